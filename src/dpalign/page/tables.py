"""The tables of the page, as data that the template lays out: what the systems reach, who dominates, over seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dpalign.page.systems import System, last_iteration
from dpalign.page.words import MISSING, Figure, between, figure, number, percent, probability, turns

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """What a cell says: a figure, and below it in small its interval or a remark."""

    text: str
    note: str = ""
    bar: float | None = None
    """A length from 0 to 1, drawn behind the figure."""
    tone: Literal["", "yes", "no", "word"] = ""
    """yes and no are verdicts; a word is set to the left."""
    colour: str = ""
    """The name of a system's colour, for a dot before the text."""


@dataclass(frozen=True)
class Row:
    cells: tuple[Cell, ...]
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """The first column names the row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        assert all(len(row.cells) == len(self.columns) for row in self.rows), self.columns


def cell(found: Figure, digits: int = 1, sign: bool = False) -> Cell:
    return Cell(number(found.value, digits, sign), between(found.low, found.high, digits))


def word(text: str) -> Cell:
    return Cell(text, tone="word")


def called(name: str, shown: Mapping[str, System]) -> Cell:
    """A system by its name, with its colour where the page shows it."""
    return name_of(shown[name]) if name in shown else word(name)


def name_of(system: System) -> Cell:
    return Cell(system.label, tone="word", colour=system.look.name)


def without_empty_columns(table: Table) -> Table:
    """Drop the columns that no row has a figure for, but never the first."""
    columns = range(len(table.columns))
    keep = [i for i in columns if i == 0 or any(row.cells[i].text != MISSING for row in table.rows)]
    rows = tuple(Row(tuple(row.cells[i] for i in keep), row.strong) for row in table.rows)
    return Table(table.caption, tuple(table.columns[i] for i in keep), rows)


def systems_table(summary: Summary, systems: Sequence[System], judged: bool = False) -> Table:
    """One row a system. `judged`: by the reward model's opinion, where the main figures are true."""
    last = last_iteration(systems)
    rows = []
    for system in systems:
        entry = system.entry["judged"] if judged else system.entry
        drops = entry.get("drops")
        steps = f"{entry['steps_beyond_doubt']} of {len(drops)}" if drops else MISSING
        rows.append(
            Row(
                (
                    name_of(system),
                    cell(figure(entry, "objective")),
                    cell(figure(entry, "hypervolume"), 0),
                    cell(percent(figure(entry, "true_front_share"))),
                    cell(figure(entry, "kendall_tau"), 2),
                    cell(figure(entry, "span")),
                    cell(percent(figure(entry, "span_share")), 0),
                    cell(figure(entry, "slope"), 2),
                    Cell(steps),
                    cell(figure(entry, "regret"), 2),
                    Cell(number(entry.get("spearman"), 2)),
                ),
                strong=system is last,
            )
        )
    dial = summary["objectives"][1] if len(summary["objectives"]) > 1 else "reward"
    way = turns(summary)
    explained = {
        "system": f"Small figures are intervals over the {summary['intervals']['prompts']:,} prompts.",
        "E_v J(v)": "",
        "hypervolume, square points" if len(summary["objectives"]) == 2 else "hypervolume": "",
        "share of the true front, %": "",
        "Kendall tau": f"Kendall tau: rank agreement of {dial} with the angle within a prompt, averaged.",
        "span": f"Span: {dial} between the ends of the dial.",
        "share of the true span, %": "",
        "slope per degree": "",
        f"steps that {dial} {way}": "Steps: those whose own interval is clear of zero.",
        "regret": "Regret: what asking for v loses against the best other direction for v.",
        "Spearman": "Spearman, over the averaged directions, is near 1 for any steady trend, so it comes last.",
    }
    table = without_empty_columns(Table("", tuple(explained), tuple(rows)))
    return replace(table, caption=" ".join(explained[column] for column in table.columns if explained[column]))


def dominance_tables(
    summary: Summary, systems: Sequence[System], key: str = "dominance"
) -> tuple[Table | None, Table | None]:
    """The pairs of the last iteration, and all others."""
    last = last_iteration(systems)
    shown = {system.name: system for system in systems}
    rows = summary.get(key) or []
    own = [row for row in rows if last is not None and row["a"] == last.name]
    others = [row for row in rows if row not in own]
    return _dominance(own, shown), _dominance(others, shown)


