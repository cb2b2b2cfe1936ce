"""A reward of one's own: heads that no data set labels, and a given reward on data without the objectives' labels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import MICRO
from dpalign.data.ratings import labels_for, require_labels
from dpalign.paper.objectives import Objective, by_name
from dpalign.pipeline import runner
from dpalign.pipeline.steps import steps
from dpalign.recipe import Recipe, load
from dpalign.rewards.score import FunctionScorer
from dpalign.rows import HEADS, RATED, SCORES, prompt_id, read_rows, read_table, user_prompt, write_rows
from dpalign.runs.folder import Run
from dpalign.stages.data import trained_on
from dpalign.stages.reward import measure, no_better_than_chance
from dpalign.stages.stage import Job
from dpalign.world.files import write_world
from dpalign.world.truth import score as truth

OWN = (
    *("--rewards.own.function", "test_own_reward:kind_and_short", "--rewards.own.heads", '["kind", "short"]'),
    *("--rewards.own.scale", "[1, 0]", "--objectives", '{kindness = ["kind"], brevity = ["short"]}'),
    *("--data.judge", "0"),
    *("--preference.low", "0", "--preference.high", "90"),
)


def kind_and_short(prompts: list[str], responses: list[str]) -> np.ndarray:
    """Different words, and few of them."""
    words = [response.split() for response in responses]
    return np.array([[min(100.0, 5 * len(set(said))), 100 / (1 + len(said))] for said in words]).reshape(-1, 2)


def longest(prompts: list[str], responses: list[str]) -> list[list[float]]:
    return [[0.0, float(len(response))] for response in responses]


def shortest(prompts: list[str], responses: list[str]) -> list[list[float]]:
    return [[0.0, -float(len(response))] for response in responses]


def length_and_overall(prompts: list[str], responses: list[str]) -> np.ndarray:
    """A head of its own before one that the data label."""
    return np.array([[len(response), 10.0 * int(response)] for response in responses])


def row(i: int, answer: str, **labels: float) -> dict[str, Any]:
    messages = user_prompt(f"question {i}")
    named = {head: labels[name] for head in HEADS if (name := head.replace("-", "_")) in labels}
    return {
        "prompt_id": prompt_id(messages), "messages": messages, "response": answer, "source": "rows", "labels": named,
    }  # fmt: skip


def test_labels_meet_heads_by_name() -> None:
    labels = {"ultrafeedback-overall_score": 5.0, "brevity": 80.0, "helpsteer-helpfulness": 0.0}
    assert labels_for(labels, ("kind", "ultrafeedback-overall_score", "brevity")) == [None, 5.0, 80.0]
    assert by_name([[1.0, 2.0]], ("a", "b"), ("b", "c", "a"))[0] == pytest.approx([2.0, np.nan, 1.0], nan_ok=True)


def test_labels_are_asked_for_where_a_model_is_trained_on_them() -> None:
    assert list(trained_on(load(MICRO))) == ["train", "judge"]
    given = ["--rewards.rm.model", "somewhere", "--rewards.rm.heads", json.dumps(HEADS)]
    assert list(trained_on(load(MICRO, given))) == ["judge"]
    assert trained_on(load(MICRO, OWN)) == {}


def test_a_head_without_labels_cannot_be_trained() -> None:
    rows = [row(i, "so", ultrafeedback_overall_score=70.0) for i in range(3)]
    overall, verbosity = Objective("overall", (HEADS[5],)), Objective("verbosity", ("helpsteer-verbosity",))
    require_labels(rows, [overall], HEADS, "train")
    for objectives, heads, part, told in (
        ([overall, verbosity], HEADS, "train", "'verbosity' reads head 'helpsteer-verbosity', .* 3 training answers"),
        ([Objective("kindness", ("0",))], ("kind",), "judge", r"'kindness' .* 'kind', .* judge's 3 .*data\.judge = 0"),
        ([overall], (HEADS[5], "kind"), "train", "has 'kind'.*labelled: ultrafeedback-overall_score"),
    ):
        with pytest.raises(ValueError, match=told):
            require_labels(rows, objectives, heads, part)


def test_the_stage_that_trains_refuses_a_head_without_labels_too(tmp_path: Path) -> None:
    """The data were read for a reward model that was given; now one is to be trained."""
    own = ("--heads", '["kind", "short"]', "--objectives", '{kindness = ["kind"], brevity = ["short"]}')
    recipe = load(MICRO, ["--data.judge", "0", *own, "--preference.low", "0", "--preference.high", "90"])
    (step,) = [step for step in steps(recipe) if step.name == "reward"]
    inputs = {"data": tmp_path / "data"}
    write_rows(tmp_path / "data" / "train" / "part-00000.parquet", [row(1, "so", helpsteer_verbosity=50.0)], RATED)
    with (
        Run.open(tmp_path / "run", None) as opened,
        pytest.raises(ValueError, match="'kindness' reads head 'kind', and none of 1 training answers has a label"),
        opened.stage("reward", 1, inputs, {}) as work,
    ):
        step.stage.run(Job(recipe, work, inputs))


def test_quality_is_of_the_heads_that_have_labels(tmp_path: Path) -> None:
    """The own head stands first, where HelpSteer's helpfulness stands among the data's heads: it has no label."""
    rows = [
        row(i, str(n), ultrafeedback_overall_score=10.0 * n, helpsteer_helpfulness=50.0)
        for i in range(8)
        for n in (2, 5, 9)
    ]
    write_rows(tmp_path / "heldout" / "part-00000.parquet", rows, RATED)
    heads = ("length", "ultrafeedback-overall_score")
    recipe = Recipe(name="test", heads=heads, objectives={"overall": (heads[1],), "length": ("0",)})
    found = measure(recipe, FunctionScorer("test_own_reward:length_and_overall", heads), tmp_path)
    assert list(found["heads"]) == [heads[1]]
    assert list(found["objectives"]) == list(found["baseline"]) == ["overall"]
    assert found["heads"][heads[1]]["r2"]["value"] == pytest.approx(1.0)
    assert found["objectives"]["overall"]["n"] == 24


def test_a_model_that_orders_held_out_answers_no_better_than_chance_is_noticed(tmp_path: Path) -> None:
    """Of 12 prompts three pairs each are in the order of the labels, or against it."""
    rows = [row(i, "a" * n, ultrafeedback_overall_score=10.0 * n) for i in range(12) for n in (2, 5, 9)]
    write_rows(tmp_path / "heldout" / "part-00000.parquet", rows, RATED)
    heads = ("length", "ultrafeedback-overall_score")
    recipe = Recipe(name="test", heads=heads, objectives={"overall": (heads[1],), "length": ("0",)})
    for function, found in (("longest", {}), ("shortest", {heads[1]: 0.0})):
        figures = measure(recipe, FunctionScorer(f"test_own_reward:{function}", heads), tmp_path)
        assert no_better_than_chance(figures) == found


def test_data_without_the_objectives_labels_serve_a_reward_that_is_given(tmp_path: Path) -> None:
    """No HelpSteer, so nobody rates verbosity; the truth of the world, as a reward, needs no ratings."""
    counts = {"helpsteer": 1, "ultrafeedback": 30, "sft": 1, "tuning": 1, "test": 1}
    write_world(tmp_path / "files", 1, counts)
    given = {
        "data.world": "false",
        "data.rows": str(tmp_path / "files" / "ultrafeedback.jsonl"),
        "data.validation": str(tmp_path / "files" / "test.jsonl"),
        "data.judge": "0",
        "model.base": "world",
    }
    knobs = [word for name, value in given.items() for word in (f"--{name}", value)]
    with pytest.raises(ValueError, match="'verbosity' reads head 'helpsteer-verbosity', and none of"):
        runner.execute(load(MICRO, knobs), tmp_path / "trained", until="data")
    given_too = ("--rewards.true.function", "dpalign.world.truth:score", "--rewards.true.heads", json.dumps(HEADS))
    recipe = load(MICRO, [*knobs, *given_too, "--rewards.true.scale", "[1, 0]"])
    run = runner.execute(recipe, tmp_path / "given", until="annotate")
    assert not (run / "reward" / "quality.json").exists()  # a function is a rule, and no model to be measured
    answers = list(read_rows(run / "data" / "train", RATED))
    scored = read_table(run / "annotate", SCORES)["rewards"].to_pylist()
    true_NH = truth([answer["messages"][-1]["content"] for answer in answers], [a["response"] for a in answers])
    assert np.array(scored) == pytest.approx(true_NH)


@pytest.mark.slow
def test_a_python_function_with_heads_of_its_own_goes_the_whole_way(tmp_path: Path) -> None:
    run = runner.execute(load(MICRO, [*OWN, "--evaluation.controls", "false"]), tmp_path / "own")
    told = json.loads((run / "report" / "summary.json").read_text())
    assert (run / "report" / "index.html").is_file()
    assert told["reward_model"]["heads"] == {}  # nothing is known of what nobody rates
    assert told["true_front"] is None
    for system in told["systems"].values():
        assert [point["rewards"].keys() for point in system["points"]] == [{"kindness", "brevity"}] * len(
            system["points"]
        )
        assert {point["true_rewards"] for point in system["points"]} == {None}
    contract = json.loads((run / "policy-2" / "model" / "dpa.json").read_text())
    assert contract["heads"] == ["own/kind", "own/short"]
    assert contract["objectives"] == {"kindness": ["own/kind"], "brevity": ["own/short"]}
