"""Scored answers a second: a prompt read once for all its answers, against peers' batches.

Both sides read text and give raw rewards of every head. `naive` is what peers do: shuffled batches of 16, padded, with
a mask. `sorted` is what this package did before: batches by length without a mask, at their fastest size.
"""

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dpalign.paper.prompts import render_reward_input
from dpalign.rewards.score import ModelScorer, Pair
from harness import Row, equal, main, ratio_of, timed
from models import asked, write_reward_model

COMMAND = "python bench/scoring.py"
NAIVE_BATCH = 16
SORTED_TOKENS = (1024, 4096, 16_384)
"""Tokens of a sorted batch that are tried."""

TARGETS = {(256, 80): (3.3, 2.2), (1024, 80): (9.0, 5.4)}
"""Against naive and sorted batches, by prompt tokens and answers."""


def naive(scorer: ModelScorer, pairs: list[Pair]) -> np.ndarray:
    """Shuffled batches of 16 with padding and a mask."""
    order = np.random.default_rng(0).permutation(len(pairs))
    rewards_NH = np.empty((len(pairs), scorer.model.config.num_labels), dtype=np.float32)
    scorer.tokenizer.padding_side = "right"
    with torch.inference_mode():
        for start in range(0, len(order), NAIVE_BATCH):
            batch = order[start : start + NAIVE_BATCH]
            texts = [render_reward_input(*pairs[n], scorer.reader.form) for n in batch]
            given = scorer.tokenizer(texts, padding=True, return_tensors="pt")
            logits = scorer.model(**given, use_cache=False).logits
            rewards_NH[batch] = logits.float().numpy()
    return rewards_NH


def fastest(scorers: Sequence[ModelScorer], pairs: list[Pair]) -> ModelScorer:
    """The one that takes least, after a round that warms: no peer is timed at a size that does not suit it."""
    return scorers[int(np.argmin(timed([partial(scorer.score, pairs) for scorer in scorers], 1)[0]))]


def compare(off: list[float], given: list[np.ndarray]) -> None:
    """Both peers' rewards against ours."""
    off += [equal(given[0], other, 1e-3, "rewards, shared and plain") for other in given[1:]]


def rows(quick: bool) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        source = write_reward_model(Path(folder) / "reward", quick)
        options = {"template": "world-v1", "batch_tokens": 16_384, "dtype": "float32"}
        ours = ModelScorer(str(source), **options)
        apart = [
            ModelScorer(str(source), **options | {"batch_tokens": tokens}, share_prefix=False)
            for tokens in SORTED_TOKENS
        ]
        for count in (4,) if quick else (80, 16):
            for prompt in (64,) if quick else (256, 1024):
                low, high = (8, 24) if quick else (40, 260)
                sizes = np.random.default_rng(prompt + count).integers(low, high + 1, size=count)
                pairs = asked(source, prompt, sizes.tolist()).pairs
                plain = fastest(apart, pairs)
                sides = [partial(ours.score, pairs), partial(naive, ours, pairs), partial(plain.score, pairs)]
                rounds = 2 if quick else 3 if count == 80 else 7  # naive takes up to a minute a round
                off: list[float] = []
                seconds = timed(sides, rounds, warm=quick, check=partial(compare, off))
                rate = count / float(np.median(seconds[:, 0]))
                targets = TARGETS.get((prompt, count), (None, None))
                unmasked = f"sorted batches of {plain.batch_tokens} tokens, its fastest, without a mask"
                for i, peer in enumerate(("shuffled padded batches of 16", unmasked)):
                    yield Row(
                        f"scoring, P={prompt}, N={count}, against {('naive', 'sorted')[i]}",
                        *ratio_of(seconds[:, 1 + i], seconds[:, 0]),
                        target=targets[i],
                        peer=f"transformers, {peer}",
                        command=COMMAND,
                        note=f"{rate:.0f} answers/s of {sizes.mean():.0f} tokens; rewards within {max(off):.0e}",
                    )


if __name__ == "__main__":
    main(rows, "scoring")
