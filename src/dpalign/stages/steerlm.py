"""SteerLM: pi_0 on D2, and the baseline on D1 and D2 (sections 2.3, 3.1, 3.2)."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from dpalign.chat import with_system_line
from dpalign.measure.system import System
from dpalign.paper.prompts import render_condition
from dpalign.run.tables import Table
from dpalign.stages.evaluate import evaluate
from dpalign.stages.pools import annotated
from dpalign.stages.rival import Rival, at_the_edge
from dpalign.stages.stage import Job, Step, model_read, objectives_read, stage
from dpalign.stages.training import model_folder, train_policy
from dpalign.train.knobs import Training

if TYPE_CHECKING:
    from dpalign.recipe import Recipe


class SteerLM(Table):
    """The reward-conditioned model: pi_0 on D2, and the baseline on D1 and D2 (sections 2.3, 3.1, 3.2)."""

    template: Literal["steerlm", "world-v1"] = "steerlm"
    """How reward targets are written (paper silent; the authors of SteerLM's own form)."""
    targets: int = Field(5, ge=1)
    """Verbosity values the baseline is asked for (section 3.2); fewer where the annotated answers have fewer that the
    template can tell apart, such as labels 0..4."""
    quantile: float = Field(1.0, gt=0, le=1)
    """The helpfulness asked for with each: this quantile among the annotated answers nearest in verbosity, or with the
    same label of it; 1 is section 3.2's "highest corresponding"."""
    quantiles: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1.0, 0.9, 0.75)
    """The quantiles that a comparison chooses among."""
    training: Training = Training()
    """Its fine-tuning."""


@stage(
    reads=lambda r: (
        *(r.seed, r.steerlm.template, r.steerlm.training, r.sft.checkpoint, r.model.chat),
        *(*model_read(r), *objectives_read(r)),
    ),
    inputs=("sft", "data", "annotate"),
    several=True,
    asks={"half": ("D1", "D2", "both")},
    trains=lambda r: r.steerlm.training,
    cost=lambda costs, step: costs.train(
        step, (2 if step.half == "both" else 1) * costs.sizes.prompts * costs.sizes.rated, costs.row
    ),
)
def steerlm(job: Job) -> None:
    """Fine-tune SFT on answers that state their own rewards."""
    recipe = job.recipe
    rows = (
        {
            "prompt_id": row["prompt_id"],
            "messages": with_system_line(row["messages"], _condition(recipe, reward_K), recipe.model.chat),
            "response": row["response"],
            "origin": "steerlm",
        }
        for row, reward_K in annotated(job.inputs["data"], job.inputs["annotate"], recipe, job.half)
    )
    train_policy(job, model_folder(job.inputs["sft"]), rows, recipe.steerlm.training)


def _condition(recipe: "Recipe", reward_K: Iterable[float]) -> str:
    rewards = {name: float(r) for name, r in zip(recipe.objectives, reward_K, strict=True)}
    return render_condition(rewards, recipe.steerlm.template)


def rivals(recipe: "Recipe") -> Iterator[Rival]:
    """The baseline at each of its target grids."""
    for i, quantile in enumerate(recipe.steerlm.quantiles, start=1):
        # A quantile of 1 is no edge: it is the highest there is.
        edge = quantile < 1 and at_the_edge(quantile, recipe.steerlm.quantiles)
        system = System("SteerLM, tuned", setting=f"helpfulness at its {quantile:g} quantile", at_edge=edge)
        knobs = {"steerlm.quantile": float(quantile)}
        asked = Step("", evaluate, {"policy": "steerlm"}, condition="targets", knobs=knobs)
        yield Rival(f"steerlm-{i}", system, asked)
