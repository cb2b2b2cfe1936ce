"""The user's own data: rated answers, preference pairs and prompts, in any form of `forms.py`.

A column of numbers rates the answer under the column's name. A pair has two columns, such as `brevity_chosen` and
`brevity_rejected`. A scale turns a rating into points of 0-100; it is stated, or else read from the column.
The paper's data sets are recognised by their columns, and `ratings.py` reads them.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from dpalign.data.forms import TEXTS, Example, Form, form_of, or_rename, read_example
from dpalign.data.ratings import Rescaling, paper_form, rated, read_rated
from dpalign.data.report import ReadReport, Scale
from dpalign.data.sources import Row, describe, located, read_source, shorten
from dpalign.rows import Message, Pair, Rated, prompt_id, user_prompt

Scales = Mapping[str, Scale]
"""The ratings that become 0 and 100, by column."""

SPLITS: Final = ("train_prefs", "train")
"""Splits to look for, in this order, if a data set has several and the source names none."""
EVALUATED_SPLITS: Final = ("test_prefs", "validation", "test")
"""The same, for prompts to evaluate on."""
USUAL: Final[tuple[Scale, ...]] = ((0, 1), (1, 5), (0, 4), (1, 10))
"""The scales assumed for whole numbers: the first that contains them all."""
STRAYS: Final = 0.01
"""If at most this share of a column's ratings lies outside a usual scale, they count as mistakes."""
_OF_A_SIDE: Final = re.compile(r"(.+)[_-](chosen|rejected)|(chosen|rejected)[_-](.+)")
_COUNTS_ROWS: Final = re.compile(r"|id|idx|index|unnamed: 0|.*_id", re.IGNORECASE)


@dataclass
class OwnData:
    """What a source holds.

    Attributes:
        rated: the answers, with labels where they are rated.
        pairs: two answers each; the first was preferred.
        prompts: all prompts, also those without an answer.
        reports: what was read, kept and left out.
    """

    rated: list[Rated] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    prompts: list[list[Message]] = field(default_factory=list)
    reports: list[ReadReport] = field(default_factory=list)


def read_own(source: str, rescaling: Rescaling, scales: Scales) -> OwnData:
    """Read all rows of a source, in the form that its columns decide.

    Args:
        rescaling: for the paper's data sets.
        scales: the stated scales, for all other ratings.

    Raises:
        ValueError: columns of no known form, a broken row, or a rating outside its scale, with the row; or prompts
            without any answer.
    """
    name, split = located(source, SPLITS)
    first = next(read_source(name, split), None)
    of_paper = first is not None and scales.keys().isdisjoint([*first.values, "score"])  # no scale is stated for it
    known = paper_form(first) if first is not None and of_paper else None
    if known is None:
        own, examples = _read(name, split, scales)
    else:
        rows, report = read_rated(known, name, split, rescaling)
        own = OwnData([{**row, "source": "rows"} for row in rows], [], [row["messages"] for row in rows], [report])
        examples = [] if known in ("helpsteer", "ultrafeedback") else list(_examples(name, split))
    pairs = [example for example in examples if len(example.answers) == 2]
    if pairs:
        own.pairs = _preferences(pairs, own.rated)
        reason = "an empty answer, the same answer twice, or the same ratings"
        own.reports.append(
            ReadReport.of_filter("preferences", describe(name, split), len(pairs), len(own.pairs), reason)
        )
    return own


def read_prompts(source: str, what: str, wanted: Sequence[str]) -> tuple[dict[str, list[Message]], ReadReport]:
    """Read the prompts of a source in any form, each once, by id; answers are counted, not read.

    Args:
        what: a name for the prompts in the report.
        wanted: the splits to read where the source names none, the best first.

    Raises:
        ValueError: columns of no known form, or a broken row.
    """
    name, split = located(source, wanted)
    report = ReadReport(what, describe(name, split))
    prompts: dict[str, list[Message]] = {}
    first = next(read_source(name, split), None)
    examples: Iterable[Example] = _examples(name, split)
    if first is not None and paper_form(first) == "ultrafeedback":
        examples = (Example(user_prompt(row.text_or_empty("instruction"))) for row in read_source(name, split))
    for example in examples:
        key = prompt_id(example.messages)
        if example.gap or key in prompts:
            report.drop(example.gap or "repeated prompt")
        elif report.keeps(example.messages[-1]["content"]):
            prompts[key] = example.messages
            if example.answers:
                report.notes["answer not read"] += len(example.answers)
    return prompts, report


