"""The rows that need a GPU: Mistral-7B's architecture in bfloat16 with random weights, prompts of 220 tokens.

Scoring: 80 answers of 300 tokens on average, the prompt read once, against sorted and naive batches and vLLM's pooling
with prefix caching. Sampling: 16 answers, against `generate(num_return_sequences=16)` and vLLM. Token ids in, numbers
out: no tokenizer. vLLM cannot share the card with the others, so its rounds come after theirs.
"""

import gc
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import MistralConfig, MistralForCausalLM, MistralForSequenceClassification, PreTrainedModel

from dpalign.engines import decoding
from dpalign.engines.decoding import SharedDecoder
from dpalign.rewards.shared_prefix import cannot_share, score_shared
from harness import Row, Unable, equal, main, ratio_of, timed

COMMAND = "python bench/gpu.py"
BATCH_TOKENS = 16_384
WITHIN = 0.05
"""Of the largest reward: what bfloat16 may differ by between two orders of summing."""


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    config: MistralConfig
    device: str = "cuda"
    prompt: int = 220
    answer: tuple[int, int] = (150, 450)
    answers: int = 80
    n: int = 16
    new: int = 128
    rounds: int = 5


def seven_billion(**changes: Any) -> MistralConfig:
    """Mistral-7B-v0.1's own shape."""
    return MistralConfig(**{"sliding_window": 4096, "pad_token_id": 0, "num_labels": 10} | changes)


def rows(quick: bool) -> Iterator[Row]:
    if not torch.cuda.is_available():
        raise Unable("it needs a CUDA device")
    config = seven_billion(num_hidden_layers=2) if quick else seven_billion()
    yield from measured(Size(config, rounds=2, new=16) if quick else Size(config))


def measured(size: Size) -> Iterator[Row]:
    """All rows at one size, on one device."""
    yield from scoring(size)
    yield from sampling(size)
    if size.device == "cuda" and importlib.util.find_spec("vllm"):
        yield from beside_vllm(size)


