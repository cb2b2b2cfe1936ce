"""OpenAI's `verbosity` as angles of the dial, from the lengths of answers in the policy's own evaluation."""

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
"""Each level's place between the dial's shortest mean answer (0) and its longest (1)."""
LEAST: Final = 1.25
"""The least ratio of the longest mean answer to the shortest; below it the dial does not control length."""


def lengths_of(source: Source) -> dict[Verbosity, Length]:
    """Return what low, medium and high stand for; empty unless an evaluated arc changes the length of answers."""
    if source.evaluation is None or source.contract.arc is None:
        return {}
    return calibrated(*mean_words(source.evaluation))


def mean_words(evaluation: Path) -> tuple[Array, Array]:
    """Return (angle_V, words_V): the evaluated angles in rising order, and the mean words of the answers at each."""
    rows = read_table(evaluation / "answers", CANDIDATES, ["condition", "response"])
    v_NK = matrix_of(rows["condition"])
    words_N = np.array([len(answer.split()) for answer in rows["response"].to_pylist()], dtype=np.float64)
    angle_V, at_N = np.unique(np.degrees(np.arctan2(v_NK[:, 1], v_NK[:, 0])).round(4), return_inverse=True)
    return angle_V, np.bincount(at_N, words_N) / np.bincount(at_N)


def calibrated(angle_V: Array, words_V: Array) -> dict[Verbosity, Length]:
    """Find each level's angle, on the way from the shortest mean answer to the longest.

    Lengths between two evaluated angles are interpolated. A dip on the way counts as flat, so a higher level is never
    shorter.

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
