"""The learners of the loop beside rejection sampling: pairs and groups under directions, and their order."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tiny
from conftest import MICRO
from dpalign.measure.lineage import lineage
from dpalign.paper.contrast import Contrast, contrasts
from dpalign.pipeline.runner import execute
from dpalign.pipeline.steps import knobs_of, steps
from dpalign.recipe import Recipe, changed, from_mapping, load
from dpalign.rows import CANDIDATES, PAIRS, PROMPTS, SCORES, prompt_id, read_rows, user_prompt, write_rows
from dpalign.runs.folder import Tally
from dpalign.stages.contrast import contrast
from dpalign.stages.reinforce import PolicyGRPO, earlier, groups_of, reinforce, worth_by
from dpalign.stages.stage import Job, Step
from dpalign.stages.training import model_folder
from dpalign.train import rl
from dpalign.train.rl import directional_reward
from test_rl import RECIPE, SIX
from test_rl import job as rl_job

PAPER = Recipe(name="paper", iterations=3)
TWO = from_mapping(
    Recipe,
    {
        "name": "test",
        "heads": ["a", "b"],
        "objectives": {"helpfulness": ["a"], "verbosity": ["b"]},
        "preference": {"distribution": "fixed", "listed": [[1.0, 0.0], [0.6, -0.8]], "directions": 2},
        "model": {"chat": "world-v1"},
        "selection": {"reach": 180.0},
    },
)


# Pairs


def test_each_direction_has_its_best_against_its_worst_and_against_the_others_best() -> None:
    """Long and good, short, and poor: the first two are each chosen once and rejected once."""
    score_VM = np.array([[90.0, 50.0, 10.0], [-10.0, 40.0, -20.0]])
    found = list(contrasts(score_VM, np.ones((2, 3), dtype=bool), turned=True))
    assert found == [
        Contrast(0, 0, 2, "worst"),
        Contrast(0, 0, 1, "turned"),
        Contrast(1, 1, 2, "worst"),
        Contrast(1, 1, 0, "turned"),
    ]
    assert [pair.origin for pair in contrasts(score_VM, np.ones((2, 3), dtype=bool), turned=False)] == ["worst"] * 2


def test_a_direction_takes_allowed_answers_alone_and_ties_make_no_pair() -> None:
    score_VM = np.array([[90.0, 50.0, 10.0], [7.0, 7.0, 7.0], [1.0, 2.0, 3.0]])
    allowed_VM = np.array([[False, True, True], [True, True, True], [False, False, False]])
    assert list(contrasts(score_VM, allowed_VM, turned=False)) == [Contrast(0, 1, 2, "worst")]
    assert list(contrasts(score_VM[1:], allowed_VM[1:], turned=True)) == []


def scored(folder: Path, answers: list[tuple[str, list[float], bool, int]]) -> Job:
    """One prompt's candidates as (response, rewards, whether it was finished, the direction it was drawn under)."""
    messages = user_prompt("explain tea.")
    name = prompt_id(messages)
    write_rows(
        folder / "data" / "prompts" / "part-00000.parquet",
        [{"prompt_id": name, "messages": messages, "split": "D1"}],
        PROMPTS,
    )
    keys = [
        {"prompt_id": name, "t": 1, "condition_index": direction, "sample": i}
        for i, (*_, direction) in enumerate(answers)
    ]
    candidates = [
        key
        | {
            "condition_kind": "direction",
            "condition": TWO.preference.listed[key["condition_index"]],
            "messages": messages,
            "response": response,
            "tokens": 3,
            "finished": finished,
        }
        for key, (response, _, finished, _) in zip(keys, answers, strict=True)
    ]
    scores = [key | {"rewards": rewards} for key, (_, rewards, *_) in zip(keys, answers, strict=True)]
    write_rows(folder / "candidates" / "part-00000.parquet", candidates, CANDIDATES)
    write_rows(folder / "scores" / "part-00000.parquet", scores, SCORES)
    work: Any = SimpleNamespace(folder=folder / "out", run=SimpleNamespace(log=print), tally=Tally())
    return Job(TWO, work, {name: folder / name for name in ("candidates", "scores", "data")}, t=1)


