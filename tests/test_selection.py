"""Scalarize and choose, with numbers a reader can check."""

import numpy as np
import pytest

from dpalign.paper.selection import NO_ONE, best_of_n, members, pooled_best, scalarize


def test_the_papers_figure_3_scores_and_its_best() -> None:
    # (helpfulness, verbosity) of answers D, E, F; v = (0.8, -0.6). The figure prints 8.2 for D, where
    # 0.8 * 41 - 0.6 * 43 = 7.0, and marks E as the best, though F has more.
    reward_BNK = np.array([[[41.0, 43.0], [57.0, 51.0], [69.0, 62.0]]])
    score_BN = scalarize(reward_BNK, np.array([[0.8, -0.6]]))
    assert score_BN[0] == pytest.approx([7.0, 15.0, 18.0])
    assert best_of_n(score_BN).tolist() == [2]


def test_a_concise_user_gets_the_shorter_of_two_equally_helpful_answers() -> None:
    reward_BNK = np.array([[[60.0, 55.0], [60.0, 40.0]]])
    assert best_of_n(scalarize(reward_BNK, np.array([[0.8, -0.6]]))).tolist() == [1]


def test_each_prompt_is_scored_by_its_own_direction() -> None:
    reward_BNK = np.array([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]] * 2)
    score_BN = scalarize(reward_BNK, np.array([[1.0, 0.0, 0.0], [0.0, -1.0, 0.5]]))
    assert score_BN.tolist() == [[1.0, 4.0], [-0.5, -2.0]]


def test_a_tie_goes_to_the_first_candidate() -> None:
    assert best_of_n(np.array([[3.0, 7.0, 7.0], [5.0, 5.0, 5.0]])).tolist() == [1, 0]


def test_a_nan_score_is_refused_with_its_row() -> None:
    score_BN = np.array([[1.0, 2.0], [3.0, np.nan]])
    with pytest.raises(ValueError, match="row 1: the score of candidate 1 is NaN"):
        best_of_n(score_BN)


def test_no_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 0\)"):
        best_of_n(np.empty((2, 0)))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rewards \(2, 3, 2\) and directions \(3, 2\)"):
        scalarize(np.zeros((2, 3, 2)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"directions \(1, 2, 3\)"):
        pooled_best(np.zeros((1, 4, 2)), np.zeros((1, 2, 3)))


POOL_BMK = np.array([[[90.0, 80.0], [70.0, 30.0], [85.0, 60.0]]])
"""At v = (1, 0) the pool scores 90, 70, 85; at (0.8, -0.6) 24, 38, 32; at (0.6, -0.8) -10, 18, 3."""
DIRECTIONS_BVK = np.array([[[1.0, 0.0], [0.8, -0.6], [0.6, -0.8]]])


def test_each_direction_picks_from_the_whole_pool() -> None:
    assert pooled_best(POOL_BMK, DIRECTIONS_BVK).tolist() == [[0, 1, 1]]


def test_distinct_directions_leave_a_taken_answer_to_the_one_before() -> None:
    assert pooled_best(POOL_BMK, DIRECTIONS_BVK, distinct=True).tolist() == [[0, 1, 2]]
    assert pooled_best(POOL_BMK, DIRECTIONS_BVK[:, ::-1], distinct=True).tolist() == [[1, 2, 0]]


def test_distinct_directions_need_as_many_answers() -> None:
    with pytest.raises(ValueError, match="3 distinct answers of a pool of 2"):
        pooled_best(POOL_BMK[:, :2], DIRECTIONS_BVK, distinct=True)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_pool_with_a_bad_reward_is_refused_with_its_row(bad: float) -> None:
    pool_BMK = np.repeat(POOL_BMK, 2, axis=0)
    pool_BMK[1, 2, 0] = bad
    with pytest.raises(ValueError, match=f"row 1: reward 0 of candidate 2 is {bad}"):
        pooled_best(pool_BMK, np.repeat(DIRECTIONS_BVK, 2, axis=0))


def test_pooling_agrees_with_best_of_n_direction_by_direction() -> None:
    rng = np.random.default_rng(0)
    pool_BMK, v_BVK = rng.random((20, 80, 3)), rng.standard_normal((20, 5, 3))
    picks_BV = pooled_best(pool_BMK, v_BVK)
    for v in range(5):
        assert np.array_equal(picks_BV[:, v], best_of_n(scalarize(pool_BMK, v_BVK[:, v])))


def test_what_is_not_allowed_is_never_kept() -> None:
    """Without the first of the pool the second direction's best stays; a prompt with none allowed keeps no one."""
    allowed_BM = np.array([[False, True, True], [False, False, False]])
    reward_BMK, preference_BVK = np.repeat(POOL_BMK, 2, axis=0), np.repeat(DIRECTIONS_BVK, 2, axis=0)
    index_BV = pooled_best(reward_BMK, preference_BVK, allowed_BM=allowed_BM)
    assert index_BV.tolist() == [[2, 1, 1], [NO_ONE] * 3]
    index_BV = pooled_best(reward_BMK, preference_BVK, distinct=True, allowed_BM=allowed_BM)
    assert index_BV.tolist() == [[2, 1, NO_ONE], [NO_ONE] * 3]
    assert allowed_BM.sum() == 2  # the caller's own is left as it was


def test_the_members_of_groups_keep_their_order() -> None:
    assert members(np.array([2, 0, 2, 0, 2]), 4).tolist() == [[1, 3, -1], [-1] * 3, [0, 2, 4], [-1] * 3]
    assert members(np.array([], dtype=np.int64), 2).shape == (2, 0)
