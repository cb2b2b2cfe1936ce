"""Scalar rejection sampling at one fixed direction (RAFT): each specialist is about the ceiling of DPA there."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from dpalign.measure.system import System
from dpalign.rows import CONVERSATIONS, read_rows
from dpalign.runs.tables import Table
from dpalign.stages.finetune import selected_cost
from dpalign.stages.rival import Rival, Vector, fixed, grid, spelled
from dpalign.stages.sample import sample
from dpalign.stages.score import score, scored_by
from dpalign.stages.select import select
from dpalign.stages.stage import Job, Step, chat_read, model_read, stage
from dpalign.stages.training import model_folder, train_policy

if TYPE_CHECKING:
    from dpalign.recipe import Recipe


class RSF(Table):
    """Scalar rejection sampling at one fixed direction (RAFT): about the ceiling of DPA there."""

    n: int = Field(16, ge=1)
    """Answers to a prompt; the best is kept, as for one of DPA's directions."""
    prompts: int = Field(0, ge=0)
    """Prompts an iteration; 0 takes the whole half."""
    steps: int = Field(0, ge=0)
    """Updates of each fine-tuning; 0 takes finetune's steps or epochs. A specialist has fewer rows than DPA."""
    directions: int = Field(3, ge=1)
    """Even steps over P_v; a comparison trains a specialist for each."""


@stage(
    reads=lambda r: (r.seed, r.finetune, r.sft.checkpoint, r.sft.prompt, *chat_read(r), *model_read(r)),
    inputs=("start", "chosen"),
    takes="chosen",
    several=True,
    asks={"t": ()},
    trains=lambda r: r.finetune,
    cost=selected_cost,
)
def specialist(job: Job) -> None:
    """Fine-tune SFT on the answers selected for one fixed direction: a model without a dial."""
    rows = read_rows(job.inputs["chosen"], CONVERSATIONS)
    recipe = job.recipe
    train_policy(job, model_folder(job.inputs["start"]), rows, recipe.finetune, style=recipe.sft.prompt)


def rivals(recipe: "Recipe") -> Iterator[Rival]:
    """A specialist for each of `rsf.directions` even steps over P_v."""
    for i, v_K in enumerate(grid(recipe, recipe.rsf.directions), start=1):
        steps = tuple(scalar_rejection_sampling(recipe, f"rsf-{i}", v_K))
        system = System(f"RSF at {spelled(recipe, v_K)}", "specialist", direction=v_K, family="RSF")
        yield Rival(f"rsf-{i}", system, {"policy": steps[-1].name}, "plain", steps=steps)


def scalar_rejection_sampling(recipe: "Recipe", name: str, v_K: Vector) -> Iterator[Step]:
    """DPA's loop at one fixed direction, without a dial: the same number of iterations and halves, each from SFT."""
    drawn = {"sampling.n": recipe.rsf.n, "sampling.prompts": recipe.rsf.prompts}  # SFT's answers at t = 1 serve all
    trained = {"finetune.steps": recipe.rsf.steps} if recipe.rsf.steps else {}
    annotated = {"data": "data", "annotate": "annotate"}
    policy = "sft"
    for t in range(1, recipe.iterations + 1):
        half = "D2" if recipe.alternate and t % 2 == 0 else "D1"
        candidates, scores, chosen = (f"{name}-{verb}-{t}" for verb in ("sample", "score", "select"))
        yield Step(candidates, sample, {"policy": policy} | annotated, t, half, "plain", drawn)
        yield Step(scores, score, scored_by(recipe) | {"candidates": candidates}, t)
        yield Step(chosen, select, {"candidates": candidates, "scores": scores} | annotated, t, half, knobs=fixed(v_K))
        policy = f"{name}-policy-{t}"
        yield Step(policy, specialist, {"start": "sft", "chosen": chosen}, t, knobs=trained)
