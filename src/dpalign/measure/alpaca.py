"""The figures of Fig. 5: win rates against a reference, lengths and paired differences, with intervals.

A preference lies in [1, 2]: 1 for the reference, 2 for the system. The raw win rate is 100 times the mean
of preference - 1. A failed judgement is NaN. It is counted and enters no mean. With 805 instructions, a win rate of
7.5% has an interval of 1.8 points either way. So systems are compared on the same instructions.

Shapes: P instructions, N of them judged, R bootstrap replicates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from dpalign.measure.bootstrap import Array, Bootstrap, Estimate, Mask


@dataclass(frozen=True, eq=False)
class Judged:
    """One system at one direction, instruction by instruction."""

    system: str
    label: str
    """Distinguishes it from the system's other points; "" for a system of one point."""
    angle: float | None
    preference_P: Array
    length_P: Array
    """Characters."""
    metrics: Mapping[str, float]
    """From alpaca_eval: win_rate, standard_error, n_wins ...; the length-controlled rate with a difficulty file."""

    @property
    def name(self) -> str:
        return f"{self.system}@{self.label}" if self.label else self.system


@dataclass(frozen=True)
class PointFigures:
    """The figures of one system at one direction."""

    system: str
    label: str
    angle: float | None
    length: Estimate
    """Characters."""
    win_rate: Estimate
    """Raw, in %."""
    length_controlled: Estimate | None
    """In %, with the package's own standard error; None without the benchmark's difficulty file."""
    metrics: Mapping[str, float]
    judged: int
    failed: tuple[int, ...]
    """Indices of the instructions without a judgement."""
    empty: int
    """Answers of length 0."""


@dataclass(frozen=True)
class Difference:
    """Point a minus point b."""

    a: str
    b: str
    win_rate: Estimate | None
    """On the instructions that both were judged on; None if there are none."""
    length: Estimate
    instructions: int


@dataclass(frozen=True)
class AlpacaSummary:
    """All that the figure and the table show; alpaca.json holds it."""

    points: tuple[PointFigures, ...]
    differences: tuple[Difference, ...]
    """Between the ends of the curves; a system of one point is its own end."""
    judge: Mapping[str, Any]
    reference: Mapping[str, Any]
    intervals: Mapping[str, Any]
    paper: Mapping[str, Any] | None = None
    """The paper's points by system, (characters, %), to draw behind ours."""


def figures_of(point: Judged, bootstrap: Bootstrap) -> PointFigures:
    """A point's means and their intervals."""
    judged_P = np.isfinite(point.preference_P)
    controlled = None
    if (rate := point.metrics.get("length_controlled_winrate")) is not None:
        half = 1.96 * point.metrics["lc_standard_error"]
        controlled = Estimate(rate, rate - half, rate + half)
    return PointFigures(
        *(point.system, point.label, point.angle),
        length=mean_of(point.length_P, np.isfinite(point.length_P), bootstrap),
        win_rate=mean_of(100 * (point.preference_P - 1), judged_P, bootstrap),
        length_controlled=controlled,
        metrics=point.metrics,
        judged=int(judged_P.sum()),
        failed=tuple(np.flatnonzero(np.isnan(point.preference_P)).tolist()),
        empty=int((point.length_P == 0).sum()),
    )


def differences_of(points: Sequence[Judged], bootstrap: Bootstrap) -> tuple[Difference, ...]:
    """Compare the ends of all curves pairwise, within a curve and between systems."""
    indices = {p.system: [i for i, other in enumerate(points) if other.system == p.system] for p in points}
    ends = sorted({i for own in indices.values() for i in (own[0], own[-1])})
    rows = []
    for a, b in combinations([points[i] for i in ends], 2):
        lead_P, longer_P = 100 * (a.preference_P - b.preference_P), a.length_P - b.length_P
        both_P = np.isfinite(lead_P)
        wins = mean_of(lead_P, both_P, bootstrap) if both_P.any() else None
        longer = mean_of(longer_P, np.isfinite(longer_P), bootstrap)
        rows.append(Difference(a.name, b.name, wins, longer, int(both_P.sum())))
    return tuple(rows)


def mean_of(value_P: Array, counted_P: Mask, bootstrap: Bootstrap) -> Estimate:
    """The mean over the counted instructions. All are resampled, so that every figure sees the same draws."""
    value = float(value_P[counted_P].mean())
    if counted_P.sum() < 2:
        return Estimate(value, None, None)
    weight_RN = bootstrap.weights(len(value_P))[:, counted_P]
    total_R = weight_RN.sum(axis=1)
    some_R = total_R > 0
    return bootstrap.interval(value, (weight_RN[some_R] @ value_P[counted_P]) / total_R[some_R])
