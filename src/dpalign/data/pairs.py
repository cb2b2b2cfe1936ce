"""Preference pairs: two answers to a prompt with an overall score each; head 5 alone is labelled.

Two forms: ultrafeedback_binarized (HuggingFaceH4, MIT; chosen and rejected are chats), and plain rows
{prompt, chosen, rejected, metadata: {score_chosen, score_rejected}}. The named splits of the first are the paper's:
train_prefs (61,135 pairs) and, for validation, test_prefs (2,000). It keeps two of UltraFeedback's four answers and no
aspect; prompt ids join it to the raw file.
"""

from collections.abc import Callable, Iterator
from typing import Final

from dpalign.data.ratings import DEFAULT, OVERALL_RANGE, Rescaling, loose_rating, rated, rescale
from dpalign.data.report import ReadReport, Tally
from dpalign.data.sources import Row, describe, read_source
from dpalign.rows import Message, Rated, user_prompt

BINARIZED: Final = ("chosen", "rejected", "score_chosen", "score_rejected")
"""Columns of the first form; the second has its scores in `metadata`."""

SIDES: Final = ("chosen", "rejected")


def read_binarized(
    source: str, split: str | None = None, rescaling: Rescaling = DEFAULT
) -> tuple[list[Rated], ReadReport]:
    """Both answers of each pair of ultrafeedback_binarized; counts are of answers.

    Raises:
        ValueError: a row that is cut, lacks a column, holds a chat that does not end with an answer, or a score outside
            1..10.
    """

    def answers(row: Row) -> Iterator[_Answer]:
        for side in SIDES:
            chat = row.chat(side)
            if len(chat) < 2 or chat[-1]["role"] != "assistant":
                raise row.wrong(side, chat, "a chat that ends with the assistant's answer")
            yield chat[:-1], chat[-1]["content"], loose_rating(row, f"score_{side}", OVERALL_RANGE)

    return _read("ultrafeedback_binarized", source, split, rescaling, answers)


def read_preference_pairs(
    source: str, split: str | None = None, rescaling: Rescaling = DEFAULT
) -> tuple[list[Rated], ReadReport]:
    """Both answers of each plain preference pair; counts are of answers.

    Raises:
        ValueError: a row that is cut, lacks a column, or holds a score outside 1..10.
    """

    def answers(row: Row) -> Iterator[_Answer]:
        messages = user_prompt(row.text_or_empty("prompt"))
        metadata = row.part("metadata")
        for side in SIDES:
            yield messages, row.text_or_empty(side), loose_rating(metadata, f"score_{side}", OVERALL_RANGE)

    return _read("pairs", source, split, rescaling, answers)


_Answer = tuple[list[Message], str, float | None]
"""Prompt, response and overall score."""


def _read(
    form: str, source: str, split: str | None, rescaling: Rescaling, answers: Callable[[Row], Iterator[_Answer]]
) -> tuple[list[Rated], ReadReport]:
    rows: list[Rated] = []
    tally = Tally()
    for row in read_source(source, split):
        for messages, response, score in answers(row):
            points = {} if score is None else {"ultrafeedback-overall_score": rescale(score, rescaling.overall)}
            if tally.keeps(messages[-1]["content"], response, rated=bool(points)):
                rows.append(rated(messages, response, form, points))
    return rows, tally.report(form, describe(source, split), rows)
