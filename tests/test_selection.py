"""Scalarize and choose, with numbers a reader can check."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from dpalign.paper.direction import Arc, Simplex, Sphere, evaluation_grid
from dpalign.paper.selection import NO_ONE, assign, best_of_n, hindsight, members, pooled_best, scalarize


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


def test_distinct_directions_share_the_answers_so_that_they_earn_most_together() -> None:
    """90 + 32 + 18 is the most: who wants brevity most gets the shortest, in whatever order the directions come."""
    assert pooled_best(POOL_BMK, DIRECTIONS_BVK, distinct=True).tolist() == [[0, 2, 1]]
    assert pooled_best(POOL_BMK, DIRECTIONS_BVK[:, ::-1], distinct=True).tolist() == [[1, 2, 0]]


def test_distinct_answers_are_those_of_the_best_assignment() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        directions = int(rng.integers(1, 6))
        score_VM = rng.normal(size=(directions, directions + int(rng.integers(0, 20))))
        name_V = assign(score_VM, np.arange(score_VM.shape[1]))
        row_V, best_V = linear_sum_assignment(-score_VM)
        assert name_V.tolist() == best_V.tolist()
        assert row_V.tolist() == list(range(directions))


def test_of_too_few_answers_as_many_as_there_are_are_kept() -> None:
    assert assign(np.array([[1.0], [3.0], [2.0]]), np.array([7])).tolist() == [NO_ONE, 7, NO_ONE]
    assert assign(np.empty((2, 0)), np.empty(0, dtype=np.int64)).tolist() == [NO_ONE, NO_ONE]


def test_the_shorter_answer_goes_to_who_wants_more_brevity() -> None:
    """Along an arc the answers, chosen from one pool a prompt, are ever shorter."""
    rng = np.random.default_rng(1)
    angle_V = np.radians(np.linspace(0, -45, 5))
    v_BVK = np.repeat(np.stack([np.cos(angle_V), np.sin(angle_V)], axis=1)[None], 40, axis=0)
    reward_BMK = rng.uniform(0, 100, (40, 16, 2))
    index_BV = pooled_best(reward_BMK, v_BVK, distinct=True)
    verbosity_BV = np.take_along_axis(reward_BMK[:, :, 1], index_BV, axis=1)
    assert (np.diff(verbosity_BV.mean(axis=0)) < -5).all()


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
    allowed_BMV = np.repeat([[[False], [True], [True]], [[False], [False], [False]]], 3, axis=2)
    reward_BMK, preference_BVK = np.repeat(POOL_BMK, 2, axis=0), np.repeat(DIRECTIONS_BVK, 2, axis=0)
    index_BV = pooled_best(reward_BMK, preference_BVK, allowed_BMV=allowed_BMV)
    assert index_BV.tolist() == [[2, 1, 1], [NO_ONE] * 3]
    index_BV = pooled_best(reward_BMK, preference_BVK, distinct=True, allowed_BMV=allowed_BMV)
    assert index_BV.tolist() == [[2, 1, NO_ONE], [NO_ONE] * 3]
    assert allowed_BMV.sum() == 6  # the caller's own is left as it was


def test_a_candidate_serves_the_directions_that_it_may() -> None:
    """Candidate 1 may not serve the second direction, and nobody the third."""
    allowed_BMV = np.array([[[True, True, False], [True, False, False], [True, True, False]]])
    assert pooled_best(POOL_BMK, DIRECTIONS_BVK, allowed_BMV=allowed_BMV).tolist() == [[0, 2, NO_ONE]]
    assert pooled_best(POOL_BMK, DIRECTIONS_BVK, distinct=True, allowed_BMV=allowed_BMV).tolist() == [[0, 2, NO_ONE]]


def test_more_directions_are_served_before_any_is_served_better() -> None:
    """The second direction may have candidate 0 alone, so the first, which earns 90 with it, takes 70."""
    assert assign(np.array([[90.0, 70.0], [1.0, -np.inf]]), np.arange(2)).tolist() == [1, 0]
    assert assign(np.array([[90.0, 70.0], [-np.inf, -np.inf]]), np.arange(2)).tolist() == [0, NO_ONE]


def test_in_hindsight_an_answer_is_labelled_with_the_middle_of_the_angles_that_it_wins() -> None:
    """(90, 80) beats (85, 60) where 5 cos a > 20 sin a: from 0 to 14.04 degrees. That beats (70, 30) where
    15 cos a > 30 sin a: to 26.57. (60, 40) is worse than (70, 30) in both."""
    reward_BMK = np.concatenate([POOL_BMK, [[[60.0, 40.0]]]], axis=1)
    grid_GK = evaluation_grid(Arc(-45, 0), 901)
    index_BG = pooled_best(reward_BMK, grid_GK[None])
    (label_MK,) = hindsight(index_BG, grid_GK, 4)
    angle_M = np.degrees(np.arctan2(label_MK[:, 1], label_MK[:, 0]))
    expected = [-14.04 / 2, -(26.57 + 45) / 2, -(14.04 + 26.57) / 2]
    assert angle_M[:3] == pytest.approx(expected, abs=0.05)
    assert np.isnan(label_MK[3]).all()
    assert np.linalg.norm(label_MK[:3], axis=1) == pytest.approx(1)


def test_an_answer_that_wins_all_round_serves_no_direction_best() -> None:
    """The only answer of a prompt wins on the whole circle, which has no middle; of the simplex that is 45 degrees."""
    circle_GK, quarter_GK = evaluation_grid(Sphere(2), 8), evaluation_grid(Simplex(2), 9)
    assert np.isnan(hindsight(np.zeros((1, 8), dtype=np.int64), circle_GK, 1)).all()
    assert hindsight(np.zeros((1, 9), dtype=np.int64), quarter_GK, 1)[0, 0] == pytest.approx([0.5**0.5] * 2)


def test_where_no_answer_may_compete_none_is_labelled() -> None:
    index_BG = np.array([[NO_ONE, NO_ONE], [1, NO_ONE]])
    label_BMK = hindsight(index_BG, np.eye(2), 2)
    assert np.isnan(label_BMK[0]).all()
    assert np.isnan(label_BMK[1, 0]).all()
    assert label_BMK[1, 1].tolist() == [1.0, 0.0]


def test_the_members_of_groups_keep_their_order() -> None:
    assert members(np.array([2, 0, 2, 0, 2]), 4).tolist() == [[1, 3, -1], [-1] * 3, [0, 2, 4], [-1] * 3]
    assert members(np.array([], dtype=np.int64), 2).shape == (2, 0)
