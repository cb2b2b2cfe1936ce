"""The rows that need a GPU: Mistral-7B's architecture in bfloat16 with random weights, prompts of 220 tokens.

Attention: the device's fused kernel, against float32 written out. Scoring: 80 answers of 300 tokens on average, the
prompt read once, against sorted and naive batches and vLLM's pooling with prefix caching. Sampling: 16 answers, against
`generate(num_return_sequences=16)` and vLLM. Training is in gpu_training.py. Token ids in, numbers out: no tokenizer.
vLLM cannot share the card with the others, so its rounds come after theirs.

It needs torch, transformers and numpy alone: a card's machine may have no more.
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
from torch.nn import functional
from transformers import MistralConfig, MistralForCausalLM, MistralForSequenceClassification, PreTrainedModel

from dpalign.engines import decoding
from dpalign.engines.attention import attention
from dpalign.engines.decoding import SharedDecoder
from dpalign.rewards.shared_prefix import cannot_share, score_shared
from harness import Row, Unable, equal, main, ratio_of, timed

COMMAND = "bash bench/gpu_all.sh"
BATCH_TOKENS = 16_384
REPEATS = 20
"""Turns of the attention kernel in a round: one alone is too short to time."""
CHECKED = 16
"""Tokens of each answer whose logits are compared."""
WITHIN = 0.05
"""Of the largest number: what bfloat16 may differ by between two orders of summing."""


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
    context: int = 4096
    """Tokens of a packed row that is trained on."""
    packed: int = 2
    """Packed rows of an update."""
    rank: int = 64
    """Of the LoRA."""

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"


def seven_billion(**changes: Any) -> MistralConfig:
    """Mistral-7B-v0.1's own shape."""
    return MistralConfig(**{"sliding_window": 4096, "pad_token_id": 0, "num_labels": 10} | changes)


