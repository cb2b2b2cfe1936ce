"""Interpolated fronts, who lies under them, hypervolume, and the paper's Fig. 4."""

import moocore  # type: ignore[import-untyped]
import numpy as np
import pytest

from dpalign.measure.bootstrap import Array, Bootstrap
from dpalign.measure.dominance import lead
from dpalign.measure.front import Coverage, coverage, front_height, front_knots
from dpalign.measure.hypervolume import (
    hypervolume,
    hypervolume_estimate,
    hypervolume_share,
    nearby_references,
    sensitivity,
)
from dpalign.measure.paper_curves import FIG_4
from dpalign.measure.points import Rewards
from dpalign.measure.system import System

SENSES = np.array([1.0, -1.0])  # helpful, and concise
TWO_POINTS = np.array([[80.0, 60.0], [70.0, 40.0]])  # (helpfulness, verbosity)


def fig_4_points(name: str) -> Array:
    """A curve's points as (helpfulness, verbosity)."""
    return np.array(FIG_4[name])[:, ::-1]


def system(name: str, reward_PVK: Array) -> Rewards:
    prompt_ids = tuple(f"prompt {p}" for p in range(len(reward_PVK)))
    return Rewards(System(name), prompt_ids, None, reward_PVK[:, :, None, :])


def test_the_front_leaves_out_what_the_system_itself_beats() -> None:
    point_VK = np.array([[70.0, 40.0], [60.0, 50.0], [80.0, 60.0], [80.0, 65.0], [70.0, 40.0]])
    knot_NK = front_knots(point_VK, SENSES)
    assert knot_NK.tolist() == [[80, -60], [70, -40]]
    # halfway 75; more verbose than its verbose end: level; more concise than its concise end: nothing
    assert front_height(knot_NK, np.array([-50.0, -90.0, -39.0])).tolist() == [75, 80, -np.inf]


def test_points_are_counted_under_the_front_or_apart_when_outside_its_range() -> None:
    others = np.array([[74.9, 50.0], [75.0, 50.0], [69.0, 39.0], [79.0, 61.0], [81.0, 61.0]])
    seen = coverage(TWO_POINTS, others, SENSES)
    # (74.9, 50) is under 75, (75, 50) on the line is not; of those outside, only (79, 61) loses to (80, 60)
    assert seen == Coverage(under=1, inside=2, outside=3, outside_dominated=1)
    assert seen.share == 0.5
    assert coverage(TWO_POINTS, others[2:], SENSES).share is None


def test_three_objectives_have_no_interpolated_front_but_domination_still() -> None:
    a, b = np.array([[50.0, 50.0, 20.0]]), np.array([[50.0, 50.0, 21.0], [51.0, 50.0, 30.0], [50.0, 50.0, 20.0]])
    assert coverage(a, b, np.array([1.0, 1.0, -1.0])) == Coverage(1, 3, 0, 0)


def test_the_hypervolume_of_two_points_is_a_rectangle_and_a_trapezoid() -> None:
    # from verbosity 66 to 60 at 80 - 60 = 20: 120; from 60 to 40 between 20 and 10: 300
    assert hypervolume(TWO_POINTS, SENSES, np.array([60.0, 66.0])) == pytest.approx(420)
    # reference inside the segment, at 50, where the front is 75: 10 * (15 + 10) / 2
    assert hypervolume(TWO_POINTS, SENSES, np.array([60.0, 50.0])) == pytest.approx(125)
    # the front falls below a floor of 75 at verbosity 50: 6 * 5, and a triangle 10 * 5 / 2
    assert hypervolume(TWO_POINTS, SENSES, np.array([75.0, 66.0])) == pytest.approx(55)
    assert hypervolume(TWO_POINTS, SENSES, np.array([80.0, 66.0])) == 0
    assert hypervolume(TWO_POINTS, SENSES, np.array([60.0, 40.0])) == 0


def test_the_interpolated_hypervolume_is_the_limit_of_moocores_over_points_along_the_front() -> None:
    reference = np.array([65.0, 60.0])
    front = fig_4_points("t=4")
    curve = np.array(FIG_4["t=4"])
    verbosity = np.linspace(42.4, 58.4, 20001)
    along = np.stack([np.interp(verbosity, curve[:, 0], curve[:, 1]), verbosity], axis=1)
    limit = moocore.hypervolume(along, ref=reference, maximise=[True, False])
    staircase = moocore.hypervolume(front, ref=reference, maximise=[True, False])
    assert hypervolume(front, SENSES, reference) == pytest.approx(limit, rel=1e-3)
    assert hypervolume(front, SENSES, reference) > 1.05 * staircase


