"""Ridge regression of labels on hidden states, without a constant: a stock classifier's head has none.

Features are divided by their standard deviation. A head's penalty is chosen on prompts that the fit has not seen. One
decomposition serves all penalties and all heads whose labels are on the same rows.

Shapes: N rows, D width, H heads, P penalties.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PENALTIES: Final = tuple(float(x) for x in 10.0 ** np.arange(-2, 2.1, 0.5))
"""The candidates, as a share of the scaled features' mean square. With smaller penalties a head with few labels gets
weights that cancel each other: its rewards of other answers stray, and rounding errors show."""
FOLDS: Final = 5
"""Parts of the prompts, each held out once."""


@dataclass(frozen=True)
class RidgeHeads:
    """The solution of each head that has a label, and how it was chosen."""

    weights: dict[int, Array]
    penalties: dict[int, float]
    error: float
    """Mean squared error over all labels, each predicted by a fit that has not seen its prompt."""


def ridge_heads(hidden_ND: Array, target_NH: Array, prompts: Sequence[str]) -> RidgeHeads:
    """Fit every head to its labels, with the penalty that predicts the labels of other prompts best.

    Args:
        target_NH: NaN where an answer has no such label. A head without any is left out.
        prompts: the prompt of each answer.
    """
    scale_D = hidden_ND.std(axis=0)
    scale_D[scale_D == 0] = 1.0
    hidden_ND = hidden_ND / scale_D
    weights: dict[int, Array] = {}
    penalties: dict[int, float] = {}
    squares = labels = 0.0
    for heads, observed_N in _alike(target_NH):
        x_ND, y_NH = hidden_ND[observed_N], target_NH[observed_N][:, heads]
        own = [prompt for prompt, observed in zip(prompts, observed_N, strict=True) if observed]
        error_PH = _unseen_errors(x_ND, y_NH, own)
        chosen_H = error_PH.argmin(axis=0)
        squares += error_PH.min(axis=0).sum() * len(x_ND)
        labels += y_NH.size
        weight_PDH = ridge_path(x_ND, y_NH)
        for column, head in enumerate(heads):
            weights[head] = weight_PDH[chosen_H[column], :, column] / scale_D
            penalties[head] = PENALTIES[chosen_H[column]]
    return RidgeHeads(weights, penalties, float(squares / max(labels, 1)))


def _alike(target_NH: Array) -> Iterator[tuple[list[int], NDArray[np.bool_]]]:
    """Yield the heads whose labels are on the same rows, and these rows."""
    heads_of: dict[bytes, list[int]] = {}
    for head in range(target_NH.shape[1]):
        observed_N = ~np.isnan(target_NH[:, head])
        if observed_N.any():
            heads_of.setdefault(observed_N.tobytes(), []).append(head)
    for heads in heads_of.values():
        yield heads, ~np.isnan(target_NH[:, heads[0]])


def _unseen_errors(x_ND: Array, y_NH: Array, prompts: Sequence[str]) -> Array:
    """Return the mean squared error of each penalty and head on held-out prompts, (P, H).

    A prompt's fold depends on its hash. A single prompt cannot be held out: the fit is then judged on its own rows.
    """
    unique = sorted(set(prompts), key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    folds = min(FOLDS, len(unique))
    fold_of = {prompt: rank % folds for rank, prompt in enumerate(unique)}
    fold_N = np.array([fold_of[prompt] for prompt in prompts])
    square_PH = np.zeros((len(PENALTIES), y_NH.shape[1]))
    for fold in range(folds):
        out = fold_N == fold
        fit = ~out if folds > 1 else out
        predicted_PNH = x_ND[out] @ ridge_path(x_ND[fit], y_NH[fit])
        square_PH += np.square(predicted_PNH - y_NH[out]).sum(axis=1)
    return square_PH / len(y_NH)


def ridge_path(x_ND: Array, y_NH: Array) -> Array:
    """Return the weights at each of `PENALTIES`, (P, D, H), from the smaller of the two Gram matrices."""
    n, d = x_ND.shape
    penalty_P = np.array(PENALTIES) * n * np.square(x_ND).mean()
    value_R, vector_RR = np.linalg.eigh(x_ND.T @ x_ND if n > d else x_ND @ x_ND.T)
    projected_RH = vector_RR.T @ (x_ND.T @ y_NH if n > d else y_NH)
    shrunk_PRH = projected_RH / (value_R.clip(min=0) + penalty_P[:, None])[:, :, None]
    path_PRH = vector_RR @ shrunk_PRH
    weight_PDH: Array = path_PRH if n > d else x_ND.T @ path_PRH
    return weight_PDH
