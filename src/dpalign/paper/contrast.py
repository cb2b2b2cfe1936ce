"""Pairs of one prompt's answers for DPO: under a direction v, the chosen answer is worth more than the rejected one.

Shapes: V directions, M answers of one prompt.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Contrast(NamedTuple):
    """Two answers under one direction."""

    direction: int
    chosen: int
    rejected: int
    origin: Literal["worst", "turned"]
    """worst: the rejected answer is worth the least under the direction. turned: another direction chose it."""


def contrasts(score_VM: Array, allowed_VM: Bools, turned: bool) -> Iterator[Contrast]:
    """Yield the pairs of one prompt.

    Under each direction the best allowed answer is paired with the worst one. With `turned` it is also paired with
    another direction's best answer: the one that is worth least under this direction. An answer can then be chosen
    under one direction and rejected under another, and only the direction tells which. Equal worth makes no pair.

    Args:
        score_VM: v . r of each answer under each direction (Eq. 2).
        allowed_VM: whether an answer may serve a direction.
    """
    best_V = np.where(allowed_VM, score_VM, -np.inf).argmax(axis=1)
    worst_V = np.where(allowed_VM, score_VM, np.inf).argmin(axis=1)
    served = np.flatnonzero(allowed_VM.any(axis=1))
    for v in served.tolist():
        chosen, worst = int(best_V[v]), int(worst_V[v])
        if score_VM[v, chosen] > score_VM[v, worst]:
            yield Contrast(v, chosen, worst, "worst")
        other = int(min(best_V[served], key=lambda answer: score_VM[v, answer]))
        if turned and other != worst and score_VM[v, chosen] > score_VM[v, other]:
            yield Contrast(v, chosen, other, "turned")
