"""SteerLM: pi_0 on D2, and the baseline on D1 and D2 (sections 2.3, 3.1, 3.2); and its reward targets.

Shapes: N annotated answers, V targets, K objectives.
"""

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dpalign.chat import with_system_line
from dpalign.measure.system import System
from dpalign.paper.direction import rng_for
from dpalign.paper.prompts import render_condition, stated_reward
from dpalign.rows import HALVES
from dpalign.runs.tables import Table
from dpalign.stages.pools import annotated
from dpalign.stages.rival import Rival, at_the_edge
from dpalign.stages.stage import Job, chat_read, model_read, objectives_read, stage
from dpalign.stages.training import model_folder, train_policy
from dpalign.train.knobs import Training

if TYPE_CHECKING:
    from dpalign.recipe import Recipe

Array = NDArray[np.float64]


class SteerLM(Table):
    """The reward-conditioned model: pi_0 on D2, and the baseline on D1 and D2 (sections 2.3, 3.1, 3.2)."""

    template: Literal["steerlm", "steerlm-100-v1", "world-v1"] = "steerlm"
    """How reward targets are written (paper silent): `steerlm` as its authors' labels 0..4, which cannot tell 40 from
    59; `steerlm-100-v1` as whole points 0..100."""
    targets: int = Field(5, ge=1)
    """Number of verbosity values in the baseline's targets (section 3.2); fewer if the template can tell fewer apart in
    the annotated answers, such as labels 0..4."""
    quantile: float = Field(1.0, gt=0, le=1)
    """The helpfulness in each target: this quantile among the annotated answers nearest in verbosity, or with the same
    verbosity label; 1 is section 3.2's "highest corresponding"."""
    quantiles: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1.0, 0.9, 0.75)
    """The quantiles among which a comparison chooses."""
    training: Training = Training()
    """Its fine-tuning."""


@stage(
    reads=lambda r: (
        *(r.seed, r.steerlm.template, r.preference.levels, r.steerlm.training, r.sft.checkpoint, *chat_read(r)),
        *(*model_read(r), *objectives_read(r)),
    ),
    inputs=("sft", "data", "annotate"),
    several=True,
    asks={"half": (*HALVES, "both")},
    trains=lambda r: r.steerlm.training,
    cost=lambda costs, step: costs.train(
        step, (1.0 if step.half == "both" else 0.5) * math.prod(costs.originals), costs.row
    ),
)
def steerlm(job: Job) -> None:
    """Fine-tune SFT on answers that state their own rewards."""
    recipe = job.recipe
    rows = (
        {
            "prompt_id": row["prompt_id"],
            "messages": with_system_line(row["messages"], condition_line(recipe, reward_K), recipe.model.chat),
            "response": row["response"],
            "origin": "steerlm",
        }
        for row, reward_K in annotated(job.inputs["data"], job.inputs["annotate"], recipe, job.half)
    )
    train_policy(job, model_folder(job.inputs["sft"]), rows, recipe.steerlm.training)


def condition_line(recipe: "Recipe", reward_K: Iterable[float]) -> str:
    """The system line that asks for some rewards, with the words of `preference.levels` if there are any."""
    rewards = {name: float(r) for name, r in zip(recipe.objectives, reward_K, strict=True)}
    line, levels = render_condition(rewards, recipe.steerlm.template), recipe.preference.levels
    if not levels:
        return line
    part = int(rewards[list(rewards)[-1]] / 100 * len(levels))
    return f"{line}. {levels[min(max(part, 0), len(levels) - 1)]}"


def reward_targets(recipe: "Recipe", reward_NK: Array, count: int, quantile: float) -> Array:
    """Reward targets to condition SteerLM on, from annotated answers: (V, K), no two with the same line.

    The objectives after the first are spread over their values in the annotated answers. The first objective is its
    given quantile among the answers with similar other objectives: 1.0 is section 3.2's "highest corresponding
    helpfulness". V is `count`, or less if the condition's template can state fewer.
    """
    match recipe.steerlm.template:
        case "steerlm":
            target_VK = _of_labels(recipe, reward_NK, count, quantile)
        case "steerlm-100-v1" | "world-v1":
            target_VK = _of_quantiles(recipe, reward_NK, count, quantile)
    _, first = np.unique(stated(recipe, target_VK), axis=0, return_index=True)
    return target_VK[np.sort(first)]


def stated(recipe: "Recipe", reward_NK: Array) -> Array:
    """The rewards as their condition lines state them, rounded by the template."""
    template = recipe.steerlm.template
    return np.array([stated_reward(value, template) for value in reward_NK.flat]).reshape(reward_NK.shape)


def _of_labels(recipe: "Recipe", reward_NK: Array, count: int, quantile: float) -> Array:
    """Targets of a template that states few labels.

    With two objectives the second takes the labels that occur, evenly spread if more than `count` occur. The first
    takes its quantile among the answers with that label. With more objectives rows of labels replace labels; if more
    than `count` occur, they are drawn at random.
    """
    stated_NK = stated(recipe, reward_NK)
    label_LK, of_N = np.unique(stated_NK[:, 1:], axis=0, return_inverse=True)
    occur = len(label_LK)
    if count >= occur or reward_NK.shape[1] == 2:
        chosen = ((np.arange(min(count, occur)) + 0.5) / min(count, occur) * occur).astype(int)
    else:
        chosen = np.sort(rng_for(recipe.seed, "targets").choice(occur, size=count, replace=False))
    best = [np.quantile(reward_NK[of_N.ravel() == label, 0], quantile) for label in chosen]
    return stated(recipe, np.column_stack([best, label_LK[chosen]]))


def _of_quantiles(recipe: "Recipe", reward_NK: Array, count: int, quantile: float) -> Array:
    """Targets of a template that states any reward.

    With two objectives the second takes evenly spaced quantiles of the answers' values. The first takes its quantile
    among the answers nearest in the second. With more objectives, those after the first are taken from random answers.
    """
    n = len(reward_NK)
    near = max(1, n // (2 * count))
    if reward_NK.shape[1] == 2:
        anchors = np.quantile(reward_NK[:, 1:], (np.arange(count) + 0.5) / count, axis=0)
    else:
        anchors = reward_NK[rng_for(recipe.seed, "targets").choice(n, size=count, replace=n < count), 1:]
    rows = []
    for anchor in anchors:
        distance_N = np.linalg.norm(reward_NK[:, 1:] - anchor, axis=1)
        nearest = np.argsort(distance_N, kind="stable")[:near]
        rows.append([np.quantile(reward_NK[nearest, 0], quantile), *anchor])
    return np.array(rows)


def rivals(recipe: "Recipe") -> Iterator[Rival]:
    """The baseline at each of `steerlm.quantiles`."""
    for i, quantile in enumerate(recipe.steerlm.quantiles, start=1):
        # A quantile of 1 is no edge, since none is higher.
        edge = quantile < 1 and at_the_edge(quantile, recipe.steerlm.quantiles)
        system = System("SteerLM, tuned", setting=f"helpfulness at its {quantile:g} quantile", at_edge=edge)
        knobs = {"steerlm.quantile": float(quantile)}
        yield Rival(f"steerlm-{i}", system, {"policy": "steerlm"}, "targets", knobs)
