"""summary.json: what it holds, and that it is plain JSON."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dpalign.measure.bootstrap import Bootstrap
from dpalign.measure.points import SystemRewards, judged_by_truth
from dpalign.measure.summary import Setting, claims, dominance_table, jsonable, summarize, system_summary

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
FIGURES = ("true_front_share", "objective", "kendall_tau", "spearman", "regret", "span", "span_share")


def system(name: str, mean_VK: list[list[float]], directed: bool, iteration: int | None = None) -> SystemRewards:
    """Every prompt and sample varies about the means; the reward model adds 2 to the true helpfulness."""
    rng = np.random.default_rng(len(name) * 100 + len(mean_VK))
    true_PVSK = np.array(mean_VK)[None, :, None, :] + rng.normal(0, 2, (40, len(mean_VK), 2, 2))
    judged_PVSK = true_PVSK + np.array([2.0, 0.0])
    return SystemRewards(name, iteration, PROMPTS, DIRECTIONS if directed else None, judged_PVSK, true_PVSK)


SYSTEMS = [
    system("sft", MEANS["sft"], False),
    system("steerlm", MEANS["steerlm"], False),
    system("t1", MEANS["t1"], True, 1),
    system("t2", MEANS["t2"], True, 2),
]
FRONT = judged_by_truth(system("true front", TRUE_FRONT, True))


@pytest.fixture(scope="module")
def world() -> dict[str, Any]:
    return summarize(
        SYSTEMS,
        SETTING,
        true_front=FRONT,
        costs={"t2": {"sampled_tokens": 1000, "seconds": 12.5}},
        reward_model={"helpsteer-verbosity": {"pearson": 0.97}},
        counts={"data": {"in": 10, "out": 9, "filtered": {"too long": 1}}},
        seeds={"seeds": [0]},
    )


def test_the_summary_has_every_key_of_the_contract(world: dict[str, Any]) -> None:
    assert {"systems", "dominance", "reward_model", "counts", "seeds"} <= world.keys()
    for entry in world["systems"].values():
        assert {"iteration", "points", "hypervolume", *FIGURES} <= entry.keys()
        assert {"sampled_tokens", "scored_responses", "trained_tokens", "seconds"} <= entry.keys()
        assert entry["hypervolume"].keys() == {"value", "low", "high"}
    for row in world["dominance"]:
        assert {"a", "b", "share", "margin", "dominates"} <= row.keys()
        assert row["margin"].keys() == {"value", "low", "high"}
    assert world["reward_model"] == {"helpsteer-verbosity": {"pearson": 0.97}}
    assert world["counts"]["data"]["filtered"] == {"too long": 1}
    assert world["seeds"] == {"seeds": [0]}


def test_a_point_names_its_direction_and_its_rewards_by_objective(world: dict[str, Any]) -> None:
    point = world["systems"]["t2"]["points"][2]
    assert point["direction"] == pytest.approx({"helpfulness": 0.7071, "verbosity": -0.7071}, abs=1e-4)
    assert point["angle"] == pytest.approx(-45)
    assert point["rewards"].keys() == {"helpfulness", "verbosity"}
    assert point["true_rewards"]["helpfulness"]["mean"] == pytest.approx(70, abs=1)
    assert point["rewards"]["helpfulness"]["mean"] == pytest.approx(72, abs=1)
    assert world["systems"]["sft"]["points"][0]["direction"] is None


def test_figures_are_bare_numbers_by_the_truth_with_their_intervals_beside(world: dict[str, Any]) -> None:
    t2 = world["systems"]["t2"]
    assert world["measure"] == "true"
    assert t2["span"] == pytest.approx(17, abs=1)
    assert t2["intervals"]["span"]["low"] < t2["span"] < t2["intervals"]["span"]["high"]
    assert t2["span_share"] == pytest.approx(17 / 37, abs=0.04)
    assert 0 < t2["true_front_share"] < 1
    assert t2["regret"] == pytest.approx(0, abs=0.5)
    assert t2["falls_at_every_step"] is True
    assert t2["judged"]["objective"] > t2["objective"] + 1  # the reward model's opinion is 2 points kinder
    assert t2["opinion_gap"]["helpfulness"]["value"] == pytest.approx(2)
    assert t2["sampled_tokens"] == 1000
    assert t2["trained_tokens"] is None
    sft = world["systems"]["sft"]
    assert [sft[name] for name in ("kendall_tau", "spearman", "regret", "span", "span_share")] == [None] * 5


def test_the_last_iteration_dominates_and_the_table_holds_the_papers_claims(world: dict[str, Any]) -> None:
    rows = {(row["a"], row["b"]): row for row in world["dominance"]}
    expected = [("t1", "sft"), ("t1", "steerlm"), ("t2", "sft"), ("t2", "steerlm"), ("t2", "t1")]
    assert list(rows) == expected == claims(SYSTEMS)
    assert rows["t2", "sft"]["dominates"] is True
    assert rows["t2", "sft"]["share"] == 1
    assert rows["t2", "sft"]["margin"]["low"] > 0
    assert rows["t2", "t1"]["objective_lead"]["value"] == pytest.approx(3.5, abs=0.5)


def test_a_system_that_leads_nowhere_dominates_nobody() -> None:
    rows = dominance_table(SYSTEMS, SETTING, [("t2", "t1"), ("t1", "t2"), ("sft", "t2")])
    assert [row["dominates"] for row in rows] == [True, False, False]
    # 1 / (100 + 1) is the smallest p-value of 100 replicates; Holm triples the smallest of three
    assert [row["p_value"] for row in rows] == pytest.approx([1 / 101, 1, 1], abs=1e-6)
    assert [row["p_holm"] for row in rows] == pytest.approx([3 / 101, 1, 1], abs=1e-6)


def test_the_summary_is_plain_json_and_the_same_bytes_again(world: dict[str, Any]) -> None:
    text = json.dumps(world, allow_nan=False)
    again = summarize(SYSTEMS, SETTING, FRONT, costs={"t2": {"sampled_tokens": 1000, "seconds": 12.5}})
    assert json.loads(text) == world
    assert json.dumps(again["systems"]) == json.dumps(world["systems"])


def test_without_truth_the_reward_models_opinion_is_the_measure() -> None:
    judged = [replace(one, true_reward_PVSK=None) for one in SYSTEMS]
    found = summarize(judged, SETTING)
    assert found["measure"] == "judged"
    assert found["dominance_judged"] is None
    t2 = found["systems"]["t2"]
    assert (t2["judged"], t2["true_front_share"], t2["points"][0]["true_rewards"]) == (None, None, None)
    assert t2["objective"] == pytest.approx(system_summary(SYSTEMS[3], SETTING)["judged"]["objective"])


def test_three_objectives_have_an_objective_and_a_regret_but_no_dial() -> None:
    directions = np.array([[0.6, 0.8, 0.0], [0.6, 0.0, -0.8]])
    setting = Setting(("a", "b", "c"), directions, np.array([0.0, 0.0, 100.0]), Bootstrap(replicates=20))
    reward_PVSK = np.random.default_rng(0).uniform(0, 100, (6, 2, 1, 3))
    entry = system_summary(SystemRewards("t1", 1, PROMPTS[:6], directions, reward_PVSK), setting)
    assert entry["objective"] is not None
    assert entry["regret"] is not None
    assert entry["hypervolume"]["value"] > 0
    assert entry["kendall_tau"] is None
    assert entry["points"][0]["angle"] is None


def test_what_cannot_be_compared_is_refused_by_name() -> None:
    sft, t1 = SYSTEMS[0], SYSTEMS[2]
    with pytest.raises(ValueError, match="'sft' has true rewards and 't1' has none"):
        summarize([sft, replace(t1, true_reward_PVSK=None)], SETTING)
    with pytest.raises(ValueError, match="share a name"):
        summarize([sft, sft], SETTING)
    with pytest.raises(ValueError, match="no systems"):
        summarize([], SETTING)
    with pytest.raises(ValueError, match="unknown cost 'tokens'"):
        summarize([sft], SETTING, costs={"sft": {"tokens": 3}})
    with pytest.raises(ValueError, match="asks for system 't9'; known are sft"):
        dominance_table([sft], SETTING, [("t9", "sft")])
    few = replace(SETTING, bootstrap=Bootstrap(replicates=10))
    with pytest.raises(ValueError, match="10 bootstrap replicates cannot decide 1 pairs at once: set at least 20"):
        dominance_table([sft, t1], few, [("t1", "sft")])
    with pytest.raises(ValueError, match=r"a reference of shape \(1,\)"):
        Setting(("helpfulness", "verbosity"), DIRECTIONS, np.array([60.0]))


def test_directions_of_two_minds_need_the_senses_said() -> None:
    fan = np.array([[0.8, 0.6], [0.8, -0.6]])
    with pytest.raises(ValueError, match="some directions want more verbosity and others less, so no front has a side"):
        Setting(("helpfulness", "verbosity"), fan, np.array([60.0, 67.0]))
    assert Setting(("helpfulness", "verbosity"), fan, None).disputed == ("verbosity",)
    said = Setting(("helpfulness", "verbosity"), fan, np.array([60.0, 67.0]), senses=(1, -1))
    assert said.senses_K.tolist() == [1, -1]
    with pytest.raises(ValueError, match=r"senses are \(1, 0\): 2 of them are needed"):
        Setting(("helpfulness", "verbosity"), fan, np.array([60.0, 67.0]), senses=(1, 0))


def test_jsonable_drops_nan_and_refuses_what_json_has_no_word_for() -> None:
    assert jsonable({"a": np.array([1.0, np.nan]), "b": (np.int64(2), -1e-9)}) == {"a": [1.0, None], "b": [2, 0.0]}
    assert json.dumps(jsonable(-1e-9)) == "0.0"  # and not "-0.0"
    with pytest.raises(ValueError, match="of type set"):
        jsonable({1})
