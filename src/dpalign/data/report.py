"""What was read, kept and filtered, and why: nothing leaves a data set uncounted."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ReadReport:
    """The count of one file read, or of one filter applied.

    Attributes:
        source: the data set's format, or the filter's name.
        file: the file or hub split read; for a filter, what it was given.
        read: rows that came in: rated answers, or conversations.
        kept: rows that went out.
        filtered: reason -> rows; with `kept` it adds up to `read`.
        notes: what was changed or missing within rows that are kept -> how often.
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
        """The counts as a stage's ledger holds them, with the notes beside."""
        return {
            "source": self.source,
            "file": self.file,
            "in": self.read,
            "out": self.kept,
            "filtered": dict(self.filtered),
            "notes": dict(self.notes),
        }


@dataclass
class Tally:
    """Counts while a file is being read; `report` closes it."""

    read: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def report(self, source: str, file: str, kept: Sized) -> ReadReport:
        return ReadReport(source, file, self.read, len(kept), dict(self.filtered), dict(self.notes))


def render_reports(reports: Iterable[ReadReport]) -> str:
    """The reports as one plain table; the reasons follow in words, the most frequent first."""
    rows = [("source", "file", "read", "kept", "filtered")]
    for report in reports:
        rows.append(
            (report.source, Path(report.file).name, f"{report.read:,}", f"{report.kept:,}", _reasons(report.filtered))
        )
        if report.notes:
            rows.append(("", "", "", "", f"kept, but: {_reasons(report.notes)}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2].rjust(widths[2]), row[3].rjust(widths[3]), row[4]]
        ).rstrip()
        for row in rows
    )


def require_rows(rows: Sequence[Any], what: str, reports: Iterable[ReadReport]) -> None:
    """Refuse an empty data set, showing where its rows went.

    Raises:
        ValueError: `rows` is empty.
    """
    if not rows:
        raise ValueError(f"no {what} left after filtering; where the rows went:\n{render_reports(reports)}")


def _reasons(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {reason}" for reason, count in ordered) or "-"
