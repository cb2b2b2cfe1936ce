"""Bad input on the way through a run: what the user is told.

Elsewhere: unknown keys and wrong types (test_config), a row cut in half and a rating out of range (test_data_readers),
two runs into one folder (test_runs), a NaN score (test_scoring, test_choosing, test_evaluation_points), a batch that
does not divide and a folder without weights (test_training), a prompt without room for an answer (test_sampling).
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from conftest import MICRO
from dpalign.engines.transformers_engine import TransformersEngine
from dpalign.pipeline.runner import execute, take
from dpalign.pipeline.steps import steps
from dpalign.recipe import load
from dpalign.rows import CANDIDATES, PROMPTS, read_rows, user_prompt
from dpalign.run.folder import Run
from dpalign.run.ledger import read_ledger


@pytest.fixture
def run(micro_run: Path, tmp_path: Path) -> Path:
    """A finished run, to go on from with other knobs."""
    return Path(shutil.copytree(micro_run, tmp_path / "micro"))


def go_on(run: Path, until: str, *change: str) -> None:
    execute(load(MICRO, change), run, until=until)


def told(run: Path, until: str, *change: str) -> str:
    """What the user is told."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 - each test looks at the words
        go_on(run, until, *change)
    return str(error.value)


def test_prompts_over_the_limit_are_left_out_and_counted_and_all_over_is_an_error(run: Path) -> None:
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
    message = told(run, "sample-1", "--sampling.prompt_tokens", "3")
    assert message == f"none of {len(half)} prompts is at most 3 tokens long; raise sampling.prompt_tokens"


def test_validation_prompts_that_are_all_too_long_are_an_error_too(run: Path) -> None:
    change = ("--sampling.prompt_tokens", "3")
    shutil.rmtree(run / "evaluate-sft")
    recipe = load(MICRO, change)
    (step,) = [step for step in steps(recipe) if step.name == "evaluate-sft"]
    with (
        Run.open(run, None) as opened,
        pytest.raises(ValueError, match="none of 6 prompts is at most 3 tokens long"),
    ):
        take(recipe, opened, step)


def test_more_new_tokens_than_the_model_has_room_for(run: Path) -> None:
    message = told(run, "sample-1", "--sampling.max_new_tokens", "190")
    assert "and 190 new ones exceed the model's context of 192" in message


def test_a_head_that_objectives_read_and_the_reward_model_lacks(run: Path) -> None:
    """A reward model of other heads is named as a checkpoint; the error comes before anything is scored."""
    folder = Path(shutil.copytree(run / "reward" / "model", run.parent / "other"))
    config = json.loads((folder / "config.json").read_text())
    names = {key: name.replace("verbosity", "length") for key, name in config["id2label"].items()}
    config |= {"id2label": names, "label2id": {name: int(key) for key, name in names.items()}}
    (folder / "config.json").write_text(json.dumps(config))
    message = told(run, "reward", "--reward.checkpoint", str(folder))
    for part in ("verbosity", "helpsteer-verbosity", "helpsteer-length"):
        assert part in message
    unknown = told(run, "data", "--objectives", '{helpfulness = ["helpsteer-helpfulnes"]}')
    assert "helpsteer-helpfulnes" in unknown
    assert "helpsteer-helpfulness" in unknown


OVERALL = '{overall = ["ultrafeedback-overall_score"], again = ["ultrafeedback-overall_score"]}'
"""What can be read from pairs alone."""


def rated_files(folder: Path, rows: Sequence[object]) -> tuple[str, ...]:
    """Knobs that take the ratings from one file of pairs, and nothing else."""
    path = folder / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    given = {
        "world": "false",
        "helpsteer": "",
        "ultrafeedback": "",
        "pairs": str(path),
        "splits": "",
        "sft": "",
        "judge": "0",
    }
    return tuple(word for name, value in given.items() for word in (f"--data.{name}", value))


def pair(i: int, answer: str) -> dict[str, object]:
    scores = {"score_chosen": 8.0, "score_rejected": 3.0}
    return {"prompt": f"question {i}", "chosen": answer, "rejected": answer and "no.", "metadata": scores}


