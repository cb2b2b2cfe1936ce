"""Win rates against the reference, lengths and paired differences, with intervals over the instructions.

A preference lies in [1, 2]; AlpacaEval's raw win rate is 100 times the mean of preference - 1. On 805
instructions its interval spans about 1.8 points either way at 7.5%, so systems are compared by the
difference on the same instructions. What was not judged is in no mean; a difference takes the
instructions that both were judged on.

Shapes: P instructions, R bootstrap replicates.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from dpalign.measure.bootstrap import Array, Bootstrap, Estimate, Mask


@dataclass(frozen=True, eq=False)
class Answers:
    """One system at one direction: every instruction's preference (NaN where it failed) and length in characters."""

    name: str
    preference_P: Array
    length_P: Array
    reference_length_P: Array
    reasons: Counter[str] = field(default_factory=Counter)
    """Why judgements failed."""

    def __post_init__(self) -> None:
        shapes = {array.shape for array in (self.preference_P, self.length_P, self.reference_length_P)}
        if len(shapes) != 1:
            raise ValueError(
                f"{self.name}: preferences and lengths of shapes {sorted(shapes)}; each instruction has both"
            )
        lengths = np.concatenate([self.length_P, self.reference_length_P])
        bad_N = lengths[~(np.isfinite(lengths) & (lengths >= 0))]
        if bad_N.size:
            raise ValueError(f"{self.name}: a length is {bad_N[0]}; lengths are counted in characters")
        judged_N = self.preference_P[self.judged_P]
        if not judged_N.size:
            said = "; ".join(f"{n} times {reason}" for reason, n in self.reasons.most_common(3)) or "there are none"
            raise ValueError(f"{self.name}: none of its {len(self.preference_P)} answers was judged: {said}")
        if not ((judged_N >= 1) & (judged_N <= 2)).all():
            bad = judged_N[~((judged_N >= 1) & (judged_N <= 2))][0]
            raise ValueError(f"{self.name}: a preference is {bad}; it lies in [1, 2]")

    @property
    def judged_P(self) -> Mask:
        return ~np.isnan(self.preference_P)

    @property
    def win_P(self) -> Array:
        """Preference - 1, in %."""
        win_P: Array = 100 * (self.preference_P - 1)
        return win_P


def win_rate(answers: Answers, bootstrap: Bootstrap) -> Estimate:
    """AlpacaEval's raw win rate in %."""
    return mean_of(answers.win_P, answers.judged_P, bootstrap)


def standard_error(answers: Answers) -> float | None:
    """The benchmark's own: of the mean over instructions; None with a single one."""
    win_N = answers.win_P[answers.judged_P]
    return float(win_N.std(ddof=1) / np.sqrt(len(win_N))) if len(win_N) > 1 else None


def difference(a: Answers, b: Answers, bootstrap: Bootstrap) -> tuple[Estimate | None, Estimate, int]:
    """How far a's win rate lies above b's, how much longer a is, and on how many instructions both were judged.

    Raises:
        ValueError: the two were not asked the same number of instructions.
    """
    if len(a.preference_P) != len(b.preference_P):
        raise ValueError(
            f"{a.name} and {b.name}: {len(a.preference_P)} and {len(b.preference_P)} instructions; "
            "a paired difference needs the same"
        )
    both_P = a.judged_P & b.judged_P
    everywhere_P = np.ones_like(both_P)
    wins = mean_of(a.win_P - b.win_P, both_P, bootstrap) if both_P.any() else None
    return wins, mean_of(a.length_P - b.length_P, everywhere_P, bootstrap), int(both_P.sum())


def mean_of(value_P: Array, counted_P: Mask, bootstrap: Bootstrap) -> Estimate:
    """A mean over some of the instructions; all are resampled, so that every figure sees the same draws."""
    value = float(value_P[counted_P].mean())
    if counted_P.sum() < 2:
        return Estimate(value, None, None)
    weight_RN = bootstrap.weights(len(value_P))[:, counted_P]
    total_R = weight_RN.sum(axis=1)
    drawn_R = total_R > 0
    return bootstrap.interval(value, (weight_RN[drawn_R] @ value_P[counted_P]) / total_R[drawn_R])
