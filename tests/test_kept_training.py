"""A finished training is kept when something after it fails: the next run makes no update again."""

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
from dpalign.stages import finetune, reward
from dpalign.stages.stage import Step
from dpalign.train import trainer
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
    labels = dict.fromkeys(HEADS, 50.0)
    rows = [rated(row["messages"][-1]["content"], row["response"]) | {"labels": labels} for row in ROWS]
    for part in ("train", "heldout"):
        write_rows(tmp_path / "data" / part / "part-00000.parquet", [row | {"source": "x"} for row in rows], RATED)
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
