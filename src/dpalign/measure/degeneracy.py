"""Degenerate answers: a simple rule, so that anyone can count them again.

An answer is degenerate if it was cut at the length limit, has no word, repeats a sentence, or repeats too many of its
runs of four words. Code, verse and tables repeat themselves for good reasons: compare rates between conditions, and
do not read one alone.
"""

import re
from collections.abc import Sequence
from typing import Final

import numpy as np

from dpalign.measure.bootstrap import Array, Bootstrap, Estimate
from dpalign.measure.record import Record

SENTENCE_WORDS: Final = 3
"""A repeated sentence of fewer words ("Yes. Yes.") does not count."""
RUN: Final = 4
"""Words in a run; repeated runs are counted."""
MOST_REPEATED: Final = 0.3
"""Default for the largest share of repeated runs in a sound answer."""
REASONS: Final = ("unfinished", "empty", "repeated sentence", "repetitive")
"""Why an answer is degenerate."""

Faults = Sequence[Sequence[Sequence[Sequence[str]]]]
"""The faults of each answer, by prompt, condition and sample."""


def words(text: str) -> list[str]:
    """The words of a text, in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def repeats_a_sentence(text: str) -> bool:
    """Whether a sentence, or a line, of at least three words occurs twice."""
    sentences = [tuple(words(sentence)) for sentence in re.split(r"[.!?\n]+", text)]
    long = [sentence for sentence in sentences if len(sentence) >= SENTENCE_WORDS]
    return len(set(long)) < len(long)


def repetition(text: str) -> float:
    """The share of a text's runs of four words that occurred in it before."""
    spoken = words(text)
    runs = [tuple(spoken[i : i + RUN]) for i in range(len(spoken) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def faults(text: str, finished: bool, most: float) -> tuple[str, ...]:
    """The reasons why an answer is degenerate; none for a sound one.

    Args:
        finished: the answer was not cut. An empty answer has no other fault than "empty".
        most: the largest share of repeated runs in a sound answer.
    """
    empty = not words(text)
    found = (not finished and not empty, empty, repeats_a_sentence(text), repetition(text) > most)
    return tuple(reason for reason, at_fault in zip(REASONS, found, strict=True) if at_fault)


class Degenerate(Record):
    """How often answers are degenerate, and for which reasons (an answer may have several)."""

    share: Estimate
    reasons: dict[str, float]
    """Reason -> share of the answers."""


def degenerate_share(fault_PVS: Faults, bootstrap: Bootstrap) -> Degenerate:
    """Measure how often answers are degenerate, with an interval by prompt."""
    answers = [answer for conditions in fault_PVS for samples in conditions for answer in samples]
    return Degenerate(
        share=bootstrap.mean(share_by_prompt(fault_PVS)),
        reasons={reason: sum(reason in answer for answer in answers) / len(answers) for reason in REASONS},
    )


def share_by_prompt(fault_PVS: Faults) -> Array:
    """The share of each prompt's answers that are degenerate: (P,)."""
    flags = [[bool(answer) for samples in conditions for answer in samples] for conditions in fault_PVS]
    return np.array([np.mean(own) for own in flags])
