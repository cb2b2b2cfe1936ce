"""Intervals by prompt: one bootstrap, shared by everything that is compared.

The prompts are resampled with all their conditions and samples. All systems of a comparison see the same
resampled prompts, so that common variation cancels. Such an interval covers other prompts for the same
checkpoints. It does not cover another training seed: see `seeds.py`.

Shapes: R bootstrap replicates, P prompts, V conditions, K objectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dpalign.paper.direction import rng_for

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval; the ends are None if the data give no interval."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def above_zero(self) -> bool:
        """The whole interval lies above 0."""
        return self.low is not None and self.low > 0

    @property
    def below_zero(self) -> bool:
        """The whole interval lies below 0."""
        return self.high is not None and self.high < 0


@dataclass(frozen=True)
class Bootstrap:
    """How prompts are resampled. Equal settings give equal draws for every figure."""

    seed: int = 0
    replicates: int = 2000
    level: float = 0.95

    def __post_init__(self) -> None:
        if self.replicates < 2:
            raise ValueError(f"bootstrap replicates is {self.replicates}: at least 2 are needed")
        if not 0 < self.level < 1:
            raise ValueError(f"bootstrap level is {self.level}: it must lie between 0 and 1, as 0.95 does")

    def weights(self, prompts: int, part: str = "all") -> Array:
        """How often each prompt is drawn in each replicate, divided by P: (R, P); rows sum to 1.

        The draw is keyed only by (seed, part, P), so systems on the same prompts are paired.
        `part` names a set of prompts that is resampled separately, such as each half in `regret`.
        """
        return _weights(self.seed, part, prompts, self.replicates)

    def interval(self, value: float, replicate_R: Array) -> Estimate:
        """The percentile interval of a figure from its replicates."""
        tail = (1 - self.level) / 2
        low, high = np.quantile(replicate_R, [tail, 1 - tail])
        return Estimate(float(value), float(low), float(high))

    def mean(self, figure_P: Array) -> Estimate:
        """The mean over prompts, with its interval."""
        return self.interval(figure_P.mean(), self.weights(len(figure_P)) @ figure_P)


@lru_cache(maxsize=4)
def _weights(seed: int, part: str, prompts: int, replicates: int) -> Array:
    if prompts < 1:
        raise ValueError("no prompts to resample: the evaluation set is empty")
    drawn_RP = rng_for("bootstrap", seed, part, prompts).integers(prompts, size=(replicates, prompts))
    cell_RP = drawn_RP + prompts * np.arange(replicates)[:, None]
    weight_RP = np.bincount(cell_RP.ravel(), minlength=replicates * prompts).reshape(replicates, prompts) / prompts
    weight_RP.flags.writeable = False  # cached: every caller reads the same array
    return weight_RP


def replicate_means(weight_RP: Array, mean_PVK: Array) -> Array:
    """The mean over each replicate's prompts: (R, V, K)."""
    return np.tensordot(weight_RP, mean_PVK, axes=1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values by Holm's step-down method: compared with alpha, they hold the family-wise error rate.

    The i-th smallest of m is multiplied by m - i + 1. None falls below the adjusted value of a smaller one (Holm 1979).
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
