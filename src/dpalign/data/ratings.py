"""Ratings: read from a row, rescaled to 0-100, and stored as labels of the ten heads.

Section 3.1: "rewards in each dimension are rescaled". The released HelpSteer heads invert with (score - 10) / 20: a
label l of 0..4 became 20 l + 10. UltraFeedback's map is unpublished; the defaults put its ratings at the middle of
their interval in the same way. The alternatives use the full range.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from dpalign.data.sources import Row
from dpalign.paper.objectives import Objective, head_indices
from dpalign.rows import HEADS, Message, Rated, prompt_id

HELPSTEER_RANGE: Final = (0, 4)
ASPECT_RANGE: Final = (1, 5)
OVERALL_RANGE: Final = (1, 10)

_LINES: Final[Mapping[str, tuple[float, float]]] = {  # formula -> (slope, offset)
    "20l+10": (20.0, 10.0),
    "25l": (25.0, 0.0),
    "20r-10": (20.0, -10.0),
    "25r-25": (25.0, -25.0),
    "10s-5": (10.0, -5.0),
    "100/9(s-1)": (100 / 9, -100 / 9),
}


@dataclass(frozen=True)
class Rescaling:
    """The formula from each data set's ratings to points of 0-100."""

    helpsteer: Literal["20l+10", "25l"] = "20l+10"
    """HelpSteer's labels l of 0..4: 10..90 as the released heads invert it, or 0..100."""
    aspects: Literal["20r-10", "25r-25"] = "20r-10"
    """UltraFeedback's four aspects r of 1..5: 10..90 (unpublished; by analogy), or 0..100."""
    overall: Literal["10s-5", "100/9(s-1)"] = "10s-5"
    """UltraFeedback's overall score s of 1..10: 5..95 (unpublished; by analogy), or 0..100."""


DEFAULT: Final = Rescaling()


def rescale(rating: float, formula: str) -> float:
    """A rating in points of 0-100.

    Raises:
        ValueError: an unknown formula.
    """
    if formula not in _LINES:
        raise ValueError(f"unknown rescaling {formula!r}; known: {', '.join(_LINES)}")
    slope, offset = _LINES[formula]
    return slope * rating + offset


def whole_rating(row: Row, key: str, bounds: tuple[int, int]) -> float:
    """A rating stored as a whole number."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not bounds[0] <= value <= bounds[1]:
        raise row.wrong(key, value, f"a whole number from {bounds[0]} to {bounds[1]}")
    return float(value)


def loose_rating(row: Row, key: str, bounds: tuple[int, int]) -> float | None:
    """A rating stored as a number or as text; None where it is null or reads "N/A"."""
    value = row.get(key)
    if value is None or (isinstance(value, str) and value.strip().upper() in ("", "N/A")):
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not bounds[0] <= number <= bounds[1]:  # NaN is outside too
        raise row.wrong(key, value, f'a number from {bounds[0]} to {bounds[1]}, or "N/A"')
    return number


def rated(messages: list[Message], response: str, source: str, points: Mapping[str, float | None]) -> Rated:
    """A rated answer; `points` (0-100) are by head, and heads without points have the label None."""
    assert points.keys() <= set(HEADS), f"unknown heads: {points.keys() - set(HEADS)}"
    return {
        "prompt_id": prompt_id(messages),
        "messages": messages,
        "response": response,
        "source": source,
        "labels": [points.get(head) for head in HEADS],
    }


def labels_for(labels: Sequence[float | None], heads: Sequence[str]) -> list[float | None]:
    """A row's labels (in the order of `HEADS`) for a reward model's heads; None for a head without data."""
    label = dict(zip(HEADS, labels, strict=True))
    return [label.get(head) for head in heads]


def require_labels(
    rows: Sequence[Mapping[str, Any]], objectives: Sequence[Objective], heads: Sequence[str], part: str
) -> None:
    """Refuse to train a head without labels: one outside `HEADS`, or one that an objective reads.

    Args:
        part: "train" for the reward model's rows, "judge" for the judge's.

    Raises:
        ValueError: names the head, the objective that reads it, and the cure.
    """
    reader = {index: o.name for o in objectives for index in head_indices(o, heads)}
    for index, head in enumerate(heads):
        if head in HEADS and (index not in reader or any(row["labels"][HEADS.index(head)] is not None for row in rows)):
            continue
        subject = f"objective {reader[index]!r} reads head {head!r}" if index in reader else f"[heads] has {head!r}"
        answers = f"{len(rows)} training answers" if part == "train" else f"the judge's {len(rows)} answers"
        without = "reward.checkpoint names a finished reward model" if part == "train" else "data.judge = 0"
        raise ValueError(
            f"{subject}, and none of {answers} has a label for it; add a data set that has, read another head in "
            f"[objectives], or do without this training ({without})"
        )
