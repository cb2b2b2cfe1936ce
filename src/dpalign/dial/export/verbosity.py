"""OpenAI's `verbosity` as angles: where on the dial a policy's own evaluation found answers of certain lengths."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dpalign.dial.export.source import Source
from dpalign.rows import CANDIDATES, matrix_of, read_table
from dpalign.train.contract import Length, Verbosity

Array = NDArray[np.float64]

SHARES: Final[Mapping[Verbosity, float]] = {"low": 0.1, "medium": 0.5, "high": 0.9}
"""How far each level lies from the shortest mean answer of the dial to the longest."""
LEAST: Final = 1.25
"""The longest over the shortest; below it the dial does not say how long an answer is."""


def lengths_of(source: Source) -> dict[Verbosity, Length]:
    """What low, medium and high stand for; empty unless the policy was evaluated, on an arc that changes the length."""
    if source.evaluation is None or source.contract.arc is None:
        return {}
    return calibrated(*mean_words(source.evaluation))


def mean_words(evaluation: Path) -> tuple[Array, Array]:
    """(angle_V, words_V): the evaluated angles, rising, and the mean number of words of the answers there."""
    rows = read_table(evaluation / "answers", CANDIDATES, ["condition", "response"])
    v_NK = matrix_of(rows["condition"])
    words_N = np.array([len(answer.split()) for answer in rows["response"].to_pylist()], dtype=np.float64)
    angle_V, at_N = np.unique(np.degrees(np.arctan2(v_NK[:, 1], v_NK[:, 0])).round(4), return_inverse=True)
    return angle_V, np.bincount(at_N, words_N) / np.bincount(at_N)


def calibrated(angle_V: Array, words_V: Array) -> dict[Verbosity, Length]:
    """Each level's angle, on the way from the shortest mean answer to the longest.

    Between two evaluated angles the length is interpolated. Where it dips on the way, it counts as level. So a higher
    level is never shorter.

    Args:
        angle_V: rising.
    """
    short, long = int(words_V.argmin()), int(words_V.argmax())
    shortest, longest = words_V[short], words_V[long]
    if longest < LEAST * shortest or short == long:
        return {}
    way = np.arange(short, long + 1) if short < long else np.arange(short, long - 1, -1)
    words_W = np.maximum.accumulate(words_V[way])
    lengths: dict[Verbosity, Length] = {}
    for level, share in SHARES.items():
        words = shortest + share * (longest - shortest)
        angle = float(np.interp(words, words_W, angle_V[way]))
        lengths[level] = Length(round(angle, 1) + 0.0, round(float(words), 1))
    return lengths
