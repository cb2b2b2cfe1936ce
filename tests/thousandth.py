"""What the paper's recipe reads, at a thousandth of its size: a random Mistral, and the public data sets' rows."""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast, set_seed

from dpalign.paper.direction import Preference
from dpalign.paper.prompts import render_preference, render_reward_input
from dpalign.world.language import THINGS, fact, say

WIDTH, ENDS = 256, 6.0
MODELS = ("gpt-4", "llama-2-7b-chat", "falcon-40b-instruct", "bard")
ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


def question(things: Sequence[str]) -> str:
    return f"Tell me about {' and '.join(things)}."


def answer(things: Sequence[str], i: int) -> str:
    """One of four answers, each longer than the one before."""
    return say([fact(thing, detailed=i > 1) for thing in things[: 1 + i % 2]] * (1 + i // 2))


PAIRS = list(itertools.combinations(THINGS, 2))
OBJECTIVES = ("helpfulness", "verbosity")
TEXTS = [
    text
    for angle, things in enumerate(PAIRS)
    for asked in [[{"role": "user", "content": question(things)}]]
    for text in (
        *(render_reward_input(asked, answer(things, i), "dpa-v1") for i in range(4)),
        render_preference(Preference.from_angle(-(angle % 46), OBJECTIVES), "dpa-v1"),
    )
]
"""What the tokenizer is trained on: the words of the prompts, the answers, and the lines around them."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Mistral's kind: BPE with byte fallback, spaces as part of words, a BOS before each text, no pad token.

    A direction's digits and Zephyr's markers are no tokens of their own.
    """
    special = ["<unk>", "<s>", "</s>"]
    tokens = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokens.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokens.decoder = decoders.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))],
        initial_alphabet=[chr(i) for i in range(33, 127)],
        show_progress=False,
    )
    tokens.train_from_iterator(TEXTS, trainer)
    tokens.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token="<unk>", bos_token="<s>", eos_token="</s>", add_prefix_space=None
    )


def write_model(folder: Path) -> Path:
    """A random Mistral of two million parameters that ends an answer after a few tokens."""
    set_seed(1)
    tokens = tokenizer()
    config = MistralConfig(
        vocab_size=len(tokens), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
        head_dim=32, intermediate_size=896, max_position_embeddings=2048, sliding_window=None,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = MistralForCausalLM(config)
    with torch.no_grad():  # every embedding leans one way, and the end of text is read off there
        lean = torch.full((WIDTH,), 0.3)
        model.get_input_embeddings().weight += lean
        model.lm_head.weight[config.eos_token_id] = ENDS * lean / lean.norm() / WIDTH**0.5
    model.to(torch.bfloat16).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def write_data(folder: Path, prompts: int, validated: int, attributes: int) -> dict[str, str]:
    """HelpSteer, UltraFeedback and its validation prompts, as the hub has them; returns the knobs of [data]."""

    def ultrafeedback() -> Iterator[dict[str, Any]]:
        for things in PAIRS[: prompts + validated]:
            completions = []
            for i, model in enumerate(MODELS):
                ratings = {
                    aspect: {"Rating": str(1 + (i + j) % 5), "Rationale": "So it is."}
                    for j, aspect in enumerate(ASPECTS)
                }
                one = {"model": model, "principle": "helpfulness", "custom_system_prompt": "Be of use."}
                more = {"response": answer(things, i), "annotations": ratings, "critique": "Fine."}
                completions.append(one | more | {"overall_score": 3.0 + i, "fine-grained_score": 2.0})
            yield {"source": "flan", "instruction": question(things), "models": [*MODELS], "completions": completions}

    def binarized() -> Iterator[dict[str, Any]]:
        for things in PAIRS[:validated]:
            asked = {"role": "user", "content": question(things)}
            chosen, rejected = ([asked, {"role": "assistant", "content": answer(things, i)}] for i in (3, 0))
            row = {"prompt": asked["content"], "prompt_id": "0" * 64, "chosen": chosen, "rejected": rejected}
            yield row | {"messages": chosen, "score_chosen": 6.0, "score_rejected": 3.0}

    def helpsteer() -> Iterator[dict[str, Any]]:
        for n, things in enumerate(PAIRS[-attributes:]):
            row = {"prompt": question(things), "response": answer(things, n % 4), "verbosity": n % 4}
            yield row | {"helpfulness": 4 - n % 3, "correctness": 4, "coherence": 4, "complexity": n % 2}

    paths = {}
    for name, rows in (("helpsteer", helpsteer()), ("ultrafeedback", ultrafeedback()), ("test_prefs", binarized())):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths[name] = str(path)
    return paths
