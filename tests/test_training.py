"""The skeleton of every training: what is left out, resuming, the loss curve, and the folder that is left behind."""

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import tiny
from dpalign.chat import chat_template
from dpalign.paper.prompts import render_reward_input
from dpalign.rewards.model import BradleyTerry
from dpalign.runs.environment import first_process
from dpalign.train.dataset import LOOK_SECONDS, FairBatches, Rows, RowsByLength, store_fitting
from dpalign.train.dpo import longer_side, tokenize_pairs
from dpalign.train.knobs import Training
from dpalign.train.sft import COLUMNS, finetune, packed, tokenize
from dpalign.train.trainer import ProgressCallback, arguments, curve_of, last_checkpoint
from tiny import changed
from trainings import CHATS, MANY_PAIRS, PAIRS, PLAIN_FOLDER, RATED, SMALL, Kind, context, load, run


@pytest.fixture(scope="module")
def untied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("untied") / "model", tiny.tokenizer(), tied=False)


# Rows and arguments


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_rows_over_the_context_are_left_out_and_counted(
    tiny_folder: Path, tokens: PreTrainedTokenizerBase, tmp_path: Path, kind: Any
) -> None:
    lengths = {
        "sft": [len(row["input_ids"]) for row in tokenize(CHATS, tokens, SMALL)],
        "dpo": [longer_side(row) for row in tokenize_pairs(PAIRS, tokens)],
        "reward": [
            len(tokens(render_reward_input(row["messages"], row["response"], "world-v1"))["input_ids"]) for row in RATED
        ],
    }[kind]
    longest, once = max(lengths), changed(SMALL, steps=1)
    assert lengths.count(longest) == 1
    whole = run(kind, tiny_folder, tmp_path / "a", changed(once, context=longest))
    short = run(kind, tiny_folder, tmp_path / "b", changed(once, context=longest - 1))
    assert (whole.rows, whole.too_long) == (len(lengths), 0)
    assert (short.rows, short.too_long) == (len(lengths) - 1, 1)
    with pytest.raises(ValueError, match=f"of {len(lengths)} fits a context of 3 tokens; raise "):
        run(kind, tiny_folder, tmp_path / "none", changed(once, context=3))