def _examples(name: str, split: str | None) -> Iterator[Example]:
    form: Form | None = None
    for row in read_source(name, split):
        form = form or form_of(row)
        yield read_example(row, form)


def _read(name: str, split: str | None, scales: Scales) -> tuple[OwnData, list[Example]]:
    """Read a source that is not one of the paper's: first all ratings, then their scales, then the labels."""
    report, form = ReadReport("rows", describe(name, split)), None
    rows: list[tuple[Example, list[dict[str, float]]]] = []
    places: list[str] = []
    texts: dict[str, str] = {}
    columns: list[str] = []
    for row in read_source(name, split):
        if form is None:
            report.source = form = form_of(row)
            columns = list(row.values)
        example = read_example(row, form)
        if example.gap:
            report.drop(example.gap)
        else:
            rows.append((example, _ratings(row, form, len(example.answers), scales, texts)))
            places += [row.where] * len(example.answers)
    ratings_N = [ratings for _, ratings_A in rows for ratings in ratings_A]
    _read_scales(ratings_N, scales, texts, report)
    for head, scale in report.scales.items():
        if head not in scales:
            _require_no_stray(head, scale, ratings_N, places)
    if rows and not any(example.answers for example, _ in rows):
        raise ValueError(f"{report.file}: prompts without answers; name it in data.prompts{or_rename(columns)}")
    own = OwnData(reports=[report])
    for example, ratings_A in rows:
        asked, before = example.messages[-1]["content"], len(own.rated)
        for answer, ratings in zip(example.answers, ratings_A, strict=True):
            points = {head: points_on(ratings[head], scale) for head, scale in report.scales.items() if head in ratings}
            if report.keeps(asked, answer):
                own.rated.append(rated(example.messages, answer, "rows", points))
                if report.scales and not points:
                    report.notes["answer without a rating"] += 1
        if len(own.rated) > before or (not example.answers and report.keeps(asked)):
            own.prompts.append(example.messages)
    return own, [example for example, _ in rows]


def _ratings(row: Row, form: Form, answers: int, scales: Scales, texts: dict[str, str]) -> list[dict[str, float]]:
    """The ratings of each answer, by head; `texts` gets the first value of a column that is not a number."""
    ratings_A: list[dict[str, float]] = [{} for _ in range(answers)]
    for column, value in row.values.items() if answers else ():
        head, answer = column, 0
        if form == "pairs":
            if (of_side := _OF_A_SIDE.fullmatch(column)) is None:
                continue
            head, answer = of_side[1] or of_side[4], int("rejected" in (of_side[2], of_side[3]))
        if column in TEXTS or _COUNTS_ROWS.fullmatch(head):
            continue
        try:
            number = to_number(value)
        except ValueError:
            if head in scales:
                raise row.wrong(column, value, "a number, since [data.scales] has its scale") from None
            texts.setdefault(head, f"{row.where} has {shorten(repr(value), 40)}")
            continue
        if number is None:
            continue
        if head in scales and not min(scales[head]) <= number <= max(scales[head]):
            raise row.wrong(column, value, f"a number from {scale_text(scales[head])}, as [data.scales] says")
        ratings_A[answer][head] = number
    return ratings_A