def texts(size: Size) -> list[list[int]]:
    """A prompt and answers to it, as token ids."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(3, size.config.vocab_size, size=size.prompt).tolist()
    sizes = rng.integers(*size.answer, size=size.answers, endpoint=True)
    return [prompt + rng.integers(3, size.config.vocab_size, size=count).tolist() for count in sizes]


def built(kind: type[PreTrainedModel], size: Size) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(size.device):
        return kind._from_config(size.config, dtype=torch.bfloat16).eval()


def settled(side: Any, size: Size) -> Any:
    """The side, timed to the end of what it started on the device."""

    def run() -> object:
        out = side()
        if size.device == "cuda":
            torch.cuda.synchronize()
        return out

    return run


@torch.inference_mode()
def in_batches(model: PreTrainedModel, given: Sequence[list[int]], batches: Sequence[Sequence[int]], mask: bool) -> Any:
    """Plain forwards, padded on the right."""
    reward_NH = torch.empty(len(given), model.config.num_labels)
    for batch in batches:
        width = max(len(given[n]) for n in batch)
        ids = torch.tensor([given[n] + [0] * (width - len(given[n])) for n in batch], device=model.device)
        masks = {"attention_mask": (ids != 0).long()} if mask else {}
        reward_NH[list(batch)] = model(input_ids=ids, use_cache=False, **masks).logits.float().cpu()
    return reward_NH


def scoring(size: Size) -> Iterator[Row]:
    given = texts(size)
    model = built(MistralForSequenceClassification, size)
    if reason := cannot_share(model):
        raise ValueError(f"the prompt cannot be shared: {reason}")
    shuffled = np.random.default_rng(1).permutation(len(given)).tolist()
    by_length = sorted(range(len(given)), key=lambda n: -len(given[n]))
    per_batch = max(1, BATCH_TOKENS // len(given[by_length[0]]))
    batches = [by_length[i : i + per_batch] for i in range(0, len(given), per_batch)]
    peers = {
        "naive": [shuffled[i : i + 16] for i in range(0, len(given), 16)],
        "sorted": batches,
    }
    ours = partial(score_shared, model, given, [0] * len(given), BATCH_TOKENS)
    largest = float(ours().abs().max())
    sides = [settled(ours, size)]
    for name, of_peer in peers.items():
        side = partial(in_batches, model, given, of_peer, name == "naive")
        equal(ours() / largest, side() / largest, WITHIN, f"rewards, shared and {name}")
        sides.append(settled(side, size))
    seconds = timed(sides, size.rounds)
    rate = len(given) / float(np.median(seconds[:, 0]))
    for i, name in enumerate(peers):
        yield Row(
            f"7B scoring, P={size.prompt}, N={size.answers}, against {name}",
            *ratio_of(seconds[:, 1 + i], seconds[:, 0]),
            target=None,
            peer=f"transformers, {name} batches",
            command=COMMAND,
            note=f"{rate:.0f} answers/s; answers of {np.mean([len(x) for x in given]) - size.prompt:.0f} tokens",
        )


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: list[int], n: int, new: int) -> list[list[int]]:
    decoder = SharedDecoder(model)
    token_R = decoder.join([prompt], [n]).argmax(dim=-1)
    drawn = [token_R]
    while len(drawn) < new:
        token_R = decoder.read(token_R).argmax(dim=-1)
        drawn.append(token_R)
    return torch.stack(drawn, dim=1).tolist()


def sampling(size: Size) -> Iterator[Row]:
    """Greedy on both sides: what is drawn from the logits takes no time beside a 7B model."""
    prompt = texts(size)[0][: size.prompt]
    model = built(MistralForCausalLM, size)
    if reason := decoding.cannot_share(model):
        raise ValueError(f"the prompt cannot be shared: {reason}")
    ids = torch.tensor([prompt] * size.n, device=model.device)

    def theirs() -> object:
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=size.new,
            min_new_tokens=size.new,
            pad_token_id=0,
        )

    seconds = timed(
        [settled(partial(greedy, model, prompt, size.n, size.new), size), settled(theirs, size)], size.rounds
    )
    rate = size.n * size.new / float(np.median(seconds[:, 0]))
    yield Row(
        f"7B sampling, P={size.prompt}, n={size.n}, against generate",
        *ratio_of(seconds[:, 1], seconds[:, 0]),
        target=None,
        peer="transformers, generate on 16 copies",
        command=COMMAND,
        note=f"{rate:.0f} tokens/s; logits checked, tokens not: bfloat16 ties fall either way",
    )


def beside_vllm(size: Size) -> Iterator[Row]:
    """The same weights in vLLM, each engine alone on the card."""
    from vllm import LLM, SamplingParams
    from vllm.config import PoolerConfig

    given = texts(size)
    for kind in ("scoring", "sampling"):
        with tempfile.TemporaryDirectory() as folder:
            scores = kind == "scoring"
            model = built(MistralForSequenceClassification if scores else MistralForCausalLM, size)
            prompt = given[0][: size.prompt]
            ours = (
                partial(score_shared, model, given, [0] * len(given), BATCH_TOKENS)
                if scores
                else partial(greedy, model, prompt, size.n, size.new)
            )
            ours_R = timed([settled(ours, size)], size.rounds)[:, 0]
            expected = ours() if scores else None
            model.save_pretrained(folder)
            del model, ours
            gc.collect()
            torch.cuda.empty_cache()
            options: dict[str, Any] = {"dtype": "bfloat16", "skip_tokenizer_init": True, "max_model_len": 4096}
            if scores:
                pooling = PoolerConfig(task="classify", use_activation=False)
                llm = LLM(folder, runner="pooling", pooler_config=pooling, enable_prefix_caching=True, **options)
            else:
                llm = LLM(folder, enable_prefix_caching=True, **options)
            theirs_R = []
            for _ in range(size.rounds + 1):
                llm.reset_prefix_cache()
                start = time.perf_counter()
                if scores:
                    out = llm.classify([{"prompt_token_ids": ids} for ids in given], use_tqdm=False)
                else:
                    drawing = SamplingParams(
                        n=size.n, max_tokens=size.new, temperature=1.0, ignore_eos=True, detokenize=False
                    )
                    llm.generate([{"prompt_token_ids": prompt}], drawing, use_tqdm=False)
                theirs_R.append(time.perf_counter() - start)
            if expected is not None:
                largest = float(expected.abs().max())
                got = np.array([one.outputs.probs for one in out])
                equal(expected.numpy() / largest, got / largest, WITHIN, "rewards, shared and vLLM's")
            yield Row(
                f"7B {kind}, P={size.prompt}, against vLLM",
                *ratio_of(np.full(size.rounds, statistics.median(theirs_R[1:])), ours_R),
                target=None,
                peer="vLLM, classify with prefix caching" if scores else "vLLM, generate with n=16",
                command=COMMAND,
                note="one engine after the other",
            )
            del llm
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(rows, "gpu")
