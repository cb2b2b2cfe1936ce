"""Whole runs in miniature: three objectives of a trained model and a function; prompts that nobody answered."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import MICRO
from dpalign import cli
from dpalign.dial.doctor.model import examine
from dpalign.dial.rewards import open_scorer as open_exported
from dpalign.measure.summary import Summary
from dpalign.pipeline import runner
from dpalign.pipeline.plan.count import make
from dpalign.pipeline.steps import steps
from dpalign.recipe import Recipe, load
from dpalign.rewards.functions import words
from dpalign.rewards.scale import FILE as SCALES
from dpalign.rows import CANDIDATES, PROMPTS, RATED, SCORES, matrix_of, read_rows, read_table, user_prompt
from dpalign.runs.ledger import read_ledger
from dpalign.stages.score import model_scorer, open_scorer
from dpalign.train.contract import read_contract
from dpalign.world.files import write_world
from recorded import Reads, reads_recorded, undeclared

THREE = [
    *("--rewards.rm.trained", "true", "--rewards.short.function", "dpalign.rewards.functions:words"),
    "--objectives",
    '{helpful = ["ultrafeedback-helpfulness"], detail = ["helpsteer-complexity"], length = ["short"]}',
    *("--preference.distribution", "cone", "--preference.center", "[1, 1, -1]", "--preference.angle", "20"),
    *("--data.judge", "0", "--evaluation.controls", "false"),
]
CHAT = [*user_prompt("explain tea and iron."), {"role": "assistant", "content": "tea is hot."}]


def points_of(folder: Path) -> np.ndarray:
    return matrix_of(read_table(folder, SCORES, ["rewards"])["rewards"])


@pytest.mark.slow
def test_three_objectives_of_a_trained_model_and_a_function_go_the_whole_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load(MICRO, THREE)
    run = runner.execute(recipe, tmp_path / "run")
    heads = list(recipe.scored_heads)
    short = heads.index("short/score")

    # the scale: the annotated answers' own 5th and 95th percentile of words are 10 and 90, and stay so
    scales = json.loads((run / "annotate" / SCALES).read_text())
    assert list(scales) == heads
    assert scales["rm/helpsteer-complexity"] == [1.0, 0.0]
    slope, offset = scales["short/score"]
    original = [row["response"] for row in read_rows(run / "data" / "train", RATED) if row["source"] != "helpsteer"]
    low, high = np.quantile(words([], original), (0.05, 0.95))
    assert (slope * low + offset, slope * high + offset) == pytest.approx((10, 90))
    drawn = [row["response"] for row in read_rows(run / "sample-2", CANDIDATES)]
    for scored, responses in ((run / "annotate", original), (run / "score-2", drawn)):
        expected = slope * np.array(words([], responses)) + offset
        np.testing.assert_allclose(points_of(scored)[:, short], expected, rtol=1e-5)

    # the page: three dials, what each objective's users ask for, what scores it
    summary = Summary.model_validate_json((run / "report" / "summary.json").read_text())
    assert (summary.objectives, summary.senses) == (("helpful", "detail", "length"), (1.0, 1.0, -1.0))
    assert {point.rewards.keys() == set(summary.objectives) for point in summary.systems["DPA t=2"].points} == {True}
    fact = next(one for one in summary.rewards if one.head == "short/score")
    assert (fact.source, fact.fitted) == ("dpalign.rewards.functions:words", True)
    page = (run / "report" / "index.html").read_text()
    for said in ("more helpful and detail; less length", "dpalign.rewards.functions:words"):
        assert said in page

    # the contract and the export score as the run did
    contract = read_contract(run / "policy-2" / "model")
    assert contract is not None
    assert contract.objectives["length"] == ("short/score",)
    assert contract.rewards[1].scale == ((slope, offset),)
    cli.main(["export", str(run), "--out", str(tmp_path / "mine"), "--reward"])
    told = json.loads((tmp_path / "mine" / "dpa.json").read_text())
    assert told["units"] == "points"
    assert [(one["kind"], one.get("folder")) for one in told["rewards"]] == [("trained", "reward"), ("function", None)]
    exported = read_contract(tmp_path / "mine")
    assert exported is not None
    ours, theirs = (
        open_scorer(recipe, run / "reward", run / "annotate"),
        open_exported(tmp_path / "mine", exported, dtype="float32"),
    )
    assert theirs is not None
    asked: list[Any] = [(CHAT[:1], answer) for answer in ("tea is hot.", "iron is hard and makes ships.")]
    np.testing.assert_allclose(theirs.score(asked), ours.score(asked), atol=1e-4)
    findings = {one.check: one for one in examine(tmp_path / "mine")}
    assert [one.text for one in findings.values() if one.level == "bad"] == []
    assert "golden scores" in findings["reward"].text
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "more helpful and detail, less length" in card
    assert (tmp_path / "mine" / "reward" / "golden_scores.json").is_file()


def test_the_cards_snippet_gives_the_golden_score(micro_run: Path, tmp_path: Path) -> None:
    """Run as it stands, it prints what the card says."""
    cli.main(["export", str(micro_run), "--out", str(tmp_path / "mine"), "--reward"])
    card = (tmp_path / "mine" / "README.md").read_text()
    snippet = next(part for part in card.split("```python\n") if "AutoModelForSequenceClassification" in part)
    code = snippet.split("```")[0].replace("./mine/", f"{tmp_path / 'mine'}/")
    printed: list[dict[str, float]] = []
    exec(code, {"print": printed.append})
    golden = json.loads((tmp_path / "mine" / "reward" / "golden_scores.json").read_text())["scores"][0]["scores"]
    assert printed[0] == pytest.approx(golden, abs=1e-3)


def prompts_alone(folder: Path, *more: str) -> Recipe:
    """A recipe on files: prompts to align on without any answer, chats for SFT, and two functions."""
    write_world(folder, 1, {"helpsteer": 1, "ultrafeedback": 24, "sft": 64, "tuning": 1, "test": 6})
    asked = {json.loads(row)["instruction"] for row in (folder / "ultrafeedback.jsonl").read_text().splitlines()}
    lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in sorted(asked))
    (folder / "prompts.jsonl").write_text("".join(lines))
    given = {
        "data.world": "false",
        "data.rows": "[]",
        "data.prompts": f'["{folder / "prompts.jsonl"}"]',
        "data.helpsteer": "",
        "data.validation": str(folder / "test.jsonl"),
        "data.sft": str(folder / "sft.jsonl"),
        "data.judge": "0",
        "rewards.short.function": "dpalign.rewards.functions:words",
        "rewards.varied.function": "test_rewards_loop:variety",
        "rewards.varied.scale": "[100, 0]",
        "objectives": '{varied = ["varied"], short = ["short"]}',
        "preference.low": "-45",
        "evaluation.controls": "false",
    }
    words_given = [word for name, value in given.items() for word in (f"--{name}", value)]
    return load(MICRO, [*words_given, *more])


def variety(prompts: list[str], responses: list[str]) -> list[float]:
    """Different words as a share of all."""
    said = [response.split() for response in responses]
    return [len(set(own)) / max(1, len(own)) for own in said]


def test_prompts_alone_are_answered_first_and_the_plan_counts_it(tmp_path: Path) -> None:
    recipe = prompts_alone(tmp_path)
    planned = {step.name: step for step in steps(recipe)}
    names = list(planned)
    assert names.index("sft") < names.index("originals") < names.index("annotate") < names.index("steerlm-d2")
    first = planned["originals"]
    assert (first.inputs["policy"], first.half, first.condition) == ("sft", "both", "plain")
    assert planned["annotate"].inputs["answers"] == "originals"
    loads = make(recipe).loads
    assert loads["originals"].answers == loads["annotate"].scored == 4 * 2 * recipe.sampling.prompts
    trained = ("--rewards.rm.trained", "true", "--objectives", '{a = ["helpsteer-helpfulness"], b = ["short"]}')
    unlabelled = prompts_alone(tmp_path / "again", *trained)
    with pytest.raises(ValueError, match=r"no rated answers, on which \[reward\] could be trained"):
        steps(unlabelled)


@pytest.mark.slow
def test_prompts_that_nobody_answered_suffice_where_all_rewards_are_given(tmp_path: Path) -> None:
    recipe = prompts_alone(tmp_path / "files", "--sampling.prompts", "8")
    reads: Reads = {}
    with reads_recorded(reads):
        run = runner.execute(recipe, tmp_path / "run")
    assert "sampling.n" in reads["sample", "plain"]
    assert undeclared(reads) == {}
    assert not (run / "data" / "train").exists()
    drawn = list(read_rows(run / "originals", CANDIDATES))
    kept = list(read_rows(run / "annotate" / "originals", RATED))
    assert len({row["prompt_id"] for row in drawn}) == 16
    assert len(drawn) == 64
    assert [row["response"] for row in kept] == [row["response"] for row in drawn if row["finished"]]
    split_of = {row["prompt_id"]: row["split"] for row in read_rows(run / "data" / "prompts", PROMPTS)}
    assert {split_of[row["prompt_id"]] for row in kept} == {"D1", "D2"}
    points_NH = points_of(run / "annotate")
    np.testing.assert_allclose(
        points_NH[:, 1], [100 * x for x in variety([], [r["response"] for r in kept])], rtol=1e-5
    )
    low, high = np.quantile(points_NH[:, 0], (0.05, 0.95))
    assert (low, high) == pytest.approx((10, 90), abs=1e-3)
    assert read_ledger(run / "steerlm-d2")["counts"]["in"] == sum(split_of[row["prompt_id"]] == "D2" for row in kept)
    assert (run / "report" / "index.html").is_file()


def test_hints_ask_for_original_answers_of_many_kinds(tmp_path: Path) -> None:
    """One answer under each hint, in place of four plain ones; the plan counts them so."""
    hints = '["Answer in one word.", "Answer in one sentence.", "Answer at length."]'
    recipe = prompts_alone(tmp_path, "--data.hints", hints)
    planned = {step.name: step for step in steps(recipe)}
    assert planned["originals"].condition == "hints"
    loads = make(recipe).loads
    assert loads["originals"].answers == loads["annotate"].scored == 3 * 2 * recipe.sampling.prompts


def test_hints_and_probes_that_nothing_would_use_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hints ask for original answers to prompts alone, .* set rows = \[\]"):
        load(MICRO, ["--data.hints", '["Answer in one word."]'])
    with pytest.raises(ValueError, match=r"reward\.probe gives heads to the model of \[reward\]"):
        prompts_alone(tmp_path, "--reward.freeze", "true", "--reward.probe", "probe.safetensors")


PROBED = [
    *("--reward.freeze", "true", "--rewards.ours.trained", "true"),
    *("--rewards.short.function", "dpalign.rewards.functions:words"),
    "--objectives",
    '{helpful = ["ultrafeedback-helpfulness"], length = ["helpsteer-verbosity", "short"]}',
]


@pytest.mark.slow
def test_a_probe_of_a_few_kilobytes_stands_for_ratings_and_hints_are_forgotten(tmp_path: Path) -> None:
    rated = runner.execute(load(MICRO, [*PROBED, "--preference.low", "-45"]), tmp_path / "rated", until="judge")
    probes = {name: rated / name / "probe.safetensors" for name in ("reward", "judge")}
    assert max(path.stat().st_size for path in probes.values()) < 10_000
    hints = ["name it.", "explain it.", "describe it."]
    given = [
        *("--model.base", str(rated / "base" / "model"), "--data.hints", json.dumps(hints)),
        *("--rewards.varied.scale", "[100, 0]", "--sampling.prompts", "8"),
        *("--reward.probe", str(probes["reward"]), "--reward.judge_probe", str(probes["judge"])),
    ]
    recipe = prompts_alone(tmp_path / "files", *PROBED, *given)
    reads: Reads = {}
    with reads_recorded(reads):
        run = runner.execute(recipe, tmp_path / "run")
    assert {"sampling.n", "data.hints"} <= reads["sample", "hints"]
    assert undeclared(reads) == {}
    drawn, kept = (
        list(read_rows(run / "originals", CANDIDATES)),
        list(read_rows(run / "annotate" / "originals", RATED)),
    )
    prompts = {row["prompt_id"]: row["messages"] for row in read_rows(run / "data" / "prompts", PROMPTS)}
    asked = [row["messages"][-1]["content"].removeprefix(prompts[row["prompt_id"]][-1]["content"]) for row in drawn]
    assert sorted(set(asked)) == sorted(f"\n{hint}" for hint in hints)
    assert [row["messages"] for row in kept] == [prompts[row["prompt_id"]] for row in kept]

    # the same heads on the same backbone give the same scores, and the judge scores too, by its own heads alone
    chats: list[Any] = [(CHAT[:1], "tea is hot."), (CHAT[:1], "iron is hard and makes ships.")]
    ours = model_scorer(recipe, run / "reward").score(chats)
    np.testing.assert_array_equal(ours, model_scorer(recipe, rated / "reward").score(chats))
    summary = Summary.model_validate_json((run / "report" / "summary.json").read_text())
    assert all(np.isfinite(points_of(path)).all() for path in run.glob("evaluate-*/judged"))
    assert summary.trust is not None
    assert summary.trust.check == "judge"
