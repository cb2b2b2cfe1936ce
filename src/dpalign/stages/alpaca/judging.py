"""A judge at work: what is not judged yet is asked, kept at once, and given up on where it is hopeless."""

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dpalign.run.progress import Progress
from dpalign.stages.alpaca.judge import Judge, Judgement, Pair, key_of
from dpalign.stages.alpaca.store import Store

HOPELESS: Final = 5
"""Failures before the first success that end the asking: such a judge would be paid for nothing."""


@dataclass(frozen=True)
class Judged:
    """One instruction of one system: the preference, or why there is none; lengths in characters."""

    index: int
    preference: float | None
    reason: str
    length: int
    reference_length: int
    asked: bool
    """False: the two answers were equal, which is a draw and costs nothing."""

    def to_json(self) -> dict[str, Any]:
        return vars(self)


def pending(pairs: Sequence[Pair], identity: Mapping[str, Any], store: Store) -> list[Pair]:
    """The pairs to pay for: not judged yet, not equal, each once."""
    todo: dict[str, Pair] = {}
    for pair in pairs:
        key = key_of(identity, pair)
        if pair.output != pair.reference and key not in store:
            todo.setdefault(key, pair)
    return list(todo.values())


def judge_pairs(pairs: Sequence[Pair], judge: Judge, store: Store, about: str) -> int:
    """Ask for what the store lacks, and keep each judgement as it comes; how many were asked for.

    Raises:
        ValueError: the judge cannot be asked, or fails from the first; it says how many are answered, and kept.
    """
    todo = pending(pairs, judge.identity, store)
    if not todo:
        return 0
    store.hold()  # before anything is paid for
    progress = Progress(f"{about}: judgement", len(pairs), len(pairs) - len(todo))
    tally: Counter[bool] = Counter()
    reasons: Counter[str] = Counter()
    lock = threading.Lock()

    def keep(pair: Pair, judgement: Judgement) -> None:
        store.keep(key_of(judge.identity, pair), judgement, {"of": about, "index": pair.index, "judge": judge.name})
        with lock:
            tally[judgement.preference is not None] += 1
            if judgement.preference is None:
                reasons[judgement.reason] += 1
            progress.advance()
            if tally[False] >= HOPELESS and not tally[True]:
                reason, _ = reasons.most_common(1)[0]
                raise ValueError(
                    f"judge {judge.name}: its first {tally[False]} answers cannot be used: {reason}. They are kept as "
                    "failures; mend the judge, then ask for them again with --retry-failed"
                )

    try:
        with progress:
            judge.ask(todo, keep)
    except ValueError as error:
        left = len(pending(pairs, judge.identity, store))
        raise ValueError(
            f"{about}: {error} ({len(pairs) - left} of {len(pairs)} are answered and kept; the same command goes on)"
        ) from error
    return tally.total()


def judged_rows(pairs: Sequence[Pair], identity: Mapping[str, Any], store: Store) -> list[Judged]:
    """The judgements of a system's pairs, in their order; an answer equal to the reference's is a draw, 1.5."""
    rows = []
    for pair in pairs:
        preference, reason, asked = 1.5, "", pair.output != pair.reference
        if asked:
            record = store.records[key_of(identity, pair)]
            preference, reason = record["preference"], record["reason"]
        rows.append(Judged(pair.index, preference, reason, len(pair.output), len(pair.reference), asked))
    return rows
