"""Tables of what went in and what it cost: reward model quality, stages, rows read and kept."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any, Final

from dpalign.page.tables import Cell, Row, Table, cell, without_empty_columns, word
from dpalign.page.words import COUNTED, MISSING, Figure, whole
from dpalign.run.progress import spell_seconds

_FIGURES: Final = (
    ("R2", ("r2",)),
    ("Pearson", ("pearson",)),
    ("Spearman", ("spearman",)),
    ("Spearman within a prompt", ("within_prompt_spearman",)),
    ("pairs in order within a prompt", ("pairwise_accuracy", "within_prompt_accuracy")),
    ("with length", ("length_correlation",)),
    ("labels with length", ("label_length_correlation",)),
)
_UNITS: Final = {"sampled": "tokens sampled", "scored": "answers scored", "trained": "tokens trained"}
"""What a ledger counts, and how a column of it is headed."""
_WHAT: Final = (
    "Pairs in order: of two answers to one prompt with different labels, how often the better one is scored higher; "
    "selection asks nothing else of the reward model. With length: the correlation of the prediction, and of the "
    "label, with the answer's length."
)


def quality_tables(quality: Mapping[str, Any]) -> dict[str, Table]:
    """By title: heads and objectives on held-out ratings, then each system's own samples."""
    baseline = _named(quality.get("baseline"))
    parts = (("Objectives, on held-out ratings", "objectives"), ("Heads, on held-out ratings", "heads"))
    tables = {title: _quality(_named(quality.get(key)), baseline) for title, key in parts}
    on_policy = {
        f"{objective}, of {system}": figures
        for system, part in (quality.get("on_policy") or {}).items()
        for objective, figures in _named(part).items()
    }
    tables["Objectives, on the policies' own samples"] = _quality(on_policy, {})
    found = {title: table for title, table in tables.items() if table is not None}
    # what the columns mean is said once
    return {
        title: replace(table, caption=table.caption if i == 0 else "") for i, (title, table) in enumerate(found.items())
    }


def _named(part: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    """name -> figures, whether given so or as `Quality.to_json` writes it; anything else in it is left out."""
    part = part or {}
    found = part["heads"] if isinstance(part.get("heads"), Mapping) else part
    return {name: figures for name, figures in found.items() if isinstance(figures, Mapping)}


def _quality(rows: Mapping[str, Mapping[str, Any]], baseline: Mapping[str, Mapping[str, Any]]) -> Table | None:
    if not rows:
        return None
    with_ridge = any(name in baseline for name in rows)
    columns = (
        "",
        "answers",
        *(label for label, _ in _FIGURES),
        *(("ridge: Pearson", "ridge: pairs in order") if with_ridge else ()),
    )
    body = []
    for name, figures in rows.items():
        cells = [word(name), Cell(whole(figures.get("n")))]
        cells += [cell(_first(figures, keys), 2) for _, keys in _FIGURES]
        if with_ridge:
            ridge = baseline.get(name, {})
            cells += [cell(_first(ridge, keys), 2) for keys in (("pearson",), _FIGURES[4][1])]
        body.append(Row(tuple(cells)))
    caption = _WHAT
    if with_ridge:
        caption += (
            " Ridge is a regression on what an answer looks like (length, punctuation, counts): what a model must beat."
        )
    return without_empty_columns(Table(caption, columns, tuple(body)))


def _first(figures: Mapping[str, Any], keys: Sequence[str]) -> Figure:
    return next((Figure.read(figures[key]) for key in keys if figures.get(key) is not None), Figure(None))


def stages_table(stages: Sequence[Mapping[str, Any]]) -> Table | None:
    """What each stage cost; the bar is its share of the whole time."""
    if not stages:
        return None
    seconds = [float(stage.get("seconds") or 0.0) for stage in stages]
    total = sum(seconds)
    rows = []
    for stage, own in zip(stages, seconds, strict=True):
        tokens, counts = stage.get("tokens") or {}, stage.get("counts") or {}
        out = _reasons(counts.get("filtered") or {})
        cells = (
            word(str(stage.get("name", MISSING))),
            Cell(spell_seconds(own), bar=own / total if total else 0.0),
            *(Cell(whole(tokens.get(unit))) for unit in _UNITS),
            Cell(whole(counts.get("in"))),
            Cell(whole(counts.get("out"))),
            word(out or MISSING),
        )
        rows.append(Row(cells))
    sums = [sum((stage.get("tokens") or {}).get(unit) or 0 for stage in stages) for unit in _UNITS]
    dashes = (Cell(""), Cell(""), Cell(""))
    rows.append(
        Row((word("together"), Cell(spell_seconds(total)), *(Cell(whole(n)) for n in sums), *dashes), strong=True)
    )
    columns = ("stage", "time", *_UNITS.values(), "rows in", "rows out", "left out")
    caption = (
        "Time at work, over all resumes of a stage; bars show each stage's share. An answer counts as scored once for "
        f"each model that scores it; {COUNTED}."
    )
    return Table(caption, columns, tuple(rows))


def costs_table(summary: Mapping[str, Any]) -> Table | None:
    """What each system cost, where the summary says."""
    columns = ("seconds", "sampled_tokens", "scored_responses", "trained_tokens")
    entries = {name: entry for name, entry in summary["systems"].items() if any(entry.get(key) for key in columns)}
    if not entries:
        return None
    rows = tuple(
        Row(
            (
                word(name),
                Cell(spell_seconds(entry["seconds"]) if entry.get("seconds") else MISSING),
                *(Cell(whole(entry.get(key))) for key in columns[1:]),
            )
        )
        for name, entry in entries.items()
    )
    heads = ("system", "time", *_UNITS.values())
    caption = (
        "What each system took to make, its evaluation left out. Systems share stages, so the rows do not add up. "
        f"{COUNTED[0].upper()}{COUNTED[1:]}."
    )
    return without_empty_columns(Table(caption, heads, rows))


def data_table(reports: Sequence[Mapping[str, Any]]) -> Table | None:
    """What was read and kept, and why the rest was not."""
    if not reports:
        return None
    rows = []
    for report in reports:
        read, kept = report.get("read", report.get("in", 0)), report.get("kept", report.get("out", 0))
        notes = _reasons(report.get("notes") or {})
        rows.append(
            Row(
                (
                    word(str(report.get("source", MISSING))),
                    word(PurePath(str(report.get("file", MISSING))).name),
                    Cell(f"{read:,}"),
                    Cell(f"{kept:,}", bar=kept / read if read else 0.0),
                    Cell(
                        _reasons(report.get("filtered") or {}) or MISSING,
                        f"kept, but: {notes}" if notes else "",
                        tone="word",
                    ),
                )
            )
        )
    caption = "Every row that was read is counted: kept, or filtered for the reason given. Bars show the share kept."
    return Table(caption, ("source", "file", "read", "kept", "filtered, and why"), tuple(rows))


def _reasons(filtered: Mapping[str, int]) -> str:
    ordered = sorted(filtered.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{n:,} {reason}" for reason, n in ordered if n)