def _dominance(rows: Sequence[Mapping[str, Any]], shown: Mapping[str, System]) -> Table | None:
    if not rows:
        return None
    columns = (
        "A",
        "over B",
        "dominates",
        "smallest lead",
        "Holm p",
        "lead in E_v J(v)",
        "B under A's front",
        "B outside",
    )
    caption = (
        "A dominates B where, at every evaluation direction, the best of A's points beats the best of B's; the "
        "smallest lead has a simultaneous interval, the p-values are Holm's over all pairs of the run. The last "
        "columns count B's points under A's interpolated front, out of those inside A's range, and apart from them "
        "those outside it."
    )
    return Table(caption, columns, tuple(_dominance_row(row, shown) for row in rows))


def _dominance_row(row: Mapping[str, Any], shown: Mapping[str, System]) -> Row:
    outside = row.get("outside") or 0
    beaten = f"{row.get('outside_dominated', 0)} of them beaten all the same" if outside else ""
    return Row(
        (
            called(row["a"], shown),
            called(row["b"], shown),
            Cell("yes", tone="yes") if row["dominates"] else Cell("not shown", tone="no"),
            cell(Figure.read(row["margin"])),
            Cell(probability(row.get("p_holm"))),
            cell(Figure.read(row.get("objective_lead"))),
            Cell(f"{row['under']} of {row['inside']}" if row.get("inside") else MISSING),
            Cell(str(outside) if outside else MISSING, beaten),
        )
    )


def gap_table(summary: Summary, systems: Sequence[System]) -> Table | None:
    """By how much the reward model's opinion exceeds the truth, over all conditions of a system."""
    known = [system for system in systems if system.entry.get("opinion_gap")]
    if not known:
        return None
    rows = []
    for system in known:
        gaps = [
            cell(Figure.read(system.entry["opinion_gap"].get(name)), 2, sign=True) for name in summary["objectives"]
        ]
        true, judged = figure(system.entry, "objective"), figure(system.entry["judged"], "objective")
        rows.append(Row((name_of(system), *gaps, cell(true), cell(judged)), strong=system is last_iteration(systems)))
    columns = ("system", *(f"gap in {name}" for name in summary["objectives"]), "E_v J(v), true", "E_v J(v), judged")
    caption = (
        "Opinion minus truth in reward points, over all conditions of a system; intervals over prompts. Ratings that "
        "the data rescales to 10..90 for a truth of 0..100 (20l+10, 20r-10) put even a perfect reward model 8 points "
        "below a truth of 90, and 8 above one of 10."
    )
    return Table(caption, columns, tuple(rows))


def sensitivity_table(summary: Summary, systems: Sequence[System]) -> Table | None:
    """Hypervolume, and how it and the order of the systems move with the reference."""
    references = summary.get("hypervolume_sensitivity") or []
    if not references:
        return None
    known = all(share is not None for at in references for share in at["shares"].values())
    values = [at["shares"] if known else at["hypervolumes"] for at in references]
    scale, digits = (100.0, 1) if known else (1.0, 0)
    rows = []
    for system in systems:
        own = [scale * value[system.name] for value in values]
        ranks = [1 + sum(other > value[system.name] for other in value.values()) for value in values]
        rank = str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"
        main = figure(system.entry, "true_front_share" if known else "hypervolume")
        rows.append(
            Row(
                (
                    name_of(system),
                    Cell(number(None if main.value is None else scale * main.value, digits)),
                    Cell(number(min(own), digits)),
                    Cell(number(max(own), digits)),
                    Cell(rank),
                )
            )
        )
    what = "share of the true front, %" if known else "hypervolume, square points"
    places = ", ".join(
        f"{name} {number(value)}" for name, value in (summary.get("reference") or {}).items() if value is not None
    )
    caption = (
        f"The hypervolume's reference ({places}) was fixed beforehand; here each coordinate is also moved, "
        f"{len(references)} references in all. Look at the last column: where the order of the systems stands still, "
        "the choice of reference does not matter."
    )
    return Table(caption, ("system", what, "least", "most", "rank"), tuple(rows))
