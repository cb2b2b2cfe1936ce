"""Against vLLM on the same weights, in one process, each side in turns.

vLLM's prefix cache is on, and empty at the start of each turn: it would else answer from the last one.

Scoring: our scorer, which reads a prompt once for all its answers, against vLLM's `classify`, both from text to raw
rewards. Sampling: our engine on vLLM against a plain script around `LLM.chat`, both from messages to texts; and against
our transformers engine.
"""

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dpalign.engines.engine import Request
from dpalign.engines.knobs import Engines
from dpalign.engines.transformers_engine import TransformersEngine
from dpalign.engines.vllm_engine import Vllm, VllmEngine, seed_of
from dpalign.rewards.score import ModelScorer, VllmScorer
from harness import THREADS, Row, Unable, equal, main, ratio_of, timed
from models import CONTEXT, asked, write_policy, write_reward_model

COMMAND = ".venv-heavy/bin/python bench/vllm_rows.py"
ON_VLLM = Engines(sampling="vllm", scoring="vllm")
SAMPLES = 16
PROMPTS = 4
ROUNDS = 7


def rows(quick: bool) -> Iterator[Row]:
    if importlib.util.find_spec("vllm") is None:
        raise Unable("vLLM (make .venv-heavy/.ready, and run it with that environment's python)")
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))  # vLLM's threads are OpenMP's
    with tempfile.TemporaryDirectory() as folder:
        yield from scoring(Path(folder), quick)
        yield from sampling(Path(folder), quick)


def scoring(folder: Path, quick: bool) -> Iterator[Row]:
    source = str(write_reward_model(folder / "reward", quick=False))
    ours = ModelScorer(source, template="world-v1", batch_tokens=16_384, dtype="float32")
    vllm = Vllm(source, ON_VLLM, rows=128, prompt_tokens=CONTEXT, max_new_tokens=0, classifies=True)
    theirs = VllmScorer(vllm, template="world-v1")

    def classify(pairs: Any) -> Any:
        theirs.vllm.llm.reset_prefix_cache()
        return theirs.score(pairs)

    for prompt in (64,) if quick else (256, 1024):
        for count in (4,) if quick else (16, 80):
            low, high = (8, 24) if quick else (60, 300)
            sizes = np.random.default_rng(prompt + count).integers(low, high + 1, size=count)
            pairs = asked(Path(source), prompt, sizes.tolist()).pairs
            off = equal(ours.score(pairs), classify(pairs), 1e-3, "rewards, ours and vLLM's")
            seconds = timed([partial(ours.score, pairs), partial(classify, pairs)], 2 if quick else ROUNDS)
            yield Row(
                f"scoring, P={prompt}, N={count}, against vLLM",
                *ratio_of(seconds[:, 1], seconds[:, 0]),
                target=1.0,
                peer="vLLM's classify, prefix caching on",
                command=COMMAND,
                note=f"{count / float(np.median(seconds[:, 0])):.0f} answers/s of {sizes.mean():.0f} tokens; "
                f"rewards within {off:.0e}",
            )
    theirs.close()


def sampling(folder: Path, quick: bool) -> Iterator[Row]:
    source = str(write_policy(folder / "policy", quick=False))
    new, prompts = (8, 2) if quick else (64, PROMPTS)
    ours = VllmEngine(Vllm(source, ON_VLLM, rows=128, prompt_tokens=CONTEXT, max_new_tokens=0))
    plain = TransformersEngine(source, rows=128)

    def draw(engine: Any, requests: list[Request], temperature: float = 1.0) -> list[list[str]]:
        ours.vllm.llm.reset_prefix_cache()
        return [
            [a.text for a in drawn] for drawn in engine.sample(requests, temperature=temperature, max_new_tokens=new)
        ]

    for prompt in (64,) if quick else (256, 1024):
        requests = [
            Request(tuple(asked(Path(source), prompt, [], seed=i).messages), SAMPLES, ("bench", i))
            for i in range(prompts)
        ]
        greedy = [Request(r.messages, 1, r.key) for r in requests]
        if draw(ours, greedy, 0.0) != draw(plain, greedy, 0.0):
            raise ValueError("greedy answers of vLLM and transformers differ; nothing is timed")
        drawn = [
            [ours.tokenizer.decode(a.token_ids, skip_special_tokens=True) for a in o.outputs]
            for o in bare(ours.llm, requests, new)
        ]
        if draw(ours, requests) != drawn:
            raise ValueError("our engine and plain vLLM draw different answers from the same seeds; nothing is timed")
        sides = [partial(draw, ours, requests), partial(bare, ours.llm, requests, new), partial(draw, plain, requests)]
        seconds = timed(sides, 2 if quick else ROUNDS)
        tokens = prompts * SAMPLES * new
        for i, (against, peer, target) in enumerate(
            [
                ("plain vLLM", "a script around vLLM's LLM.chat", 0.95),
                ("the transformers engine", "our engine on transformers", None),
            ],
            start=1,
        ):
            yield Row(
                f"sampling on vLLM, P={prompt}, n={SAMPLES}, against {against}",
                *ratio_of(seconds[:, i], seconds[:, 0]),
                target=target,
                peer=peer,
                command=COMMAND,
                note=f"{tokens / float(np.median(seconds[:, 0])):.0f} tokens/s; "
                + ("equal answers from equal seeds" if i == 1 else "equal greedy answers"),
            )
    ours.close()


def bare(llm: Any, requests: list[Request], new: int) -> list[Any]:
    """What one would write around vLLM: chats in, texts out."""
    from vllm import SamplingParams

    llm.reset_prefix_cache()
    params = [SamplingParams(n=r.n, temperature=1.0, seed=seed_of(r), max_tokens=new) for r in requests]
    chats: Any = [list(r.messages) for r in requests]
    outputs: list[Any] = llm.chat(chats, params, use_tqdm=False)
    assert all(isinstance(answer.text, str) for output in outputs for answer in output.outputs)
    return outputs


if __name__ == "__main__":
    main(rows, "vllm_rows")