ANSWERS = [
    ("tea is hot and calms people.", [90.0, 60.0], True, 0),
    ("tea is hot.", [60.0, 20.0], True, 1),
    ("tea is cold.", [10.0, 20.0], True, 1),
    ("tea is", [99.0, 1.0], False, 0),
]


def test_pairs_state_their_direction_and_what_both_answers_are_worth(tmp_path: Path) -> None:
    """Cut answers stand in none; each row's chat has the line of the direction that prefers its first answer."""
    job = scored(tmp_path, ANSWERS)
    contrast.run(job)
    rows = list(read_rows(tmp_path / "out", PAIRS))
    assert [(row["chosen"], row["rejected"], row["origin"]) for row in rows] == [
        (ANSWERS[0][0], ANSWERS[2][0], "worst"),
        (ANSWERS[0][0], ANSWERS[1][0], "turned"),
        (ANSWERS[1][0], ANSWERS[2][0], "worst"),
        (ANSWERS[1][0], ANSWERS[0][0], "turned"),
    ]
    assert [row["chosen_score"] for row in rows] == pytest.approx([90.0, 90.0, 20.0, 20.0])
    assert [row["rejected_score"] for row in rows] == pytest.approx([10.0, 60.0, -10.0, 6.0])
    first, second = (json.dumps(rows[i]["messages"]) for i in (0, 2))
    assert "helpfulness*100" in first
    assert "verbosity*-80" in second
    tally = job.work.tally
    assert (tally.rows_in, tally.rows_out) == (4, 4)
    assert dict(+tally.filtered) == {"cut at max_new_tokens, or empty": 1, "chosen in no pair": 1}


def test_without_the_whole_pool_a_direction_compares_its_own_answers(tmp_path: Path) -> None:
    job = scored(tmp_path, ANSWERS)
    own = {"selection.reach": 0.0, "policy.dpo.turned": False}
    contrast.run(Job(changed(TWO, own), job.work, job.inputs, t=1))
    (row,) = read_rows(tmp_path / "out", PAIRS)
    assert (row["chosen"], row["rejected"]) == (ANSWERS[1][0], ANSWERS[2][0])


def test_an_answer_that_repeats_itself_stands_in_no_pair_where_it_may_not_be_chosen(tmp_path: Path) -> None:
    again = ("tea is hot and calms. tea is hot and calms.", [95.0, 60.0], True, 0)
    job = scored(tmp_path, [*ANSWERS, again])
    contrast.run(Job(changed(TWO, {"selection.degenerate": False}), job.work, job.inputs, t=1))
    assert again[0] not in {row[side] for row in read_rows(tmp_path / "out", PAIRS) for side in ("chosen", "rejected")}
    assert job.work.tally.filtered["degenerate"] == 1


def test_answers_that_are_worth_the_same_leave_nothing_to_learn(tmp_path: Path) -> None:
    job = scored(tmp_path, [("a", [50.0, 20.0], True, 0), ("b", [50.0, 20.0], True, 1)])
    with pytest.raises(ValueError, match=r"no pair is left of 2 finished answers: under no direction are two worth"):
        contrast.run(job)


# Groups


def test_a_group_has_a_direction_of_its_own_in_every_round() -> None:
    """The policy reads the line, the rewards do not; the same wherever it is asked for."""
    recipe = changed(PAPER, {"model.chat": "world-v1", "preference.template": "world-v1"})
    prompt = {"prompt_id": "p", "messages": user_prompt("explain tea.")}
    first, second = groups_of(recipe, 2, [prompt, prompt])
    assert first["v"] != second["v"]
    assert np.hypot(*first["v"]) == pytest.approx(1)
    assert first["asked"] == prompt["messages"] != first["messages"]
    assert next(groups_of(recipe, 2, [prompt])) == first
    assert next(groups_of(recipe, 3, [prompt]))["v"] != first["v"]


