"""Rewards that know what they do not know: members of an ensemble, their spread, and a choice that heeds it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from dpalign.measure.answers import reward_quality
from dpalign.measure.reading import Reading, read_rewards
from dpalign.measure.system import policy_at
from dpalign.page.tables import quality_tables
from dpalign.paper.ensemble import head_of, masked_labels, member_objectives, readings, spread_of, with_members
from dpalign.paper.objectives import Objective
from dpalign.recipe import changed, load
from dpalign.rewards.knobs import RewardTable
from dpalign.rewards.ridge import ridge_heads
from dpalign.rewards.scale import fitted_scales
from dpalign.rows import SCORES, matrix_of, read_table
from dpalign.stages.pools import Pools, best_answers
from dpalign.stages.select import Selection

MICRO = Path(__file__).parent.parent / "recipes" / "micro.toml"
HEADS = ("help", "verbose")
OBJECTIVES = (Objective("helpfulness", ("help",)), Objective("verbosity", ("verbose",)))


def test_every_member_has_every_head_once_more() -> None:
    heads = with_members(HEADS, 2)
    assert heads == ("help", "verbose", "help~1", "verbose~1", "help~2", "verbose~2")
    assert len(readings(heads, OBJECTIVES)) == 2
    assert readings(HEADS, OBJECTIVES) == []
    assert list(map(head_of, heads)) == ["help", "verbose"] * 3


def test_a_member_learns_from_half_of_the_prompts_whole_prompts_at_a_time() -> None:
    prompts = [f"prompt {i}" for i in range(400)]
    rows = np.array([masked_labels([80.0, None], prompt, 3, seed=1) for prompt in prompts], dtype=float)
    assert rows.shape == (400, 2 * 4)
    assert (rows[:, 0] == 80).all()
    seen = ~np.isnan(rows[:, [2, 4, 6]])
    assert (abs(seen.mean(axis=0) - 0.5) < 0.1).all()
    assert not (seen[:, 0] == seen[:, 1]).all()
    assert np.isnan(rows[:, 1::2]).all()  # a label that is missing is missing for all
    assert masked_labels([1.0], "prompt 3", 3, seed=1) == masked_labels([1.0], "prompt 3", 3, seed=1)


def test_a_member_reads_its_own_heads_and_shares_those_of_functions() -> None:
    heads = ("ours/help", "ours/help~1", "ours/help~2", "words/score")
    objectives = (Objective("helpfulness", ("ours/help", "words/score")), Objective("length", ("words/score",)))
    reward_NEK = member_objectives(np.array([[50.0, 40.0, 70.0, 10.0]]), heads, objectives)
    assert reward_NEK.tolist() == [[[25.0, 10.0], [40.0, 10.0]]]


def test_several_reward_models_of_one_objective_are_members_of_it() -> None:
    heads = ("a/help", "a/depth", "b/score", "words/score")
    objectives = (Objective("helpfulness", ("a/help", "a/depth", "b/score")), Objective("length", ("words/score",)))
    reward_NH = np.array([[50.0, 70.0, 20.0, 10.0], [30.0, 30.0, 30.0, 90.0]])
    reward_NEK = member_objectives(reward_NH, heads, objectives)
    assert reward_NEK.tolist() == [[[60.0, 10.0], [20.0, 10.0]], [[30.0, 90.0], [30.0, 90.0]]]
    spread_NK = spread_of(reward_NH, heads, objectives)
    assert spread_NK is not None
    assert spread_NK == pytest.approx(np.array([[800**0.5, 0.0], [0.0, 0.0]]))
    alone = (Objective("helpfulness", ("a/help", "a/depth")), objectives[1])
    assert readings(heads, alone) == []  # two heads of one model are no two opinions
    assert spread_of(reward_NH, heads, alone) is None


def test_no_objective_has_no_spread() -> None:
    """A reward model whose heads every objective averages with another reward's is measured by its heads alone."""
    assert spread_of(np.zeros((1, 3)), ("help", "help~1", "help~2"), ()) is None


def test_an_ensemble_beside_another_model_shares_it() -> None:
    heads = ("ours/help", "ours/help~1", "ours/help~2", "b/score")
    objectives = (Objective("helpfulness", ("ours/help", "b/score")),)
    assert [one.heads for one, *_ in readings(heads, objectives)] == [
        ("ours/help~1", "b/score"),
        ("ours/help~2", "b/score"),
    ]


def test_the_spread_of_half_samples_is_about_the_error_of_the_whole_fit() -> None:
    rng = np.random.default_rng(0)
    x_ND = rng.normal(size=(300, 20))
    weight_D, noise_N = rng.normal(size=20), 4.0 * rng.normal(size=300)
    prompts = [str(i) for i in range(300)]
    label_N = x_ND @ weight_D + noise_N
    target_NE = [masked_labels([float(y)], prompt, 16, seed=0) for y, prompt in zip(label_N, prompts, strict=True)]
    fitted = ridge_heads(x_ND, np.array(target_NE, dtype=float), prompts).weights
    fresh_ND = rng.normal(size=(500, 20)) * rng.uniform(0.2, 3.0, size=(500, 1))  # near what was seen, and far from it
    error_N = fresh_ND @ (fitted[0] - weight_D)
    spread_N = np.std([fresh_ND @ fitted[member] for member in range(1, 17)], axis=0, ddof=1)
    assert 0.6 < np.sqrt(np.mean(spread_N**2) / np.mean(error_N**2)) < 1.6
    assert np.corrcoef(spread_N, abs(error_N))[0, 1] > 0.3


