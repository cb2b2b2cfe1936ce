"""The figures of Fig. 5: win rates against a reference, lengths and paired differences, with intervals.

A preference lies in [1, 2]: 1 for the reference, 2 for the system. The raw win rate is 100 times the mean
of preference - 1. A failed judgement is NaN. It is counted and enters no mean. 805 instructions leave an
interval of 1.8 points either way at 7.5%, so systems are compared on the same instructions.

Shapes: P instructions, N of them judged, R bootstrap replicates.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpalign.measure.bootstrap import Array, Bootstrap, Estimate, Mask


@dataclass(frozen=True)
class PointFigures:
    """One system at one direction."""

    system: str
    label: str
    angle: float | None
    length: Estimate
    """Characters."""
    win_rate: Estimate
    """Raw, in %."""
    length_controlled: Estimate | None
    """In %; None without the benchmark's difficulty file."""
    metrics: Mapping[str, float]
    """All that alpaca_eval computes."""
    judged: int
    failed: tuple[int, ...]
    """Indices of the instructions without a judgement."""
    empty: int
    """Answers of length 0."""


@dataclass(frozen=True)
class Difference:
    """Point a less point b."""

    a: str
    b: str
    win_rate: Estimate | None
    """On the instructions that both were judged on; None where there are none."""
    length: Estimate
    """Characters, on all instructions."""
    instructions: int


@dataclass(frozen=True)
class AlpacaSummary:
    """All that the figure and the table show, as alpaca.json keeps it."""

    points: tuple[PointFigures, ...]
    differences: tuple[Difference, ...]
    """Between the ends of the curves, and the systems of one point."""
    judge: Mapping[str, Any]
    instructions: Mapping[str, Any]
    reference: Mapping[str, Any]
    intervals: Mapping[str, Any]
    paper: Mapping[str, Any] | None = None
    """The paper's points by system, (characters, %), to draw behind ours."""


def win_rate(preference_P: Array, bootstrap: Bootstrap) -> Estimate:
    """The raw win rate in %."""
    return mean_of(100 * (preference_P - 1), ~np.isnan(preference_P), bootstrap)


def difference(a: str, b: str, preference_2P: Array, length_2P: Array, bootstrap: Bootstrap) -> Difference:
    """How far a's win rate lies above b's, and how much longer its answers are."""
    both_P = ~np.isnan(preference_2P).any(axis=0)
    lead_P = 100 * (preference_2P[0] - preference_2P[1])
    longer = mean_of(length_2P[0] - length_2P[1], np.ones_like(both_P), bootstrap)
    return Difference(a, b, mean_of(lead_P, both_P, bootstrap) if both_P.any() else None, longer, int(both_P.sum()))


def mean_of(value_P: Array, counted_P: Mask, bootstrap: Bootstrap) -> Estimate:
    """A mean over some of the instructions. All are resampled, so that every figure sees the same draws."""
    value = float(value_P[counted_P].mean())
    if counted_P.sum() < 2:
        return Estimate(value, None, None)
    weight_RN = bootstrap.weights(len(value_P))[:, counted_P]
    total_R = weight_RN.sum(axis=1)
    some_R = total_R > 0
    return bootstrap.interval(value, (weight_RN[some_R] @ value_P[counted_P]) / total_R[some_R])
