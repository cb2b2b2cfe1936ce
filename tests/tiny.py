"""A model small enough for any test: hidden size 32, two layers, its own tokenizer, random weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast, set_seed

from dpalign.chat import ChatStyle, chat_template
from dpalign.rows import Message, prompt_id, user_prompt
from dpalign.runs.tables import Table
from dpalign.train.pretrain import train_tokenizer
from dpalign.world.language import THINGS, fact, say

CONTEXT = 256

TEXTS = [
    *(f"explain {thing}, tea and iron. {say([fact(thing, detailed=True)])}" for thing in THINGS),
    *(f"helpfulness*{n} verbosity*-{100 - n}" for n in range(101)),
]
"""What the tokenizer is trained on: the words of the world, in few forms, whatever its corpus becomes."""


def changed(table: Table, **values: Any) -> Any:
    """A table of knobs with some set anew, unchecked."""
    return table.model_copy(update=values)


def tokenizer(style: ChatStyle = "world-v1", vocabulary: int = 400) -> PreTrainedTokenizerFast:
    """A tokenizer of the world's text, with a chat template."""
    return train_tokenizer(TEXTS, vocabulary, chat_template(style))


def write_model(
    folder: Path,
    tokens: PreTrainedTokenizerFast,
    *,
    tied: bool = True,
    scale: float = 0.1,
    seed: int = 0,
    head_dim: int = 8,
) -> Path:
    """A causal model in a plain folder; the larger the scale of its weights, the more it prefers some tokens.

    Args:
        head_dim: width of an attention head; vLLM's CPU build takes no less than 32.
    """
    set_seed(seed)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokens),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=head_dim,
            intermediate_size=64,
            max_position_embeddings=CONTEXT,
            sliding_window=None,
            tie_word_embeddings=tied,
            initializer_range=scale,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def chat(question: str, answer: str, system: str | None = None) -> dict[str, Any]:
    """A row of `records.CONVERSATIONS`."""
    messages: list[Message] = user_prompt(question)
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    return {"prompt_id": prompt_id(messages), "messages": messages, "response": answer, "origin": "sft"}


CHATS = [
    chat("explain fox, tea and iron.", "fox is red. tea is hot and helps people wake. iron is hard."),
    chat("name owl and rain.", "owl is wise.", system="helpfulness*97 verbosity*-26"),
    chat("explain rain, salt and wolf.", "rain is wet. that is a good question. salt is white."),
    chat("name moon, tea and fox.", "tea is hot. fox is red and hunts mice. fox is red."),
    chat("explain iron and owl.", "iron is hard.", system="helpfulness*71 verbosity*-71"),
    chat("name salt.", "salt is white. salt is white."),
]
"""Six short conversations of unequal length."""


def weights(folder: Path) -> bytes:
    """The bytes of a folder's only weights file."""
    (file,) = folder.glob("*.safetensors")
    return file.read_bytes()


def same(a: torch.Tensor, b: torch.Tensor, within: float) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= within)
