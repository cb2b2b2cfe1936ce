"""The model of the CPU rows: a random Mistral of width 256 and 6 layers in float32, which reads the world's language.

Small enough for one thread, and shaped like the 7B one: grouped keys, an MLP of 3.5 widths, and next to nothing of its
work in the vocabulary (838 tokens).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM, MistralForSequenceClassification

from dpalign.engines.knobs import WORLD_BASE
from dpalign.paper.prompts import render_reward_input
from dpalign.rows import Message, user_prompt

CONTEXT = 2048
HEADS = 10


def config(quick: bool, **changes: object) -> MistralConfig:
    """256x6; for a quick run 64x2."""
    tokens = AutoTokenizer.from_pretrained(WORLD_BASE)
    width = 64 if quick else 256
    return MistralConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=2 if quick else 6,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        sliding_window=None,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        **changes,
    )


def write_policy(folder: Path, quick: bool) -> Path:
    torch.manual_seed(0)
    MistralForCausalLM(config(quick)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(WORLD_BASE).save_pretrained(folder)
    return folder


def write_reward_model(folder: Path, quick: bool) -> Path:
    torch.manual_seed(1)
    model = MistralForSequenceClassification(config(quick, num_labels=HEADS, problem_type="regression"))
    with torch.no_grad():
        model.score.weight *= 50  # rewards that differ between answers by more than a rounding
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(WORLD_BASE).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Asked:
    """A prompt, and answers to it of unequal lengths."""

    messages: list[Message]
    answers: list[str]

    @property
    def pairs(self) -> list[tuple[list[Message], str]]:
        return [(self.messages, answer) for answer in self.answers]


def asked(folder: Path, prompt_tokens: int, sizes: Sequence[int], seed: int = 0) -> Asked:
    """A prompt whose reward input has about so many tokens before its answer, and answers of these many tokens."""
    tokens = AutoTokenizer.from_pretrained(folder)
    rng = np.random.default_rng(seed)
    words = [w for w in (tokens.decode([i]) for i in range(len(tokens))) if len(w) > 3 and w.strip(" ").isalpha()]

    def text(count: int) -> str:
        drawn = "".join(rng.choice(words, size=count))
        return tokens.decode(tokens(drawn, add_special_tokens=False)["input_ids"][:count])

    frame = len(tokens(render_reward_input(user_prompt(""), "", "world-v1"))["input_ids"])
    return Asked(user_prompt(text(prompt_tokens - frame)), [text(size) for size in sizes])