def tiny() -> Size:
    """Seconds on any device: for tests, its figures mean nothing."""
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = seven_billion(vocab_size=512, intermediate_size=192, initializer_range=0.1, **shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes: dict[str, Any] = {"prompt": 24, "answer": (4, 12), "answers": 6, "n": 3, "new": 4, "rounds": 2}
    return Size(config, device, **sizes, context=96, rank=4)


def rows(quick: bool) -> Iterator[Row]:
    if not torch.cuda.is_available():
        raise Unable("it needs a CUDA device")
    config = seven_billion(num_hidden_layers=2) if quick else seven_billion()
    yield from measured(Size(config, rounds=2, new=16) if quick else Size(config))


def measured(size: Size) -> Iterator[Row]:
    """Scoring and sampling at one size, on one device."""
    yield from scoring(size)
    yield from sampling(size)
    if size.cuda and importlib.util.find_spec("vllm"):
        yield from beside_vllm(size)


def texts(size: Size) -> list[list[int]]:
    """A prompt and answers to it, as token ids."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(3, size.config.vocab_size, size=size.prompt).tolist()
    sizes = rng.integers(*size.answer, size=size.answers, endpoint=True)
    return [prompt + rng.integers(3, size.config.vocab_size, size=count).tolist() for count in sizes]


def built(kind: type[PreTrainedModel], size: Size, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(size.device):
        return kind._from_config(size.config, dtype=dtype).eval()


def settled(side: Any, size: Size) -> Any:
    """The side, timed to the end of what it started on the device."""

    def run() -> object:
        out = side()
        if size.cuda:
            torch.cuda.synchronize()
        return out

    return run


@torch.inference_mode()
def kernel(size: Size) -> Iterator[Row]:
    """A prompt's own attention, and that of all tokens of its answers to it: numbers first, then the time.

    The peer is torch's attention: it gives no log-sum-exps, and for the answers it holds a copy of the prompt's keys
    for each of them.
    """
    config, random = size.config, torch.Generator(size.device).manual_seed(0)
    width, mean = config.hidden_size // config.num_attention_heads, sum(size.answer) // 2

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, width, generator=random, device=size.device).to(torch.bfloat16)

    key, value = (drawn(1, config.num_key_value_heads, size.prompt) for _ in range(2))
    for what, own, tokens in (("a prompt's own", True, size.prompt), ("its answers'", False, size.answers * mean)):
        query = drawn(1, config.num_attention_heads, tokens)
        ours = partial(attention, query, key, value, width**-0.5, causal=own)
        off = []
        for name, got, known in zip(("result", "sums"), ours(), written_out(query, key, value, own), strict=True):
            largest = known.abs().max()
            off.append(
                equal((got.float() / largest).cpu(), (known / largest).cpu(), WITHIN, f"{what} attention: {name}")
            )
        copies = 1 if own else size.answers
        query_N, key_N, value_N = (
            query if own else query.unflatten(2, (size.answers, mean))[0].transpose(0, 1),
            *(part.expand(copies, -1, -1, -1).contiguous() for part in (key, value)),
        )
        theirs = partial(
            functional.scaled_dot_product_attention, query_N, key_N, value_N, is_causal=own, enable_gqa=True
        )
        seconds = timed([settled(partial(repeated, side), size) for side in (ours, theirs)], size.rounds)
        yield Row(
            f"7B attention, P={size.prompt}, {what} {tokens} tokens, with log-sum-exps",
            *ratio_of(seconds[:, 1], seconds[:, 0]),
            target=None,
            peer="torch's attention" + ("" if own else ", the keys copied for each answer"),
            command=COMMAND,
            note=f"within {max(off):.0e} of float32 written out",
        )


def repeated(side: Any) -> None:
    for _ in range(REPEATS):
        side()


def written_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its log-sum-exp in float32, as `engines.attention.attention` has them."""
    times = query.shape[1] // key.shape[1]
    key, value = (part.float().repeat_interleave(times, dim=1) for part in (key, value))
    scores = query.float() @ key.mT * query.shape[-1] ** -0.5
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(dim=-1) @ value, scores.logsumexp(dim=-1)


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
    rewards = ours()
    largest = float(rewards.abs().max())
    sides, off = [settled(ours, size)], []
    for name, of_peer in peers.items():
        side = partial(in_batches, model, given, of_peer, name == "naive")
        off.append(equal(rewards / largest, side() / largest, WITHIN, f"rewards, shared and {name}"))
        sides.append(settled(side, size))
    seconds = timed(sides, size.rounds)
    rate = len(given) / float(np.median(seconds[:, 0]))
    mean = np.mean([len(ids) for ids in given]) - size.prompt
    for i, name in enumerate(peers):
        yield Row(
            f"7B scoring, P={size.prompt}, N={size.answers}, against {name}",
            *ratio_of(seconds[:, 1 + i], seconds[:, 0]),
            target=None,
            peer=f"transformers, {name} batches",
            command=COMMAND,
            note=f"{rate:.0f} answers/s of {mean:.0f} tokens; rewards within {max(off):.0e} of the largest",
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


@torch.inference_mode()
def logits_beside(model: PreTrainedModel, prompt: list[int], n: int, new: int) -> float:
    """How far the decoder's logits of n different answers are from a plain forward's, of the largest.

    Raises:
        ValueError: further than bfloat16's rounding.
    """
    random = np.random.default_rng(2)
    token_RT = torch.tensor(random.integers(3, model.config.vocab_size, size=(n, new)), device=model.device)
    decoder = SharedDecoder(model)
    steps = [decoder.join([prompt], [n])]
    steps += [decoder.read(token_R) for token_R in token_RT[:, :-1].T]
    ours_RTV = torch.stack(steps, dim=1).float().cpu()
    ids_RT = torch.cat([torch.tensor([prompt] * n, device=model.device), token_RT[:, :-1]], dim=1)
    theirs_RTV = model(input_ids=ids_RT, use_cache=False, logits_to_keep=new).logits.float().cpu()
    largest = theirs_RTV.abs().max()
    return equal(ours_RTV / largest, theirs_RTV / largest, WITHIN, "logits, the prompt shared and read by each")


def sampling(size: Size) -> Iterator[Row]:
    """Greedy on both sides: what is drawn from the logits takes no time beside a 7B model."""
    prompt = texts(size)[0][: size.prompt]
    model = built(MistralForCausalLM, size)
    if reason := decoding.cannot_share(model):
        raise ValueError(f"the prompt cannot be shared: {reason}")
    differs = logits_beside(model, prompt, size.n, min(CHECKED, size.new))
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
        note=f"{rate:.0f} tokens/s; logits within {differs:.0e} of the largest",
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
