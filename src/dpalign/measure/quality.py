"""How good predicted rewards are, head by head, against labels of the same answers.

Selection only compares answers to one prompt. So the usual correlations over all answers are joined by the
two figures that matter to it: the rank correlation and the pairwise accuracy within a prompt.
Intervals are bootstraps over prompts, since the answers of one prompt are not independent.

Shape suffixes: N answers, H heads (or objectives), P prompts, B bootstrap resamples.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dpalign.measure.bootstrap import Array, Estimate

LEVEL: Final = 0.95  # of the intervals
_CHUNK: Final = 500_000  # weights at a time, to bound memory
_FLAT: Final = 1e-12  # relative covariance that counts as 0: rounding leaves a little in a constant column


@dataclass(frozen=True)
class HeadQuality:
    """How well one column predicts its labels; a figure that is not defined (a constant column, no pairs) is None.

    Attributes:
        n: answers with a label.
        prompts: prompts of these answers.
        comparable_prompts: prompts with at least two different labels.
        pairs: pairs of answers to one prompt with different labels.
        r2: 1 - squared error / variance of the labels; negative when worse than their mean.
        pearson, spearman: correlation of prediction and label over all answers.
        length_correlation: Pearson of the prediction with the answer's length.
        label_length_correlation: the same for the label, to compare with.
        within_prompt_spearman: mean over comparable prompts; a prompt whose predictions are all equal
            counts as 0.
        within_prompt_accuracy: share of the pairs put in the right order; equal predictions count 1/2.
        calibration_gap: mean prediction - mean label, in reward points.
    """

    name: str
    n: int
    prompts: int
    comparable_prompts: int
    pairs: int
    r2: Estimate | None
    pearson: Estimate | None
    spearman: Estimate | None
    length_correlation: Estimate | None
    label_length_correlation: Estimate | None
    within_prompt_spearman: Estimate | None
    within_prompt_accuracy: Estimate | None
    calibration_gap: Estimate | None


@dataclass(frozen=True)
class Quality:
    """The quality of every column, and how its intervals were made."""

    heads: tuple[HeadQuality, ...]
    resamples: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Head name -> its figures; undefined ones are null."""
        heads = {head.name: asdict(head) for head in self.heads}
        return {"heads": heads, "resamples": self.resamples, "seed": self.seed, "confidence": LEVEL}


