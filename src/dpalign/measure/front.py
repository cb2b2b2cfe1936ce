"""Fronts of two objectives: a system's nondominated points, joined by straight lines.

A gain is the sense (+1 maximised, -1 minimised) times the reward. So on the paper's arc verbosity becomes
conciseness, and more is better in both. A segment joins two neighbouring points of the front. Every point of
it can be reached: choose at random between the two conditions for each prompt, and the mean rewards are
exactly those. The curve is that of Fig. 4 without the points that the system itself dominates.

Shapes: V points, N knots of the front, K = 2 objectives (unless said otherwise), in the order of the recipe.
"""

from dataclasses import dataclass

import numpy as np

from dpalign.measure.bootstrap import Array, Mask


def front_knots(point_V2: Array, senses_2: Array) -> Array:
    """The gains of the nondominated points, most concise last: (N, 2).

    Along the front the second gain rises and the first falls, both strictly.
    """
    gain_V2 = point_V2 * senses_2
    best_first = np.lexsort((-gain_V2[:, 0], -gain_V2[:, 1]))
    knots = []
    most = -np.inf
    for gain_2 in gain_V2[best_first]:
        if gain_2[0] > most:
            most = gain_2[0]
            knots.append(gain_2)
    return np.array(knots[::-1])


def front_height(knot_N2: Array, second_gain_X: Array) -> Array:
    """The first gain that the front reaches at given second gains: (X,).

    Before its first knot the front is level: less conciseness gains nothing. Past its last knot nothing is
    reached (-inf).
    """
    height_X: Array = np.interp(second_gain_X, knot_N2[:, 1], knot_N2[:, 0], right=-np.inf)
    return height_X


@dataclass(frozen=True)
class Coverage:
    """How many points of B lie under the front of A."""

    under: int
    """Points inside A's range of the second objective and strictly under A's front."""
    inside: int
    """Points inside A's range."""
    outside: int
    """Points outside A's range, counted separately: there A's interpolated front says nothing."""
    outside_dominated: int
    """Points outside A's range that some point of A still dominates."""

    @property
    def share(self) -> float | None:
        """The share of the points inside A's range that lie under A's front; None if none is inside."""
        return self.under / self.inside if self.inside else None


def coverage(a_VK: Array, b_WK: Array, senses_K: Array) -> Coverage:
    """Count B's points under A's front.

    With two objectives A's front is the interpolated one. With more there is none: a point then counts as
    under A's front if one of A's points dominates it, and no point is outside.
    """
    beaten_W = dominated(b_WK, a_VK, senses_K)
    if len(senses_K) != 2:
        return Coverage(int(beaten_W.sum()), len(b_WK), 0, 0)
    inside_W = (b_WK[:, 1] >= a_VK[:, 1].min()) & (b_WK[:, 1] <= a_VK[:, 1].max())
    gain_W2 = b_WK * senses_K
    under_W = inside_W & (front_height(front_knots(a_VK, senses_K), gain_W2[:, 1]) > gain_W2[:, 0])
    return Coverage(int(under_W.sum()), int(inside_W.sum()), int((~inside_W).sum()), int((beaten_W & ~inside_W).sum()))


def dominated(b_WK: Array, a_VK: Array, senses_K: Array) -> Mask:
    """Which of B's points some point of A dominates: as good in all objectives, better in one (any K): (W,)."""
    lead_WVK = (a_VK * senses_K)[None] - (b_WK * senses_K)[:, None]
    beaten_WV = np.asarray((lead_WVK >= 0).all(axis=-1) & (lead_WVK > 0).any(axis=-1))
    return np.asarray(beaten_WV.any(axis=1))
