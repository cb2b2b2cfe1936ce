"""The count of rows read, kept and filtered, with the reasons: no row leaves a data set uncounted."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Scale = tuple[float, float]
"""The ratings that become 0 and 100."""


@dataclass
class ReadReport:
    """The counts of one file while it is read, or of one filter.

    Attributes:
        source: the data set's format, or the filter's name.
        file: the file or hub split; "" for a filter.
        read: rows in: rated answers, or conversations.
        kept: rows out.
        filtered: reason -> rows; with `kept` it adds up to `read`.
        notes: changes or gaps within kept rows -> how often.
        scales: by head, for ratings without a published scale.
        remarks: other notes on the columns.
    """

    source: str
    file: str
    read: int = 0
    kept: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    scales: dict[str, Scale] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @classmethod
    def of_filter(cls, source: str, file: str, read: int, kept: int, reason: str) -> "ReadReport":
        """The count of a filter that leaves rows out for one reason."""
        return cls(source, file, read, kept, +Counter({reason: read - kept}))

    def keeps(self, prompt: str, response: str | None = None, has_rating: bool = True) -> bool:
        """Count one answer, or a prompt alone; false if its prompt, its text or its rating is missing."""
        for present, reason in (
            (bool(prompt.strip()), "empty prompt"),
            (response is None or bool(response.strip()), "empty response"),
            (has_rating, "no rating at all"),
        ):
            if not present:
                self.drop(reason)
                return False
        self.read += 1
        self.kept += 1
        return True

    def drop(self, reason: str) -> None:
        """Count a row that is left out."""
        self.read += 1
        self.filtered[reason] += 1

    def to_json(self) -> dict[str, Any]:
        """The counts under the names of a stage's ledger, with the notes."""
        assert self.kept + sum(self.filtered.values()) == self.read, f"rows unaccounted for: {self}"
        counts = {"source": self.source, "file": self.file, "in": self.read, "out": self.kept}
        scales = {head: list(scale) for head, scale in self.scales.items()}
        return counts | {
            "filtered": dict(self.filtered),
            "notes": dict(self.notes),
            "scales": scales,
            "remarks": self.remarks,
        }


def render_reports(reports: Iterable[ReadReport]) -> str:
    """The reports as one plain table; each line ends with the reasons, the most frequent first."""
    rows = [("source", "file", "read", "kept", "filtered")]
    for r in reports:
        rows.append((r.source, Path(r.file).name, f"{r.read:,}", f"{r.kept:,}", reasons(r.filtered) or "-"))
        if r.notes:
            rows.append(("", "", "", "", f"kept, but: {reasons(r.notes)}"))
        if r.scales:
            scales = ", ".join(f"{head} {low:g} to {high:g}" for head, (low, high) in r.scales.items())
            rows.append(("", "", "", "", f"to 0-100: {scales}"))
        rows += [("", "", "", "", remark) for remark in r.remarks]
    source, file, read, kept, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(f"{a:{source}}  {b:{file}}  {c:>{read}}  {d:>{kept}}  {e}".rstrip() for a, b, c, d, e in rows)


def require_rows(rows: Sequence[Any], what: str, reports: Iterable[ReadReport]) -> None:
    """Refuse an empty data set, with the table of its counts.

    Raises:
        ValueError: `rows` is empty.
    """
    if not rows:
        raise ValueError(f"no {what} left after filtering; where the rows went:\n{render_reports(reports)}")


def reasons(counts: Mapping[str, int]) -> str:
    """Each reason with its count, the most frequent first; empty if there are none."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {reason}" for reason, count in ordered if count)
