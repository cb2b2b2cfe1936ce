"""Preference pairs: two answers to a prompt with an overall score each, so head 5 alone is labelled.

Two forms: ultrafeedback_binarized (HuggingFaceH4, MIT; chosen and rejected are chats), and plain rows
{prompt, chosen, rejected, metadata: {score_chosen, score_rejected}}. The named splits of the first
are the paper's: train_prefs (61,135 pairs) and, for validation, test_prefs (2,000). It keeps two of
UltraFeedback's four answers and no aspect; prompt ids join it to the raw file.
"""

from typing import Final

from dpalign.data.ratings import OVERALL_RANGE, Rescaling, head_labels, loose_rating, rescale
from dpalign.data.report import ReadReport, Tally
from dpalign.data.rows import Rated, rated
from dpalign.data.sources import Row, describe, read_source
from dpalign.rows import Message, user_prompt

BINARIZED: Final = ("chosen", "rejected", "score_chosen", "score_rejected")
"""Columns by which the first form is known: the second has its scores in `metadata`."""


def read_binarized(
    source: str, split: str | None = None, rescaling: Rescaling | None = None
) -> tuple[list[Rated], ReadReport]:
    """Both answers of each pair of ultrafeedback_binarized; counts are of answers.

    Raises:
        ValueError: a row that is cut, lacks a column, holds a chat that does not end with an answer,
            or a score outside 1..10.
    """
    rows: list[Rated] = []
    tally = Tally()
    for row in read_source(source, split):
        for side in ("chosen", "rejected"):
            chat = row.chat(side)
            if len(chat) < 2 or chat[-1]["role"] != "assistant":
                raise row.wrong(side, chat, "a chat that ends with the assistant's answer")
            _keep(rows, tally, chat[:-1], chat[-1]["content"], "ultrafeedback_binarized", _score(row, side, rescaling))
    return rows, tally.report("ultrafeedback_binarized", describe(source, split), rows)


def read_preference_pairs(
    source: str, split: str | None = None, rescaling: Rescaling | None = None
) -> tuple[list[Rated], ReadReport]:
    """Both answers of each plain preference pair; counts are of answers.

    Raises:
        ValueError: a row that is cut, lacks a column, or holds a score outside 1..10.
    """
    rows: list[Rated] = []
    tally = Tally()
    for row in read_source(source, split):
        messages = user_prompt(row.text_or_none("prompt") or "")
        metadata = row.part("metadata")
        for side in ("chosen", "rejected"):
            _keep(rows, tally, messages, row.text_or_none(side), "pairs", _score(metadata, side, rescaling))
    return rows, tally.report("pairs", describe(source, split), rows)


def _score(row: Row, side: str, rescaling: Rescaling | None) -> float | None:
    score = loose_rating(row, f"score_{side}", OVERALL_RANGE)
    return None if score is None else rescale(score, (rescaling or Rescaling()).overall)


def _keep(
    rows: list[Rated], tally: Tally, messages: list[Message], response: str | None, source: str, points: float | None
) -> None:
    tally.read += 1
    if not messages[-1]["content"].strip():
        tally.filtered["empty prompt"] += 1
    elif not (response or "").strip():
        tally.filtered["empty response"] += 1
    elif points is None:
        tally.filtered["no rating at all"] += 1
    else:
        assert response is not None
        rows.append(rated(messages, response, source, head_labels({"ultrafeedback-overall_score": points})))
