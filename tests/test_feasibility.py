"""Asked for what cannot be had: degenerate answers, the conditions, and what is measured of the answers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import MICRO
from dpalign.measure.bootstrap import Bootstrap
from dpalign.measure.control import following, regret
from dpalign.measure.degeneracy import degenerate_share, faults, repetition
from dpalign.measure.feasibility import (
    AS_ANNOTATED,
    TRAINED,
    Wish,
    distance,
    figures,
    follows_on,
    margin_group,
    more_than_annotated,
    reachable,
    trained_on,
)
from dpalign.measure.points import Rewards
from dpalign.measure.system import System
from dpalign.pipeline.runner import take
from dpalign.recipe import changed, load
from dpalign.rows import CANDIDATES, read_rows
from dpalign.runs.folder import Run
from dpalign.runs.ledger import read_ledger
from dpalign.stages.feasibility import directions_beyond, feasibility, targets_beyond
from dpalign.stages.stage import Step

FEW = Bootstrap(replicates=100)
NAMES = ("helpfulness", "verbosity")


@pytest.mark.parametrize(
    ("text", "finished", "expected"),
    [
        ("fox is red. tea is hot.", True, ()),
        ("fox is red. tea is", False, ("unfinished",)),
        (" .\n", True, ("empty",)),
        ("Fox is red. tea is hot, fox is red.", True, ()),  # the second is part of a longer sentence
        ("Fox is red! tea is hot. fox IS red.", True, ("repeated sentence",)),
        ("Yes. Yes. Of course.", True, ()),  # of one word: too short to count
        ("- a b c\n- a b c", True, ("repeated sentence",)),
        ("on and on and on and on and on and on", True, ("repetitive",)),
    ],
)
def test_an_answer_is_degenerate_for_a_reason(text: str, finished: bool, expected: tuple[str, ...]) -> None:
    assert faults(text, finished, 0.3) == expected


def test_repetition_is_the_share_of_runs_of_four_words_seen_before() -> None:
    # a b c d, b c d a, c d a b, d a b c, a b c d: the fifth was there
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("a b c") == 0


def test_the_share_of_degenerate_answers_and_its_reasons() -> None:
    ok: tuple[str, ...] = ()
    found = degenerate_share([[[ok, ("empty",)]], [[ok, ok]], [[("unfinished", "repetitive"), ok]]], FEW)
    assert found.share.value == pytest.approx(2 / 6)
    assert found.share.low <= 1 / 3 <= found.share.high
    assert found.reasons == pytest.approx(
        {"unfinished": 1 / 6, "empty": 1 / 6, "repeated sentence": 0, "repetitive": 1 / 6}
    )


def test_angles_are_told_apart_by_the_trained_arc() -> None:
    recipe = changed(load(MICRO), {"feasibility.angles": [-60.0, 0.0, 15.0, -45.0]})
    wishes = directions_beyond(recipe)
    assert [(wish.about["angle"], wish.group) for wish in wishes] == [
        (15.0, "above 0 degrees"), (0.0, TRAINED), (-45.0, TRAINED), (-60.0, "below -45 degrees"),
    ]  # fmt: skip
    assert wishes[2].line == "helpfulness*71 verbosity*-71"


def test_angles_that_cannot_be_asked_are_refused() -> None:
    with pytest.raises(ValueError, match=r"feasibility\.angles has 120\.0"):
        directions_beyond(changed(load(MICRO), {"feasibility.angles": [0.0, 120.0]}))
    with pytest.raises(ValueError, match="none within the trained arc"):
        directions_beyond(changed(load(MICRO), {"feasibility.angles": [-60.0]}))
    with pytest.raises(ValueError, match=r'preference\.distribution is "simplex"'):
        directions_beyond(changed(load(MICRO), {"preference.distribution": "simplex"}))


def test_targets_go_from_the_highest_annotated_to_the_top_of_the_scale() -> None:
    """At verbosity 20, 50 and 80 the best annotated answers have helpfulness 60, 80 and 100."""
    reward_NK = np.array([[60.0, 20.0], [80.0, 50.0], [100.0, 80.0]]).repeat(10, axis=0)
    recipe = changed(load(MICRO), {"feasibility.reach": [1.0, 0.0, 0.5], "steerlm.targets": 3})
    found = {(wish.group, wish.value) for wish in targets_beyond(recipe, reward_NK)}
    assert found == {
        (AS_ANNOTATED, (60.0, 20.0)),
        (AS_ANNOTATED, (80.0, 50.0)),
        (AS_ANNOTATED, (100.0, 80.0)),
        ("50% of the way beyond", (80.0, 20.0)),
        ("50% of the way beyond", (90.0, 50.0)),
        ("100% of the way beyond", (100.0, 20.0)),
        ("100% of the way beyond", (100.0, 50.0)),
    }  # fmt: skip  (100, 80) can be had, so it is no target beyond


def test_what_counts_as_asked_is_what_the_line_can_state() -> None:
    """The published labels 0..4 stand for 10, 30, .. 90: a target of 66 is stated as 70, one of 100 as 90."""
    reward_NK = np.array([[66.0, 30.0]]).repeat(10, axis=0)
    recipe = changed(load(MICRO), {"steerlm.template": "steerlm", "feasibility.reach": [0.0, 1.0]})
    assert [wish.value for wish in targets_beyond(recipe, reward_NK)] == [(70.0, 30.0), (90.0, 30.0)]
    in_points = changed(recipe, {"steerlm.template": "steerlm-100-v1"})
    assert [wish.value for wish in targets_beyond(in_points, reward_NK)] == [(66.0, 30.0), (100.0, 30.0)]


def asked(*targets: tuple[float, float]) -> list[Wish]:
    return [Wish("target", target, "", AS_ANNOTATED, NAMES, {"highest": 0.0, "share": 0.0}) for target in targets]


def given(mean_VK: list[list[float]], directions_VK: np.ndarray | None = None) -> Rewards:
    """Two prompts, 2 points above and below the means."""
    reward_PVSK = np.array(mean_VK)[None, :, None, :] + np.array([-2.0, 2.0])[:, None, None, None]
    return Rewards(System("asked"), ("p", "q"), directions_VK, reward_PVSK)


def test_the_distance_is_between_what_was_asked_and_each_answer() -> None:
    wishes = asked((90.0, 20.0), (100.0, 40.0))
    found = distance(given([[70.0, 30.0], [75.0, 40.0]]), wishes, [0, 1], NAMES, FEW)
    # helpfulness: 22 and 18, then 27 and 23; verbosity: 8 and 12, then 2 and 2
    assert found["helpfulness"].value == pytest.approx((22 + 18 + 27 + 23) / 4)
    assert found["verbosity"].value == pytest.approx((8 + 12 + 2 + 2) / 4)


def test_asking_for_more_is_compared_with_the_annotated_target_beside_it() -> None:
    """Off by 20 and by 5 as annotated at verbosity 20 and 40; asked 10 points more at 20 alone, off by 34."""
    about = {"highest": 0.0, "share": 0.5}
    wishes = [*asked((80.0, 20.0), (90.0, 40.0)), Wish("target", (90.0, 20.0), "", "beyond", NAMES, about)]
    system = given([[60.0, 25.0], [85.0, 45.0], [56.0, 30.0]])
    fault_PVS = [[[()], [("empty",)], [("empty",)]], [[()], [()], [()]]]
    found = more_than_annotated(system, fault_PVS, wishes, [2], FEW)
    assert found is not None
    assert found.distance["helpfulness"].value == pytest.approx(34 - 20)
    assert found.distance["verbosity"].value == pytest.approx(10 - 5)
    assert found.degenerate.value == pytest.approx(0.5)  # and not against the mean over both annotated targets
    assert more_than_annotated(system, fault_PVS, wishes, [0, 1], FEW) is None


def dial(*angles: float) -> tuple[list[Wish], np.ndarray]:
    directions = np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))], axis=1)
    groups = ["trained range" if -45 <= a <= 0 else "above" if a > 0 else "below" for a in angles]
    wishes = [
        Wish("direction", tuple(v), "", group, NAMES, {"angle": a})
        for v, group, a in zip(directions.tolist(), groups, angles, strict=True)
    ]
    return wishes, directions


def test_beyond_its_range_a_dial_follows_from_the_trained_end_to_the_farthest_angle() -> None:
    wishes, directions = dial(15, 0, -45, -60, -75)
    system = given([[80, 58], [80, 60], [70, 40], [68, 37], [66, 38]], directions)
    moved = [follows_on(system, wishes, at, FEW) for at in ([0], [1, 2], [3, 4])]
    # above 0 it should rise and falls by 2; within it falls by 20; below -45 it falls by 2 in all
    assert [one.value if one else None for one in moved] == pytest.approx([-2, 20, 2])
    assert follows_on(given([[70, 40]], directions[2:3]), wishes[2:3], [0], FEW) is None


def test_what_lies_in_the_margin_is_told_from_the_arc_and_from_what_no_training_had() -> None:
    """Trained from -55 to 10 degrees, for users from -45 to 0."""
    groups = {margin_group(angle, -45.0, 0.0, 10.0): angle for angle in (15.0, 10.0, 0.0, -22.5, -45.0, -52.5, -75.0)}
    assert list(groups) == [
        "above 10 degrees", "margin, 0 to 10 degrees", "asked arc", "margin, -45 to -55 degrees", "below -55 degrees",
    ]  # fmt: skip
    assert [name for name in groups if reachable(name)] == ["asked arc"]
    assert [name for name in groups if trained_on(name)] == list(groups)[1:4]


def test_beyond_a_margin_a_dial_follows_from_the_margins_end() -> None:
    wishes, directions = dial(0, -45, -55, -75)
    names = ("asked arc", "asked arc", "margin, -45 to -55 degrees", "below -55 degrees")
    wishes = [replace(wish, group=name) for wish, name in zip(wishes, names, strict=True)]
    system = given([[80, 60], [70, 40], [68, 37], [66, 33]], directions)
    assert [follows_on(system, wishes, at, FEW).value for at in ([0, 1], [2], [3])] == [20, 3, 4]


def test_regret_can_be_asked_of_some_directions_alone() -> None:
    """At -75 degrees the answers of -45 would have been better; elsewhere each direction has its own best."""
    wishes, directions = dial(0, -45, -75)
    system = given([[80, 60], [72, 40], [60, 45]], directions)
    assert regret(system, FEW, [0, 1]).value == pytest.approx(0, abs=1e-9)
    v = directions[2]
    lost = float(v @ [72, 40] - v @ [60, 45])
    assert regret(system, FEW, [2]).value == pytest.approx(lost)
    assert regret(system, FEW).value == pytest.approx(lost / 3)
    assert len(wishes) == 3


def test_a_target_is_followed_as_a_dial_is() -> None:
    system = given([[70, 50], [70, 30], [70, 45]])
    found = following(system, np.array([60.0, 20.0, 40.0]), FEW)
    assert found.kendall_tau is not None
    assert (found.kendall_tau.value, found.spearman, found.span.value) == (1, 1, 20)


def test_the_figures_are_plain_json_by_condition_and_by_group() -> None:
    wishes, directions = dial(15, 0, -45)
    system = given([[80, 62], [80, 60], [70, 40]], directions)
    fault_PVS = [[[()], [()], [("empty",)]], [[()], [()], [()]]]
    found = figures(system, fault_PVS, wishes, 0.3, FEW, np.array([[90, 70], [90, 60], [80, 35]]))
    assert type(found).model_validate_json(found.model_dump_json()) == found
    assert [(group.name, group.conditions) for group in found.groups] == [("above", 1), ("trained range", 2)]
    assert found.groups[1].degenerate.share.value == 0.25
    assert found.conditions[2].optimum == {"helpfulness": 80, "verbosity": 35}
    assert found.asked_for == "directions"


@pytest.mark.parametrize(
    ("name", "policy", "condition", "conditions"),
    [("feasible-policy-2", "policy-2", "directions", 9), ("feasible-steerlm", "steerlm", "targets", None)],
)
def test_the_stage_asks_a_policy_for_more_and_measures_it(
    micro_run: Path, tmp_path: Path, name: str, policy: str, condition: str, conditions: int | None
) -> None:
    recipe = changed(load(MICRO), {"feasibility.prompts": 4, "feasibility.samples": 2})
    folders = {key: micro_run / value for key, value in {"policy": policy}.items()}
    folders |= {key: micro_run / key for key in ("data", "reward", "annotate")}
    with Run.open(tmp_path / "run", None) as run:
        take(recipe, run, Step(name, feasibility, folders, t=2, condition=condition))
    folder = tmp_path / "run" / name
    found = json.loads((folder / "feasibility.json").read_text())
    rows = list(read_rows(folder / "answers", CANDIDATES))
    assert len(found["conditions"]) == (conditions or len({row["condition_index"] for row in rows}))
    assert len(rows) == 4 * 2 * len(found["conditions"]) == read_ledger(folder)["tokens"]["scored"]
    assert found["prompts"] == 4
    assert found["measure"] == "true"
    cut = sum(not row["finished"] and bool(row["response"].strip()) for row in rows) / len(rows)
    shares = [one["degenerate"]["reasons"]["unfinished"] for one in found["conditions"]]
    assert np.mean(shares) == pytest.approx(cut, abs=1e-6)