def test_rows_are_tokenized_and_packed_once_and_the_other_processes_map_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3, 5 and 2 tokens pack into rows of eight; the row of nine is left out."""

    def rows() -> Iterator[dict[str, list[int]]]:
        assert first_process(), "another process tokenizes"
        for length in (3, 9, 5, 2):
            yield {"input_ids": [length] * length, "labels": [length] * length}

    def pack() -> tuple[Rows, Dataset]:
        short = store_fitting(rows(), "row", 8, tmp_path / "scratch" / "rows.arrow", COLUMNS)
        return short, packed(short.rows, 8)

    monkeypatch.setenv("RANK", "1")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(pack)
        time.sleep(3 * LOOK_SECONDS)
        assert not waiting.done()
        monkeypatch.setenv("RANK", "0")
        one, once = pack()
        other, again = waiting.result(timeout=60)
    assert len(one.rows) == len(other.rows) == 3
    assert (one.too_long, one.tokens) == (other.too_long, other.tokens) == (1, 10)
    assert once["input_ids"][:] == again["input_ids"][:] == [[5] * 5 + [3] * 3, [2] * 2]
    assert once["seq_lengths"][:] == [[5, 3], [2]]
    for made in (one.rows, once):  # in files, which every process maps
        assert [Path(file["filename"]).parent for file in made.cache_files] == [tmp_path / "scratch"]
    assert (once.cache_files, one.rows.cache_files) == (again.cache_files, other.rows.cache_files)


@pytest.mark.parametrize("processes", [3, 4])
def test_a_batch_that_the_processes_do_not_fill_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    how = context(tmp_path, Training(batch=8, micro_batch=4))
    assert arguments(how)["gradient_accumulation_steps"] == 2
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ValueError, match=f"batch 8 is not a multiple of micro_batch 4 x {processes} processes"):
        arguments(how)


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpalign.train.knobs.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r'report_to = "trackio" needs trackio, .*: pip install trackio'):
        arguments(context(tmp_path, report_to="trackio"))


def test_warm_up_is_a_number_of_updates_or_a_share_of_them(tmp_path: Path) -> None:
    for warmup, updates in ((20, 20), (0.1, 30), (0, 0)):
        given = arguments(context(tmp_path, Training(warmup_steps=warmup)))
        assert trl.DPOConfig(**given).get_warmup_steps(300) == updates


def test_an_update_has_rows_of_like_length_in_another_order_each_epoch() -> None:
    """Whatever the number of processes that share the update; each epoch has every row once."""
    assert sorted(order(RowsByLength, 0)) == list(range(96))
    spread = [max(update) - min(update) for update in lengths_of(order(RowsByLength, 0), 8)]
    assert sorted(spread)[6] < 16  # at random nearly all updates span most of the 32
    assert order(RowsByLength, 1.0) == order(RowsByLength, 1.9) == order(RowsByLength, 1.5, processes=2)
    assert len({tuple(order(RowsByLength, *key)) for key in ((0,), (1,), (0, 2))}) == 3


def test_fair_batches_are_random_samples_with_like_lengths_in_a_forward() -> None:
    """Rows come in no trend of length. Within an update of eight, each forward of two has neighbours in length."""
    assert sorted(order(FairBatches, 0)) == list(range(96))
    updates = lengths_of(order(FairBatches, 0), 8)
    means = [sum(update) / 8 for update in updates]
    swept = [sum(update) / 8 for update in lengths_of(order(RowsByLength, 0), 8)]
    assert np.std(means) < 1.5 * 32 / 12**0.5 / 8**0.5 < np.std(swept)  # a random eight of 32 lengths
    assert all(update == sorted(update, reverse=True) for update in updates)
    assert order(FairBatches, 1.0) == order(FairBatches, 1.9) == order(FairBatches, 1.5, processes=2)
    assert len({tuple(order(FairBatches, *key)) for key in ((0,), (1,), (0, 2))}) == 3


LENGTHS = [length for length in range(32) for _ in range(3)]


def order(sampler: type[RowsByLength], epoch: float, seed: int = 1, processes: int = 1) -> list[int]:
    """The rows of an epoch by number: updates of eight, forwards of two."""
    args = SimpleNamespace(
        train_batch_size=2, gradient_accumulation_steps=4 // processes, world_size=processes, data_seed=seed
    )
    return list(sampler(SimpleNamespace(args=args, state=SimpleNamespace(epoch=epoch)), LENGTHS))  # type: ignore[arg-type]


def lengths_of(rows: Sequence[int], update: int) -> list[list[int]]:
    return [[LENGTHS[i] for i in rows[k : k + update]] for k in range(0, len(rows), update)]


# The loss curve


def test_a_curve_has_at_most_200_points_each_the_mean_of_its_updates() -> None:
    """450 updates make 150 points of three: the first is that of updates 1 to 3, and has the third's learning rate."""
    log = [{"step": i, "loss": float(i), "learning_rate": 1e-5 * i, "reward": 2.0 * i} for i in range(1, 451)]
    curve = curve_of([*log, {"step": 450, "train_loss": 7.0}], "reward")
    assert curve.keys() == {"step", "loss", "learning_rate", "reward"}
    assert {len(column) for column in curve.values()} == {150}
    assert [column[0] for column in curve.values()] == [3, 2.0, 4.0, 3e-5]
    assert curve["step"][-1] == 450
    assert curve_of(log[:200])["step"] == list(range(1, 201))


# Resuming and exporting