def test_three_objectives_use_the_hypervolume_of_the_points() -> None:
    point_VK = np.array([[3.0, 2.0, 1.0], [9.0, 9.0, 6.0]])  # the second is past the reference's 5
    assert hypervolume(point_VK, np.array([1.0, 1.0, -1.0]), np.array([0.0, 0.0, 5.0])) == pytest.approx(3 * 2 * 4)


def test_the_share_of_a_front_is_paired_by_prompt() -> None:
    rng = np.random.default_rng(2)
    truth = TWO_POINTS + rng.normal(0, 3, (40, 1, 1))  # prompts differ; every prompt's two points move together
    reference, bootstrap = np.array([60.0, 66.0]), Bootstrap(replicates=200)
    whole = system("truth", truth)
    same = hypervolume_share(system("same", truth), whole, SENSES, reference, bootstrap)
    assert same is not None
    assert (same.value, same.low, same.high) == (1, 1, 1)
    lesser = hypervolume_share(system("lesser", truth[:, 1:]), whole, SENSES, reference, bootstrap)
    assert lesser is not None
    assert lesser.low is not None
    assert lesser.high is not None
    assert lesser.low < lesser.value < lesser.high < 1
    estimate = hypervolume_estimate(whole, SENSES, reference, bootstrap)
    assert estimate.value == pytest.approx(hypervolume(truth.mean(axis=0), SENSES, reference))
    assert hypervolume_share(whole, whole, SENSES, np.array([99.0, 66.0]), bootstrap) is None


def test_the_sensitivity_table_moves_the_reference_both_ways() -> None:
    references = nearby_references(np.array([60.0, 66.0]), (-10.0, 0.0))
    assert [reference.tolist() for reference in references] == [[50, 56], [50, 66], [60, 56], [60, 66]]
    one = system("one", TWO_POINTS[None])
    rows = sensitivity([one], SENSES, references, one)
    # from 66: 420 with the floor at 60, and 10 * 26 more with the floor at 50
    assert rows[3].hypervolumes == pytest.approx({"one": 420})
    assert rows[1].hypervolumes == pytest.approx({"one": 680})
    assert [row.shares for row in rows] == [{"one": 1.0}] * 4
    assert sensitivity([one], SENSES, references, None)[0].shares == {"one": None}


def test_on_the_papers_curves_the_last_iteration_leads_at_every_direction_of_the_arc() -> None:
    angle = np.radians(np.linspace(0, -45, 10))
    directions = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    for name in ("SFT", "DPO", "SteerLM", "t=0", "t=1", "t=2", "t=3"):
        assert lead(fig_4_points("t=4"), fig_4_points(name), directions).min() > 0
    # at 0 degrees helpfulness alone counts: 77.5 of t=1 against SteerLM's 78.3
    assert lead(fig_4_points("t=1"), fig_4_points("SteerLM"), directions)[0] == pytest.approx(-0.8)


def test_on_the_papers_curves_strict_dominance_does_not_hold_everywhere() -> None:
    last = fig_4_points("t=4")
    assert coverage(last, fig_4_points("SFT"), SENSES).share == 1
    assert coverage(last, fig_4_points("DPO"), SENSES).share == 1
    for name in ("t=1", "t=2"):  # their concise ends (38.1, 63.4) and (40.9, 66.9) lie outside and undominated
        assert coverage(last, fig_4_points(name), SENSES) == Coverage(1, 1, 1, 0)
    # SteerLM's concise end is outside too; its verbose end is, by 0.3, but (58.4, 80.5) beats it outright
    assert coverage(last, fig_4_points("SteerLM"), SENSES) == Coverage(0, 0, 2, 1)
    # SteerLM's verbose end 78.3 lies past t=1's range, and above its 77.5
    assert coverage(fig_4_points("t=1"), fig_4_points("SteerLM"), SENSES) == Coverage(1, 1, 1, 0)
