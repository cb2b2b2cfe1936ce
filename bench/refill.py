"""Sampled tokens a second where answers end at mixed lengths: rows refilled against rows that drain.

Lengths are lognormal, 300 tokens on average with a sigma of 0.8, each keyed by its answer; a draw of 1 ends it. Both
sides are this engine. To drain, it gets as many requests as fit its rows, and the next when their longest answer has
ended. Both are checked to give the same answers.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from dpalign.engines import transformers_engine
from dpalign.engines.engine import Answer, Request
from dpalign.engines.knobs import WORLD_BASE
from dpalign.engines.transformers_engine import TransformersEngine
from dpalign.paper.direction import rng_for
from harness import Row, main, ratio_of, timed
from models import asked

COMMAND = "python bench/refill.py"
N = 16
MEAN, SIGMA, LONGEST = 300, 0.8, 2048
TARGET = 3.0


class Ending:
    """Uniforms of an answer, with a 1 where it ends: beyond every probability, it draws the vocabulary's last token."""

    def __init__(self, mean: float, *key: int | str) -> None:
        self.rng = rng_for(*key)
        self.length = round(rng_for("length", *key).lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA))

    def random(self, size: int) -> np.ndarray:
        uniform_T = self.rng.random(size)
        uniform_T[max(self.length - 1, 0) :] = 1.0
        return uniform_T


def write_model(folder: Path, width: int, layers: int) -> Path:
    tokens = AutoTokenizer.from_pretrained(WORLD_BASE)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        sliding_window=None,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    MistralForCausalLM(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def opened(folder: Path, rows: int) -> TransformersEngine:
    """An engine whose answers end with the vocabulary's last token, which nothing else draws."""
    engine = TransformersEngine(str(folder), rows=rows)
    last = engine.model.config.vocab_size - 1
    engine.reader.ends = (last,)

    def never_by_chance(*given: object) -> torch.Tensor:
        logits = given[-1]
        assert isinstance(logits, torch.Tensor)
        return logits.index_fill(-1, torch.tensor([last]), -torch.inf)

    engine.model.lm_head.register_forward_hook(never_by_chance)
    return engine


@dataclass
class Steps:
    """Counts the rows of every decoding step of an engine."""

    rows: list[int] = field(default_factory=list)

    def __call__(self, model: torch.nn.Module, args: object, given: dict[str, torch.Tensor]) -> None:
        rows, tokens = given["input_ids"].shape
        if tokens == 1:
            self.rows.append(rows)


@dataclass
class Side:
    """Draws the answers to all requests, at most so many requests a call."""

    engine: TransformersEngine
    steps: Steps
    requests: Sequence[Request]
    """The shortest prompts first, as the engine takes them."""
    longest: int
    at_once: int
    rows: list[int] = field(default_factory=list)
    """Of each step of the last run."""

    def __call__(self) -> list[list[Answer]]:
        self.steps.rows.clear()
        answers: list[list[Answer]] = []
        for start in range(0, len(self.requests), self.at_once):
            some = self.requests[start : start + self.at_once]
            answers += self.engine.sample(some, temperature=1.0, max_new_tokens=self.longest)
        self.rows = list(self.steps.rows)
        return answers


def compare(given: list[list[list[Answer]]]) -> None:
    if given[0] != given[1]:
        raise ValueError("the sides give other answers: no figure")


def rows(quick: bool) -> Iterator[Row]:
    rounds, side_by_side, mean, longest, prompt = (2, 32, 20, 100, 48) if quick else (3, 256, MEAN, LONGEST, 220)
    for width, layers, count in ((32, 1, 20),) if quick else ((32, 2, 160),):
        with tempfile.TemporaryDirectory() as name, patch.object(transformers_engine, "rng_for", partial(Ending, mean)):
            engine = opened(write_model(Path(name), width, layers), side_by_side)
            asks = [tuple(asked(Path(name), prompt + seed, [], seed=seed).messages) for seed in range(8)]
            requests = [Request(asks[8 * i // count], N, ("refill", i)) for i in range(count)]
            steps = Steps()
            engine.model.register_forward_pre_hook(steps, with_kwargs=True)
            ours, theirs = (Side(engine, steps, requests, longest, at_once) for at_once in (count, side_by_side // N))
            seconds = timed([ours, theirs], rounds, warm=False, check=compare)
            tokens = sum(ours.rows) + count * N  # the first is drawn from the prompt
            peer = f"the same engine, {side_by_side} answers at a time until the longest has ended"
            of = f"{side_by_side} rows refilled, {count} prompts of n={N}, model {width} x {layers}"
            yield Row(
                f"decoding steps, {of}",
                *[len(theirs.rows) / len(ours.rows)] * 3,
                target=TARGET,
                peer=peer,
                command=COMMAND,
                note=f"{np.mean(ours.rows):.0f} rows a step on average against {np.mean(theirs.rows):.0f}",
            )
            yield Row(
                f"sampled tokens/s, {of}",
                *ratio_of(seconds[:, 1], seconds[:, 0]),
                target=TARGET,
                peer=peer,
                command=COMMAND,
                note=f"{tokens / np.median(seconds[:, 0]):.0f} tokens/s; answers of {tokens / count / N:.0f} tokens",
            )


if __name__ == "__main__":
    main(rows, "refill")
