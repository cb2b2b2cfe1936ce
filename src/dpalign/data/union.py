"""The union of the rated data sets under ten heads (section 3.1).

Each data set labels its own heads; a head without a label is None, and no loss is taken there.
"""

from collections.abc import Iterable
from statistics import mean
from typing import Literal

from dpalign.data.helpsteer import read_helpsteer
from dpalign.data.pairs import read_binarized, read_preference_pairs
from dpalign.data.ratings import Rescaling
from dpalign.data.report import ReadReport
from dpalign.data.rows import Rated
from dpalign.data.ultrafeedback import read_ultrafeedback
from dpalign.rows import HEADS

RatedFormat = Literal["helpsteer", "ultrafeedback", "ultrafeedback_binarized", "pairs"]


def read_rated(
    form: RatedFormat, source: str, split: str | None = None, rescaling: Rescaling | None = None
) -> tuple[list[Rated], ReadReport]:
    """Rated answers of a data set in one of the known forms; see each form's reader."""
    match form:
        case "helpsteer":
            return read_helpsteer(source, split, rescaling)
        case "ultrafeedback":
            return read_ultrafeedback(source, split, rescaling)
        case "ultrafeedback_binarized":
            return read_binarized(source, split, rescaling)
        case "pairs":
            return read_preference_pairs(source, split, rescaling)


def merge_repeats(rows: Iterable[Rated]) -> tuple[list[Rated], ReadReport]:
    """One row an answer: those with the same prompt and response become one, at the first one's place.

    Its label for a head is the mean over the rows that have one, so the result does not hang on their
    order, and an answer that two data sets rate has the labels of both. It keeps the first row's source.
    """
    groups: dict[tuple[str, str], list[Rated]] = {}
    for row in rows:
        groups.setdefault((row["prompt_id"], row["response"]), []).append(row)
    merged = [_merge(group) for group in groups.values()]
    read = sum(len(group) for group in groups.values())
    filtered = {"same answer again, labels averaged": read - len(merged)} if read > len(merged) else {}
    return merged, ReadReport("repeats", "", read, len(merged), filtered)


def _merge(group: list[Rated]) -> Rated:
    if len(group) == 1:
        return group[0]
    labels: list[float | None] = []
    for head in range(len(HEADS)):
        given = [label for row in group if (label := row["labels"][head]) is not None]
        labels.append(mean(given) if given else None)
    return {**group[0], "labels": labels}
