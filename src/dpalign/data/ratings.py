"""Rated answers of the paper's data sets, rescaled to 0-100 and stored as labels of the ten heads.

Four forms:

- `helpsteer` (nvidia/HelpSteer, CC-BY-4.0): five attributes of 0..4. Splits: train (35,331 rows), validation (1,789).
- `ultrafeedback` (openbmb/UltraFeedback, MIT): four answers a prompt, four aspects and an overall score each.
- `ultrafeedback_binarized` (HuggingFaceH4, MIT): pairs of chats with overall scores. The paper's splits are train_prefs
  (61,135 pairs) and, for validation, test_prefs (2,000). Prompt ids join it to the raw file.
- `pairs`: plain rows {prompt, chosen, rejected, metadata: {score_chosen, score_rejected}}.

Section 3.1: "rewards in each dimension are rescaled". The released HelpSteer heads invert with (score - 10) / 20: a
label l of 0..4 became 20 l + 10. UltraFeedback's map is unpublished; the defaults put its ratings at the middle of
their interval in the same way. The alternatives use the full range.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, Final, Literal

from dpalign.data.report import ReadReport
from dpalign.data.sources import Row, describe, read_source
from dpalign.paper.objectives import Objective, head_indices
from dpalign.rows import HEADS, Message, Rated, prompt_id, user_prompt

RatedFormat = Literal["helpsteer", "ultrafeedback", "ultrafeedback_binarized", "pairs"]
Points = Mapping[str, float | None]
"""Points of 0-100 by head; None where the rating is missing."""
Answers = Iterator[tuple[list[Message], str, Points]]
"""The prompt, response and points of each answer in a row."""

HELPSTEER_RANGE: Final = (0, 4)
ASPECT_RANGE: Final = (1, 5)
OVERALL_RANGE: Final = (1, 10)

ATTRIBUTES: Final = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
ASPECTS: Final = ("instruction_following", "truthfulness", "honesty", "helpfulness")
OVERALL: Final = "ultrafeedback-overall_score"
SCORES: Final = ("score_chosen", "score_rejected")
"""Overall scores: columns of ultrafeedback_binarized; plain pairs have them in `metadata`."""

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


def paper_form(row: Row) -> RatedFormat | None:
    """The paper's form that has the columns of a file's first row; None if there is none."""
    columns, metadata = row.values.keys(), row.values.get("metadata")
    if {"instruction", "completions"} <= columns:
        return "ultrafeedback"
    if {"prompt", "response", *ATTRIBUTES} <= columns:
        return "helpsteer"
    if {"prompt_id", "chosen", "rejected", *SCORES} <= columns:
        return "ultrafeedback_binarized"
    if {"prompt", "chosen", "rejected"} <= columns and isinstance(metadata, Mapping) and metadata.keys() >= {*SCORES}:
        return "pairs"
    return None


def read_rated(
    form: RatedFormat, source: str, split: str | None = None, rescaling: Rescaling = DEFAULT
) -> tuple[list[Rated], ReadReport]:
    """Read the rated answers of a data set in one of these forms; the report counts answers.

    Raises:
        ValueError: a row that is cut, lacks a column, holds a rating out of range, or a chat that does not end with an
            answer.
    """
    rows: list[Rated] = []
    report = ReadReport(form, describe(source, split))
    for row in read_source(source, split):
        for messages, response, points in ANSWERS[form](row, rescaling, report):
            has_rating = any(value is not None for value in points.values())
            if report.keeps(messages[-1]["content"], response, has_rating):
                rows.append(rated(messages, response, form, points))
    return rows, report


def _helpsteer(row: Row, rescaling: Rescaling, _: ReadReport) -> Answers:
    ratings = {name: whole_rating(row, name, HELPSTEER_RANGE) for name in ATTRIBUTES}
    points = {f"helpsteer-{name}": rescale(rating, rescaling.helpsteer) for name, rating in ratings.items()}
    yield user_prompt(row.text_or_empty("prompt")), row.text_or_empty("response"), points


def _binarized(row: Row, rescaling: Rescaling, _: ReadReport) -> Answers:
    for side in ("chosen", "rejected"):
        chat = row.chat(side)
        if len(chat) < 2 or chat[-1]["role"] != "assistant":
            raise row.wrong(side, chat, "a chat that ends with the assistant's answer")
        score = loose_rating(row, f"score_{side}", OVERALL_RANGE)
        yield chat[:-1], chat[-1]["content"], {OVERALL: rescale(score, rescaling.overall)}


def _pairs(row: Row, rescaling: Rescaling, _: ReadReport) -> Answers:
    messages, metadata = user_prompt(row.text_or_empty("prompt")), row.part("metadata")
    for side in ("chosen", "rejected"):
        score = loose_rating(metadata, f"score_{side}", OVERALL_RANGE)
        yield messages, row.text_or_empty(side), {OVERALL: rescale(score, rescaling.overall)}


def _ultrafeedback(row: Row, rescaling: Rescaling, report: ReadReport) -> Answers:
    """Read UltraFeedback as first published; its known quirks are filtered or noted, and counted.

    Ratings are text, "1".."5" or "N/A"; a response may be null, NaN or empty; a prompt may have no completions. The
    system prompt of the model that wrote an answer (custom_system_prompt) is left out, as in the released reward
    model's input.
    """
    messages = user_prompt(row.text_or_empty("instruction"))
    completions = row.parts("completions")
    if not completions:
        report.notes["prompt without completions"] += 1
    for completion in completions:
        annotations = completion.part("annotations")
        ratings: dict[str, float | None] = {}
        for aspect in ASPECTS:
            known = annotations.get(aspect) is not None
            ratings[aspect] = loose_rating(annotations.part(aspect), "Rating", ASPECT_RANGE) if known else None
            if ratings[aspect] is None:
                report.notes["aspect rated N/A"] += 1
        points = {f"ultrafeedback-{name}": rescale(rating, rescaling.aspects) for name, rating in ratings.items()}
        overall = _overall([rating for rating in ratings.values() if rating is not None], completion, report)
        points[OVERALL] = rescale(overall, rescaling.overall)
        yield messages, completion.text_or_empty("response"), points


def _overall(ratings: Sequence[float], completion: Row, report: ReadReport) -> float | None:
    """The overall score of an answer; repairs the tens that older files have in place of 1."""
    overall = loose_rating(completion, "overall_score", OVERALL_RANGE)
    if overall is None:
        report.notes["overall_score missing"] += 1
    elif overall == OVERALL_RANGE[1]:
        overall = repair_ten(ratings)
        if overall is None:
            report.notes["overall_score 10 in doubt, left out"] += 1
        elif overall == OVERALL_RANGE[0]:
            report.notes["overall_score 10 repaired to 1"] += 1
    return overall


def repair_ten(aspect_ratings: Sequence[float]) -> float | None:
    """The true overall score behind a 10, from the answer's aspect ratings (1..5, without N/A); None if in doubt.

    This is the publishers' own repair: a mean of at most 2 gives 1, a mean above 4 gives 10.
    """
    if not aspect_ratings:
        return None
    fine_grained = mean(aspect_ratings)
    if fine_grained <= 2:
        return 1.0
    return 10.0 if fine_grained > 4 else None


ANSWERS: Final[Mapping[RatedFormat, Callable[[Row, Rescaling, ReadReport], Answers]]] = {
    "helpsteer": _helpsteer,
    "ultrafeedback": _ultrafeedback,
    "ultrafeedback_binarized": _binarized,
    "pairs": _pairs,
}


def rescale(rating: float | None, formula: str) -> float | None:
    """A rating in points of 0-100; None stays None.

    Raises:
        ValueError: an unknown formula.
    """
    if formula not in _LINES:
        raise ValueError(f"unknown rescaling {formula!r}; known: {', '.join(_LINES)}")
    slope, offset = _LINES[formula]
    return None if rating is None else slope * rating + offset


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
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not bounds[0] <= number <= bounds[1]:  # NaN is outside too
        raise row.wrong(key, value, f'a number from {bounds[0]} to {bounds[1]}, or "N/A"')
    return number


def rated(messages: list[Message], response: str, source: str, points: Points) -> Rated:
    """A rated answer; heads without points have no label."""
    return {
        "prompt_id": prompt_id(messages),
        "messages": messages,
        "response": response,
        "source": source,
        "labels": {head: value for head, value in points.items() if value is not None},
    }


def labels_for(labels: Mapping[str, float], heads: Sequence[str]) -> list[float | None]:
    """A row's labels in the order of a reward model's heads; None for a head without one."""
    return [labels.get(head) for head in heads]


def require_labels(
    rows: Iterable[Mapping[str, Any]], objectives: Sequence[Objective], heads: Sequence[str], part: str
) -> None:
    """Refuse to train a head without labels: one of the user's own, or one that an objective reads.

    Args:
        part: "train" for the reward model's rows, "judge" for the judge's.

    Raises:
        ValueError: names the head, the objective that reads it, the heads that have labels, and the cure.
    """
    reader = {index: o.name for o in objectives for index in head_indices(o, heads)}
    labelled: dict[str, None] = {}
    answers = 0
    for row in rows:
        answers += 1
        labelled |= dict.fromkeys(row["labels"])
    for index, head in enumerate(heads):
        if head in labelled or (head in HEADS and index not in reader):
            continue
        subject = f"objective {reader[index]!r} reads head {head!r}" if index in reader else f"[heads] has {head!r}"
        whose = f"{answers} training answers" if part == "train" else f"the judge's {answers} answers"
        without = "[rewards.NAME] gives a finished one" if part == "train" else "data.judge = 0"
        raise ValueError(
            f"{subject}, and none of {whose} has a label for it (labelled: {', '.join(labelled) or 'none'}); add a "
            f"data set that has, read another head in [objectives], or do without this training ({without})"
        )
