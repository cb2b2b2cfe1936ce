"""Updates of a 7B model on a card: tokens a second, the share of the card's peak, the most memory held.

A LoRA stands on bfloat16 weights. All weights are float32 under bfloat16 autocast, as this package trains them. Rows
are packed: conversations end to end that do not see each other, which their losses must show. The loop is a bare one
(torch, transformers, peft). Where TRL is installed, the package's own trainer is timed beside it, on the same rows.
"""

import copy
import itertools
import math
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import MistralForCausalLM, PreTrainedModel, TrainerCallback

from dpalign.engines.architecture import Architecture
from gpu import COMMAND, Size, built, settled
from harness import Row, Unable, equal, ratio_of, timed

GIB = 2**30
USED = 0.92
"""Of the card's memory; the rest is the libraries' and fragments."""
APART = 0.1
"""Mean difference of the tokens' losses that bfloat16 may make; conversations that see each other differ by more."""
SAME = 0.01
"""Difference of an update's loss in two loops."""
WIDE = 8192
"""Side of the square product that stands for a card's peak where its data sheet is not known."""


@dataclass(frozen=True)
class Kind:
    """What is trained, and the memory that it takes."""

    name: str
    dtype: torch.dtype
    a_weight: int
    """Bytes of each weight with its gradient, AdamW's two numbers and autocast's copy."""
    spare: int
    """GiB for activations, logits and a LoRA."""
    forwards: float
    """An update's FLOPs as so many forwards: a LoRA needs no gradients of the weights it stands on."""


LORA = Kind("LoRA", torch.bfloat16, 2, 12, 2.0)
FULL = Kind("all weights", torch.float32, 4 + 4 + 8 + 2, 8, 3.0)


@dataclass(frozen=True)
class Packed:
    """Conversations of random tokens end to end, each from position 0: (1, T)."""

    ids: torch.Tensor
    positions: torch.Tensor

    @property
    def counted(self) -> torch.Tensor:
        """Which tokens have a loss: all but the first of each conversation; (T - 1,)."""
        return self.positions[0, 1:] != 0

    def apart(self) -> Iterator["Packed"]:
        """Each conversation alone."""
        starts = [*(self.positions[0] == 0).nonzero().flatten().tolist(), self.ids.shape[1]]
        for start, end in itertools.pairwise(starts):
            yield Packed(self.ids[:, start:end], self.positions[:, start:end])


def update(kind: Kind, size: Size) -> Iterator[Row]:
    """Updates in a bare loop."""
    size = fitted(size, kind)
    model, rows = trainable(kind, size), rows_of(size)
    losses = [float(mean_loss(model, rows, size))]
    differs = seeing_each_other(model, rows[0], size)
    seconds = timed([settled(updating(model, rows, size, losses), size)], size.rounds)[:, 0]
    if not all(map(math.isfinite, losses)):
        raise ValueError(f"{kind.name}: the losses of {len(losses)} updates are {losses}")
    tokens, shape = size.packed * size.context, shape_of(size)
    context = float(np.mean([row.positions.float().mean().item() for row in rows]))
    rate = tokens / seconds
    tflops, whose = peak(size)
    shares = 100 * rate * kind.forwards * shape.forward(1, context, logits=True) / (tflops * 1e12)
    what = f"7B update of {kind.name}, {size.packed} packed rows of {size.context}"
    note = f"{shape.layers} layers; losses {losses[0]:.3f} to {losses[-1]:.3f}; packed and apart within {differs:.0e}"
    yield figure(f"{what}: trained tokens", rate, "tokens/s", note)
    yield figure(f"{what}: MFU", shares, "%", f"of {tflops:.3g} TFLOPS, {whose}; recomputing is not counted")
    yield figure(f"{what}: most memory", [memory(size)], "GiB", "weights, gradients, AdamW and activations")


def figure(name: str, measured: Sequence[float] | np.ndarray, unit: str, note: str) -> Row:
    """A figure without a peer: its median and range."""
    low, median, high = np.quantile(measured, [0.0, 0.5, 1.0]).tolist()
    return Row(name, median, low, high, None, "no peer", COMMAND, note, unit)


def shape_of(size: Size) -> Architecture:
    c = size.config
    width = c.hidden_size // c.num_attention_heads
    sizes = (c.vocab_size, c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads)
    return Architecture("7B", *sizes, width, c.intermediate_size)


def fitted(size: Size, kind: Kind) -> Size:
    """With as many layers as the card has memory for."""
    if not size.cuda:
        return size
    shape, memory = shape_of(size), torch.cuda.get_device_properties(0).total_memory
    room = USED * memory - kind.spare * GIB - 2 * shape.embedding * kind.a_weight
    layers = min(shape.layers, int(room / (shape.linear / shape.layers * kind.a_weight)))
    if layers < 1:
        raise Unable(f"a card with memory for one layer of {kind.name}; this one has {memory / GIB:.0f} GiB")
    config = copy.deepcopy(size.config)
    config.num_hidden_layers = layers
    return replace(size, config=config)


def rows_of(size: Size) -> list[Packed]:
    """The packed rows of an update, each filled to its last token."""
    rng, rows = np.random.default_rng(3), []
    for _ in range(size.packed):
        lengths: list[int] = []
        while sum(lengths) < size.context:
            lengths.append(int(rng.lognormal(math.log(size.context / 10), 0.7)) + 2)
        lengths[-1] -= sum(lengths) - size.context
        ids = rng.integers(3, size.config.vocab_size, size=size.context)
        positions = np.concatenate([np.arange(length) for length in lengths])
        rows.append(Packed(*(torch.tensor(part, device=size.device)[None] for part in (ids, positions))))
    return rows


