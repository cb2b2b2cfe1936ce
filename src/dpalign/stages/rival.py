"""A system that is compared with DPA, in one of its settings: its name, its evaluation and the steps that make it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dpalign.measure.points import senses_of
from dpalign.measure.system import System
from dpalign.paper.direction import Fixed, Grid, arithmetic, evaluation_grid
from dpalign.stages.stage import Stage, Step

if TYPE_CHECKING:
    from dpalign.recipe import Recipe

Vector = tuple[float, ...]


@dataclass(frozen=True)
class Rival:
    """A system in one of its settings. A rival's stage file yields them; `pipeline/` lists those files."""

    name: str
    """Its steps are evaluate-NAME and, if the system has several settings, tune-NAME."""
    system: System
    inputs: Mapping[str, str]
    """Inputs of its evaluation beside the data and the reward model."""
    condition: str = ""
    knobs: Mapping[str, Any] = field(default_factory=dict)
    """Knobs of its evaluation."""
    steps: tuple[Step, ...] = ()
    """The steps that make it, in order."""
    evaluation: Stage | None = None
    """The stage that evaluates it; None for `evaluate`."""


def fixed(v_K: Vector) -> dict[str, Any]:
    """The knobs of a population of users that all want the same."""
    return {
        "preference.distribution": "fixed",
        "preference.margin": 0.0,
        "preference.listed": [[float(w) for w in v_K]],
        "preference.directions": 1,
    }


def spelled(recipe: "Recipe", v_K: Vector) -> str:
    """A direction as the paper writes it, for a title."""
    senses_K = senses_of(np.array(grid(recipe, recipe.evaluation.directions))).tolist()
    return arithmetic(dict(zip(recipe.objectives, v_K, strict=True)), senses_K)


def grid(recipe: "Recipe", n: int) -> list[Vector]:
    """n even steps over the population; if that is a list, n of its directions at most."""
    population = recipe.preference.population(len(recipe.objectives))
    if isinstance(population, Grid | Fixed):
        every_VK = evaluation_grid(population, recipe.evaluation.directions)
        grid_UK = every_VK[np.linspace(0, len(every_VK) - 1, min(n, len(every_VK))).round().astype(int)]
    else:
        grid_UK = evaluation_grid(population, n)
    return [tuple(v_K) for v_K in (grid_UK.round(12) + 0.0).tolist()]


def at_the_edge(value: float, settings: Sequence[float]) -> bool:
    """Whether a setting is the first or the last of a grid that could go on there."""
    return value in (min(settings), max(settings))
