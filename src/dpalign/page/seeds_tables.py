"""Tables over seeds of the whole pipeline: what another training run would have given."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from dpalign.page.systems import System
from dpalign.page.tables import Cell, Row, Table, called, without_empty_columns, word
from dpalign.page.words import MISSING, Figure, between, degrees, number, seed_count, turns

Summary = Mapping[str, Any]


def seeds_tables(summary: Summary, systems: Sequence[System]) -> list[Table]:
    """Figures, differences and dominance over seeds of the whole pipeline."""
    seeds = summary.get("seeds") or {}
    if not seeds.get("systems"):
        return []
    shown = {system.name: system for system in systems}
    runs = seed_count(summary)
    figures = {"objective": ("E_v J(v)", 1, 1), "true_front_share": ("share of the true front, %", 100, 1),
               "hypervolume": ("hypervolume", 1, 0), "kendall_tau": ("Kendall tau", 1, 2), "span": ("span", 1, 1),
               "span_share": ("share of the true span, %", 100, 0), "regret": ("regret", 1, 2)}  # fmt: skip
    rows = tuple(
        Row(
            (
                called(name, shown),
                *(_over_seeds(found.get(key), scale, digits) for key, (_, scale, digits) in figures.items()),
            )
        )
        for name, found in seeds["systems"].items()
    )
    caption = (
        f"Means over {runs} runs of the whole pipeline (seeds {', '.join(map(str, seeds['seeds']))}), with "
        "t-intervals: what another training run would have given."
    )
    columns = ("system", *(label for label, _, _ in figures.values()))
    tables = [without_empty_columns(Table(caption, columns, rows)), *_steps(summary, shown)]
    leads = {(row["a"], row["b"]): row["objective"] for row in seeds.get("differences") or []}
    margins = {(row["a"], row["b"]): row for row in seeds.get("dominance") or []}
    pairs = [*margins, *(pair for pair in leads if pair not in margins)]
    if pairs:
        tables.append(
            without_empty_columns(
                Table(
                    "Pairs, compared within each seed. Each seed's own lead stands below the mean.",
                    ("A", "over B", "dominates in", "smallest lead", "lead in E_v J(v)"),
                    tuple(
                        Row(
                            (
                                called(a, shown),
                                called(b, shown),
                                Cell(f"{margins[a, b]['dominates_in']} of {runs}" if (a, b) in margins else MISSING),
                                _over_seeds(margins.get((a, b), {}).get("margin"), 1, 1, each=True),
                                _over_seeds(leads.get((a, b)), 1, 1, each=True),
                            )
                        )
                        for a, b in pairs
                    ),
                )
            )
        )
    return tables


def _steps(summary: Summary, shown: Mapping[str, System]) -> Iterator[Table]:
    """What each step of the dial does, for the systems that have one."""
    seeds = summary["seeds"]
    rows = tuple(
        Row((called(name, shown), *(_over_seeds(drop, 1, 1, each=True) for drop in found["drops"])))
        for name, found in seeds["systems"].items()
        if found.get("drops")
    )
    if rows:
        angles = next(shown[name] for name in seeds["systems"] if name in shown and shown[name].entry.get("drops"))
        turned = [degrees(point["angle"]) for point in angles.entry["points"]]
        falls = turns(summary)
        caption = (
            f"By how much {summary['objectives'][1]} {falls} at each step of the dial: means and t-intervals over "
            "seeds, each seed's own step in brackets."
        )
        yield Table(caption, ("system", *(f"{a} to {b}" for a, b in pairwise(turned))), rows)


def seeds_of_comparison(summary: Summary, systems: Sequence[System]) -> list[Table]:
    """What a comparison over seeds adds: ratios of hypervolume, specialists, degenerate answers, chosen settings."""
    seeds, runs = summary.get("seeds") or {}, seed_count(summary)
    shown = {system.name: system for system in systems}
    figures = [
        (f"hypervolume, {row['a']}'s over that of", called(row["b"], shown), row["ratio"], 1, 2)
        for row in seeds.get("hypervolume_ratios") or []
    ]
    figures += [
        ("reward points lost to the specialists of", word(family), mean, 1, 1)
        for family, mean in (seeds.get("specialists") or {}).items()
    ]
    figures += [
        (f"degenerate answers, %, asked for: {group}", called(system, shown), share, 100, 1)
        for system, groups in (seeds.get("degenerate") or {}).items()
        for group, share in groups.items()
    ]
    if (seeds.get("trust") or {}).get("warned_in") is not None:
        figures += [
            (f"change of E_v J(v) from the first to the last iteration, {name}", word(""), seeds["trust"][key], 1, 1)
            for key, name in (("proxy", "by the reward model"), ("check", "by its check"))
        ]
    tables = []
    if figures:
        rows = tuple(
            Row((word(what), of, _over_seeds(found, scale, digits, each=True)))
            for what, of, found, scale, digits in figures
        )
        caption = f"Over {runs} seeds, with t-intervals; each seed's own figure in brackets."
        tables.append(Table(caption, ("figure", "of", "mean"), rows))
    if seeds.get("settings"):
        columns = ("system", *(f"seed {seed}" for seed in seeds["seeds"]))
        rows = tuple(
            Row((called(system, shown), *(word(setting) for setting in chosen)))
            for system, chosen in seeds["settings"].items()
        )
        tables.append(Table("The setting that each seed's tuning chose.", columns, rows))
    return tables


def _over_seeds(found: Mapping[str, Any] | None, scale: float, digits: int, each: bool = False) -> Cell:
    if found is None:
        return Cell(MISSING)
    value, low, high = (None if x is None else scale * x for x in Figure.read(found))
    note = between(low, high, digits)
    if each:
        values = ", ".join(number(scale * x, digits) for x in found.get("values", ()))
        note = f"{note} [{values}]" if note else values
    return Cell(number(value, digits), note)
