"""Files and models that a recipe names: what is wrong with them is said, and a stage is done again when they change."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from conftest import MICRO
from dpalign.pipeline.runner import dry_run, execute, take
from dpalign.pipeline.steps import STAGES, steps
from dpalign.recipe import Recipe, changed, load
from dpalign.recipe.localfiles import FUNCTIONS, MODELS, SOURCES, local_files
from dpalign.rows import CANDIDATES, HEADS, PROMPTS, read_rows
from dpalign.runs.folder import Run
from dpalign.runs.ledger import read_ledger

OVERALL = (
    '{overall = ["ultrafeedback-overall_score"], again = ["ultrafeedback-overall_score"]}',
    *("--preference.low", "-45"),
)
"""What can be read from pairs alone."""


@pytest.fixture
def run(micro_run: Path, tmp_path: Path) -> Path:
    """A finished run, to go on from with other knobs."""
    return Path(shutil.copytree(micro_run, tmp_path / "micro"))


def go_on(run: Path, until: str, *change: str) -> None:
    execute(load(MICRO, change), run, until=until)


def refusal(run: Path, until: str, *change: str) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        go_on(run, until, *change)
    return str(error.value)


# Prompts, answers and models of a run


def test_prompts_over_the_limit_are_left_out_and_counted_and_all_over_is_an_error(run: Path) -> None:
    from dpalign.engines.transformers_engine import TransformersEngine

    engine = TransformersEngine(str(run / "steerlm-d2" / "model"), rows=8)
    half = [row for row in read_rows(run / "data" / "prompts", PROMPTS) if row["split"] == "D1"]
    lengths = sorted(engine.reader.prompt_tokens(row["messages"]) for row in half)
    limit = lengths[len(lengths) // 2]
    over = sum(n > limit for n in lengths)
    assert 0 < over < len(half)
    go_on(run, "sample-1", "--sampling.prompt_tokens", str(limit), "--sampling.prompts", "0")
    assert read_ledger(run / "sample-1")["counts"]["filtered"] == {"prompt too long": over}
    asked = {row["prompt_id"] for row in read_rows(run / "sample-1", CANDIDATES)}
    assert len(asked) == len(half) - over
    all_over = ("--sampling.prompt_tokens", "3")
    message = refusal(run, "sample-1", *all_over)
    assert f"none of {len(half)} prompts is at most 3 tokens" in message
    assert "sampling.prompt_tokens" in message
    shutil.rmtree(run / "evaluate-sft")
    (step,) = [step for step in steps(load(MICRO, all_over)) if step.name == "evaluate-sft"]
    with Run.open(run, None) as opened, pytest.raises(ValueError, match="none of 6 prompts is at most 3 tokens"):
        take(load(MICRO, all_over), opened, step)


def test_more_new_tokens_than_the_model_has_room_for(run: Path) -> None:
    message = refusal(run, "sample-1", "--sampling.max_new_tokens", "190")
    assert "190 new ones exceed the model's context of 192" in message


def test_a_head_that_objectives_read_and_the_reward_model_lacks(run: Path) -> None:
    """A reward model of other heads is named as a checkpoint; the error comes before anything is scored."""
    folder = Path(shutil.copytree(run / "reward" / "model", run.parent / "other"))
    config = json.loads((folder / "config.json").read_text())
    names = {key: name.replace("verbosity", "length") for key, name in config["id2label"].items()}
    config |= {"id2label": names, "label2id": {name: int(key) for key, name in names.items()}}
    (folder / "config.json").write_text(json.dumps(config))
    message = refusal(run, "reward", "--rewards.rm.model", str(folder), "--rewards.rm.input", "world-v1",
                      "--objectives.verbosity", '["helpsteer-verbosity"]')  # fmt: skip
    assert [part for part in ("'helpsteer-verbosity'", "rm/helpsteer-length") if part not in message] == []


@pytest.mark.parametrize(
    ("step", "knob"), [("sft", "model.base"), ("reward", "rewards.rm.model"), ("steerlm-d2", "sft.checkpoint")]
)
def test_a_checkpoint_folder_without_weights(tmp_path: Path, step: str, knob: str) -> None:
    empty, nowhere = tmp_path / "empty", tmp_path / "nowhere"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    more = ("--rewards.rm.heads", json.dumps(HEADS)) if step == "reward" else ()
    message = refusal(tmp_path / "run", step, f"--{knob}", str(empty), *more)
    assert message.startswith(f"{knob} is {str(empty)!r}: {empty}: no folder with config.json and model.safetensors")
    assert f"{knob} is {str(nowhere)!r}" in refusal(tmp_path / "run", step, f"--{knob}", str(nowhere), *more)


def test_a_named_checkpoint_takes_the_place_of_training(run: Path) -> None:
    """Nothing is trained; the next stages read the folder that is named."""
    named = Path(shutil.copytree(run / "sft" / "model", run.parent / "named"))
    go_on(run, "steerlm-d2", "--sft.checkpoint", str(named))
    assert (run / "sft" / "checkpoint.txt").read_text() == f"{named}\n"
    assert not (run / "sft" / "model").exists()
    assert read_ledger(run / "sft")["tokens"]["trained"] == 0
    assert (run / "steerlm-d2" / "model" / "model.safetensors").is_file()


# Data files


def write_pairs(path: Path, count: int, answer: str = "because.") -> None:
    scores = {"score_chosen": 8.0, "score_rejected": 3.0}
    rows = [
        {"prompt": f"question {i}", "chosen": answer, "rejected": answer and "no.", "metadata": scores}
        for i in range(count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def on_pairs(path: Path | str, *more: str) -> tuple[str, ...]:
    """Knobs that take the ratings from one file of pairs, and nothing else."""
    knobs = {"world": "false", "rows": str(path), "judge": "0"}
    return (*(word for name, value in knobs.items() for word in (f"--data.{name}", value)), *more)


def splits(run: Path) -> dict[str, set[str]]:
    """The splits of each prompt, by its text without case and spacing."""
    found: dict[str, set[str]] = {}
    for row in read_rows(run / "data" / "prompts", PROMPTS):
        found.setdefault(" ".join(row["messages"][0]["content"].lower().split()), set()).add(row["split"])
    return found


def test_an_objective_without_a_label_and_data_that_are_empty_after_filtering(tmp_path: Path) -> None:
    """Pairs rate the overall score alone: nothing tells the reward model what verbosity is."""
    write_pairs(tmp_path / "pairs.jsonl", 40)
    knobs = on_pairs(tmp_path / "pairs.jsonl", "--data.validation_prompts", "5")
    message = refusal(tmp_path / "run", "data", *knobs)
    assert [part for part in ("reads head", "add a data set") if part not in message] == []
    go_on(tmp_path / "run", "data", *knobs, "--objectives", *OVERALL)
    write_pairs(tmp_path / "pairs.jsonl", 5, answer="")
    message = refusal(tmp_path / "run", "data", *knobs)
    assert [part for part in ("pairs", "empty") if part not in message] == []


def test_a_validation_prompt_is_asked_once_and_never_sampled_for_however_it_is_spelled(tmp_path: Path) -> None:
    """Of a rated prompt that says the same but for case and spacing neither the answers nor the prompt are left."""
    write_pairs(tmp_path / "pairs.jsonl", 40)
    named = tmp_path / "validation.jsonl"
    named.write_text("".join(f"{json.dumps({'prompt': f'Question  {i % 10} '})}\n" for i in range(11)))
    knobs = on_pairs(tmp_path / "pairs.jsonl", "--data.validation", str(named), "--objectives", *OVERALL)
    go_on(tmp_path / "run", "data", *knobs)
    found = splits(tmp_path / "run")
    assert all(found[f"question {i}"] == {"validation"} for i in range(10))
    assert sum(found[f"question {i}"] <= {"D1", "D2", "heldout"} for i in range(10, 40)) == 30
    reports = {one["source"]: one for one in json.loads((tmp_path / "run" / "data" / "reports.json").read_text())}
    validation = reports["validation prompts"]
    assert (validation["in"], validation["out"], validation["filtered"]) == (11, 10, {"repeated prompt": 1})


# A stage is done again when a file that the recipe names is another one


def verdict(recipe: Recipe, run: Path, step: str) -> str:
    return next(why for planned, why in dry_run(recipe, run) if planned.name == step)


def test_a_data_file_that_was_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edited in place, or another one behind an environment variable."""
    write_pairs(tmp_path / "one" / "pairs.jsonl", 40)
    write_pairs(tmp_path / "two" / "pairs.jsonl", 60)
    monkeypatch.setenv("PAIRS_OF_THE_TEST", str(tmp_path / "one"))
    more: Sequence[str] = ("--data.validation_prompts", "5", "--objectives", *OVERALL, "--sft.checkpoint", "some/name")
    recipe, run = load(MICRO, on_pairs("$PAIRS_OF_THE_TEST/pairs.jsonl", *more)), tmp_path / "run"
    execute(recipe, run, until="data")
    assert verdict(recipe, run, "data") == "done"
    monkeypatch.setenv("PAIRS_OF_THE_TEST", str(tmp_path / "two"))
    assert "input data.rows[0] changed" in verdict(recipe, run, "data")
    monkeypatch.setenv("PAIRS_OF_THE_TEST", str(tmp_path / "one"))
    write_pairs(tmp_path / "one" / "pairs.jsonl", 20)
    assert "input data.rows[0] changed" in verdict(recipe, run, "data")