def _read_scales(
    ratings_N: Sequence[Mapping[str, float]], scales: Scales, texts: Mapping[str, str], report: ReadReport
) -> None:
    """Put the scale of each rating into the report. A column with text, or with a single value, is no rating."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    for ratings in ratings_N:
        for head, number in ratings.items():
            values[head].append(number)
    for head, numbers in values.items():
        if head in texts:
            report.remarks.append(f"{head} is no rating: {texts[head]}")
        elif head in scales:
            report.scales[head] = scales[head]
        elif min(numbers) == max(numbers):
            report.remarks.append(f"{head} is no rating: always {numbers[0]:g}")
        else:
            report.scales[head] = usual_scale(numbers)


def _require_no_stray(head: str, scale: Scale, ratings_N: Sequence[Mapping[str, float]], places: Sequence[str]) -> None:
    """Refuse a rating outside the usual scale of nearly all others: a 40 or an 8 among 1 to 5 would stretch the scale.

    A column of a usual scale may be nearly constant, or have a thin upper end: several values that begin right above
    a narrower scale. Neither is refused.

    Args:
        scale: the one read from all ratings.
        places: the file and row of each answer.
    """
    if not all(ratings.get(head, 0.0).is_integer() for ratings in ratings_N):
        return
    numbers = [(ratings[head], place) for ratings, place in zip(ratings_N, places, strict=True) if head in ratings]
    usual = scale in USUAL
    for low, high in USUAL:
        if usual and high - low >= scale[1] - scale[0]:
            continue
        strays = [(number, place) for number, place in numbers if not low <= number <= high]
        beyond = {number for number, _ in strays}
        constant = len({number for number, _ in numbers} - beyond) == 1
        thin_end = high + 1 in beyond and len(beyond) > 1
        if len(strays) <= STRAYS * len(numbers) and not (usual and (constant or thin_end)):
            number, place = strays[0]
            raise ValueError(
                f"{place}: {head} is {number:g}, and {len(numbers) - len(strays)} of {len(numbers)} ratings are "
                f"{scale_text((low, high))}; correct or remove the row, or state the scale: [data.scales] {head} = "
                f"[{scale[0]:g}, {scale[1]:g}]"
            )


def to_number(value: Any) -> float | None:
    """A rating as a number; None where it is null, NaN, empty or "N/A".

    Raises:
        ValueError: anything else.
    """
    if value is None or (isinstance(value, str) and value.strip().upper() in ("", "N/A", "NAN")):
        return None
    if not isinstance(value, str | int | float):
        raise ValueError("no number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if math.isinf(number):
        raise ValueError("no number")
    return None if math.isnan(number) else number


def usual_scale(numbers: Sequence[float]) -> Scale:
    """The scale of some ratings: a usual one that fits whole numbers, else from the least to the greatest."""
    low, high = min(numbers), max(numbers)
    if all(float(number).is_integer() for number in numbers):
        for scale in USUAL:
            if scale[0] <= low and high <= scale[1]:
                return scale
    return low, high


def points_on(rating: float, scale: Scale) -> float:
    """A rating in points: the ends of its scale are 0 and 100."""
    return 100 * (rating - scale[0]) / (scale[1] - scale[0])


def scale_text(scale: Scale) -> str:
    return f"{scale[0]:g} to {scale[1]:g}"


def _preferences(pairs: Sequence[Example], answers: Sequence[Rated]) -> list[Pair]:
    """The pairs whose two answers were kept and differ in text and, if rated, in ratings; each once."""
    labels = {(row["prompt_id"], row["response"]): row["labels"] for row in answers}
    kept: dict[tuple[str, ...], Pair] = {}
    for example in pairs:
        key, (chosen, rejected) = prompt_id(example.messages), example.answers
        sides = labels.get((key, chosen)), labels.get((key, rejected))
        if None in sides or chosen == rejected or (sides[0] and sides[0] == sides[1]):
            continue
        kept[key, chosen, rejected] = {
            "prompt_id": key,
            "messages": example.messages,
            "chosen": chosen,
            "rejected": rejected,
            "chosen_score": None,
            "rejected_score": None,
            "origin": "pairs",
        }
    return list(kept.values())
