"""Does the answer follow the dial: tau, slope, span, steps, regret."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]

from dpalign.measure.bootstrap import Array, Bootstrap
from dpalign.measure.control import (
    angles,
    control,
    dial_angles,
    following,
    following_lead,
    is_dial,
    kendall_tau_b,
    length,
    rank_correlation,
    regret,
    slope,
    span_share,
    weight_taus,
)
from dpalign.measure.points import Rewards
from dpalign.measure.system import System
from dpalign.paper.direction import Arc, evaluation_grid

FEW = Bootstrap(replicates=200)


def arc(*degrees: float) -> Array:
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def dial(verbosity_PV: Array, directions_VK: Array, helpfulness: float = 70.0) -> Rewards:
    reward_PVK = np.stack([np.full_like(verbosity_PV, helpfulness), verbosity_PV], axis=-1)
    prompt_ids = tuple(f"prompt {p}" for p in range(len(verbosity_PV)))
    return Rewards(System("t1", iteration=1), prompt_ids, directions_VK, reward_PVK[:, :, None, :])


def test_angles_are_degrees() -> None:
    assert angles(np.array([[1.0, 0.0], [0.8, -0.6]])) == pytest.approx([0, -36.8699], abs=1e-4)


def test_a_dial_that_works_has_positive_figures() -> None:
    # three directions, two prompts: averages 65, 55, 40
    verbosity_PV = np.array([[60.0, 50.0, 30.0], [70.0, 60.0, 50.0]])
    found = control(dial(verbosity_PV, arc(0, -20, -40)), FEW)
    assert (found.kendall_tau.value, found.constant_prompts) == (1, 0)
    assert found.span.value == pytest.approx(25)
    assert (found.span.low, found.span.high) == pytest.approx((20, 30))  # the two prompts' own spans
    assert [drop.value for drop in found.drops] == pytest.approx([10, 15])
    assert found.slope.value == pytest.approx(25 / 40)  # evenly spaced: the ends alone count
    assert found.spearman == pytest.approx(1)
    assert found.steps_beyond_doubt == 2


def test_a_step_that_rises_on_average_is_no_fall_and_one_that_rises_on_some_prompts_is_in_doubt() -> None:
    verbosity_PV = np.array([[60.0, 50.0, 30.0, 35.0], [60.0, 55.0, 60.0, 61.0]])
    found = control(dial(verbosity_PV, arc(0, -10, -20, -30)), FEW)
    assert [drop.value for drop in found.drops] == pytest.approx([7.5, 7.5, -3])
    assert found.steps_beyond_doubt == 1


def test_an_arc_that_asks_for_more_is_obeyed_by_rising() -> None:
    found = control(dial(np.array([[40.0, 60.0]]), arc(0, 30)), FEW)
    assert (found.span.value, found.kendall_tau.value) == (20, 1)


def test_a_dial_that_starts_above_0_is_obeyed_by_falling_all_the_way() -> None:
    """From 30 degrees, which ask for more words, to -30, which ask for fewer."""
    found = control(dial(np.array([[60.0, 50.0, 45.0]]), arc(30, 0, -30)), FEW)
    assert (found.span.value, found.kendall_tau.value) == (15, 1)
    assert [drop.value for drop in found.drops] == [10, 5]


@pytest.mark.parametrize("ends", [(-45, 0), (-90, 90), (100, 170), (190, 260), (95, 265), (-265, -95)])
def test_a_policy_that_obeys_has_positive_figures_on_any_arc(ends: tuple[float, float]) -> None:
    """Verbosity is 50 plus 40 times its weight: what the direction asks for."""
    directions_VK = evaluation_grid(Arc(*ends), 6)
    obedient = dial(50 + 40 * directions_VK[None, :, 1].repeat(2, axis=0), directions_VK)
    found, told = control(obedient, FEW), following(obedient, dial_angles(directions_VK), FEW)
    assert found.kendall_tau.value == told.kendall_tau.value == told.kendall_tau_common.value == 1
    assert found.spearman == told.spearman == pytest.approx(1)
    assert found.steps_beyond_doubt == 5
    whole = 40 * np.ptp(directions_VK[:, 1])
    assert (found.span.value, told.span.value) == pytest.approx((whole, whole))
    degrees = ends[1] - ends[0]
    assert found.slope.value == pytest.approx(whole / degrees, rel=0.3)  # a sine is no line


def test_the_dial_is_the_angle_itself_where_more_of_the_first_objective_is_wanted() -> None:
    within = evaluation_grid(Arc(-90, 90), 37)
    assert dial_angles(within).tolist() == angles(within).tolist()
    assert dial_angles(arc(170, 130, 100)) == pytest.approx([10, 50, 80])
    assert dial_angles(arc(265, 180, 95)) == pytest.approx([-85, 0, 85])


def test_words_follow_the_dial_as_rewards_do_and_the_last_direction_is_a_share_of_the_first() -> None:
    # averages 80, 70 and 30 words; the second prompt does not change at the first step
    words_PVS = np.array([[100.0, 80.0, 40.0], [60.0, 60.0, 20.0]])[:, :, None]
    system = replace(dial(np.full((2, 3), 50.0), arc(0, -20, -40)), words_PVS=words_PVS)
    found = length(system, FEW)
    assert found is not None
    assert [drop.value for drop in found.drops] == pytest.approx([10, 40])
    assert (found.drops[0].low, found.drops[0].high) == (0, 20)  # a replicate may hold one prompt twice
    assert found.steps_beyond_doubt == 1
    assert found.kendall_tau.value == pytest.approx((1 + 2 / np.sqrt(2 * 3)) / 2)  # one pair of three is a tie
    ratio = found.last_to_first
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((30 / 80, 20 / 60, 40 / 100))


def test_words_have_no_share_of_nothing_and_need_texts_and_a_dial() -> None:
    mute = replace(dial(np.full((1, 2), 50.0), arc(0, -45)), words_PVS=np.array([[[0.0], [3.0]]]))
    assert length(mute, FEW).last_to_first is None
    assert [drop.value for drop in length(mute, FEW).drops] == [-3]
    assert length(replace(mute, words_PVS=None), FEW) is None
    assert length(replace(mute, directions_VK=None), FEW) is None


def test_directions_round_a_circle_are_no_dial() -> None:
    assert is_dial(arc(0, -45, -90))
    assert not is_dial(arc(0, -90, -180))
    assert not is_dial(None)


def test_tau_b_agrees_with_scipy_and_is_zero_for_constant_prompts() -> None:
    rng = np.random.default_rng(6)
    dial_V = np.linspace(0, -45, 6)
    reward_PV = rng.integers(0, 4, (50, 6)).astype(float)  # many ties
    reward_PV[7] = 3.0
    tau_P, constant_P = kendall_tau_b(dial_V, reward_PV)
    assert np.flatnonzero(constant_P).tolist() == [7]
    assert tau_P[7] == 0
    others = [p for p in range(50) if p != 7]
    assert tau_P[others] == pytest.approx([stats.kendalltau(dial_V, reward_PV[p]).statistic for p in others])


def test_tau_counts_sums_in_another_order_as_ties() -> None:
    tau_P, constant_P = kendall_tau_b(np.array([0.0, -1.0]), np.array([[0.1 + 0.2, 0.3]]))
    assert constant_P.tolist() == [True]
    assert tau_P.tolist() == [0]


def test_spearman_is_near_one_for_a_trend_too_small_to_matter() -> None:
    dial_V = np.linspace(0, -45, 10)
    assert rank_correlation(dial_V, 50 + dial_V * 1e-4) == pytest.approx(1)
    assert rank_correlation(dial_V, np.full(10, 50.0)) is None
    a, b = np.array([1.0, 2.0, 2.0, 5.0]), np.array([3.0, 1.0, 4.0, 4.0])
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


def test_the_slope_is_least_squares() -> None:
    dial_V, mean_V = np.array([0.0, -10.0, -40.0]), np.array([60.0, 50.0, 45.0])
    assert slope(dial_V, mean_V) == pytest.approx(np.polyfit(dial_V, mean_V, 1)[0])


def test_the_span_share_is_paired_with_the_reference_by_prompt() -> None:
    directions = arc(0, -45)
    truth = dial(np.array([[70.0, 30.0], [60.0, 40.0]]), directions)
    half = dial(np.array([[60.0, 40.0], [55.0, 45.0]]), directions)
    share = span_share(half, truth, FEW)
    assert share is not None
    assert (share.value, share.low, share.high) == pytest.approx((0.5, 0.5, 0.5))
    assert span_share(truth, dial(np.full((2, 2), 50.0), directions), FEW) is None


def test_regret_is_what_a_swapped_dial_loses() -> None:
    directions = np.array([[1.0, 0.0], [0.8, -0.6]])
    reward_PVK = np.tile([[[70.0, 30.0], [80.0, 60.0]]], (8, 1, 1))
    swapped = Rewards(System("t1", iteration=1), tuple("abcdefgh"), directions, reward_PVK[:, :, None, :])
    # asked (1, 0): 70 where 80 could be had; asked (0.8, -0.6): 28 where 38 could: mean (10 + 10) / 2
    found = regret(swapped, FEW)
    assert (found.value, found.low, found.high) == pytest.approx((10, 10, 10))
    obedient = Rewards(System("t1", iteration=1), tuple("abcdefgh"), directions, reward_PVK[:, ::-1, None, :])
    assert regret(obedient, FEW).value == 0


def test_regret_is_judged_both_ways_between_the_halves() -> None:
    # two prompts, so two halves. The first answers alike wherever it is asked; the second as a swapped dial.
    directions = np.array([[1.0, 0.0], [0.8, -0.6]])
    reward_PVK = np.array([[[71.0, 40.0], [70.0, 40.0]], [[70.0, 30.0], [80.0, 60.0]]])
    found = regret(Rewards(System("t1", iteration=1), ("a", "b"), directions, reward_PVK[:, :, None, :]), FEW)
    # chosen on a: the first answer for both. On b: 70 - 70 = 0 at (1, 0), 38 - 28 = 10 at the other: mean 5
    # chosen on b: each the other's. On a: 70 - 71 = -1, and 0.8 * 71 - 0.8 * 70 = 0.8: mean -0.1
    assert found.value == pytest.approx((5 - 0.1) / 2)


def test_regret_finds_nothing_in_noise_that_would_fool_a_choice_on_the_same_prompts() -> None:
    rng, directions = np.random.default_rng(8), arc(*np.linspace(0, -45, 10))
    split, same = [], []
    for _ in range(100):
        reward_PVK = rng.normal(50, 10, (40, 10, 2))
        deaf = Rewards(System("t1", iteration=1), tuple(map(str, range(40))), directions, reward_PVK[:, :, None, :])
        split.append(regret(deaf, Bootstrap(replicates=2)).value)
        score_UV = deaf.point_VK @ directions.T
        same.append((score_UV.max(axis=0) - np.diagonal(score_UV)).mean())
    assert abs(np.mean(split)) < 0.2
    assert np.mean(same) > 2


def test_of_two_conditions_the_span_alone_is_measured() -> None:
    found = following(dial(np.array([[60.0, 30.0]]), arc(0, -45)), np.array([0.0, -45.0]), FEW)
    assert (found.conditions, found.kendall_tau, found.kendall_tau_common, found.spearman) == (2, None, None, None)
    assert found.span.value == pytest.approx(30)


def test_the_common_tau_leaves_out_the_neighbours_between_which_a_fine_dial_slips() -> None:
    """Of ten steps each second one slips: 41 of 45 pairs are in order. Numbers 0, 2, 4, 7 and 9 all are."""
    angle_V = np.linspace(0, -45, 10)
    verbosity_PV = np.array([[64.0, 60.0, 62.0, 56.0, 58.0, 52.0, 54.0, 48.0, 50.0, 44.0]])
    fine, coarse = dial(verbosity_PV, arc(*angle_V)), dial(verbosity_PV[:, ::2], arc(*angle_V[::2]))
    found = following(fine, angle_V, FEW)
    assert found.kendall_tau is not None
    assert found.kendall_tau_common is not None
    assert found.conditions == 10
    assert found.kendall_tau.value == pytest.approx((41 - 4) / 45)
    assert found.kendall_tau_common.value == 1
    of_five = following(coarse, angle_V[::2], FEW)
    assert of_five.kendall_tau == of_five.kendall_tau_common
    assert following(dial(verbosity_PV[:, :4], arc(*angle_V[:4])), angle_V[:4], FEW).kendall_tau_common is None


def test_leads_in_control_are_paired_by_prompt_and_take_as_many_conditions() -> None:
    angle_V = np.linspace(0, -45, 10)
    ease_P1 = np.array([[0.0], [20.0]])
    steady = dial(60 + 0.4 * angle_V + ease_P1, arc(*angle_V))
    wide = dial(60 + 0.6 * angle_V[::2] + ease_P1, arc(*angle_V[::2]))
    lead = following_lead(steady, angle_V, wide, angle_V[::2], FEW)
    assert lead.kendall_tau is not None
    assert (lead.kendall_tau.value, lead.kendall_tau.low) == (0, 0)
    assert (lead.span.value, lead.span.low, lead.span.high) == pytest.approx((18 - 24, 18 - 24, 18 - 24))
    two = dial(np.array([[60.0, 30.0], [60.0, 30.0]]), arc(0, -45))
    assert following_lead(steady, angle_V, two, np.array([0.0, -45.0]), FEW).kendall_tau is None


def test_each_reward_is_compared_with_each_weight_over_the_directions() -> None:
    """The first reward follows its weight, the second goes against it on one prompt, and nobody varies the third."""
    weight_VK = np.array([[0.0, 0.9, -0.5], [0.5, 0.7, -0.5], [0.8, 0.1, -0.5]])
    follows = np.array([10.0, 20.0, 30.0])
    means_PVK = np.array([[follows, follows, follows], [follows, -3 * follows, follows]]).transpose(0, 2, 1)
    system = Rewards(System("t1", iteration=1), ("a", "b"), weight_VK, means_PVK[:, :, None, :])
    found = weight_taus(system, FEW)
    assert [[tau and tau.value for tau in row] for row in found] == [[1, -1, None], [-1, 1, None], [1, -1, None]]
    assert (found[0][0].low, found[0][0].high) == (1, 1)
    assert (found[1][1].low, found[1][1].high) == (-1, 1)  # prompt a alone rises with the first weight


def test_less_of_an_objective_rises_with_its_weight_too() -> None:
    directions_VK = np.array([[0.6, -0.8, 0.0], [0.8, -0.6, 0.0], [1.0, 0.0, 0.0]])
    reward_PVK = np.array([[[50.0, 30.0, 1.0], [50.0, 45.0, 1.0], [50.0, 70.0, 1.0]]])
    found = weight_taus(Rewards(System("t1"), ("a",), directions_VK, reward_PVK[:, :, None, :]), FEW)
    assert (found[1][1].value, found[0][0].value) == (1, 0)  # equal rewards have no rank: 0
