"""The table [preference]: the directions that users may ask for, and how a model reads them.

Shapes: V directions of a prompt, K objectives.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dpalign.paper.direction import (
    Arc,
    Cone,
    Fixed,
    Grid,
    Population,
    Preference,
    Simplex,
    Sphere,
    draw_directions,
    ends_in_words,
    evaluation_grid,
    rng_for,
)
from dpalign.paper.prompts import Level, levels_of, render_preference
from dpalign.runs.tables import Table

if TYPE_CHECKING:
    from dpalign.recipe import Recipe

Array = NDArray[np.float64]

DENSE: Final = 181
"""Directions that stand for all of P_v: on the paper's arc a quarter of a degree apart."""


class Steering(Table):
    """The directions users may ask for (section 3.1), and how a model reads them."""

    distribution: Literal["arc", "cone", "sphere", "simplex", "grid", "fixed"] = "arc"
    """P_v: angles uniform on an arc (section 3.1), or another population of users."""
    low: float = -45.0
    """Arc: degrees of its end of least verbosity (section 3.1)."""
    high: float = 0.0
    """Arc: degrees of its end of most helpfulness (section 3.1)."""
    stratified: bool = False
    """Arc: one angle from each of the equal slices, in place of independent draws (section 3.1)."""
    margin: float = Field(0.0, ge=0)
    """Arc, cone: degrees beyond the ends or the rim that training directions may lie, so that a model has met both
    sides of what it is asked there. Evaluation and users keep to P_v (not in the paper: 0)."""
    center: tuple[float, ...] = ()
    """Cone: the direction in its middle, by objective."""
    angle: float = 45.0
    """Cone: degrees from its centre to its rim."""
    points: int = Field(10, ge=1, le=1000)
    """Grid: evenly spread directions on the arc."""
    listed: tuple[tuple[float, ...], ...] = ()
    """Fixed: the directions themselves, by objective."""
    directions: int = Field(5, ge=1, le=1000)
    """Directions a prompt and iteration (section 3.1)."""
    template: Literal["dpa-v1", "fig1", "world-v1"] = "dpa-v1"
    """The system line; the default is the released policy's."""
    levels: tuple[str, ...] = ()
    """Arc: what equal parts of it, from low to high, are called in words at the end of the line, such as "Answer in one
    short sentence.". SteerLM's line has them for equal parts of 0-100 points of the last objective. A small model reads
    words sooner than numbers (not in the paper: none)."""

    @property
    def level_ends(self) -> tuple[Level, ...]:
        """Which directions each of the levels is for.

        Raises:
            ValueError: levels of what is no arc within -90 and 90 degrees.
        """
        if self.levels and self.distribution != "arc":
            raise ValueError(f"levels with a distribution of {self.distribution}: they divide an arc")
        return levels_of(self.levels, self.low, self.high)

    def trained(self, objectives: int) -> Population:
        """What training directions are drawn from: P_v, with the margin around it.

        Raises:
            ValueError: a margin around what is no arc or cone.
        """
        population = self.population(objectives)
        if not self.margin:
            return population
        match population:
            case Arc(low, high):
                return replace(population, low=low - self.margin, high=high + self.margin)
            case Cone(angle=angle):
                return replace(population, angle=angle + self.margin)
        raise ValueError(
            f"margin {self.margin:g} with a distribution of {self.distribution}: it widens an arc or a cone"
        )

    def population(self, objectives: int) -> Population:
        """P_v over so many objectives (Eq. 4)."""
        match self.distribution:
            case "arc":
                return Arc(self.low, self.high, self.stratified)
            case "cone":
                return Cone(self.center, self.angle)
            case "sphere":
                return Sphere(objectives)
            case "simplex":
                return Simplex(objectives)
            case "grid":
                return Grid(Arc(self.low, self.high), self.points)
            case "fixed":
                return Fixed(self.listed)


def directions_of(steering: Steering, objectives: int, seed: int, t: int, prompt_id: str) -> Array:
    """The directions that a prompt is sampled at in iteration t: (V, K); the same wherever they are asked for."""
    rng = rng_for(seed, "directions", t, prompt_id)
    return draw_directions(steering.trained(objectives), steering.directions, rng)


def even_directions(steering: Steering, objectives: int) -> Array:
    """Directions evenly spread over what training directions are drawn from, dense enough for a choice: (G, K)."""
    population = steering.trained(objectives)
    match population:
        case Grid(points=points):
            return evaluation_grid(population, points)
        case Fixed(directions):
            return evaluation_grid(population, len(directions))
        case _:
            return evaluation_grid(population, DENSE)


def line(recipe: "Recipe", v_K: Sequence[float] | Array) -> str:
    """The system line of a direction."""
    preference = Preference.from_vector(v_K, tuple(recipe.objectives))
    return render_preference(preference, recipe.preference.template, recipe.preference.level_ends)


def asked_in_words(recipe: "Recipe") -> str:
    """What the ends of the users' directions ask for."""
    objectives = tuple(recipe.objectives)
    return "; ".join(ends_in_words(recipe.preference.population(len(objectives)), objectives))


def evaluation_directions(recipe: "Recipe") -> Array:
    """The directions that steered systems are evaluated at: (V, K)."""
    return evaluation_grid(recipe.preference.population(len(recipe.objectives)), recipe.evaluation.directions)
