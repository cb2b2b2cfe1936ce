"""Supervised fine-tuning: which tokens are trained on, and that packed conversations do not see each other."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import tiny
from dpalign.train import knobs
from dpalign.train.knobs import Kernels, Training
from dpalign.train.sft import IGNORED, packed, sft_trainer, tokenize
from tiny import CHATS, changed, chat, same
from trainings import SMALL, Update, context, load, one_update, run

# What is trained on


def trained_text(row: dict[str, list[int]], tokens: PreTrainedTokenizerBase) -> str:
    return tokens.decode([label for label in row["labels"] if label != IGNORED], skip_special_tokens=False)


@pytest.mark.parametrize("style", ["zephyr", "world-v1"])
def test_the_answer_and_its_end_of_text_are_trained_and_nothing_else(style: Any) -> None:
    tokens = tiny.tokenizer(style)
    (row,) = tokenize([chat("why?", "fox is red.", system="helpfulness*97")], tokens, Training(loss_on="answer"))
    assert trained_text(row, tokens) == "fox is red.</s>"
    first = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
    asked = tokens.decode(row["input_ids"][:first], skip_special_tokens=False)
    assert asked.replace("\n ", "\n").replace("> ", ">") == (
        "<|system|>\nhelpfulness*97</s>\n<|user|>\nwhy?</s>\n<|assistant|>\n"
        if style == "zephyr"
        else "<|system|>helpfulness*97<|user|>why?<|assistant|>"
    )
    assert row["input_ids"][-1] == tokens.eos_token_id  # no sampled answer reaches Zephyr's newline after it


@pytest.mark.parametrize("style", ["zephyr", "world-v1"])
def test_the_loss_on_text_leaves_out_nothing(style: Any) -> None:
    for row in tokenize(CHATS, tiny.tokenizer(style), Training(loss_on="text")):
        assert row["labels"] == row["input_ids"]


def test_the_prompt_is_tokenized_as_the_sampler_will_read_it(tokens: PreTrainedTokenizerBase) -> None:
    row = CHATS[1]
    asked = tokens.apply_chat_template(row["messages"], add_generation_prompt=True, return_dict=False)
    (trained,) = tokenize([row], tokens, Training(loss_on="answer"))
    assert trained["input_ids"][: len(asked)] == asked
    assert trained["labels"][len(asked) - 1] == IGNORED
    assert trained["labels"][len(asked)] == trained["input_ids"][len(asked)]


# Packing


@pytest.fixture(scope="module")
def rows(tiny_folder: Path) -> list[dict[str, list[int]]]:
    """Four tokenized conversations, 64 tokens or fewer together with room left over."""
    tokens = AutoTokenizer.from_pretrained(tiny_folder)
    return list(tokenize(CHATS[:4], tokens, Training(loss_on="answer")))


def updated(folder: Path, rows: Sequence[Any], training: Training, scratch: Path) -> Update:
    how = context(scratch / "model", training, folder)
    return one_update(folder, lambda model: sft_trainer(model, rows, how))


@pytest.mark.parametrize("loss_on", ["answer", "text"])
def test_packed_conversations_train_as_the_separate_ones(tiny_folder: Path, tmp_path: Path, loss_on: Any) -> None:
    """Best-fit decreasing makes one row of four; its loss and gradients are those of the four apart."""
    tokens = AutoTokenizer.from_pretrained(tiny_folder)
    rows = list(tokenize(CHATS[:4], tokens, Training(loss_on=loss_on)))
    room = sum(len(row["input_ids"]) for row in rows)
    assert room <= tiny.CONTEXT
    once = changed(SMALL, steps=1, context=room, micro_batch=1)
    together = updated(tiny_folder, rows, changed(once, batch=1, packing=True), tmp_path / "a")
    apart = updated(tiny_folder, rows, changed(once, batch=4), tmp_path / "b")
    assert [forward["input_ids"].shape for forward in together.forwards] == [(1, room)]
    assert len(apart.forwards) == 4
    assert together.loss == pytest.approx(apart.loss, abs=1e-5)
    assert all(same(together.gradients[name], x, within=1e-5) for name, x in apart.gradients.items())
    assert max(gradient.abs().max() for gradient in apart.gradients.values()) > 1e-2


@pytest.mark.parametrize(("loss_on", "packing"), [("answer", False), ("text", False), ("answer", True)])
def test_on_a_cpu_an_update_is_trls(tiny_folder: Path, tmp_path: Path, loss_on: Any, packing: bool) -> None:
    """From fewer logits: those of positions that no label asks for are not computed."""
    rows = list(tokenize(CHATS[:4], AutoTokenizer.from_pretrained(tiny_folder), Training(loss_on=loss_on)))
    room = sum(len(row["input_ids"]) for row in rows)
    batch, micro_batch = (1, 1) if packing else (4, 2)
    once = changed(SMALL, steps=1, context=room, batch=batch, micro_batch=micro_batch, packing=packing)
    how = context(tmp_path / "model", once, tiny_folder)

    def of_trl(model: PreTrainedModel) -> trl.SFTTrainer:
        trainer = sft_trainer(model, rows, how)
        trainer.compute_loss = partial(trl.SFTTrainer.compute_loss, trainer)
        return trainer

    ours = updated(tiny_folder, rows, once, tmp_path / "ours")
    theirs = one_update(tiny_folder, of_trl)
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
    assert all(same(ours.gradients[name], x, within=1e-5) for name, x in theirs.gradients.items())
    for forward in ours.forwards:
        asked = (forward["shift_labels"] != IGNORED).any(dim=0)
        assert asked.all()
        assert len(asked) < forward["input_ids"].shape[1]


def test_a_model_that_gives_all_its_logits_or_none_trains_as_well(
    tiny_folder: Path, rows: list[dict[str, list[int]]], tmp_path: Path
) -> None:
    """A model of foreign code may lack the keyword that selects positions."""
    once = changed(SMALL, steps=1, batch=4, micro_batch=4)
    how = context(tmp_path / "model", once, tiny_folder)

    def without_selection(model: PreTrainedModel) -> trl.SFTTrainer:
        def forward(
            self: Any, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **rest: Any
        ) -> Any:
            assert "logits_to_keep" not in rest
            return kind.forward(self, input_ids=input_ids, attention_mask=attention_mask, labels=labels, **rest)

        kind = type(model)
        model.__class__ = type("Foreign", (kind,), {"forward": forward})
        return sft_trainer(model, rows, how)

    foreign = one_update(tiny_folder, without_selection)
    assert foreign.loss == pytest.approx(updated(tiny_folder, rows, once, tmp_path / "ours").loss, abs=1e-5)
    assert "logits_to_keep" not in foreign.forwards[0]


def test_a_packed_row_keeps_its_conversations_apart_only_without_a_cache(
    tiny_folder: Path, rows: list[dict[str, list[int]]], tmp_path: Path
) -> None:
    """The same row and positions leak with a key-value cache, and so does packing that forgets the positions."""
    room = sum(len(row["input_ids"]) for row in rows)
    training = changed(SMALL, steps=1, context=room, batch=1, micro_batch=1, packing=True)
    (given,) = updated(tiny_folder, rows, training, tmp_path / "resume").forwards
    assert given["use_cache"] is False
    starts = [*(given["position_ids"][0] == 0).nonzero().flatten().tolist(), room]
    packed = [given["input_ids"][0, a:b].tolist() for a, b in pairwise(starts)]
    assert sorted(packed) == sorted(row["input_ids"] for row in rows)

    model = load(tiny_folder).eval()
    seen = {"input_ids": given["input_ids"], "position_ids": given["position_ids"]}
    (wrapped,) = trl.pack_dataset(Dataset.from_list([{"input_ids": ids} for ids in packed]), room, "wrapped")
    with torch.inference_mode():
        apart = torch.cat([model(torch.tensor([ids]), use_cache=False).logits[0] for ids in packed])
        assert same(model(**seen, use_cache=False).logits[0], apart, within=1e-4)
        leak = (model(**seen, use_cache=True).logits[0] - apart).abs().max()
        mixed = (model(torch.tensor([wrapped["input_ids"]]), use_cache=False).logits[0] - apart).abs().max()
    assert min(leak, mixed) > 0.05


def lengths_of_conversations(count: int) -> list[int]:
    """As a half of UltraFeedback has them with our answers: most of 200 to 800 tokens, some of thousands."""
    return np.random.default_rng(0).lognormal(6.0, 0.7, count).astype(int).clip(30, 4096).tolist()


def test_packed_rows_are_full_to_998_in_a_thousand_and_no_conversation_is_split() -> None:
    """TRL's trainer would pack them a thousand at a time, and fill less."""
    room, lengths = 4096, lengths_of_conversations(3500)
    rows = Dataset.from_list([{"input_ids": [i] * n, "labels": [i] * n} for i, n in enumerate(lengths)])
    made = packed(rows, room)
    fill = sum(lengths) / (len(made) * room)
    assert fill >= 0.998
    by_thousands = trl.pack_dataset(rows, room, "bfd")
    assert fill > sum(lengths) / (len(by_thousands) * room)
    found = []
    for row in made:
        ends = np.cumsum(row["seq_lengths"])
        assert len(row["input_ids"]) == len(row["labels"]) == ends[-1] <= room
        found += [(row["input_ids"][end - 1], n) for end, n in zip(ends, row["seq_lengths"], strict=True)]
        assert row["input_ids"] == [i for (i, n) in found[-len(ends) :] for _ in range(n)]
    assert sorted(found) == list(enumerate(lengths))


