"""Rejection sampling's choice: scalarize, then keep the best (section 2.2).

Shapes: B prompts with a direction each, N candidates of one, M candidates in a prompt's whole pool, V directions of
a prompt, G evenly spread directions of P_v, K objectives. A tie goes to the lowest index: a choice never depends on
the machine.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]
Index = NDArray[np.int64]

NO_ONE: Final = -1
"""The index that stands for no candidate."""
CANCELS: Final = 1e-9
"""Directions cancel if their mean is no longer than this."""


def scalarize(reward_BNK: Array, preference_BK: Array) -> Array:
    """Preference-conditioned reward R(x, v, y) = v . r(x, y) (Eq. 2); returns (B, N)."""
    expected = (reward_BNK.shape[0], reward_BNK.shape[-1])
    if reward_BNK.ndim != 3 or preference_BK.shape != expected:
        raise ValueError(f"rewards {reward_BNK.shape} and directions {preference_BK.shape}; give (B, N, K) and (B, K)")
    return np.asarray(np.einsum("bnk,bk->bn", reward_BNK, preference_BK), dtype=np.float64)


def best_of_n(score_BN: Array) -> Index:
    """index_B: the highest-ranked of each prompt's n candidates (section 2.2, step 1).

    Raises:
        ValueError: there are no candidates, or a score is NaN; the message names its row.
    """
    if score_BN.ndim != 2 or score_BN.shape[1] == 0:
        raise ValueError(f"scores of shape {score_BN.shape}; give (prompts, candidates) with at least one candidate")
    bad = np.argwhere(np.isnan(score_BN))
    if len(bad):
        row, column = bad[0]
        raise ValueError(f"row {row}: the score of candidate {column} is NaN; score it again or leave it out")
    return np.asarray(np.argmax(score_BN, axis=1), dtype=np.int64)


def pooled_best(
    reward_BMK: Array,
    preference_BVK: Array,
    distinct: bool = False,
    allowed_BMV: Bools | None = None,
    penalty_BMV: Array | None = None,
) -> Index:
    """index_BV: the best of a prompt's pool by v . r, for each direction; `NO_ONE` if it gets none.

    `allowed_BMV` says which candidates may serve which direction; without it all may serve all.
    `distinct` chooses no candidate twice. It serves the most directions possible, with the largest sum of v . r. The
    answers to a prompt therefore follow the order of its directions.
    `penalty_BMV` is subtracted from a candidate's score for each direction (not in the paper).

    Raises:
        ValueError: shapes that do not fit; a reward that is NaN or infinite; fewer candidates than `distinct`
            directions.
    """
    if reward_BMK.ndim != 3 or preference_BVK.ndim != 3 or reward_BMK.shape[::2] != preference_BVK.shape[::2]:
        raise ValueError(
            f"rewards {reward_BMK.shape} and directions {preference_BVK.shape}; give (B, M, K) and (B, V, K)"
        )
    bad = np.argwhere(~np.isfinite(reward_BMK))
    if len(bad):
        row, candidate, k = bad[0]
        raise ValueError(
            f"row {row}: reward {k} of candidate {candidate} is {reward_BMK[row, candidate, k]}; score it again"
        )
    directions = preference_BVK.shape[1]
    if distinct and allowed_BMV is None and reward_BMK.shape[1] < directions:
        raise ValueError(
            f"{directions} distinct answers of a pool of {reward_BMK.shape[1]}; sample more, or allow repeats"
        )
    score_BVM = np.stack([scalarize(reward_BMK, preference_BVK[:, v]) for v in range(directions)], axis=1)
    if penalty_BMV is not None:
        score_BVM -= penalty_BMV.transpose(0, 2, 1)
    if allowed_BMV is not None:
        score_BVM = np.where(allowed_BMV.transpose(0, 2, 1), score_BVM, -np.inf)
    if distinct:
        name_BM = [np.flatnonzero((score_VM > -np.inf).any(axis=0)) for score_VM in score_BVM]
        return np.array([assign(score_VM[:, n], n) for score_VM, n in zip(score_BVM, name_BM, strict=True)])
    index_BV = np.stack([best_of_n(score_BVM[:, v]) for v in range(directions)], axis=1)
    return np.where((score_BVM > -np.inf).any(axis=2), index_BV, NO_ONE)


def hindsight(index_BG: Index, direction_GK: Array, candidates: int) -> Array:
    """label_BMK: the direction that each candidate serves best (not in the paper); NaN if it is the best nowhere.

    The label is the mean of the directions where the candidate is the best, at length 1. On an arc that is the middle
    angle of the stretch that it wins. A candidate whose directions cancel has no such mean and gets NaN.

    Args:
        index_BG: the best candidate of each prompt at each direction (`pooled_best`), or `NO_ONE`.
        direction_GK: directions of length 1, evenly spread over P_v.
        candidates: M.
    """
    best_BMG = index_BG[:, None, :] == np.arange(candidates)[:, None]
    sum_BMK = best_BMG.astype(np.float64) @ direction_GK
    length_BM1 = np.linalg.norm(sum_BMK, axis=2, keepdims=True)
    has_middle_BM1 = length_BM1 > CANCELS * np.maximum(best_BMG.sum(axis=2, keepdims=True), 1)
    return np.asarray(np.divide(sum_BMK, length_BM1, out=np.full_like(sum_BMK, np.nan), where=has_middle_BM1))


def assign(score_VM: Array, name_M: Index) -> Index:
    """name_V: one candidate a direction, none twice; first the most directions, then the largest sum of scores.

    A direction without a candidate gets `NO_ONE`. A score of -inf means that a candidate may not serve a direction.
    The Hungarian algorithm by shortest augmenting paths (Jonker and Volgenant 1987).
    """
    directions, candidates = score_VM.shape
    score_S = score_VM[np.isfinite(score_VM)]
    nothing = 1.0 + 2.0 * directions * float(np.ptp(score_S)) if score_S.size else 1.0
    spare_VV = np.full((directions, directions), -score_S.min(initial=0.0) + nothing)  # for directions without one
    cost_VC = np.concatenate([-score_VM, spare_VV], axis=1)
    price_C, taken_C = np.zeros(cost_VC.shape[1]), np.full(cost_VC.shape[1], NO_ONE)
    for v in range(directions):
        # the cheapest augmenting path for v: each step takes a column, whose holder moves on to another
        cost_C, before_C = np.full(len(price_C), np.inf), np.full(len(price_C), NO_ONE)
        done_C = np.zeros(len(price_C), dtype=bool)
        mover, place, paid = v, NO_ONE, 0.0
        while mover != NO_ONE:
            reduced_C = cost_VC[mover] - price_C
            own = cost_VC[mover, place] - price_C[place] if place != NO_ONE else 0.0
            better_C = ~done_C & (paid + reduced_C - own < cost_C)
            cost_C[better_C], before_C[better_C] = (paid + reduced_C - own)[better_C], place
            place = int(np.argmin(np.where(done_C, np.inf, cost_C)))
            done_C[place], paid, mover = True, cost_C[place], int(taken_C[place])
        price_C[done_C] += cost_C[done_C] - paid
        while place != NO_ONE:
            before = int(before_C[place])
            taken_C[place] = v if before == NO_ONE else taken_C[before]
            place = before
    name_V = np.full(directions, NO_ONE, dtype=np.int64)
    for candidate in np.flatnonzero(taken_C[:candidates] != NO_ONE):
        name_V[taken_C[candidate]] = name_M[candidate]
    return name_V


def members(group_N: Index, groups: int) -> Index:
    """row_GM: the rows of each group in their original order, padded with `NO_ONE` to the largest group.

    Args:
        group_N: each row's group, from 0 to `groups` - 1.
    """
    count_G = np.bincount(group_N, minlength=groups)
    order_N = np.argsort(group_N, kind="stable")
    first_G = np.cumsum(count_G) - count_G
    row_GM = np.full((groups, int(count_G.max(initial=0))), NO_ONE, dtype=np.int64)
    row_GM[group_N[order_N], np.arange(len(group_N)) - np.repeat(first_G, count_G)] = order_N
    return row_GM