def test_an_objective_without_a_label(tmp_path: Path) -> None:
    """Pairs rate the overall score alone: nothing tells the reward model what verbosity is."""
    knobs = rated_files(tmp_path, [pair(i, "because.") for i in range(40)])
    message = told(tmp_path / "run", "data", *knobs, "--data.validation_prompts", "5")
    assert "reads head" in message
    assert "training answers has a label for it; add a data set that has, or read another head" in message
    go_on(tmp_path / "run", "data", *knobs, "--data.validation_prompts", "5", "--objectives", OVERALL)


def test_a_validation_prompt_is_never_sampled_for_however_it_is_spelled(tmp_path: Path) -> None:
    """Of a rated prompt that says the same but for case and spacing neither the answers nor the prompt are left."""
    knobs = rated_files(tmp_path, [pair(i, "because.") for i in range(40)])
    named = tmp_path / "validation.jsonl"
    named.write_text("".join(f"{json.dumps({'prompt': f'Question  {i} '})}\n" for i in range(10)))
    go_on(tmp_path / "run", "data", *knobs, "--data.prompts", str(named), "--objectives", OVERALL)
    splits: dict[str, set[str]] = {}
    for row in read_rows(tmp_path / "run" / "data" / "prompts", PROMPTS):
        splits.setdefault(" ".join(row["messages"][0]["content"].lower().split()), set()).add(row["split"])
    assert all(splits[f"question {i}"] == {"validation"} for i in range(10))
    assert sum(splits[f"question {i}"] <= {"D1", "D2", "heldout"} for i in range(10, 40)) == 30
    assert "10 held-out prompt" in (tmp_path / "run" / "data" / "reports.txt").read_text()


def test_a_validation_prompt_named_twice_is_asked_once_and_counted(tmp_path: Path) -> None:
    knobs = rated_files(tmp_path, [pair(i, "because.") for i in range(40)])
    named = tmp_path / "validation.jsonl"
    named.write_text("".join(f"{json.dumps({'prompt': f'question {i % 4}'})}\n" for i in range(5)))
    go_on(tmp_path / "run", "data", *knobs, "--data.prompts", str(named), "--objectives", OVERALL)
    (report,) = (
        report
        for report in json.loads((tmp_path / "run" / "data" / "reports.json").read_text())
        if report["source"] == "validation prompts"
    )
    assert (report["in"], report["out"], report["filtered"]) == (5, 4, {"repeated prompt": 1})
    validation = [
        row for row in read_rows(tmp_path / "run" / "data" / "prompts", PROMPTS) if row["split"] == "validation"
    ]
    assert len(validation) == 4


def test_a_data_set_that_is_empty_after_filtering(tmp_path: Path) -> None:
    """All answers are empty: the table says why."""
    message = told(tmp_path / "run", "data", *rated_files(tmp_path, [pair(i, "") for i in range(5)]))
    assert "pairs" in message
    assert "empty" in message


@pytest.mark.parametrize(
    ("step", "knob"), [("sft", "model.base"), ("reward", "reward.checkpoint"), ("steerlm-d2", "sft.checkpoint")]
)
def test_a_checkpoint_folder_without_weights(run: Path, tmp_path: Path, step: str, knob: str) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    message = told(run, step, f"--{knob}", str(empty))
    assert message.startswith(f"{knob} is {str(empty)!r}: {empty}: no folder with config.json and model.safetensors")
    missing = told(run, step, f"--{knob}", str(tmp_path / "nowhere"))
    assert missing == f"{knob} is {str(tmp_path / 'nowhere')!r}: there is no such folder"


def test_a_named_checkpoint_takes_the_place_of_training(run: Path) -> None:
    """Nothing is trained; the next stages read the folder that is named."""
    named = Path(shutil.copytree(run / "sft" / "model", run.parent / "named"))
    go_on(run, "steerlm-d2", "--sft.checkpoint", str(named))
    assert (run / "sft" / "checkpoint.txt").read_text() == f"{named}\n"
    assert not (run / "sft" / "model").exists()
    assert read_ledger(run / "sft")["tokens"]["trained"] == 0
    engine = TransformersEngine(str(run / "steerlm-d2" / "model"), rows=1)
    assert engine.reader.prompt_tokens(user_prompt("name fox.")) > 0
