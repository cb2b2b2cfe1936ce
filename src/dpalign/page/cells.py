"""The vocabulary of the page's tables: cells, rows and tables, as data that the template lays out."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from dpalign.measure.bootstrap import Estimate
from dpalign.measure.summary import Summary
from dpalign.page.looks import label, looks_of
from dpalign.page.words import MISSING, between, number, whole


@dataclass(frozen=True)
class Cell:
    """A cell: a figure, and below it in small print its interval or a remark."""

    text: str
    note: str = ""
    bar: float | None = None
    """A length from 0 to 1, drawn behind the figure."""
    tone: Literal["", "yes", "no", "word"] = ""
    """yes and no are verdicts; a word is aligned left."""
    colour: str = ""
    """The name of a system's colour, for a dot before the text."""


@dataclass(frozen=True)
class Row:
    """A row's cells by the titles of their columns; the first names the row."""

    cells: Mapping[str, Cell]
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Rows that share their columns."""

    caption: str
    rows: tuple[Row, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns' titles."""
        return tuple(self.rows[0].cells)


def table(caption: str, rows: Iterable[Row]) -> Table | None:
    """A table without the columns that hold no figure; None if there are no rows."""
    rows = list(rows)
    if not rows:
        return None
    first, *others = rows[0].cells
    kept = [first, *(title for title in others if any(row.cells[title].text != MISSING for row in rows))]
    return Table(caption, tuple(Row({title: row.cells[title] for title in kept}, row.strong) for row in rows))


DASH: Final = Cell(MISSING)


def cell(estimate: Estimate | None, digits: int = 1, sign: bool = False, scale: float = 1) -> Cell:
    """A figure with its interval below it."""
    if estimate is None:
        return DASH
    value, low, high = (None if x is None else scale * x for x in (estimate.value, estimate.low, estimate.high))
    return Cell(number(value, digits, sign), between(low, high, digits))


def word(text: str, note: str = "") -> Cell:
    """Text, aligned left."""
    return Cell(text, note, tone="word")


def count(n: float | None) -> Cell:
    """A whole number; a dash for 0 and None."""
    return Cell(whole(n))


def verdict(decided: bool | None) -> Cell:
    """Whether a claim is established."""
    if decided is None:
        return DASH
    return Cell("established", tone="yes") if decided else Cell("not established", tone="no")


def name_of(summary: Summary, name: str, note: str = "") -> Cell:
    """A system by its name, with its colour if the page shows it."""
    if name not in summary.systems:
        return word(name, note)
    return Cell(label(summary.systems[name]), note, tone="word", colour=looks_of(summary)[name].name)


def ahead(lead: Estimate | None, last: str, other: str) -> str:
    """The name of the system that is ahead; "not significant" if the interval of the lead contains 0."""
    if lead is None:
        return MISSING
    return last if lead.above_zero else other if lead.below_zero else "not significant"
