"""The weight of each expert of a soup at a direction. No torch here: a plan needs it before anything is trained.

Shapes: E experts, K objectives.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog, nnls  # type: ignore[import-untyped]

Array = NDArray[np.float64]

NEAR: Final = 1e-3
"""How far a direction may lie from the experts' span (0.06 degrees): they may be written with few digits."""


def mixture_weights(v_K: Sequence[float] | Array, experts_EK: Sequence[Sequence[float]] | Array) -> Array:
    """The weight of each expert at a direction: w_E >= 0, of sum 1.

    The direction is written as v = sum_e a_e expert_e with a >= 0, and w = a / sum(a). For experts of (1, 0) and
    (0, -1) that is |v| / sum |v|; for the two ends of an arc it runs from (1, 0) to (0, 1). With more experts than
    objectives, the a of the smallest sum is taken, which mixes neighbours.

    Raises:
        ValueError: the direction is no such sum, so that no interpolation of these experts serves it; or a direction
            is of another length, zero or not finite.
    """
    nearest_K, unit_EK = spanned(v_K, experts_EK)
    smallest = linprog(np.ones(len(unit_EK)), A_eq=unit_EK.T, b_eq=nearest_K)
    assert smallest.success, smallest.message
    w_E: Array = (smallest.x / smallest.x.sum()).round(12) + 0.0  # drops an expert that only a rounding error lets in
    return w_E


def spanned(v_K: Sequence[float] | Array, experts_EK: Sequence[Sequence[float]] | Array) -> tuple[Array, Array]:
    """A direction as a sum of experts, and the experts as unit vectors; ValueError if it is no such sum."""
    unit_K = _unit_rows([v_K], "the direction")[0]
    unit_EK = _unit_rows(experts_EK, "the experts' directions")
    if unit_EK.shape[1] != len(unit_K):
        raise ValueError(f"direction {_shown(unit_K)} of {len(unit_K)} objectives, for experts of {unit_EK.shape[1]}")
    a_E, distance = nnls(unit_EK.T, unit_K)
    nearest_K = unit_EK.T @ a_E
    if distance > NEAR:
        raise ValueError(
            f"direction {_shown(unit_K)} lies outside what the experts {', '.join(map(_shown, unit_EK))} span: their "
            f"nearest sum is {_shown(nearest_K)}, {distance:.3g} away; train experts on both sides of it"
        )
    return nearest_K, unit_EK


def _unit_rows(rows: Sequence[Any] | Array, what: str) -> Array:
    listed = [[float(w) for w in row] for row in rows]
    if len({len(row) for row in listed}) != 1:
        raise ValueError(f"{what}: {listed}; give at least one, and each a weight by objective")
    weight_NK = np.array(listed)
    norm_N = np.linalg.norm(weight_NK, axis=1)
    if not np.isfinite(norm_N).all() or not norm_N.all():
        raise ValueError(f"{what}: {listed}; each needs finite weights, not all of them 0")
    unit_NK: Array = weight_NK / norm_N[:, None]
    return unit_NK


def _shown(v_K: Array) -> str:
    return f"({', '.join(f'{w:g}' for w in (v_K.round(4) + 0.0).tolist())})"