def test_a_stretched_group_states_its_direction_and_is_ranked_beyond_it() -> None:
    """Half as far again from the middle of -45 to 0, at -22.5: -45 is ranked at -56.25."""
    recipe = changed(PAPER, {"model.chat": "world-v1", "preference.template": "world-v1"})
    prompts = [{"prompt_id": f"p{i}", "messages": user_prompt("explain tea.")} for i in range(20)]
    plain = list(groups_of(recipe, 2, prompts))
    wide = list(groups_of(changed(recipe, {"policy.grpo.stretch": 1.5}), 2, prompts))
    assert [group["messages"] for group in wide] == [group["messages"] for group in plain]
    angle, ranked = (np.degrees([np.arctan2(*group["v"][::-1]) for group in groups]) for groups in (plain, wide))
    assert ranked == pytest.approx(-22.5 + 1.5 * (angle + 22.5))
    assert ranked.min() < -45
    with pytest.raises(ValueError, match=r"stretch is 1.5, and a preference.distribution of sphere has no middle"):
        changed(recipe, {"policy.grpo.stretch": 1.5, "preference.distribution": "sphere"})


def test_doubt_is_taken_off_what_an_answer_is_worth() -> None:
    """Members that disagree by 10 points of help (a standard deviation of 10/sqrt 2 at weight 1, 0.6 of it at 0.6)."""
    recipe = changed(TWO, {"reward.ensemble": 2, "selection.caution": 2.0})
    assert recipe.scored_heads == ("a", "b", "a~1", "b~1", "a~2", "b~2")
    v_VK = np.array(TWO.preference.listed)
    reward_NH = np.array([[80.0, 50.0, 75.0, 50.0, 85.0, 50.0], [60.0, 10.0, 60.0, 10.0, 60.0, 10.0]])
    doubt = 2 * 10 / np.sqrt(2)
    assert worth_by(recipe)(reward_NH, v_VK) == pytest.approx(np.array([[80 - doubt, 60], [8 - 0.6 * doubt, 28]]))
    assert worth_by(TWO)(reward_NH[:, :2], v_VK) == pytest.approx(np.array([[80.0, 60.0], [8.0, 28.0]]))


def test_an_answer_is_weighed_under_the_direction_of_its_own_group() -> None:
    """Two whole answers and a cut one to each of two directions; the cut ones earn their direction's least."""
    reader: Any = SimpleNamespace(answer=lambda ids: SimpleNamespace(text=f"{ids[0]}", whole=ids[-1] == 0))
    reward_NK = np.array([[90.0, 60.0], [60.0, 20.0], [99.0, 1.0], [90.0, 60.0], [60.0, 20.0], [99.0, 1.0]])
    first, second = TWO.preference.listed
    reward = directional_reward(lambda pairs: reward_NK, worth_by(TWO), reader)
    given = {"asked": [user_prompt("x")] * 6, "v": [first] * 3 + [second] * 3, "prompts": None}
    ids = [[1, 0], [2, 0], [3, 9]] * 2
    assert reward(completion_ids=ids, **given) == pytest.approx([90.0, 60.0, 0.0, 6.0, 20.0, -80.0])
    strict = directional_reward(lambda pairs: reward_NK, worth_by(TWO), reader, sound=lambda text: text == "1")
    assert strict(completion_ids=ids, **given) == pytest.approx([90.0, 0.0, 0.0, 6.0, -80.0, -80.0])
    none = directional_reward(lambda pairs: reward_NK, worth_by(TWO), reader, sound=lambda text: False)
    assert none(completion_ids=ids, **given) == pytest.approx([0.0] * 3 + [-80.0] * 3)


def test_a_cut_answer_earns_no_more_than_the_worst_of_any_process(monkeypatch: pytest.MonkeyPatch) -> None:
    reader: Any = SimpleNamespace(answer=lambda ids: SimpleNamespace(text="x", whole=ids[-1] == 0))
    monkeypatch.setattr(rl, "gather_object", lambda own: [*own, [-7.0, 50.0]])
    reward = directional_reward(lambda pairs: np.array([[90.0, 60.0], [99.0, 1.0]]), worth_by(TWO), reader)
    given = {"asked": [user_prompt("x")] * 2, "v": [TWO.preference.listed[0]] * 2, "prompts": None}
    assert reward(completion_ids=[[1, 0], [3, 9]], **given) == pytest.approx([90.0, -7.0])


