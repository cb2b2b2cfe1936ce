"""What is kept of a training: all of it when something after it fails, and its checkpoints when it is cut short."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import tiny
from conftest import MICRO
from dpalign import recipe
from dpalign.pipeline import runner
from dpalign.pipeline.steps import STAGES
from dpalign.rewards import model as reward_model
from dpalign.rows import CONVERSATIONS, HEADS, RATED, write_rows
from dpalign.runs import folder as runs
from dpalign.runs.ledger import read_ledger
from dpalign.runs.stopping import Stopped, stoppable
from dpalign.stages import finetune, reward
from dpalign.stages.stage import Step
from dpalign.train import trainer
from dpalign.train.knobs import Training
from dpalign.train.trainer import last_checkpoint
from tiny import CHATS, changed
from trainings import RATED as ROWS
from trainings import SMALL, Kind, rated, run


class Failed(Exception):
    """Stands for a full disk, or a kill."""


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The updates that are made."""
    made: list[int] = []
    monkeypatch.setattr(
        trainer.ProgressCallback, "on_step_end", lambda _, __, state, *___, **____: made.append(state.global_step)
    )
    return made


def fail(*_: Any, **__: Any) -> None:
    raise Failed


@pytest.mark.parametrize("kind", ["sft", "packed", "dpo", "reward", "grpo"])
@pytest.mark.parametrize("updates", [6, 7])
def test_a_training_whose_model_could_not_be_written_goes_on_from_its_last_update(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int], kind: str, updates: int
) -> None:
    """Six updates are whole epochs of all kinds but one, seven are not."""
    packed = {"packing": True, "micro_batch": 1, "loss_on": "text"} if kind == "packed" else {}
    trained: Kind = "sft" if kind == "packed" else kind  # type: ignore[assignment]
    training = changed(SMALL, steps=updates, **packed)
    unbroken = run(trained, tiny_folder, tmp_path / "unbroken" / "model", training)
    with monkeypatch.context() as broken:
        broken.setattr(trainer, "export", fail)
        broken.setattr(reward_model, "export", fail)
        with pytest.raises(Failed):
            run(trained, tiny_folder, tmp_path / "broken" / "model", training)
    assert steps == [*range(1, updates + 1)] * 2
    assert run(trained, tiny_folder, tmp_path / "broken" / "model", training) == unbroken
    assert len(steps) == 2 * updates
    assert tiny.weights(tmp_path / "broken" / "model") == tiny.weights(tmp_path / "unbroken" / "model")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """One bit in the middle, as a worn disk does."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def stopped_after(updates: int, monkeypatch: pytest.MonkeyPatch, start: Path, folder: Path, training: Training) -> None:
    """A training that fails after so many updates."""

    def on_step_end(_: Any, __: Any, state: Any, *___: Any, **____: Any) -> None:
        if state.global_step == updates:
            raise Failed

    with monkeypatch.context() as broken:
        broken.setattr(trainer.ProgressCallback, "on_step_end", on_step_end)
        with pytest.raises(Failed):
            run("sft", start, folder / "model", training)


@pytest.mark.parametrize(
    "harm",
    [
        lambda checkpoint: cut(checkpoint / "model.safetensors"),
        lambda checkpoint: cut(checkpoint / "optimizer.pt"),
        lambda checkpoint: flip(checkpoint / "optimizer.pt"),
        lambda checkpoint: (checkpoint / "scheduler.pt").write_bytes(bytes(1000)),
        lambda checkpoint: (checkpoint / "optimizer.pt").unlink(),
        lambda checkpoint: (checkpoint / "rng_state.pth").unlink(),
        lambda checkpoint: cut(checkpoint / "trainer_state.json"),
    ],
    ids=["weights", "optimizer", "a bit", "zeros", "no optimizer", "no generator", "state"],
)
def test_a_checkpoint_that_cannot_be_read_is_passed_over_for_the_one_before(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stopped: Path,
    harm: Any,
) -> None:
    resume = Path(shutil.copytree(stopped / "resume", tmp_path / "resume"))
    assert sorted(path.name for path in resume.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert last_checkpoint(resume) == str(resume / "checkpoint-4")
    assert not caplog.records
    harm(resume / "checkpoint-4")
    assert last_checkpoint(resume) == str(resume / "checkpoint-2")
    assert f"{resume / 'checkpoint-4'} cannot be read" in caplog.text
    harm(resume / "checkpoint-2")
    assert last_checkpoint(resume) is None


@pytest.fixture(scope="module")
def stopped(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that failed at its fifth update of six, with a checkpoint every other one."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(5, patch, tiny_folder, folder, changed(SMALL, save_every=2))
    return folder


def test_a_training_goes_on_from_the_checkpoint_before_a_damaged_one_to_the_same_bytes(
    tiny_folder: Path, tmp_path: Path, steps: list[int], stopped: Path
) -> None:
    training = changed(SMALL, save_every=2)
    run("sft", tiny_folder, tmp_path / "whole" / "model", training)
    folder = tmp_path / "broken"
    shutil.copytree(stopped, folder)
    cut(folder / "resume" / "checkpoint-4" / "model.safetensors")
    steps.clear()
    run("sft", tiny_folder, folder / "model", training)
    assert steps == [3, 4, 5, 6]
    assert tiny.weights(folder / "model") == tiny.weights(tmp_path / "whole" / "model")


def test_a_training_that_sigterm_reaches_writes_a_checkpoint_of_its_update_and_goes_on_to_the_same_bytes(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It comes in the third update of six; checkpoints are due every fourth."""
    made: list[int] = []

    def on_step_begin(_: Any, __: Any, state: Any, *___: Any, **____: Any) -> None:
        made.append(state.global_step + 1)
        if made == [1, 2, 3]:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer.ProgressCallback, "on_step_begin", on_step_begin, raising=False)
    with pytest.raises(Stopped), stoppable():
        run("sft", tiny_folder, tmp_path / "ended" / "model", SMALL)
    assert made == [1, 2, 3]
    assert [path.name for path in (tmp_path / "ended" / "resume").glob("checkpoint-*")] == ["checkpoint-3"]
    assert "SIGTERM after update 3" in caplog.text
    run("sft", tiny_folder, tmp_path / "ended" / "model", SMALL)
    assert made == [1, 2, 3, 4, 5, 6]
    run("sft", tiny_folder, tmp_path / "whole" / "model", SMALL)
    assert tiny.weights(tmp_path / "ended" / "model") == tiny.weights(tmp_path / "whole" / "model")


