"""Sampled tokens a second, 16 answers a prompt: this package's engine against `generate` and `generate_batch`.

Greedy answers, and answers drawn with the engine's own uniforms injected into `generate`, are checked to be the same
tokens first. Timed is true sampling at temperature 1 of a fixed number of tokens, without an end-of-text token, so that
both sides decode equally many.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor

from dpalign.engines.engine import Answer, Request
from dpalign.engines.transformers_engine import TransformersEngine, draw
from dpalign.paper.direction import rng_for
from harness import Row, interleaved, main, say
from models import asked, write_policy

COMMAND = "python bench/sampling.py"
N = 16
TARGETS = {256: 1.3, 1024: 1.9}


@dataclass
class Uniforms(LogitsProcessor):
    """Makes `generate` take the tokens that the engine's uniforms choose."""

    uniform_RT: np.ndarray
    step: int = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token_R = draw(scores, self.uniform_RT[:, self.step], 1.0)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, token_R[:, None], 0.0)


def generated(engine: TransformersEngine, ids: list[int], new: int, **options: Any) -> list[list[int]]:
    """`generate(num_return_sequences=16)` as its documentation has it, with true sampling unless told otherwise."""
    drawing = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    out = engine.model.generate(
        torch.tensor([ids], device=engine.device),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=engine.device),
        max_new_tokens=new,
        pad_token_id=engine.tokenizer.pad_token_id,
        **{"num_return_sequences": N} | drawing | options,
    )
    return out[:, len(ids) :].tolist()


def same(ours: list[Answer], theirs: list[list[int]], engine: TransformersEngine, what: str) -> None:
    texts = [engine.tokenizer.decode(row, skip_special_tokens=True) for row in theirs]
    if [answer.text for answer in ours] != texts:
        raise ValueError(f"{what}: the sides give other answers; nothing is timed")


def check(engine: TransformersEngine, request: Request, ids: list[int], new: int) -> None:
    """The same tokens greedily, and with the same noise."""
    (greedy,) = engine.sample([request], temperature=0.0, max_new_tokens=new)
    beside = generated(
        engine, ids, new, do_sample=False, num_return_sequences=1, top_k=None, top_p=None, temperature=None
    )
    same(greedy[:1], beside, engine, "greedy")
    (drawn,) = engine.sample([request], temperature=1.0, max_new_tokens=new)
    uniform_RT = np.stack([rng_for(*request.key, sample).random(new) for sample in range(N)])
    same(drawn, generated(engine, ids, new, logits_processor=[Uniforms(uniform_RT)]), engine, "with the same noise")


def batched(engine: TransformersEngine, ids: list[int], new: int) -> Callable[[], object]:
    """`generate_batch`, transformers' continuous batching, on 16 copies of the prompt."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    config = GenerationConfig(
        max_new_tokens=new, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=3, eos_token_id=-1
    )
    blocks = ContinuousBatchingConfig(num_blocks=-(-N * (len(ids) + new) // 32) + 64, page_size=32)

    def run() -> None:
        out = engine.model.generate_batch(
            inputs=[ids] * N, generation_config=config, continuous_batching_config=blocks, progress_bar=False
        )
        if len(out) != N or any(len(got.generated_tokens) != new for got in out.values()):
            raise ValueError(f"generate_batch gave {len(out)} of {N} answers")

    return run


def rows(quick: bool) -> Iterator[Row]:
    rounds, new = (2, 8) if quick else (7, 64)
    with tempfile.TemporaryDirectory() as folder:
        source = write_policy(Path(folder) / "policy", quick)
        engine = TransformersEngine(str(source), rows=N)
        engine.tokenizer.add_special_tokens({"eos_token": "<never>"})  # beyond the vocabulary: no answer ends early
        engine.model.generation_config.eos_token_id = None
        for prompt in (64,) if quick else (256, 1024):
            messages = tuple(asked(source, prompt, []).messages)
            request = Request(messages, N, ("bench", prompt))
            ids = engine.reader.prompt_ids(messages)
            check(engine, request, ids, new)

            def ours(request: Request = request) -> None:
                list(engine.sample([request], temperature=1.0, max_new_tokens=new))

            def theirs(ids: list[int] = ids) -> None:
                generated(engine, ids, new)

            peers: dict[str, tuple[Callable[[], object], float | None]] = {
                "generate(num_return_sequences=16)": (theirs, TARGETS.get(prompt)),
                "generate_batch": (batched(engine, ids, new), None),
            }
            for peer, (side, target) in peers.items():
                try:
                    ratio = interleaved(ours, side, 3 if peer == "generate_batch" else rounds)
                except (ValueError, RuntimeError, TypeError, AttributeError, ImportError) as error:
                    if peer != "generate_batch":
                        raise
                    say(f"{peer} does not run here: {error}")
                    continue
                yield Row(
                    f"sampling, P={prompt}, n={N}, against {peer}",
                    *ratio,
                    target=target,
                    peer=f"transformers, {peer}",
                    command=COMMAND,
                    note=f"prompt of {len(ids)} tokens, {new} new",
                )


if __name__ == "__main__":
    main(rows, "sampling")