def test_without_flash_attention_packed_rows_go_one_at_a_time_and_the_update_is_the_same(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A micro-batch of two packed rows would be one row of twice the length, with four times the mask."""
    tokens = AutoTokenizer.from_pretrained(tiny_folder)
    rows = list(tokenize(CHATS, tokens, Training()))
    once = changed(SMALL, steps=1, batch=2, context=64, packing=True)
    one = updated(tiny_folder, rows, changed(once, micro_batch=1), tmp_path / "one")
    assert "micro_batch" not in capsys.readouterr().err
    two = updated(tiny_folder, rows, changed(once, micro_batch=2), tmp_path / "two")
    assert "not 2 (micro_batch)" in capsys.readouterr().err
    assert len(one.forwards) == len(two.forwards) == 2
    assert max(forward["input_ids"].numel() for forward in two.forwards) <= once.context
    assert one.loss == two.loss
    assert all(torch.equal(one.gradients[name], two.gradients[name]) for name in one.gradients)


def test_kernels_that_this_machine_lacks_are_refused_with_what_is_missing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knobs, "find_spec", lambda _: None)
    for kernels, knob, package in (
        (Kernels(liger=True), "kernels.liger = true", "liger-kernel"),
        (Kernels(attention="flash_attention_2"), 'kernels.attention = "flash_attention_2"', "flash-attn"),
    ):
        with pytest.raises(ValueError, match=f"{knob} needs a GPU"):
            kernels.require(on_gpu=False)
        with pytest.raises(ValueError, match=f"{knob} needs {package}, .*: pip install {package}"):
            kernels.require(on_gpu=True)
    Kernels().require(on_gpu=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"kernels.liger = true needs a GPU, and this machine has none"):
        run("sft", tiny_folder, tmp_path / "model", told={"kernels": Kernels(liger=True)})