def reinforcing(folder: Path, start: Path, **knobs: Any) -> Job:
    """A job of iteration 2 on two prompts: two updates of two groups of four."""
    settings = PolicyGRPO(samples=4, training=tiny.changed(SIX, steps=2))
    recipe = changed(tiny.changed(RECIPE, policy=tiny.changed(RECIPE.policy, grpo=settings)), knobs)
    work = rl_job(folder, start, recipe)
    return Job(recipe, work.work, work.inputs, t=2, half="D1")


def test_a_policy_learns_from_groups_and_leaves_its_curve_and_its_dial(tiny_folder: Path, tmp_path: Path) -> None:
    """Both prompts of D1 have their turn; 16 answers are scored."""
    work = reinforcing(tmp_path, tiny_folder)
    reinforce.function(work)
    assert (work.work.tally.rows_in, work.work.tally.rows_out, work.work.tally.scored) == (2, 2, 16)
    curve = json.loads((work.out / "curve.json").read_text())
    assert curve["step"] == [1, 2]
    assert curve["kl"][0] == pytest.approx(0, abs=1e-6)
    assert json.loads((work.out / "model" / "dpa.json").read_text())["iteration"] == 2


def test_the_divergence_is_measured_from_sft_where_that_is_the_reference(tiny_folder: Path, tmp_path: Path) -> None:
    """Another model than the start: the two differ before the first update."""
    other = tiny.write_model(tmp_path / "other", tiny.tokenizer(), seed=1)
    work = reinforcing(tmp_path, tiny_folder, **{"policy.grpo.reference": "sft"})
    with pytest.raises(ValueError, match=r'policy.grpo.reference is "sft", and no SFT is given; name its folder'):
        reinforce.function(work)
    reinforce.function(Job(work.recipe, work.work, {**work.inputs, "sft": other}, t=2, half="D1"))
    assert json.loads((work.out / "curve.json").read_text())["kl"][0] > 1e-3


def test_a_named_checkpoint_stands_for_a_learner_with_its_dial(tiny_folder: Path, tmp_path: Path) -> None:
    work = reinforcing(tmp_path, tmp_path / "none", **{"policy.grpo.training.checkpoint": str(tiny_folder)})
    reinforce.function(work)
    assert model_folder(work.out) == str(tiny_folder)
    assert json.loads((work.out / "model" / "dpa.json").read_text())["iteration"] == 2


def test_a_lora_has_no_reference_but_its_start() -> None:
    knobs = {"policy.grpo.reference": "sft", "policy.grpo.training.lora_rank": 8}
    with pytest.raises(ValueError, match=r'reference is "sft", and training.lora_rank 8'):
        changed(PAPER, knobs)


def test_a_half_goes_on_with_the_prompts_that_its_earlier_iterations_did_not_reach() -> None:
    """Halves alternate: of five iterations by groups after one of choices, t=4 is the second on D2, t=5 on D1."""
    recipe = changed(PAPER, {"iterations": 6, "policy.method": ["rsf", "grpo"]})
    assert [earlier(recipe, t) for t in (2, 3, 4, 5, 6)] == [0, 0, 1, 1, 2]
    assert [earlier(changed(recipe, {"alternate": False}), t) for t in (2, 3, 4)] == [0, 1, 2]


# The order


def planned(**knobs: Any) -> dict[str, Step]:
    return {step.name: step for step in steps(changed(PAPER, knobs))}


def test_each_iteration_has_its_method_and_the_last_goes_on() -> None:
    method = {"policy.method": ["rsf", "grpo"]}
    found = planned(**method)
    assert {t: found[f"policy-{t}"].stage.name for t in (1, 2, 3)} == {1: "finetune", 2: "reinforce", 3: "reinforce"}
    assert found["policy-2"].inputs["start"] == "policy-1"
    assert (found["policy-2"].half, found["policy-3"].half) == ("D2", "D1")
    assert "sample-2" not in found
    with_sft = planned(**method, **{"policy.grpo.reference": "sft"})
    assert with_sft["policy-3"].inputs["sft"] == "sft"
    assert found.keys() >= {"sample-1", "select-1"}


