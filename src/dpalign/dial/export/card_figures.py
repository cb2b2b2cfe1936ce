"""What the card of an export shows of its run's report: figures with their intervals, and the picture."""

from collections.abc import Mapping, Sequence
from typing import Any

from dpalign.dial.export.source import Source, entry_of
from dpalign.measure.beyond import trained_on
from dpalign.page.accounts import data_table
from dpalign.page.drawing import by_prompt, png
from dpalign.page.figures import front
from dpalign.page.headline import headline
from dpalign.page.systems import System, last_iteration, systems_of
from dpalign.page.tables import Table
from dpalign.page.words import Figure, degrees, number, turns


def front_png(source: Source) -> bytes | None:
    """The run's front up to the exported policy, as an image; None where none was measured."""
    if entry_of(source) is None or len(source.contract.names) < 2:
        return None
    summary = _until(source)
    return png(front(summary, systems_of(summary)).wide)


def _until(source: Source) -> dict[str, Any]:
    """The run's summary without the iterations after the exported one."""
    assert source.summary is not None
    t = source.contract.iteration or 0
    later = {s.name for s in systems_of(source.summary) if s.role == "iteration" and (s.entry["iteration"] or 0) > t}
    systems = {name: entry for name, entry in source.summary["systems"].items() if name not in later}
    return {**source.summary, "systems": systems}


def measured(source: Source) -> dict[str, Any]:
    """What the run's report says of this policy."""
    nothing = dict.fromkeys(("points", "beyond", "says", "quality", "caption", "caption_short", "points_note"))
    entry = entry_of(source)
    if entry is None or source.summary is None:
        return nothing | {"whose": "a reward model's opinion", "seed_note": "Nothing was measured for this card."}
    summary, names = _until(source), source.contract.names
    systems = systems_of(summary)
    truth = summary["measure"] == "true"
    (own,) = (system for system in systems if system.entry is entry)
    last = last_iteration(systems_of(source.summary))
    plot = front(summary, systems)  # drawn again for its caption
    return {
        "points": _points(own, names, truth),
        "points_note": _points_note(summary, own, names),
        "caption_short": f"{names[0]} against {names[1]}, a curve an iteration",
        "caption": f"{own.name} is this model. {'Rewards are the true ones. ' if truth else ''}{plot.caption}",
        "beyond": _beyond(source.summary, own.name, names),
        "says": headline(source.summary, systems_of(source.summary)).sentence
        if last is not None and last.name == own.name
        else None,
        "quality": _quality(source),
        "whose": "a reward model's opinion" + (", and where marked true computed by the world's rule" if truth else ""),
        "seed_note": "The intervals are of one training run: another seed's may differ by more.",
    }


def _points(own: System, names: Sequence[str], truth: bool) -> str:
    """The policy's rewards at each evaluation direction."""
    columns = ["angle" if len(names) == 2 else "direction", *(f"{name}, by the reward model" for name in names)]
    columns += [f"{name}, true" for name in names] if truth else []
    rows = []
    judged, true = ([own.rewards(name, opinion) for name in names] for opinion in (True, False))
    for i, point in enumerate(own.entry["points"]):
        asked = point["direction"]
        weights = ", ".join(f"{name} {number(asked[name], 2)}" for name in names)
        first = degrees(point["angle"]) if len(names) == 2 else weights
        found = [*(column[i] for column in judged), *((column[i] for column in true) if truth else ())]
        rows.append([first, *map(str, found)])
    return _markdown(columns, rows)


def _points_note(summary: Mapping[str, Any], own: System, names: Sequence[str]) -> str:
    note = f"Mean rewards, 0-100, with {by_prompt(summary)}."
    tau = Figure(own.entry.get("kendall_tau"))
    if len(names) == 2 and tau.value is not None:
        way = turns(summary)
        span, true = own.entry.get("span"), "true " if summary["measure"] == "true" else ""
        note += (
            f" From one end of the dial to the other {true}{names[1]} {way} by {number(span)} points; its Kendall's "
            f"tau with the dial within a prompt is {number(tau.value, 2)} on average."
        )
    return note


def _beyond(summary: Mapping[str, Any], name: str, names: Sequence[str]) -> str | None:
    """What the policy did at directions outside the trained range, where the run asked it."""
    found = (summary.get("feasibility") or {}).get(name)
    outside = [one for one in (found or {}).get("conditions", ()) if not trained_on(one["group"])]
    if (
        found is None
        or not outside
        or found["asked_for"] != "directions"
        or any(one["angle"] is None for one in outside)
    ):
        return None
    whose = ", true" if found["measure"] == "true" else ""
    columns = ["angle", *(f"{objective}{whose}" for objective in names), "degenerate, %"]
    rows = [
        [
            degrees(one["angle"]),
            *(str(Figure.read(one["rewards"][objective])) for objective in names),
            number(100 * one["degenerate"]["share"]["value"], 0),
        ]
        for one in outside
    ]
    return _markdown(columns, rows)


def _quality(source: Source) -> str | None:
    heads = (source.summary or {}).get("reward_model") or {}
    read = [head for listed in source.contract.objectives.values() for head in listed if head in heads]
    if not read:
        return None
    keys = ("pearson", "spearman", "length_correlation")
    rows = [[f"`{head}`", *(number(heads[head][key], 2) for key in keys)] for head in dict.fromkeys(read)]
    return _markdown(["head", "Pearson", "Spearman", "with length"], rows)


def data_read(source: Source) -> dict[str, Any]:
    table = data_table(source.reports)
    if table is None:
        return {"data": None, "data_note": None}
    return {"data": _of_table(table), "data_note": table.caption.partition(" Bars show")[0]}


def _of_table(table: Table) -> str:
    rows = [[c.text + (f" ({c.note})" if c.note else "") for c in row.cells] for row in table.rows]
    return _markdown(table.columns, rows)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"

    return "\n".join([line(columns), "|" + "---|" * len(columns), *map(line, rows)])
