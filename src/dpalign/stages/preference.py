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
    even_or_all,
    rng_for,
)
from dpalign.paper.prompts import Level, levels_of, render_preference
from dpalign.runs.tables import Table

if TYPE_CHECKING:
    from dpalign.recipe import Recipe

Array = NDArray[np.float64]

DENSE: Final = 181
"""Directions that represent all of P_v; on the paper's arc they are a quarter of a degree apart."""


class Steering(Table):
    """The directions that users may ask for (section 3.1), and how a model reads them."""

    distribution: Literal["arc", "cone", "sphere", "simplex", "grid", "fixed"] = "arc"
    """P_v: angles uniform on an arc (section 3.1), or another population of users."""
    low: float = -45.0
    """Arc: degrees at the end of least verbosity (section 3.1)."""
    high: float = 0.0
    """Arc: degrees at the end of most helpfulness (section 3.1)."""
    stratified: bool = False
    """Arc: draw one angle from each of equal slices, in place of independent draws (section 3.1)."""
    margin: float = Field(0.0, ge=0)
    """Arc, cone: training directions may lie this many degrees beyond the ends or the rim, so that a model has seen
    both sides of an end. Evaluation and users keep to P_v (not in the paper: 0)."""
    center: tuple[float, ...] = ()
    """Cone: the direction at its centre, by objective."""
    angle: float = 45.0
    """Cone: degrees from the centre to the rim."""
    points: int = Field(10, ge=1, le=1000)
    """Grid: evenly spread directions on the arc."""
    listed: tuple[tuple[float, ...], ...] = ()
    """Fixed: the directions themselves, by objective."""
    directions: int = Field(5, ge=1, le=1000)
    """Directions a prompt and iteration (section 3.1)."""
    template: Literal["dpa-v1", "fig1", "world-v1"] = "dpa-v1"
    """The system line; the default is the released policy's."""
    levels: tuple[str, ...] = ()
    """Arc: words at the end of the line, one text for each of equal parts from low to high, such as "Answer in one
    short sentence.". SteerLM's line has them for equal parts of 0-100 points of the last objective. A small model reads
    words sooner than numbers (not in the paper: none)."""

    @property
    def level_ends(self) -> tuple[Level, ...]:
        """The levels, each with the end of its part of the arc.

        Raises:
            ValueError: there are levels, and the distribution is no arc within -90 and 90 degrees.
        """
        if self.levels and self.distribution != "arc":
            raise ValueError(f"levels with a distribution of {self.distribution}: they divide an arc")
        return levels_of(self.levels, self.low, self.high)

    def trained(self, objectives: int) -> Population:
        """The population of training directions: P_v, with the margin around it.

        Raises:
            ValueError: there is a margin, and the distribution is no arc or cone.
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
        """P_v over this number of objectives (Eq. 4)."""
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
                return Grid(self.low, self.high, self.points)
            case "fixed":
                return Fixed(self.listed)


def directions_of(steering: Steering, objectives: int, seed: int, t: int, prompt_id: str) -> Array:
    """The directions at which a prompt is sampled in iteration t: (V, K); every call returns the same."""
    rng = rng_for(seed, "directions", t, prompt_id)
    return draw_directions(steering.trained(objectives), steering.directions, rng)


def even_directions(steering: Steering, objectives: int) -> Array:
    """Directions evenly spread over the training population, dense enough for selection: (G, K)."""
    return even_or_all(steering.trained(objectives), DENSE)


def line(recipe: "Recipe", v_K: Sequence[float] | Array) -> str:
    """The system line of a direction."""
    preference = Preference.from_vector(v_K, tuple(recipe.objectives))
    return render_preference(preference, recipe.preference.template, recipe.preference.level_ends)


def asked_in_words(recipe: "Recipe") -> str:
    """What the two ends of P_v ask for, in words."""
    objectives = tuple(recipe.objectives)
    return "; ".join(ends_in_words(recipe.preference.population(len(objectives)), objectives))


def evaluation_directions(recipe: "Recipe") -> Array:
    """The directions at which steered systems are evaluated: (V, K)."""
    return evaluation_grid(recipe.preference.population(len(recipe.objectives)), recipe.evaluation.directions)
