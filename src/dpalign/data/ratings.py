"""Ratings and their rescaling to 0-100 (section 3.1: "rewards in each dimension are rescaled").

The released HelpSteer heads invert with (score - 10) / 20, so a label l of 0..4 became 20 l + 10.
UltraFeedback's map is unpublished; the defaults put its ratings at the middle of their interval in
the same way. The alternatives use the full range.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from dpalign.data.sources import Row
from dpalign.rows import HEADS

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
    """How the labels of each data set become points of 0-100."""

    helpsteer: Literal["20l+10", "25l"] = "20l+10"
    """HelpSteer's labels l of 0..4: 10..90 as the released heads invert it, or 0..100."""
    aspects: Literal["20r-10", "25r-25"] = "20r-10"
    """UltraFeedback's four aspects r of 1..5: 10..90 (unpublished; by analogy), or 0..100."""
    overall: Literal["10s-5", "100/9(s-1)"] = "10s-5"
    """UltraFeedback's overall score s of 1..10: 5..95 (unpublished; by analogy), or 0..100."""

    def __post_init__(self) -> None:
        choices = {"helpsteer": ("20l+10", "25l"), "aspects": ("20r-10", "25r-25"), "overall": ("10s-5", "100/9(s-1)")}
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise ValueError(f"rescaling.{key} is {getattr(self, key)!r}, expected one of {', '.join(known)}")


def rescale(rating: float, formula: str) -> float:
    """A rating in points of 0-100, by one of the formulas of `Rescaling`."""
    slope, offset = _LINES[formula]
    return slope * rating + offset


def head_labels(points: Mapping[str, float | None]) -> list[float | None]:
    """Labels for all of `HEADS`, in order; None for the heads that `points` does not name."""
    assert points.keys() <= set(HEADS), f"unknown heads: {points.keys() - set(HEADS)}"
    return [points.get(head) for head in HEADS]


def whole_rating(row: Row, key: str, bounds: tuple[int, int]) -> float:
    """A rating stored as a whole number."""
    value = row.get(key)
    expected = f"a whole number from {bounds[0]} to {bounds[1]}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise row.wrong(key, value, expected)
    if not bounds[0] <= value <= bounds[1]:
        raise row.wrong(key, value, expected)
    return float(value)


def loose_rating(row: Row, key: str, bounds: tuple[int, int]) -> float | None:
    """A rating stored as a number or as text; None where it is null or reads "N/A"."""
    value = row.get(key)
    if value is None or (isinstance(value, str) and value.strip().upper() in ("", "N/A")):
        return None
    expected = f'a number from {bounds[0]} to {bounds[1]}, or "N/A"'
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise row.wrong(key, value, expected)
    try:
        number = float(value)
    except ValueError as error:
        raise row.wrong(key, value, expected) from error
    if math.isnan(number) or not bounds[0] <= number <= bounds[1]:
        raise row.wrong(key, value, expected)
    return number
