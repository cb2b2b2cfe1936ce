"""The last iteration beside every other system: pairs, differences, specialists, and trust in the reward model."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dpalign.measure.bootstrap import Array, Bootstrap
from dpalign.measure.comparison import comparison_pairs, difference, nearest_directions, shortfalls
from dpalign.measure.points import Rewards
from dpalign.measure.setting import Setting
from dpalign.measure.summarize import fewest_replicates
from dpalign.measure.system import System
from dpalign.measure.trust import trust

FEW = Bootstrap(replicates=200)
PROMPTS = tuple(f"prompt {p}" for p in range(30))
REFERENCE = np.array([60.0, 65.0])


def arc(*degrees: float) -> Array:
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def system(
    name: str, mean_VK: list[list[float]], directions_VK: Array | None = None, iteration: int | None = None, **what: Any
) -> Rewards:
    """The means exactly, every prompt its own share of ease that all systems have in common."""
    ease_P = np.linspace(-3, 3, len(PROMPTS))[:, None, None, None]
    reward_PVSK = np.array(mean_VK)[None, :, None, :] + ease_P
    return Rewards(System(name, iteration=iteration, **what), PROMPTS, directions_VK, reward_PVSK)


def test_the_last_iteration_meets_everyone_and_only_rivals_meet_it() -> None:
    plain, dial = [[70.0, 50.0]], [[70.0, 50.0], [60.0, 40.0]]
    systems = [system(f"t{t}", dial, arc(0, -45), t, role="iteration") for t in range(3)]
    systems += [system("sft", plain), system("steerlm", dial), system("rsf", plain, role="specialist")]
    assert comparison_pairs(systems) == [
        ("t2", "sft"), ("t2", "steerlm"), ("t2", "rsf"), ("t2", "t0"), ("t2", "t1"),
        ("t1", "t0"), ("steerlm", "t2"),
    ]  # fmt: skip
    assert comparison_pairs([system("sft", plain)]) == []
    # the smallest p-value of 139 replicates is 1/140; times 7 pairs it is the level
    assert fewest_replicates(7, 0.95) == 140


def test_differences_are_paired_by_prompt() -> None:
    """What all systems share on a prompt cancels: the interval has no width."""
    directions = arc(0, -45)
    last = system("t1", [[80.0, 55.0], [70.0, 40.0]], directions, 1)
    other = system("sft", [[70.0, 50.0]])
    setting = Setting(("helpfulness", "verbosity"), directions, REFERENCE, FEW)
    found = difference(last, other, setting)
    # at 0 degrees 80 - 70; at -45 (70 - 40) / sqrt 2 against (70 - 50) / sqrt 2: 7.07; mean 8.54
    assert found.objective.value == pytest.approx((10 + 10 / np.sqrt(2)) / 2)
    assert found.objective.low == pytest.approx(found.objective.high)
    # areas beyond (60, 65): the other 15 * 10; the last 20 * 10 up to 55, then a trapezium of 15 by (20 + 10) / 2
    assert found.hypervolume_ratio is not None
    assert found.hypervolume_ratio.value == pytest.approx((200 + 225) / 150)
    nowhere = system("worse", [[50.0, 50.0]])
    assert difference(last, nowhere, setting).hypervolume_ratio is None


def test_a_direction_between_two_of_the_dials_is_asked_at_both() -> None:
    directions = arc(0, -15, -30, -45)
    assert nearest_directions(directions, arc(-22.5)[0]) == [1, 2]
    assert nearest_directions(directions, arc(-20)[0]) == [1]
    assert nearest_directions(directions, arc(-60)[0]) == [3]


def test_what_is_lost_at_a_specialists_own_direction() -> None:
    last = system("t1", [[80.0, 55.0], [76.0, 48.0], [70.0, 40.0]], arc(0, -22.5, -45), 1)
    at_0 = system("rsf-1", [[83.0, 60.0]], role="specialist", direction=(1.0, 0.0), family="RSF")
    at_45 = system("rsf-2", [[70.0, 39.0]], role="specialist", direction=tuple(arc(-45)[0]), family="RSF")
    rows, families = shortfalls(last, [at_0, at_45], FEW)
    losses = [row.shortfall.value for row in rows]
    assert losses == pytest.approx([83 - 80, 1 / np.sqrt(2)])
    assert families["RSF"].value == pytest.approx(np.mean(losses))


def checked(name: str, t: int, proxy: float, check: float) -> Rewards:
    """An iteration that the proxy finds `proxy` helpful and the check `check`, spread over prompts and samples."""
    rng = np.random.default_rng(t)
    judged, true = (
        np.array([helpful, 50.0])[None, None, None] + rng.normal(0, 1, (30, 2, 2, 2)) for helpful in (proxy, check)
    )
    return Rewards(System(name, "iteration", iteration=t), PROMPTS, arc(0, -45), judged, true)


def test_a_proxy_that_rises_while_the_check_falls_is_warned_of() -> None:
    runs = [checked("t0", 0, 60, 60), checked("t1", 1, 75, 74), checked("t2", 2, 78, 71)]
    found = trust(runs, arc(0, -45), FEW)
    assert found is not None
    assert found.change is not None
    assert (found.check, found.warning, len(found.steps)) == ("truth", True, 1)
    assert (found.change.b, found.change.a) == ("t1", "t2")  # pi_0 was not selected by the proxy
    # helpfulness weighs 1 and 0.707: E_v J moves by 0.854 of it
    assert found.change.proxy.value == pytest.approx(0.854 * 3, abs=0.5)
    assert found.change.check.value == pytest.approx(-0.854 * 3, abs=0.5)
    assert [point.system for point in found.curve] == ["t0", "t1", "t2"]


@pytest.mark.parametrize(("proxy", "check"), [(78, 76), (72, 71), (75, 74)])
def test_no_warning_where_both_rise_both_fall_or_nothing_moves(proxy: float, check: float) -> None:
    found = trust([checked("t1", 1, 75, 74), checked("t2", 2, proxy, check)], arc(0, -45), FEW)
    assert found is not None
    assert not found.warning


def test_a_step_is_over_optimised_though_the_whole_way_is_not() -> None:
    """The check gains 6 and loses 3 again, while the proxy rises twice."""
    runs = [checked("t1", 1, 70, 70), checked("t2", 2, 75, 76), checked("t3", 3, 78, 73)]
    found = trust(runs, arc(0, -45), FEW)
    assert found is not None
    assert found.change is not None
    assert [(step.b, step.a, step.over_optimised) for step in found.steps] == [
        ("t1", "t2", False),
        ("t2", "t3", True),
    ]
    assert not found.change.over_optimised
    assert not found.warning


def test_a_judge_checks_where_the_truth_is_not_known_and_one_iteration_has_no_change() -> None:
    one = checked("t1", 1, 75, 74)
    judged = replace(one, true_reward_PVSK=None, judge_PVSK=one.true_reward_PVSK)
    found = trust([judged], arc(0, -45), FEW)
    assert found is not None
    assert (found.check, found.change, found.steps, len(found.curve)) == ("judge", None, (), 1)
    assert found.curve[0].check == trust([one], arc(0, -45), FEW).curve[0].check
    assert trust([replace(one, true_reward_PVSK=None)], arc(0, -45), FEW) is None
