"""The count of rows read, kept and filtered, with the reasons: no row leaves a data set uncounted."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ReadReport:
    """The count of one file, or of one filter.

    Attributes:
        source: the data set's format, or the filter's name.
        file: the file or hub split; "" for a filter.
        read: rows in: rated answers, or conversations.
        kept: rows out.
        filtered: reason -> rows; with `kept` it adds up to `read`.
        notes: changes or gaps within kept rows -> how often.
    """

    source: str
    file: str
    read: int
    kept: int
    filtered: Mapping[str, int]
    notes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.kept + sum(self.filtered.values()) == self.read, f"rows unaccounted for: {self}"

    def to_json(self) -> dict[str, Any]:
        """The counts under the names of a stage's ledger, with the notes."""
        counts = {"source": self.source, "file": self.file, "in": self.read, "out": self.kept}
        return counts | {"filtered": dict(self.filtered), "notes": dict(self.notes)}


@dataclass
class Tally:
    """Counts while a file is being read; `report` closes it."""

    read: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def keeps(self, prompt: str, response: str, rated: bool = True) -> bool:
        """Count one answer; false if its prompt, its text or its rating is missing."""
        self.read += 1
        if not prompt.strip():
            self.filtered["empty prompt"] += 1
        elif not response.strip():
            self.filtered["empty response"] += 1
        elif not rated:
            self.filtered["no rating at all"] += 1
        else:
            return True
        return False

    def report(self, source: str, file: str, kept: Sized) -> ReadReport:
        return ReadReport(source, file, self.read, len(kept), dict(self.filtered), dict(self.notes))


def render_reports(reports: Iterable[ReadReport]) -> str:
    """The reports as one plain table; each line ends with the reasons, the most frequent first."""
    rows = [("source", "file", "read", "kept", "filtered")]
    for r in reports:
        rows.append((r.source, Path(r.file).name, f"{r.read:,}", f"{r.kept:,}", _reasons(r.filtered)))
        if r.notes:
            rows.append(("", "", "", "", f"kept, but: {_reasons(r.notes)}"))
    source, file, read, kept, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(f"{a:{source}}  {b:{file}}  {c:>{read}}  {d:>{kept}}  {e}".rstrip() for a, b, c, d, e in rows)


def require_rows(rows: Sequence[Any], what: str, reports: Iterable[ReadReport]) -> None:
    """Refuse an empty data set, with the table of its counts.

    Raises:
        ValueError: `rows` is empty.
    """
    if not rows:
        raise ValueError(f"no {what} left after filtering; where the rows went:\n{render_reports(reports)}")


def _reasons(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {reason}" for reason, count in ordered) or "-"
