"""The last iteration beside every other system: pairs, differences, specialists, and trust in the reward model."""

import numpy as np
import pytest

from dpalign.measure.bootstrap import Array, Bootstrap
from dpalign.measure.comparison import Specialist, comparison_pairs, differences, nearest_directions, shortfalls
from dpalign.measure.points import SystemRewards
from dpalign.measure.summary import fewest_replicates
from dpalign.measure.trust import overoptimisation

FEW = Bootstrap(replicates=200)
PROMPTS = tuple(f"prompt {p}" for p in range(30))
SENSES, REFERENCE = np.array([1.0, -1.0]), np.array([60.0, 65.0])


def arc(*degrees: float) -> Array:
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def system(
    name: str, mean_VK: list[list[float]], directions_VK: Array | None = None, iteration: int | None = None
) -> SystemRewards:
    """The means exactly, every prompt its own share of ease that all systems have in common."""
    ease_P = np.linspace(-3, 3, len(PROMPTS))[:, None, None, None]
    reward_PVSK = np.array(mean_VK)[None, :, None, :] + ease_P
    return SystemRewards(name, iteration, PROMPTS, directions_VK, reward_PVSK)


def test_the_last_iteration_meets_everyone_and_only_rivals_meet_it() -> None:
    pairs = comparison_pairs(["t0", "t1", "t2"], ["sft", "steerlm", "rsf"], ["steerlm"])
    assert pairs == [
        ("t2", "sft"), ("t2", "steerlm"), ("t2", "rsf"), ("t2", "t0"), ("t2", "t1"),
        ("t1", "t0"), ("steerlm", "t2"),
    ]  # fmt: skip
    assert comparison_pairs([], ["sft"], []) == []
    # the smallest p-value of 139 replicates is 1/140; times 7 pairs it is the level
    assert fewest_replicates(7, 0.95) == 140


def test_differences_are_paired_by_prompt() -> None:
    """What all systems share on a prompt cancels: the interval has no width."""
    directions = arc(0, -45)
    last = system("t1", [[80.0, 55.0], [70.0, 40.0]], directions, 1)
    other = system("sft", [[70.0, 50.0]])
    (found,) = differences(last, [other], directions, SENSES, REFERENCE, FEW)
    # at 0 degrees 80 - 70; at -45 (70 - 40) / sqrt 2 against (70 - 50) / sqrt 2: 7.07; mean 8.54
    assert found.objective.value == pytest.approx((10 + 10 / np.sqrt(2)) / 2)
    assert found.objective.low == pytest.approx(found.objective.high)
    # areas beyond (60, 65): the other 15 * 10; the last 20 * 10 up to 55, then a trapezium of 15 by (20 + 10) / 2
    assert found.hypervolume_ratio is not None
    assert found.hypervolume_ratio.value == pytest.approx((200 + 225) / 150)
    nowhere = system("worse", [[50.0, 50.0]])
    assert differences(last, [nowhere], directions, SENSES, REFERENCE, FEW)[0].hypervolume_ratio is None


def test_a_direction_between_two_of_the_dials_is_asked_at_both() -> None:
    directions = arc(0, -15, -30, -45)
    assert nearest_directions(directions, arc(-22.5)[0]) == [1, 2]
    assert nearest_directions(directions, arc(-20)[0]) == [1]
    assert nearest_directions(directions, arc(-60)[0]) == [3]


def test_what_is_lost_at_a_specialists_own_direction() -> None:
    last = system("t1", [[80.0, 55.0], [76.0, 48.0], [70.0, 40.0]], arc(0, -22.5, -45), 1)
    at_0 = Specialist(system("rsf-1", [[83.0, 60.0]]), "RSF", arc(0)[0])
    at_45 = Specialist(system("rsf-2", [[70.0, 39.0]]), "RSF", arc(-45)[0])
    found = shortfalls(last, [at_0, at_45], ("helpfulness", "verbosity"), FEW)
    losses = [row["shortfall"].value for row in found["rows"]]
    assert losses == pytest.approx([83 - 80, 1 / np.sqrt(2)])
    assert found["families"]["RSF"].value == pytest.approx(np.mean(losses))
    assert found["rows"][0]["direction"] == pytest.approx({"helpfulness": 1.0, "verbosity": 0.0})


def checked(name: str, t: int, proxy: float, check: float) -> SystemRewards:
    """An iteration that the proxy finds `proxy` helpful and the check `check`, spread over prompts and samples."""
    rng = np.random.default_rng(t)
    judged, true = (
        np.array([helpful, 50.0])[None, None, None] + rng.normal(0, 1, (30, 2, 2, 2)) for helpful in (proxy, check)
    )
    return SystemRewards(name, t, PROMPTS, arc(0, -45), judged, true)


def test_a_proxy_that_rises_while_the_check_falls_is_warned_of() -> None:
    runs = [checked("t0", 0, 60, 60), checked("t1", 1, 75, 74), checked("t2", 2, 78, 71)]
    found = overoptimisation(runs, "truth", arc(0, -45), FEW)
    assert found["warning"]
    assert (found["change"]["b"], found["change"]["a"]) == ("t1", "t2")  # pi_0 was not selected by the proxy
    # helpfulness weighs 1 and 0.707: E_v J moves by 0.854 of it
    assert found["change"]["proxy"].value == pytest.approx(0.854 * 3, abs=0.5)
    assert found["change"]["check"].value == pytest.approx(-0.854 * 3, abs=0.5)
    assert [row["system"] for row in found["curve"]] == ["t0", "t1", "t2"]
    assert len(found["steps"]) == 1


@pytest.mark.parametrize(("proxy", "check"), [(78, 76), (72, 71), (75, 74)])
def test_no_warning_where_both_rise_both_fall_or_nothing_moves(proxy: float, check: float) -> None:
    found = overoptimisation([checked("t1", 1, 75, 74), checked("t2", 2, proxy, check)], "judge", arc(0, -45), FEW)
    assert not found["warning"]


def test_a_single_iteration_has_a_curve_and_no_change() -> None:
    found = overoptimisation([checked("t1", 1, 75, 74)], "truth", arc(0, -45), FEW)
    assert (found["change"], found["steps"], found["warning"], len(found["curve"])) == (None, [], False, 1)
