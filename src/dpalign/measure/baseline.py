"""The baseline of a reward model: ridge regression on the surface of an answer.

Shape suffixes: N answers, F features, H heads.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FEATURES: Final = (
    "log characters",
    "log words",
    "characters per word",
    "sentences",
    "words per sentence",
    "lines",
    "list items",
    "commas per word",
    "other punctuation per word",
    "question marks",
    "exclamation marks",
    "digits per character",
    "capitals per character",
    "type-token ratio",
    "long words per word",
    "words shared with the prompt",
    "log prompt words",
    "log words over prompt words",
)

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
_LIST_ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
_LONG_WORD = 7


def surface_features(prompt: str, response: str) -> Array:
    """Counts that need no understanding: one number for each of `FEATURES`, (F,)."""
    words = [word.lower() for word in _WORD.findall(response)]
    prompt_words = [word.lower() for word in _WORD.findall(prompt)]
    characters, n = max(1, len(response)), max(1, len(words))
    sentences = max(1, len(_SENTENCE_END.findall(response)))
    punctuation = sum(not c.isalnum() and not c.isspace() for c in response)
    return np.array(
        [
            np.log1p(len(response)),
            np.log1p(len(words)),
            sum(map(len, words)) / n,
            np.log1p(sentences),
            n / sentences,
            np.log1p(response.count("\n")),
            np.log1p(len(_LIST_ITEM.findall(response))),
            response.count(",") / n,
            (punctuation - response.count(",")) / n,
            np.log1p(response.count("?")),
            np.log1p(response.count("!")),
            sum(c.isdigit() for c in response) / characters,
            sum(c.isupper() for c in response) / characters,
            len(set(words)) / n,
            sum(len(word) >= _LONG_WORD for word in words) / n,
            len(set(words) & set(prompt_words)) / max(1, len(set(prompt_words))),
            np.log1p(len(prompt_words)),
            np.log1p(len(words)) - np.log1p(len(prompt_words)),
        ]
    )


def ridge_cross_validated(
    features_NF: Array, label_NH: Array, groups: Sequence[str], folds: int = 5, penalty: float = 100.0
) -> Array:
    """Held-out predictions of a ridge regression; whole prompts are held out at a time.

    Args:
        features_NF: standardised here, on the training folds.
        label_NH: NaN where an answer has no such label.
        groups: the prompt of each answer; a prompt's fold follows from its hash.
        penalty: on the squared weights of the standardised features.

    Returns:
        (N, H); NaN where the other folds hold fewer than two labels of the head.

    Raises:
        ValueError: shapes that do not match, or fewer prompts than folds.
    """
    if not len(features_NF) == len(label_NH) == len(groups):
        raise ValueError(
            f"{len(features_NF)} feature rows, {len(label_NH)} label rows, {len(groups)} groups: they must match"
        )
    unique = sorted(set(groups), key=lambda group: hashlib.sha256(group.encode()).digest())
    if not 2 <= folds <= len(unique):
        raise ValueError(f"{folds} folds of {len(unique)} prompts; give between 2 and {len(unique)} folds")
    fold_of = {group: rank % folds for rank, group in enumerate(unique)}
    fold_N = np.array([fold_of[group] for group in groups])
    predicted_NH = np.full(label_NH.shape, np.nan)
    for fold in range(folds):
        held_out = fold_N == fold
        for head in range(label_NH.shape[1]):
            train = ~held_out & ~np.isnan(label_NH[:, head])
            if train.sum() >= 2:
                predicted_NH[held_out, head] = _ridge(
                    features_NF[train], label_NH[train, head], features_NF[held_out], penalty
                )
    return predicted_NH


def _ridge(train_NF: Array, label_N: Array, test_MF: Array, penalty: float) -> Array:
    center_F, scale_F = train_NF.mean(0), train_NF.std(0)
    scale_F = np.where(scale_F > 0, scale_F, 1.0)
    x_NF = (train_NF - center_F) / scale_F
    weight_F = np.linalg.solve(x_NF.T @ x_NF + penalty * np.eye(x_NF.shape[1]), x_NF.T @ (label_N - label_N.mean()))
    predicted: Array = label_N.mean() + (test_MF - center_F) / scale_F @ weight_F
    return predicted
