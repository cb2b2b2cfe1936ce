"""A stage is done again when a file that the recipe names is another one."""

import json
from pathlib import Path

import pytest

from conftest import MICRO
from dpalign.pipeline.runner import dry_run, execute
from dpalign.pipeline.steps import STAGES
from dpalign.recipe import Recipe, load
from dpalign.recipe.localfiles import MODELS, SOURCES, local_files
from test_bad_input import OVERALL


def write_pairs(path: Path, count: int) -> None:
    scores = {"score_chosen": 8.0, "score_rejected": 3.0}
    rows = [{"prompt": f"question {i}", "chosen": "yes.", "rejected": "no.", "metadata": scores} for i in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def on_pairs(path: str) -> Recipe:
    given = {"world": "false", "pairs": path, "validation_prompts": "5", "judge": "0"}
    given |= dict.fromkeys(("helpsteer", "ultrafeedback", "splits", "sft"), "")
    words = [word for name, value in given.items() for word in (f"--data.{name}", value)]
    return load(MICRO, [*words, "--objectives", OVERALL])


def said(recipe: Recipe, run: Path, step: str) -> str:
    return next(reason for planned, reason in dry_run(recipe, run) if planned.name == step)


def test_a_data_file_that_was_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edited in place, or another one behind an environment variable."""
    write_pairs(tmp_path / "one" / "pairs.jsonl", 40)
    write_pairs(tmp_path / "two" / "pairs.jsonl", 60)
    monkeypatch.setenv("PAIRS_OF_THE_TEST", str(tmp_path / "one"))
    recipe, run = on_pairs("$PAIRS_OF_THE_TEST/pairs.jsonl"), tmp_path / "run"
    execute(recipe, run, until="data")
    assert said(recipe, run, "data") == "done"
    monkeypatch.setenv("PAIRS_OF_THE_TEST", str(tmp_path / "two"))
    assert said(recipe, run, "data") == "to do: input data.pairs changed"
    monkeypatch.setenv("PAIRS_OF_THE_TEST", str(tmp_path / "one"))
    write_pairs(tmp_path / "one" / "pairs.jsonl", 20)
    assert said(recipe, run, "data") == "to do: input data.pairs changed"
    execute(recipe, run, until="data")
    assert said(recipe, run, "data") == "done"


def test_a_model_folder_and_a_function_are_read_by_every_stage_that_uses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taste.py").write_text("def score(prompts, responses): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    words = ["--sft.checkpoint", str(model), "--reward.checkpoint", "python:taste:score", "--model.base", "some/name"]
    recipe = load(MICRO, words)
    found = {name: local_files(stage.knobs(recipe)) for name, stage in STAGES.items()}
    assert found["sft"] == found["steerlm"] == {"sft.checkpoint": model}
    assert found["score"] == found["annotate"] == {"reward.checkpoint": tmp_path / "taste.py"}
    assert found["data"] == found["select"] == {}  # the world's files are another stage's


def test_the_knobs_that_may_name_a_file_are_the_recipes_and_read_by_some_stage() -> None:
    recipe = Recipe(name="paper")
    read = {knob for stage in STAGES.values() for knob in stage.knobs(recipe)}
    assert {*SOURCES, *MODELS} <= read