def test_a_model_folder_and_a_function_are_read_by_every_stage_that_uses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taste.py").write_text("def score(prompts, responses): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    words = ["--sft.checkpoint", str(model), "--model.base", "some/name"]
    words += ["--rewards.a.function", "taste:score", "--rewards.b.function", "taste:other", "--preference.low", "-45"]
    words += ["--data.judge", "0"]
    recipe = load(MICRO, words)
    found = {name: local_files(stage.knobs(recipe)) for name, stage in STAGES.items()}
    assert found["sft"] == found["steerlm"] == {"sft.checkpoint": model}
    files = {f"rewards.{name}.function": tmp_path / "taste.py" for name in "ab"}
    assert found["score"] == found["annotate"] == files
    assert found["reward"] == found["select"] == {}


def test_the_local_modules_that_a_function_imports_are_read_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever in a file they are imported, and those that they import; not what is installed."""
    kit = tmp_path / "kit_of_the_test"
    (kit / "deep").mkdir(parents=True)
    (tmp_path / "taste_of_the_test.py").write_text(
        "import json, numpy, dpalign.rows\nfrom kit_of_the_test.lengths import LONG\n"
        "def score(prompts, responses):\n    import lone_of_the_test\n    raise AssertionError('nobody runs it')\n"
    )
    (kit / "__init__.py").write_text("raise AssertionError('nobody imports it')\n")
    (kit / "lengths.py").write_text("from . import units\nfrom .deep.words import LONG, SHORT\n")
    (kit / "units.py").write_text("import kit_of_the_test.lengths\n")
    (kit / "deep" / "words.py").write_text("from ..units import none\nLONG = SHORT = 3\n")
    (tmp_path / "lone_of_the_test.py").write_text("this is no Python\n")
    (tmp_path / "other_of_the_test.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    found = local_files({"rewards.a.function": "taste_of_the_test:score"})
    assert {key.removeprefix("rewards.a.function"): str(path.relative_to(tmp_path)) for key, path in found.items()} == {
        "": "taste_of_the_test.py",
        ":lone_of_the_test": "lone_of_the_test.py",
        ":kit_of_the_test": "kit_of_the_test/__init__.py",
        ":kit_of_the_test.lengths": "kit_of_the_test/lengths.py",
        ":kit_of_the_test.units": "kit_of_the_test/units.py",
        ":kit_of_the_test.deep.words": "kit_of_the_test/deep/words.py",
    }
    assert set(local_files({"rewards.a.function": "dpalign.rewards.functions:words"})) == {"rewards.a.function"}


def test_the_files_and_folders_of_a_list_are_told_apart(tmp_path: Path) -> None:
    """A split is no part of a path; what the hub holds is no file."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    rows = json.dumps([str(tmp_path / "a"), f"{tmp_path}/b:train", "some/name:test"])
    recipe = load(MICRO, ["--data.world", "false", "--data.rows", rows])
    assert local_files(STAGES["data"].knobs(recipe)) == {"data.rows[0]": tmp_path / "a", "data.rows[1]": tmp_path / "b"}


def test_each_knob_that_may_name_a_file_is_read_by_some_stage() -> None:
    recipe = changed(Recipe(name="paper"), {"rewards": {"one": {"trained": True}}})
    knobs = {knob.replace("rewards.one", "rewards.*") for stage in STAGES.values() for knob in stage.knobs(recipe)}
    assert {*SOURCES, *MODELS, *FUNCTIONS} <= knobs
