"""A person's own direction, learned from choices between two answers.

A person with direction v prefers answer a to b with probability sigmoid(s v . (r_a - r_b)): Bradley and Terry's model
on the reward of Eq. 2. The sharpness s, per point of reward, says how closely a person looks; it is unknown too. A few
choices are slips. The posterior is kept on fixed points: directions of the population P_v, each with each sharpness.

The next pair is the one whose choice says most about v: the mutual information of choice and direction, in bits.

Shapes: P directions, S sharpnesses, N pairs, K objectives.
"""

from dataclasses import dataclass, replace
from typing import Final, Self

import numpy as np

from dpalign.measure.bootstrap import Array
from dpalign.paper.direction import Fixed, Grid, Population, draw_directions, evaluation_grid, objective_count, rng_for

SHARPNESS: Final = np.geomspace(0.02, 0.64, 6)
"""Logits per point of reward. At 0.02 a lead of 10 points wins 55% of the choices; at 0.64 it wins nearly all."""
ANGLES: Final = 181
"""Directions of two objectives, evenly spread."""
DRAWN: Final = 4096
"""Directions of three or more objectives, drawn from the population."""
SLIPS: Final = 0.04
"""The share of choices that say nothing, such as a wrong key."""


@dataclass(frozen=True, eq=False)
class Taste:
    """What is known about a person's direction."""

    v_PK: Array
    """Directions that the person may have."""
    mass_PS: Array
    """The posterior of each direction with each sharpness; it sums to 1."""
    choices: int = 0
    """The number of choices so far."""

    @classmethod
    def of_anyone(cls, population: Population) -> Self:
        """The prior, before the first choice: uniform over directions of a population."""
        if objective_count(population) == 2 and not isinstance(population, Grid | Fixed):
            v_PK = evaluation_grid(population, ANGLES)
        else:
            v_PK = draw_directions(population, DRAWN, rng_for("taste"))
        return cls(v_PK, np.full((len(v_PK), len(SHARPNESS)), 1 / (len(v_PK) * len(SHARPNESS))))

    def after(self, gain_K: Array) -> Self:
        """Update on one more choice.

        Args:
            gain_K: the rewards of the preferred answer minus those of the other, in points.
        """
        mass_PS = self.mass_PS * self._chance_NPS(gain_K[None])[0]
        return replace(self, mass_PS=mass_PS / mass_PS.sum(), choices=self.choices + 1)

    @property
    def v_K(self) -> Array:
        """The posterior's mean direction, a unit vector; the likeliest direction if the mean is 0."""
        mass_P = self.mass_PS.sum(axis=1)
        mean_K = mass_P @ self.v_PK
        length = float(np.linalg.norm(mean_K))
        return np.asarray(mean_K / length if length > 1e-9 else self.v_PK[int(mass_P.argmax())])

    def within(self, share: float = 0.9) -> float:
        """Degrees around the mean direction that hold this share of the posterior."""
        angle_P = np.degrees(np.arccos(np.clip(self.v_PK @ self.v_K, -1.0, 1.0)))
        order_P = np.argsort(angle_P, kind="stable")
        held_P = np.cumsum(self.mass_PS.sum(axis=1)[order_P])
        return float(angle_P[order_P[min(int(np.searchsorted(held_P, share)), len(held_P) - 1)]])

    def information(self, gain_NK: Array) -> Array:
        """The expected information about the direction in the choice within each pair, in bits: (N,).

        Args:
            gain_NK: the rewards of a pair's first answer minus those of its second, in points.
        """
        mass_P = self.mass_PS.sum(axis=1)
        chance_NP = np.einsum("nps,ps->np", self._chance_NPS(gain_NK), self.mass_PS) / np.maximum(mass_P, 1e-300)
        return np.asarray(_bits(chance_NP @ mass_P) - _bits(chance_NP) @ mass_P)

    def _chance_NPS(self, gain_NK: Array) -> Array:
        """The probability that each pair's first answer is preferred."""
        logit_NPS = (gain_NK @ self.v_PK.T)[:, :, None] * SHARPNESS
        return np.asarray(0.5 + (0.5 - SLIPS / 2) * np.tanh(logit_NPS / 2))


def _bits(chance: Array) -> Array:
    """The entropy of a choice, in bits."""
    sure = np.clip(chance, 1e-12, 1 - 1e-12)
    return np.asarray(-sure * np.log2(sure) - (1 - sure) * np.log2(1 - sure))
