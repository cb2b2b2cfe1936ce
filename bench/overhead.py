"""What this package adds to the bare work: 1.00 means nothing, 0.95 a twentieth.

Sampling: `Engine.sample` (chat template, keyed randomness, text) and the rows of the sample stage on disk, over the
bare decoding loop with `torch.multinomial`. Scoring: the rows of the score stage on disk over the bare `score`.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dpalign.engines.decoding import SharedDecoder
from dpalign.engines.engine import Request
from dpalign.engines.transformers_engine import TransformersEngine
from dpalign.rewards.score import ModelScorer
from dpalign.rows import CANDIDATES, SCORES, Message, prompt_id, read_rows, write_rows
from dpalign.stages.score import scored_rows
from harness import Row, equal, interleaved, main
from models import asked, write_policy, write_reward_model

COMMAND = "python bench/overhead.py"
N = 16
TARGET = 0.95


@torch.inference_mode()
def bare(engine: TransformersEngine, prompts: list[list[int]], new: int) -> list[list[int]]:
    """The loop alone: token ids in, token ids out."""
    decoder = SharedDecoder(engine.model)
    logits_RV = decoder.join(prompts, [N] * len(prompts))
    drawn = []
    for step in range(new):
        token_R = torch.multinomial(torch.softmax(logits_RV, dim=-1), 1).squeeze(1)
        drawn.append(token_R)
        if step + 1 < new:
            logits_RV = decoder.read(token_R)
    return torch.stack(drawn, dim=1).tolist()


def candidate(messages: list[Message], sample: int, text: str, tokens: int) -> dict[str, Any]:
    """A row as the sample stage writes it."""
    return {
        "prompt_id": prompt_id(messages),
        "t": 1,
        "condition_index": 0,
        "sample": sample,
        "condition_kind": "plain",
        "condition": (),
        "messages": messages,
        "response": text,
        "tokens": tokens,
        "finished": False,
    }


def rows(quick: bool) -> Iterator[Row]:
    rounds, new, count, size = (2, 8, 2, 64) if quick else (7, 48, 4, 256)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_policy(folder / "policy", quick)
        engine = TransformersEngine(str(source), rows=count * N)
        engine.tokenizer.add_special_tokens({"eos_token": "<never>"})  # beyond the vocabulary: no answer ends early
        asks = [asked(source, size, [], seed=seed).messages for seed in range(count)]
        requests = [Request(tuple(messages), N, ("bench", i)) for i, messages in enumerate(asks)]
        prompts = [engine.reader.prompt_ids(messages) for messages in asks]

        def stage() -> None:
            drawn = engine.sample(requests, temperature=1.0, max_new_tokens=new)
            found = (
                candidate(messages, i, answer.text, answer.tokens)
                for messages, answers in zip(asks, drawn, strict=True)
                for i, answer in enumerate(answers)
            )
            write_rows(folder / "candidates.parquet", found, CANDIDATES)

        stage()
        written = list(read_rows(folder / "candidates.parquet", CANDIDATES))
        equal(sum(r["tokens"] for r in written), sum(map(len, bare(engine, prompts, new))), 0, "tokens sampled")
        yield Row(
            f"overhead of the sample stage, P={size}, {count} prompts of n={N}",
            *interleaved(stage, lambda: bare(engine, prompts, new), rounds),
            target=TARGET,
            peer="the bare decoding loop",
            command=COMMAND,
        )
        options = {"template": "world-v1", "batch_tokens": 16_384, "dtype": "float32"}
        scorer = ModelScorer(str(write_reward_model(folder / "reward", quick)), **options)
        pairs = [(row["messages"], row["response"]) for row in written]

        def score_stage() -> None:
            candidates = list(read_rows(folder / "candidates.parquet", CANDIDATES))
            write_rows(folder / "scores.parquet", scored_rows(scorer, candidates), SCORES)

        score_stage()
        rewards = [row["rewards"] for row in read_rows(folder / "scores.parquet", SCORES)]
        equal(rewards, scorer.score(pairs), 1e-5, "rewards")
        yield Row(
            f"overhead of the score stage, P={size}, {count} prompts of n={N}",
            *interleaved(score_stage, lambda: scorer.score(pairs), rounds),
            target=TARGET,
            peer="the bare scorer",
            command=COMMAND,
        )


if __name__ == "__main__":
    main(rows, "overhead")