def pools(rewards: list[list[float]], members: list[list[list[float]]], kind: str = "target") -> Pools:
    """Answers to one prompt; drawn under targets, they may serve any direction."""
    n = len(rewards)
    zero_N = np.zeros(n, dtype=np.int64)
    condition = pa.chunked_array([pa.array([[1.0, 0.0]] * n, pa.list_(pa.float32()))])
    reward_NK, member_NEK = np.array(rewards), np.array(members)
    whole_N = np.ones(n, dtype=bool)
    return Pools(Path("a"), ["p"], zero_N, zero_N, whole_N, kind, condition, reward_NK, lambda: member_NEK)


@pytest.mark.parametrize("kind", ["target", "direction"])
def test_a_cautious_choice_leaves_the_answer_that_the_members_quarrel_about(kind: str) -> None:
    doubtful, sure = [[40.0, 50.0], [100.0, 50.0]], [[69.0, 50.0], [67.0, 50.0]]
    answers = pools([[70.0, 50.0], [68.0, 50.0]], [doubtful, sure], kind)
    wanted_BVK = np.array([[[1.0, 0.0]]])
    assert best_answers(answers, wanted_BVK, Selection()).tolist() == [[0]]
    assert best_answers(answers, wanted_BVK, Selection(caution=1.0)).tolist() == [[1]]


def test_errors_that_cancel_in_v_cost_nothing() -> None:
    # both members see the same v . r at -45 degrees: one thinks the answer better and longer
    agreed, lower = [[60.0, 40.0], [80.0, 60.0]], [[69.0, 50.5], [69.0, 50.5]]
    answers = pools([[70.0, 50.0], [69.0, 50.5]], [agreed, lower])
    wanted_BVK = np.array([[[np.sqrt(0.5), -np.sqrt(0.5)]]])
    assert best_answers(answers, wanted_BVK, Selection(caution=10.0)).tolist() == [[0]]


def test_members_are_in_the_units_of_the_head_they_stand_beside() -> None:
    rewards = {"ours": RewardTable(trained=True, scale="fit")}
    raw_NH = np.array([[0.0, 40.0], [1.0, 50.0], [2.0, 60.0]])
    first, member = fitted_scales(rewards, ("help", "help~1"), raw_NH)
    assert first == member == pytest.approx((80 / 1.8, 10 - 80 / 1.8 * 0.1))


def test_caution_without_an_ensemble_is_refused() -> None:
    recipe = load(MICRO)
    with pytest.raises(ValueError, match=r"selection\.caution is 1.*reward\.ensemble"):
        changed(recipe, {"selection.caution": 1.0})
    named: dict[str, object] = {f"rewards.{name}.function": "dpalign.rewards.functions:words" for name in ("a", "b")}
    named["data.judge"] = 0
    two = named | {"objectives": {"helpfulness": ["a", "b"], "verbosity": ["b"]}, "selection.caution": 1.0}
    assert len(readings(changed(recipe, two).scored_heads, changed(recipe, two).objective_list)) == 2
    with pytest.raises(ValueError, match="let an objective read several"):
        changed(recipe, two | {"objectives": {"helpfulness": ["a"], "verbosity": ["b"]}})
    with_ensemble = changed(recipe, {"selection.caution": 1.0, "reward.ensemble": 4})
    assert len(with_ensemble.scored_heads) == 5 * len(recipe.heads)
    assert with_ensemble.judged().reward_heads == recipe.heads


def test_the_report_says_whether_the_spread_of_several_rewards_tells_their_error(micro_run: Path) -> None:
    folder, names = micro_run / "evaluate-policy-1", ("a", "b")
    heads = tuple(f"{names[i % 2]}/h{i}" for i in range(10))
    reading = Reading(heads, (Objective("helpfulness", ("a/h0", "b/h1")), Objective("verbosity", ("a/h4",))))
    answered = read_rewards(folder, policy_at(1), reading, truth=False)
    reward_NH = matrix_of(read_table(folder / "scores", SCORES, ["rewards"])["rewards"])
    assert answered.spread_PVSK is not None
    assert answered.spread_PVSK[..., 0].ravel() == pytest.approx(abs(reward_NH[:, 0] - reward_NH[:, 1]) / np.sqrt(2))
    assert not answered.spread_PVSK[..., 1].any()
    found = reward_quality(micro_run / "reward", [answered], reading.names, resamples=10, seed=0)
    assert found.spread_on_policy["DPA t=1"]["helpfulness"].n == len(reward_NH)
    shown = quality_tables(SimpleNamespace(reward_model=found))  # type: ignore[arg-type]
    assert shown["Spread of the rewards, on the size of the error of these"] is not None