def write_rated(data: Path) -> None:
    """Rated answers to train on and held-out ones, each with a label for every head."""
    answers = [rated(row["messages"][-1]["content"], row["response"]) for row in ROWS]
    rows = [row | {"labels": dict.fromkeys(HEADS, 40.0 + 5 * i)} for i, row in enumerate(answers)]
    for part in ("train", "heldout"):
        write_rows(data / part / "part-00000.parquet", [row | {"source": "x"} for row in rows], RATED)


@pytest.mark.parametrize(
    ("name", "after", "updates"), [("reward", (reward, "measure"), 6), ("finetune", (finetune, "write_contract"), 6)]
)
def test_a_stage_that_fails_after_its_training_does_not_train_again(
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: list[int],
    name: str,
    after: tuple[Any, str],
    updates: int,
) -> None:
    """The finished stage has the bytes and the counts of one that did not fail."""
    write_rated(tmp_path / "data")
    write_rows(tmp_path / "chosen" / "part-00000.parquet", CHATS, CONVERSATIONS)
    inputs = {
        "reward": {"data": tmp_path / "data", "base": tiny_folder.parent},
        "finetune": {"start": tiny_folder, "chosen": tmp_path / "chosen"},
    }
    step = Step(name, STAGES[name], inputs[name], 1)
    read = recipe.load(MICRO, ["--data.world", "false"])

    def take(folder: Path) -> Path:
        with runs.Run.open(folder, None, {}) as opened:
            runner.take(read, opened, step)
        return folder / name

    whole = take(tmp_path / "whole")
    with monkeypatch.context() as broken:
        broken.setattr(*after, fail)
        with pytest.raises(Failed):
            take(tmp_path / "broken")
    assert steps == [*range(1, updates + 1)] * 2
    mended = take(tmp_path / "broken")
    assert len(steps) == 2 * updates
    same = ("digest", "counts", "tokens")
    assert [read_ledger(mended)[key] for key in same] == [read_ledger(whole)[key] for key in same]  # type: ignore[literal-required]
    assert f"{name}: its training was finished before" in (tmp_path / "broken" / "log.txt").read_text()


OTHERS = [
    *("--objectives", '{helpfulness = ["ultrafeedback-helpfulness"], complexity = ["helpsteer-complexity"]}'),
    *("--preference.low", "0", "--preference.high", "90"),
]
SHORT = [
    *("--rewards.rm.trained", "true", "--rewards.short.function", "dpalign.rewards.functions:words"),
    *("--objectives", '{helpfulness = ["rm/ultrafeedback-helpfulness"], length = ["short"]}'),
    *("--preference.low", "-45", "--preference.high", "0", "--data.judge", "0"),
]


@pytest.mark.parametrize(
    ("always", "more", "kept"),
    [
        ([], OTHERS, True),
        ([], SHORT, True),
        ([], ["--reward.lm_loss", "0.5"], False),
        (["--reward.bradley_terry", "0.1"], OTHERS, False),
    ],
    ids=["objectives", "one more reward", "a knob of the training", "a preference by the objectives"],
)
def test_a_reward_model_is_kept_where_only_what_measures_it_changes(
    tmp_path: Path, tiny_folder: Path, steps: list[int], always: list[str], more: list[str], kept: bool
) -> None:
    """It has the bytes and the counts of one that is trained for the new objectives."""
    write_rated(tmp_path / "data")
    step = Step("reward", STAGES["reward"], {"data": tmp_path / "data", "base": tiny_folder.parent})

    def take(folder: Path, *words: str) -> Path:
        with runs.Run.open(folder, None, {}) as opened:
            runner.take(recipe.load(MICRO, ["--data.world", "false", *always, *words]), opened, step)
        return folder / "reward"

    before = (take(tmp_path / "run") / "quality.json").read_text()
    fresh = take(tmp_path / "fresh", *more) if kept else None
    steps.clear()
    changed = take(tmp_path / "run", *more)
    assert bool(steps) is not kept
    assert ("its model is kept" in (tmp_path / "run" / "log.txt").read_text()) is kept
    if fresh is not None:
        same = ("digest", "counts", "tokens")
        assert [read_ledger(changed)[key] for key in same] == [read_ledger(fresh)[key] for key in same]  # type: ignore[literal-required]
        assert (changed / "quality.json").read_text() != before


def test_a_damaged_reward_model_is_not_kept(tmp_path: Path, tiny_folder: Path, steps: list[int]) -> None:
    write_rated(tmp_path / "data")
    step = Step("reward", STAGES["reward"], {"data": tmp_path / "data", "base": tiny_folder.parent})
    for words in ([], OTHERS):
        steps.clear()
        with runs.Run.open(tmp_path / "run", None, {}) as opened:
            runner.take(recipe.load(MICRO, ["--data.world", "false", *words]), opened, step)
        flip(tmp_path / "run" / "reward" / "model" / "model.safetensors")
    assert steps
    assert "reward: it is trained again: " in (tmp_path / "run" / "log.txt").read_text()