def trainable(kind: Kind, size: Size) -> PreTrainedModel:
    """The model, recomputing its activations."""
    model = built(MistralForCausalLM, size, kind.dtype).train()
    switch = "activation_checkpointing_enable"  # transformers 5.23 changed its name
    getattr(model, switch if hasattr(model, switch) else "gradient_checkpointing_enable")()
    if kind is not LORA:
        return model
    from peft import LoraConfig, get_peft_model

    model.enable_input_require_grads()
    config = LoraConfig(r=size.rank, lora_alpha=2 * size.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def token_losses(model: PreTrainedModel, row: Packed, size: Size) -> torch.Tensor:
    """Of the tokens that count, in float32."""
    with torch.autocast(size.device, torch.bfloat16):
        logits_1TV = model(input_ids=row.ids, position_ids=row.positions, use_cache=False).logits
    return functional.cross_entropy(logits_1TV[0, :-1].float(), row.ids[0, 1:], reduction="none")[row.counted]


def count(rows: Sequence[Packed]) -> int:
    return sum(int(row.counted.sum()) for row in rows)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, rows: Sequence[Packed], size: Size) -> float:
    return sum(float(token_losses(model, row, size).sum()) for row in rows) / count(rows)


@torch.no_grad()
def seeing_each_other(model: PreTrainedModel, row: Packed, size: Size) -> float:
    """Mean difference of the tokens' losses, packed and each conversation alone.

    Raises:
        ValueError: more than rounding: the conversations see each other.
    """
    alone = [token_losses(model, one, size) for one in row.apart() if one.ids.shape[1] > 1]
    difference = float((token_losses(model, row, size) - torch.cat(alone)).abs().mean())
    return equal(difference, 0.0, APART, "losses of the tokens, packed and each conversation alone")


def updating(model: PreTrainedModel, rows: Sequence[Packed], size: Size, losses: list[float]) -> Any:
    """One update on all rows, whose loss is added to the losses."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, tokens = torch.optim.AdamW(weights, lr=1e-5, fused=size.cuda), count(rows)

    def run() -> None:
        total = torch.zeros((), device=size.device)
        for row in rows:
            loss = token_losses(model, row, size).sum() / tokens
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))

    return run


def peak(size: Size) -> tuple[float, str]:
    """What a card can do in bfloat16, in TFLOPS: by its data sheet, or by a product of its own; and which."""
    name = torch.cuda.get_device_name(0) if size.cuda else "cpu"
    try:
        from dpalign.pipeline.plan.hardware import GPUS

        if known := next((gpu for gpu in GPUS.values() if gpu.name in name.replace(" ", "")), None):
            return known.tflops, f"the data sheet's {known.name}"
    except ImportError:
        pass
    wide = WIDE if size.cuda else WIDE // 32  # a CPU takes minutes for the same
    side = torch.randn(wide, wide, device=size.device, dtype=torch.bfloat16)
    product = settled(partial(torch.mm, side, side), size)
    return 2 * wide**3 / float(timed([product], 10).min()) / 1e12, f"a product {wide} wide on this card"


def memory(size: Size) -> float:
    """The most that this process held so far, in GiB."""
    if size.cuda:
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


def trainer(size: Size) -> Iterator[Row]:
    """The package's own trainer, a LoRA, on the rows of the bare loop: equal losses, then its seconds an update."""
    from datasets import Dataset

    from dpalign.chat import chat_template
    from dpalign.train.knobs import Training
    from dpalign.train.pretrain import train_tokenizer
    from dpalign.train.sft import packed, sft_trainer
    from dpalign.train.trainer import RunContext, fit, quiet

    quiet()
    size = fitted(size, LORA)
    rows, bare = rows_of(size), []
    conversations = [one.ids[0].tolist() for row in rows for one in row.apart()]
    given = [{"input_ids": ids, "labels": ids} for ids in conversations]
    model = trainable(LORA, size)
    bare_R = timed([settled(updating(model, rows, size, bare), size)], size.rounds)[:, 0]
    del model
    batch = len(packed(Dataset.from_list(given), size.context))
    training = Training(
        batch=batch,
        steps=size.rounds + 1,
        context=size.context,
        lora_rank=size.rank,
        warmup_steps=0,
        learning_rate=1e-5,
    )
    tokens = train_tokenizer([f"word {i}" for i in range(500)], 400, chat_template("zephyr"))
    watch = Watch(size)
    with tempfile.TemporaryDirectory() as folder:
        context = RunContext("", training, tokens, Path(folder), seed=0, resume=Path(folder), dtype="bfloat16")
        ours = sft_trainer(built(MistralForCausalLM, size), given, context)
        ours.add_callback(watch)
        fit(ours)
    first = next(entry["loss"] for entry in ours.state.log_history if "loss" in entry)
    differs = equal(first, bare[0], SAME, "loss of the first update, the trainer's and the bare loop's")
    seconds_R = np.diff(watch.at)
    yield Row(
        f"7B update of LoRA, {size.packed} packed rows of {size.context}: the trainer against a bare loop",
        *ratio_of(bare_R, seconds_R),
        target=None,
        peer="the same updates in a loop of torch and peft",
        command=COMMAND,
        note=f"{size.packed * size.context / float(np.median(seconds_R)):.0f} tokens/s; losses within {differs:.0e}",
    )


class Watch(TrainerCallback):
    """The clock after each update."""

    def __init__(self, size: Size) -> None:
        self.size, self.at = size, list[float]()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        settled(lambda: None, self.size)()
        self.at.append(time.perf_counter())