@pytest.mark.parametrize(("first", "sampler"), [("rsf", True), ("dpo", False), ("grpo", False)])
def test_no_steerlm_is_trained_to_sample_where_nothing_chooses_among_its_answers(first: str, sampler: bool) -> None:
    found = planned(**{"policy.method": [first]})
    assert ({"steerlm-d2", "evaluate-steerlm-d2"} <= found.keys()) == sampler
    assert not any("steerlm-d2" in step.inputs.values() for step in found.values()) or sampler
    assert {"steerlm", "evaluate-steerlm", "evaluate-policy-1"} <= found.keys()


def test_pairs_are_of_the_policys_own_answers_and_train_it_on() -> None:
    """From SFT, which is asked for directions, at t = 1."""
    found = planned(**{"policy.method": ["dpo"]})
    assert (found["sample-1"].inputs["policy"], found["sample-1"].condition) == ("sft", "directions")
    assert (found["policy-1"].inputs["start"], found["policy-2"].inputs["start"]) == ("sft", "policy-1")
    assert found["sample-2"].inputs["policy"] == "policy-1"
    assert found["policy-2"].inputs["pairs"] == "contrast-2"


def test_an_empty_list_of_methods_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[policy.method\] it is empty; give one method"):
        changed(PAPER, {"policy.method": []})


def test_more_methods_than_iterations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"policy.method names 2 iterations \(rsf, grpo\), and iterations is 1"):
        changed(PAPER, {"iterations": 1, "policy.method": ["rsf", "grpo"]})


def test_what_only_rejection_sampling_heeds_redoes_no_pairs() -> None:
    made = planned(**{"policy.method": ["dpo"]})["contrast-1"]
    before = knobs_of(PAPER, made)
    alone = changed(PAPER, {"selection.rule": "hindsight", "selection.reach": 180.0})
    assert {knob for knob, value in knobs_of(alone, made).items() if value != before[knob]} == {"selection.reach"}


def test_published_rivals_are_loops_of_their_own_in_each_strength() -> None:
    """They share data, rewards and SFT with the run; MO-ODPO compares a direction's own answers, and turns none."""
    recipe = changed(
        Recipe(name="paper", iterations=2),
        {"compare.systems": ["mo-odpo", "moc"], "policy.grpo.betas": [0.04, 0.4], "data.tuning": 0.02},
    )
    found = {step.name: step for step in steps(recipe, compared=True)}
    for name, stage, beta in (("mo-odpo-1", "prefer", 0.1), ("moc-1", "reinforce", 0.04), ("moc-2", "reinforce", 0.4)):
        last = found[f"{name}-policy-2"]
        assert last.stage.name == stage
        assert knobs_of(recipe, last)[f"policy.{'dpo' if stage == 'prefer' else 'grpo'}.beta"] == beta
        assert found[f"evaluate-{name}"].inputs["policy"] == last.name
    assert found["mo-odpo-1-policy-1"].inputs["start"] == found["moc-1-policy-1"].inputs["start"] == "sft"
    assert knobs_of(recipe, found["mo-odpo-1-contrast-1"])["policy.dpo.turned"] is False
    assert {"tune-moc-1", "tune-moc-2"} <= found.keys()
    assert "tune-mo-odpo-1" not in found
    assert sum(step.stage.name == "reward" for step in found.values()) == 1


# A run


@pytest.mark.slow
def test_both_learners_make_policies_with_a_dial(tmp_path: Path) -> None:
    """Two iterations of pairs, then one of groups: each policy says what its directions mean, and what it cost."""
    recipe = changed(load(MICRO), {"iterations": 3, "policy.method": ["rsf", "dpo", "grpo"]})
    execute(recipe, tmp_path / "run", "policy-3")
    for t in (1, 2, 3):
        contract = json.loads((tmp_path / "run" / f"policy-{t}" / "model" / "dpa.json").read_text())
        assert contract["iteration"] == t
    made = {one.ledger["name"]: one.ledger for one in lineage([tmp_path / "run" / "policy-3"])}
    assert {"policy-1", "policy-2", "contrast-2", "sample-2"} <= made.keys()
    grpo = recipe.policy.grpo.training
    assert made["policy-3"]["tokens"]["scored"] == grpo.steps * grpo.batch
