"""Robust inference: answers drawn at directions near the one asked, the best of them by the reward model as asked.

An answer drawn a few degrees away may serve v better than any drawn at v itself: the dial of a trained policy is a
little off here and there, and neighbours bring other answers. The paper has no such step; pooling neighbouring
directions at inference is RPS's (arXiv 2510.20498).

Shapes: N answers, K objectives.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dpalign.preference import Cone, Preference, evaluation_grid
from dpalign.selection import best_of_n, scalarize

Array = NDArray[np.float64]


def neighbours(asked: Preference, n: int, spread: float, arc: tuple[float, float] | None = None) -> list[Preference]:
    """n directions around the asked one, at most `spread` degrees away; the same at every call.

    Over two objectives they are the middles of n even slices of the arc of 2 x spread degrees, an odd n the asked
    direction among them; over more, the asked direction and those farthest apart within the cone.

    Args:
        arc: the trained range in degrees; no neighbour is moved out of it unless the asked direction lies outside.

    Raises:
        ValueError: n < 1, or a spread that is negative or above 180 degrees.
    """
    if n < 1:
        raise ValueError(f"the best of {n} answers: give at least 1")
    if not 0 <= spread <= 180:
        raise ValueError(f"a spread of {spread} degrees; give 0 to 180")
    names = asked.objectives
    if spread == 0 or len(names) == 1:
        return [asked] * n
    if len(names) > 2:
        grid_NK = evaluation_grid(Cone(asked.v, spread), n)
        return [Preference.from_vector(v_K, names) for v_K in grid_NK.tolist()]
    angles_N = asked.angle + spread * ((2 * np.arange(n) + 1) / n - 1)
    if arc is not None and arc[0] <= asked.angle <= arc[1]:
        angles_N = np.clip(angles_N, *arc)
    return [Preference.from_angle(float(angle), names) for angle in angles_N]


def best_answer(reward_NK: Array, finished_N: Sequence[bool], asked: Preference) -> int:
    """The index of the best answer by v . r (Eq. 2); an unfinished one only where all are."""
    among = [i for i, finished in enumerate(finished_N) if finished] or list(range(len(finished_N)))
    return among[int(best_of_n(scalarize(reward_NK[among][None], asked.v_K[None])).index_B[0])]