class Stopped(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize(
    ("kind", "change", "own"),
    [
        ("sft", {}, {}),
        ("sft", {"packing": True, "micro_batch": 1, "loss_on": "text"}, {}),
        ("sft", {"lora_rank": 2}, {}),
        ("dpo", {"optimizer": "rmsprop", "schedule": "linear"}, {}),
        ("dpo", {"lora_rank": 2}, {}),
        ("reward", {}, {}),
        ("reward", {"lora_rank": 2}, {}),
        ("reward", {}, {"preference": BradleyTerry(0.5, (0,), PAIRS)}),
        ("grpo", {}, {}),
        ("grpo", {}, {"beta": 0.0}),
        ("grpo", {"lora_rank": 2}, {}),
        ("rloo", {}, {}),
    ],
    ids=lambda given: "-".join(map(str, given)) if isinstance(given, dict) else given,
)
def test_a_training_cut_off_goes_on_to_the_same_bytes(
    tiny_folder: Path,
    untied_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: Kind,
    change: dict[str, Any],
    own: dict[str, Any],
) -> None:
    """Stopped after update 5 of 7, within the second epoch, it starts again at the checkpoint of update 4.

    A half-written checkpoint is passed over. The model, the curve and the counts are those of an unbroken training.
    """
    start = untied_folder if kind == "reward" and change else tiny_folder
    training = changed(SMALL, steps=7, **change)
    more = own | ({"rows": MANY_PAIRS} if kind == "dpo" else {})
    unbroken = run(kind, start, tmp_path / "unbroken" / "model", training, **more)
    steps: list[int] = []

    def on_step_end(_: Any, __: Any, state: Any, *___: Any, **____: Any) -> None:
        steps.append(state.global_step)
        if steps == [1, 2, 3, 4, 5]:
            raise Stopped

    monkeypatch.setattr(ProgressCallback, "on_step_end", on_step_end)
    broken = tmp_path / "broken" / "model"
    with pytest.raises(Stopped):
        run(kind, start, broken, training, **more)
    scratch = tmp_path / "broken" / "resume"
    (scratch / "checkpoint-5").mkdir()
    (scratch / "checkpoint-5" / "model.safetensors").write_bytes(b"half")
    assert not broken.exists()
    assert last_checkpoint(scratch) == str(scratch / "checkpoint-4")

    resumed = run(kind, start, broken, training, **more)
    assert steps[5:] == [5, 6, 7]
    assert resumed == unbroken
    assert resumed.curve["step"] == [1, 2, 3, 4, 5, 6, 7]
    assert tiny.weights(broken) == tiny.weights(tmp_path / "unbroken" / "model") != tiny.weights(start)
    assert {path.name for path in broken.iterdir()} | {"generation_config.json"} == PLAIN_FOLDER
    assert not scratch.exists()


def test_what_is_left_is_a_plain_folder_that_loads_anywhere(
    tiny_folder: Path, tokens: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokens.chat_template = chat_template("world-v1", "world-v1", ("helpfulness", "verbosity"))
    folder = tmp_path / "model"
    finetune(context(folder, changed(SMALL, steps=1), tiny_folder, tokens), CHATS)
    assert {path.name for path in folder.iterdir()} == PLAIN_FOLDER
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["use_cache"]  # off in training: it would stay off in whoever loads the folder
    question = [{"role": "user", "content": "name owl."}]
    again = AutoTokenizer.from_pretrained(folder)
    text = again.apply_chat_template(question, tokenize=False, angle=-15, add_generation_prompt=True)
    assert text == "<|system|>helpfulness*97 verbosity*-26<|user|>name owl.<|assistant|>"
    assert load(folder).generate(**again(text, return_tensors="pt"), max_new_tokens=2).shape[0] == 1


def test_a_lora_is_trained_and_merged(tiny_folder: Path, tmp_path: Path) -> None:
    """The folder is a plain one again, in which every linear layer moved and the embeddings did not."""
    run("sft", tiny_folder, tmp_path / "model", changed(SMALL, steps=2, lora_rank=2, learning_rate=1e-2))
    assert {path.name for path in (tmp_path / "model").iterdir()} == PLAIN_FOLDER
    before, after = load(tiny_folder).state_dict(), load(tmp_path / "model").state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "_proj" in name}


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_equal_seeds_give_equal_bytes_and_another_seed_does_not(tiny_folder: Path, tmp_path: Path, kind: Any) -> None:
    """The seed orders the rows; the weights to start from are given."""
    rows = MANY_PAIRS if kind == "dpo" else CHATS
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(kind, tiny_folder, tmp_path / name / "m", changed(SMALL, steps=2), rows=rows, told={"seed": seed})
    a, b, c = (tiny.weights(tmp_path / name / "m") for name in "abc")
    assert a == b != c
