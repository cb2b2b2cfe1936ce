"""Direct preference optimisation, the paper's strongest baseline (section 3.1), as Zephyr trained it."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from dpalign.chat import PromptStyle
from dpalign.measure.system import System
from dpalign.rows import PAIRS, read_rows
from dpalign.runs.tables import Table
from dpalign.stages.pairs import pairs
from dpalign.stages.rival import Rival, at_the_edge
from dpalign.stages.stage import Job, Step, chat_read, model_read, stage
from dpalign.stages.training import context_of, model_folder, named_checkpoint, policy_tokenizer, record_training
from dpalign.train.knobs import Training

if TYPE_CHECKING:
    from dpalign.recipe import Recipe


class DPO(Table):
    """Direct preference optimisation, the paper's strongest baseline (section 3.1): Zephyr-beta's settings."""

    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards SFT."""
    betas: tuple[Annotated[float, Field(gt=0)], ...] = (0.05, 0.1, 0.5)
    """The strengths among which a comparison chooses."""
    pairs: Literal["ratings", "candidates"] = "ratings"
    """What pairs are made of. "ratings": the best answer by the data's own ratings, and a random other one (Zephyr's).
    "candidates": the best and the worst of the run's first candidates, by the reward model's first objective."""
    prompt: PromptStyle = "own"
    """How chats are written for DPO, trained here or named in `evaluation.dpo`. "zephyr-dpo": as Zephyr's DPO was
    trained, with an empty system turn if there is no system message. For the other values see `sft.prompt`."""
    training: Training = Training(
        optimizer="rmsprop",
        learning_rate=5e-7,
        schedule="linear",
        warmup_steps=0.1,
        epochs=3.0,
        batch=32,
        context=1024,
        packing=False,
        loss_on="answer",
    )
    """Its training. `batch` counts pairs. A pair with a side longer than `context` is left out and counted."""


@stage(
    reads=lambda r: (r.seed, r.dpo.beta, r.dpo.training, r.dpo.prompt, r.sft.checkpoint, *chat_read(r), *model_read(r)),
    inputs=("start", "pairs"),
    takes="pairs",
    several=True,
    trains=lambda r: r.dpo.training,
    cost=lambda costs, step: costs.train(
        step, 4 * costs.sizes.prompts, costs.row, forwards=1 / max(1.0, costs.of_step(step).dpo.training.epochs)
    ),
)
def dpo(job: Job) -> None:
    """Train a policy on preference pairs, from SFT; it has no dial."""
    from dpalign.train.dpo import optimise
    from dpalign.train.trainer import Outcome

    settings = job.recipe.dpo

    def train() -> Outcome:
        start = model_folder(job.inputs["start"])
        tokenizer = policy_tokenizer(start, job.recipe, style=settings.prompt)
        context = context_of(job, start, settings.training, tokenizer)
        return optimise(context, read_rows(job.inputs["pairs"], PAIRS), settings.beta)

    if not named_checkpoint(job, settings.training, settings.prompt):
        record_training(job, train)


def rivals(recipe: "Recipe", condition: str = "plain") -> Iterator[Rival]:
    """DPO at each of its strengths, asked plainly or with a wish in words ("brief")."""
    inputs: Mapping[str, str] = {"data": "data"}
    if recipe.dpo.pairs == "candidates":
        inputs = {**inputs, "candidates": "sample-1", "scores": "score-1"}
    suffix, title = ("-brief", "DPO, asked to be brief") if condition == "brief" else ("", "DPO")
    for i, beta in enumerate(recipe.dpo.betas, start=1):
        policy = f"dpo-{i}"
        system = System(title, setting=f"beta {beta:g}", at_edge=at_the_edge(beta, recipe.dpo.betas))
        steps = (
            Step("pairs", pairs, inputs),
            Step(policy, dpo, {"start": "sft", "pairs": "pairs"}, knobs={"dpo.beta": beta}),
        )
        yield Rival(f"{policy}{suffix}", system, {"policy": policy}, condition, steps=steps)
