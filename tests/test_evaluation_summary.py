"""The Summary: its figures, and that it reads back equal."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from dpalign.measure.bootstrap import Bootstrap
from dpalign.measure.points import Rewards, by_truth
from dpalign.measure.record import jsonable, rounded
from dpalign.measure.setting import Setting
from dpalign.measure.summarize import claims, dominance_table, measured_system, summarize
from dpalign.measure.summary import Cost, Summary
from dpalign.measure.system import System

PROMPTS = tuple(f"prompt {p}" for p in range(40))
ANGLES = np.radians([0.0, -20.0, -45.0])
DIRECTIONS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)
SETTING = Setting(("helpfulness", "verbosity"), DIRECTIONS, np.array([60.0, 67.0]), Bootstrap(replicates=100))

MEANS = {
    "sft": [[66.0, 50.0]],
    "steerlm": [[64.0, 40.0], [75.0, 58.0]],
    "t1": [[76.0, 56.0], [72.0, 48.0], [66.0, 40.0]],
    "t2": [[80.0, 57.0], [76.0, 48.0], [70.0, 40.0]],
}
TRUE_FRONT = [[95.0, 67.0], [90.0, 50.0], [75.0, 30.0]]


def system(name: str, mean_VK: list[list[float]], directed: bool, iteration: int | None = None) -> Rewards:
    """Every prompt and sample varies about the means; the reward model adds 2 to the true helpfulness."""
    rng = np.random.default_rng(len(name) * 100 + len(mean_VK))
    true_PVSK = np.array(mean_VK)[None, :, None, :] + rng.normal(0, 2, (40, len(mean_VK), 2, 2))
    judged_PVSK = true_PVSK + np.array([2.0, 0.0])
    return Rewards(System(name, iteration=iteration), PROMPTS, DIRECTIONS if directed else None, judged_PVSK, true_PVSK)


SYSTEMS = [
    system("sft", MEANS["sft"], False),
    system("steerlm", MEANS["steerlm"], False),
    system("t1", MEANS["t1"], True, 1),
    system("t2", MEANS["t2"], True, 2),
]
FRONT = by_truth(system("true front", TRUE_FRONT, True))


COSTS = {"t2": Cost(sampled_tokens=1000, seconds=12.5)}


@pytest.fixture(scope="module")
def world() -> Summary:
    return summarize(SYSTEMS, SETTING, true_front=FRONT, costs=COSTS)


def test_a_point_names_its_direction_and_its_rewards_by_objective(world: Summary) -> None:
    point = world.systems["t2"].points[2]
    assert point.direction == pytest.approx({"helpfulness": 0.7071, "verbosity": -0.7071}, abs=1e-4)
    assert point.angle == pytest.approx(-45)
    assert point.by("helpfulness").value == pytest.approx(70, abs=1)
    assert point.by("helpfulness", judged=True).value == pytest.approx(72, abs=1)
    assert world.systems["sft"].points[0].direction is None


def test_figures_are_by_the_truth_with_the_reward_models_opinion_beside(world: Summary) -> None:
    t2 = world.systems["t2"]
    figures = t2.figures
    assert world.measure == "true"
    assert figures.span.value == pytest.approx(17, abs=1)
    assert figures.span.low < figures.span.value < figures.span.high
    assert figures.span_share.value == pytest.approx(17 / 37, abs=0.04)
    assert 0 < figures.true_front_share.value < 1
    assert figures.regret.value == pytest.approx(0, abs=0.5)
    assert t2.judged.objective.value > figures.objective.value + 1  # the reward model's opinion is 2 points kinder
    assert t2.opinion_gap["helpfulness"].value == pytest.approx(2)
    assert (t2.cost, world.systems["t1"].cost) == (COSTS["t2"], None)
    sft = world.systems["sft"].figures
    assert [sft.kendall_tau, sft.spearman, sft.regret, sft.span, sft.span_share] == [None] * 5


def test_the_last_iteration_dominates_and_the_table_holds_the_papers_claims(world: Summary) -> None:
    rows = {(row.a, row.b): row for row in world.dominance}
    expected = [("t1", "sft"), ("t1", "steerlm"), ("t2", "sft"), ("t2", "steerlm"), ("t2", "t1")]
    assert list(rows) == expected == claims(SYSTEMS)
    assert rows["t2", "sft"].dominates
    assert rows["t2", "sft"].coverage.share == 1
    assert rows["t2", "sft"].margin.above_zero
    assert rows["t2", "t1"].objective_lead.value == pytest.approx(3.5, abs=0.5)


def test_a_system_that_leads_nowhere_dominates_nobody() -> None:
    rows = dominance_table(SYSTEMS, SETTING, [("t2", "t1"), ("t1", "t2"), ("sft", "t2")])
    assert [row.dominates for row in rows] == [True, False, False]
    # 1 / (100 + 1) is the smallest p-value of 100 replicates; Holm triples the smallest of three
    assert [row.p_value for row in rows] == pytest.approx([1 / 101, 1, 1], abs=1e-6)
    assert [row.p_holm for row in rows] == pytest.approx([3 / 101, 1, 1], abs=1e-6)


def test_the_summary_reads_back_equal_and_is_the_same_bytes_again(world: Summary) -> None:
    written = rounded(world)
    assert Summary.model_validate_json(written.model_dump_json()) == written
    again = rounded(summarize(SYSTEMS, SETTING, FRONT, costs=COSTS))
    assert again.model_dump_json() == written.model_dump_json()
    with pytest.raises(ValueError, match="typo"):
        Summary.model_validate(written.model_dump() | {"typo": 1})


def test_the_judge_has_figures_and_pairs_of_its_own(world: Summary) -> None:
    """A judge 3 points less kind than the truth to every answer: E_v J falls, and no lead changes."""
    stern = np.array([3.0, 0.0])
    judged = [replace(one, judge_PVSK=one.true_reward_PVSK - stern) for one in SYSTEMS]
    found = summarize(judged, SETTING, FRONT)
    for name, one in found.systems.items():
        fall = one.figures.objective.value - one.by_judge.objective.value
        assert fall == pytest.approx(3 * DIRECTIONS[:, 0].mean(), abs=1e-6)
        assert (one.figures, one.by_judge.hypervolume) == (world.systems[name].figures, None)
    for row, true in zip(found.dominance_by_judge, world.dominance, strict=True):
        assert (row.a, row.b, row.dominates) == (true.a, true.b, true.dominates)
        assert row.objective_lead.value == pytest.approx(true.objective_lead.value)
    assert found.dominance_of("t2", "sft", by_judge=True) == found.dominance_by_judge[2]
    assert found.dominance == world.dominance
    some = summarize([SYSTEMS[0], *judged[1:]], SETTING, FRONT)
    assert (some.dominance_by_judge, some.systems["sft"].by_judge) == (None, None)


def test_each_lead_in_the_objective_is_adjusted_over_all_pairs(world: Summary) -> None:
    # 2 / (100 + 1) is the smallest two-sided p-value of 100 replicates; Holm multiplies the smallest of five by five
    assert [row.lead_p_holm for row in world.dominance] == pytest.approx([10 / 101] * 5)


def test_words_and_degenerate_answers_stand_at_every_point(world: Summary) -> None:
    words_PVS = np.broadcast_to(np.array([90.0, 60.0, 30.0])[None, :, None], (40, 3, 2))
    degenerate_PVS = np.zeros((40, 3, 2), dtype=bool)
    degenerate_PVS[:10, 2, 0] = True
    t2 = replace(SYSTEMS[3], words_PVS=words_PVS, degenerate_PVS=degenerate_PVS)
    found = measured_system(t2, SETTING)
    assert [point.words.value for point in found.points] == [90, 60, 30]
    assert [point.degenerate.value for point in found.points] == [0, 0, 0.125]
    assert 0 < found.points[2].degenerate.low < 0.125 < found.points[2].degenerate.high
    assert found.length.last_to_first.value == pytest.approx(1 / 3)
    assert {point.words for point in world.systems["t2"].points} == {None}


def test_without_truth_the_reward_models_opinion_is_the_measure() -> None:
    found = summarize([replace(one, true_reward_PVSK=None) for one in SYSTEMS], SETTING)
    assert (found.measure, found.dominance_judged) == ("judged", None)
    t2 = found.systems["t2"]
    assert (t2.judged, t2.figures.true_front_share, t2.points[0].true_rewards) == (None, None, None)
    assert t2.figures.objective == measured_system(SYSTEMS[3], SETTING).judged.objective


def test_three_objectives_have_an_objective_and_a_regret_but_no_dial() -> None:
    directions = np.array([[0.6, 0.8, 0.0], [0.6, 0.0, -0.8]])
    setting = Setting(("a", "b", "c"), directions, np.array([0.0, 0.0, 100.0]), Bootstrap(replicates=20))
    reward_PVSK = np.random.default_rng(0).uniform(0, 100, (6, 2, 1, 3))
    found = measured_system(Rewards(System("t1"), PROMPTS[:6], directions, reward_PVSK), setting)
    assert found.figures.regret is not None
    assert found.figures.hypervolume.value > 0
    assert (found.figures.kendall_tau, found.points[0].angle) == (None, None)


def test_what_cannot_be_compared_is_refused_by_name() -> None:
    sft, t1 = SYSTEMS[0], SYSTEMS[2]
    with pytest.raises(ValueError, match="'sft' has true rewards and 't1' has none"):
        summarize([sft, replace(t1, true_reward_PVSK=None)], SETTING)
    with pytest.raises(ValueError, match="share a name"):
        summarize([sft, sft], SETTING)
    few = replace(SETTING, bootstrap=Bootstrap(replicates=10))
    with pytest.raises(ValueError, match="10 bootstrap replicates cannot decide 1 pairs at once: set at least 20"):
        dominance_table([sft, t1], few, [("t1", "sft")])


def test_a_stated_sense_settles_directions_of_two_minds() -> None:
    fan = np.array([[0.8, 0.6], [0.8, -0.6]])
    assert Setting(("helpfulness", "verbosity"), fan, None).disputed == ("verbosity",)
    stated = Setting(("helpfulness", "verbosity"), fan, np.array([60.0, 67.0]), senses=(1, -1))
    assert stated.senses_K.tolist() == [1, -1]


def test_json_holds_six_decimals_and_no_nan() -> None:
    assert jsonable({"a": np.array([1.0, 2.12345678]), "b": (np.int64(2), -1e-9)}) == {
        "a": [1.0, 2.123457],
        "b": [2, 0],
    }
    assert json.dumps(jsonable(-1e-9)) == "0.0"  # and not "-0.0"
    for bad in (float("nan"), {1}):
        with pytest.raises(ValueError, match="cannot hold"):
            jsonable(bad)


def test_measuring_and_the_page_load_neither_torch_nor_the_recipe() -> None:
    program = (
        "import sys, dpalign.measure.summarize, dpalign.measure.comparison, dpalign.page.write;"
        "print([name for name in sys.modules if name.startswith(('torch', 'dpalign.recipe', 'dpalign.stages'))])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"
