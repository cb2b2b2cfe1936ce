"""Numbers that are none: a NaN in weights, logits or a loss ends the work where it arises."""

import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from dpalign.dial.server.transformers_engine import draw_rows
from dpalign.engines.engine import Request
from dpalign.engines.transformers_engine import TransformersEngine, draw
from dpalign.engines.vllm_engine import VllmEngine
from dpalign.rows import user_prompt
from dpalign.train.sft import finetune
from dpalign.train.soups import mix
from tiny import changed
from trainings import SMALL, Kind, context, run

NAN, INF = math.nan, math.inf


def broken(folder: Path, out: Path, name: str) -> Path:
    """A copy with one NaN in a tensor."""
    shutil.copytree(folder, out)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[5] = NAN
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("row", [[0.0, NAN, 1.0], [-INF, -INF, -INF], [0.0, INF, 1.0], [NAN, NAN, NAN]])
def test_no_token_is_drawn_from_logits_that_are_no_numbers(row: list[float], temperature: float) -> None:
    logits_RV = torch.tensor([[0.0, 1.0, -INF], row])  # a single -inf is a token that cannot be drawn
    assert draw(logits_RV[:1], np.array([0.5]), temperature).tolist() == [1]
    with pytest.raises(ValueError, match="answer 1: the model's logits are NaN or infinite"):
        draw(logits_RV, np.array([0.5, 0.5]), temperature, "answer {}".format)
    with pytest.raises(ValueError, match="row 1: the model's logits are NaN or infinite"):
        draw_rows(logits_RV, np.array([0.5, 0.5]), np.full(2, temperature), np.full(2, 0.9))


def test_a_temperature_by_which_logits_would_overflow_takes_the_likeliest() -> None:
    logits_RV, uniform_R = torch.tensor([[1.0, 3.0, 2.0]]), np.array([0.999])
    assert draw(logits_RV, uniform_R, 1e-320).tolist() == [1]
    assert draw_rows(logits_RV, uniform_R, np.array([1e-320]), np.array([1.0])).tolist() == [1]


def test_sampling_from_broken_weights_names_the_model_the_token_and_the_prompt(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = broken(tiny_folder, tmp_path / "broken", "model.norm.weight")
    engine = TransformersEngine(str(folder), rows=2)
    with pytest.raises(ValueError, match=rf"{folder}: token 1 of answer 0 to \('fox', 7\): the model's logits are NaN"):
        list(
            engine.sample([Request(tuple(user_prompt("name fox.")), 2, ("fox", 7))], temperature=1.0, max_new_tokens=4)
        )


def test_what_vllm_says_of_broken_weights_names_the_model(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(*_: object, **__: object) -> None:
        raise RuntimeError("NaNs detected in logits: {'0': 400}")

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=dict))
    llm = SimpleNamespace(generate=generate)
    vllm: Any = SimpleNamespace(folder=str(tiny_folder), close=None, trust_remote_code=False, context=256, llm=llm)
    with pytest.raises(ValueError, match=f"{tiny_folder} on vLLM: NaNs detected in logits"):
        list(VllmEngine(vllm).sample([Request(tuple(user_prompt("fox?")), 1, (1,))], temperature=1.0, max_new_tokens=4))


@pytest.mark.parametrize("kind", ["dpo", "reward", "grpo"])
def test_every_training_ends_at_a_loss_that_is_no_number(kind: Kind, tiny_folder: Path, tmp_path: Path) -> None:
    far = changed(SMALL, learning_rate=1e300)
    with pytest.raises(ValueError, match=r"far: .*update \d+ .*lower .*learning_rate \(1e\+300\)"):
        run(kind, tiny_folder, tmp_path / "model", far, told={"name": "far"})
    assert not (tmp_path / "model").exists()


def test_a_learning_rate_that_breaks_the_weights_ends_the_training_at_its_update(
    tiny_folder: Path, tmp_path: Path, tokens: Any
) -> None:
    far = changed(SMALL, learning_rate=1e300)
    with pytest.raises(ValueError, match=r"sft: the loss of update 2 is nan; lower its learning_rate \(1e\+300\)"):
        finetune(context(tmp_path / "model", far, tiny_folder, tokens, name="sft"), tiny.CHATS)
    assert not (tmp_path / "model").exists()


def test_weights_that_the_last_update_broke_are_not_written(tiny_folder: Path, tmp_path: Path, tokens: Any) -> None:
    """The loss of a single update is that of the weights before it."""
    far = changed(SMALL, learning_rate=1e300, steps=1)
    with pytest.raises(ValueError, match=r"policy-1: after its last update \S+ holds NaN or infinite weights"):
        finetune(context(tmp_path / "model", far, tiny_folder, tokens, name="policy-1"), tiny.CHATS)
    assert not [path for path in tmp_path.iterdir() if path.name != "resume"]


def test_a_soup_of_a_broken_expert_names_the_expert_and_the_tensor(tiny_folder: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    bad = broken(tiny_folder, tmp_path / "bad", name)
    with pytest.raises(ValueError, match=rf"{bad}/model\.safetensors: {name} holds NaN"):
        mix([tiny_folder, bad], (0.5, 0.5), tmp_path / "soup")
    assert not (tmp_path / "soup").exists()
    mix([tiny_folder, bad], (1.0, 0.0), tmp_path / "alone")  # an expert of weight 0 is not read
    assert tiny.weights(tmp_path / "alone") == tiny.weights(tiny_folder)