def quality(
    predicted_NH: Array,
    label_NH: Array,
    names: Sequence[str],
    prompts: Sequence[str],
    lengths: Sequence[float],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Quality:
    """Compare predictions with labels; the columns may be heads or objectives, under any names.

    Args:
        predicted_NH: rewards, 0-100.
        label_NH: on the same scale, NaN where an answer has no such label.
        names: of the H columns.
        prompts: the prompt id of each answer.
        lengths: of each answer, in any one unit.

    Raises:
        ValueError: shapes that do not match, or a prediction that is not a number where a label is.
    """
    n, h = label_NH.shape
    if predicted_NH.shape != (n, h) or len(names) != h or len(prompts) != n or len(lengths) != n:
        raise ValueError(
            f"predictions {predicted_NH.shape}, labels {label_NH.shape}, {len(names)} names, {len(prompts)} prompts,"
            f" {len(lengths)} lengths: they must describe the same answers and columns"
        )
    bad = np.argwhere(~np.isfinite(predicted_NH) & ~np.isnan(label_NH))
    if len(bad):
        row, column = bad[0]
        raise ValueError(
            f"row {row}: the prediction of {names[column]} is {predicted_NH[row, column]}; score the row again"
        )
    ids_N, length_N = np.asarray(prompts), np.asarray(lengths, dtype=float)
    heads = []
    for column, name in enumerate(names):
        has = ~np.isnan(label_NH[:, column])
        _, prompt_N = np.unique(ids_N[has], return_inverse=True)
        bootstrap = _Bootstrap(prompt_N, resamples, seed)
        heads.append(_head(name, predicted_NH[has, column], label_NH[has, column], length_N[has], bootstrap))
    return Quality(tuple(heads), resamples, seed)


def _head(name: str, predicted_N: Array, label_N: Array, length_N: Array, bootstrap: "_Bootstrap") -> HeadQuality:
    correct_P, pairs_P, spearman_P = within_prompt(predicted_N, label_N, bootstrap.prompt_N, bootstrap.prompts)
    comparable_P = (pairs_P > 0).astype(float)
    estimate = bootstrap.estimate
    return HeadQuality(
        name=name,
        n=len(label_N),
        prompts=bootstrap.prompts,
        comparable_prompts=int(comparable_P.sum()),
        pairs=int(pairs_P.sum()),
        r2=estimate(lambda w_BN: weighted_r2(predicted_N, label_N, w_BN)),
        pearson=estimate(lambda w_BN: weighted_pearson(predicted_N, label_N, w_BN)),
        spearman=estimate(lambda w_BN: weighted_spearman(predicted_N, label_N, w_BN)),
        length_correlation=estimate(lambda w_BN: weighted_pearson(predicted_N, length_N, w_BN)),
        label_length_correlation=estimate(lambda w_BN: weighted_pearson(label_N, length_N, w_BN)),
        within_prompt_spearman=estimate(lambda w_BP: _ratio(w_BP @ spearman_P, w_BP @ comparable_P), by_prompt=True),
        within_prompt_accuracy=estimate(lambda w_BP: _ratio(w_BP @ correct_P, w_BP @ pairs_P), by_prompt=True),
        calibration_gap=estimate(lambda w_BN: _ratio(w_BN @ (predicted_N - label_N), w_BN.sum(1))),
    )


class _Bootstrap:
    """Resampled prompts, as weights: how often each was drawn. The same draws serve every figure of a head."""

    def __init__(self, prompt_N: NDArray[np.intp], resamples: int, seed: int) -> None:
        self.prompt_N = prompt_N
        self.prompts = int(prompt_N.max()) + 1 if len(prompt_N) else 0
        p = max(1, self.prompts)
        draws_BP = np.random.default_rng(seed % 2**32).multinomial(p, np.full(p, 1 / p), size=resamples)
        self.weight_BP = draws_BP[:, : self.prompts].astype(np.float32)

    def estimate(self, figure: Callable[[Array], Array], by_prompt: bool = False) -> Estimate | None:
        """The figure at weight one, and the quantiles of its resamples.

        Args:
            figure: maps weights (B, N), or (B, P) if `by_prompt`, to (B,); NaN where it is undefined.
        """
        if not self.prompts:
            return None
        value = float(figure(np.ones((1, self.prompts if by_prompt else len(self.prompt_N))))[0])
        if not np.isfinite(value):
            return None
        chunks = []
        step = max(1, _CHUNK // len(self.prompt_N))
        for start in range(0, len(self.weight_BP), step):
            weight_BP = self.weight_BP[start : start + step].astype(np.float64)
            chunks.append(figure(weight_BP if by_prompt else weight_BP[:, self.prompt_N]))
        drawn_B = np.concatenate(chunks) if chunks else np.empty(0)
        drawn_B = drawn_B[np.isfinite(drawn_B)]  # a resample may hold one prompt alone, and no variance
        if not len(drawn_B):
            return Estimate(value)
        low, high = np.quantile(drawn_B, [(1 - LEVEL) / 2, 1 - (1 - LEVEL) / 2])
        return Estimate(value, float(low), float(high))


def weighted_r2(predicted_N: Array, label_N: Array, weight_BN: Array) -> Array:
    """1 - squared error / squared deviation of the labels from their mean, (B,)."""
    error_B = _ratio(weight_BN @ (predicted_N - label_N) ** 2, weight_BN.sum(1))
    return 1 - _ratio(error_B, _covariance(label_N, label_N, weight_BN))


def weighted_pearson(x_N: Array, y_N: Array, weight_BN: Array) -> Array:
    """Pearson's correlation of two columns under each row of weights, (B,)."""
    variance_x_B, variance_y_B = _covariance(x_N, x_N, weight_BN), _covariance(y_N, y_N, weight_BN)
    return _ratio(_covariance(x_N, y_N, weight_BN), np.sqrt(variance_x_B * variance_y_B))


def weighted_spearman(x_N: Array, y_N: Array, weight_BN: Array) -> Array:
    """Spearman's correlation under each row of weights, (B,). Each row is ranked again; ties get their middle rank."""
    middle_B1 = (weight_BN.sum(1, keepdims=True) + 1) / 2  # the mean of all ranks
    x_BN, y_BN = _weighted_ranks(x_N, weight_BN) - middle_B1, _weighted_ranks(y_N, weight_BN) - middle_B1
    weighted_BN = weight_BN * x_BN
    variance_x_B = np.einsum("bn,bn->b", weighted_BN, x_BN)
    variance_y_B = np.einsum("bn,bn->b", weight_BN * y_BN, y_BN)
    return _ratio(np.einsum("bn,bn->b", weighted_BN, y_BN), np.sqrt(variance_x_B * variance_y_B))


def within_prompt(
    predicted_N: Array, label_N: Array, prompt_N: NDArray[np.intp], prompts: int
) -> tuple[Array, Array, Array]:
    """Within each prompt: pairs in the right order (ties 1/2), pairs with different labels, Spearman.

    Returns:
        correct_P, pairs_P, spearman_P; 0 for prompts with no pair.
    """
    correct_P, pairs_P, spearman_P = np.zeros(prompts), np.zeros(prompts), np.zeros(prompts)
    order = np.argsort(prompt_N, kind="stable")
    ends = np.cumsum(np.bincount(prompt_N, minlength=prompts))
    for prompt, (start, end) in enumerate(pairwise([0, *ends])):
        members = order[start:end]
        predicted, label = predicted_N[members], label_N[members]
        first, second = np.triu_indices(len(members), k=1)
        truth = np.sign(label[first] - label[second])
        agreement = truth * np.sign(predicted[first] - predicted[second])
        pairs_P[prompt] = np.count_nonzero(truth)
        correct_P[prompt] = ((agreement + 1) / 2)[truth != 0].sum()
        if pairs_P[prompt]:
            spearman_P[prompt] = np.nan_to_num(weighted_spearman(predicted, label, np.ones((1, len(members))))[0])
    return correct_P, pairs_P, spearman_P


def _covariance(x_N: Array, y_N: Array, weight_BN: Array) -> Array:
    """The weighted covariance of two columns, (B,); exactly 0 if only rounding is left."""
    total_B = weight_BN.sum(1)
    dx_N, dy_N = x_N - x_N.mean(), y_N - y_N.mean()  # near 0 already, so that little cancels below
    mean_x_B, mean_y_B = _ratio(weight_BN @ dx_N, total_B), _ratio(weight_BN @ dy_N, total_B)
    covariance_B = _ratio(weight_BN @ (dx_N * dy_N), total_B) - mean_x_B * mean_y_B
    return np.where(abs(covariance_B) <= _FLAT * abs(x_N).max() * abs(y_N).max(), 0.0, covariance_B)


def _weighted_ranks(x_N: Array, weight_BN: Array) -> Array:
    """The middle rank of each value when value n occurs weight_BN[b, n] times, (B, N)."""
    _, tie_N = np.unique(x_N, return_inverse=True)
    order = np.argsort(tie_N, kind="stable")
    starts = np.flatnonzero(np.diff(tie_N[order], prepend=-1))
    occurs_BT = np.add.reduceat(weight_BN[:, order], starts, axis=1)
    middle_BT = np.cumsum(occurs_BT, axis=1) - (occurs_BT - 1) / 2
    ranks: Array = middle_BT[:, tie_N]
    return ranks


def _ratio(top_B: Array, bottom_B: Array) -> Array:
    """Division, NaN where the bottom is 0."""
    quotient_B: Array = np.divide(top_B, bottom_B, out=np.full(np.shape(top_B), np.nan), where=bottom_B > 0)
    return quotient_B
