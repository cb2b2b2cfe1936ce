"""What the card of an export shows of its run's report: figures with their intervals, and the picture."""

from collections.abc import Sequence
from typing import Any

from dpalign.dial.export.source import Source, entry_of
from dpalign.measure.beyond import trained_on
from dpalign.measure.summary import DataReport, Measured, Summary
from dpalign.page.drawing import png
from dpalign.page.figures import front
from dpalign.page.headline import headline
from dpalign.page.tables import Table, data_table
from dpalign.page.words import by_prompt, degrees, number, said, turns


def front_png(source: Source) -> bytes | None:
    """The run's front up to the exported policy, as an image; None unless it was measured for two objectives."""
    if entry_of(source) is None or len(source.contract.names) != 2:
        return None
    return png(front(_until(source)).canvas)


def _until(source: Source) -> Summary:
    """The run's summary without the iterations after the exported one."""
    assert source.summary is not None
    t = source.contract.iteration or 0
    systems = {name: one for name, one in source.summary.systems.items() if (one.system.iteration or 0) <= t}
    return source.summary.model_copy(update={"systems": systems})


def measured(source: Source) -> dict[str, Any]:
    """What the run's report says of this policy."""
    nothing = dict.fromkeys(("points", "beyond", "says", "quality", "caption", "caption_short", "points_note"))
    own = entry_of(source)
    if own is None or source.summary is None:
        return nothing | {"whose": "a reward model's opinion", "seed_note": "Nothing was measured for this card."}
    summary, names = _until(source), source.contract.names
    truth = summary.measure == "true"
    shown: dict[str, str | None] = {"caption_short": None, "caption": None}
    if len(names) == 2:
        caption = front(summary).caption
        shown = {
            "caption_short": f"{names[0]} against {names[1]}, a curve an iteration",
            "caption": f"{own.name} is this model. {'Rewards are the true ones. ' if truth else ''}{caption}",
        }
    return shown | {
        "points": _points(own, names, truth),
        "points_note": _points_note(summary, own, names),
        "beyond": _beyond(source.summary, own.name, names),
        "says": " ".join(headline(source.summary)) if source.summary.last == own else None,
        "quality": _quality(source),
        "whose": "a reward model's opinion" + (", and where marked true computed by the world's rule" if truth else ""),
        "seed_note": "The intervals are of one training run: another seed's may differ by more.",
    }


def _points(own: Measured, names: Sequence[str], truth: bool) -> str:
    """The policy's rewards at each evaluation direction."""
    columns = ["angle" if len(names) == 2 else "direction", *(f"{name}, by the reward model" for name in names)]
    columns += [f"{name}, true" for name in names] if truth else []
    rows = []
    for point in own.points:
        asked = point.direction or {}
        first = ", ".join(f"{name} {number(asked[name], 2)}" for name in names)
        estimates = [point.by(name, judged=True) for name in names] + [point.by(name) for name in names if truth]
        rows.append([first if point.angle is None else degrees(point.angle), *map(said, estimates)])
    return _markdown(columns, rows)


def _points_note(summary: Summary, own: Measured, names: Sequence[str]) -> str:
    note = f"Mean rewards, 0-100, with {by_prompt(summary)}."
    tau, span = own.figures.kendall_tau, own.figures.span
    if tau is not None and span is not None:
        true = "true " if summary.measure == "true" else ""
        note += (
            f" From one end of the dial to the other {true}{names[1]} {turns(summary)} by {number(span.value)} points; "
            f"its Kendall's tau with the dial within a prompt is {number(tau.value, 2)} on average."
        )
    return note


def _beyond(summary: Summary, name: str, names: Sequence[str]) -> str | None:
    """What the policy did at directions outside the trained range, where the run asked it."""
    found = summary.comparison.feasibility.get(name) if summary.comparison else None
    outside = [one for one in found.conditions if not trained_on(one.group)] if found else []
    if found is None or not outside or found.asked_for != "directions":
        return None
    whose = ", true" if found.measure == "true" else ""
    columns = ["angle", *(f"{objective}{whose}" for objective in names), "degenerate, %"]
    rows = [
        [
            degrees(one.angle or 0.0),
            *(said(one.rewards[objective]) for objective in names),
            number(100 * one.degenerate.share.value, 0),
        ]
        for one in outside
    ]
    return _markdown(columns, rows)


def _quality(source: Source) -> str | None:
    heads = source.summary.reward_model.heads if source.summary else {}
    read = [head for listed in source.contract.objectives.values() for head in listed if head in heads]
    if not read:
        return None
    rows = []
    for name in dict.fromkeys(read):
        head = heads[name]
        figures = (head.pearson, head.spearman, head.length_correlation)
        rows.append([f"`{name}`", *(number(one.value if one else None, 2) for one in figures)])
    return _markdown(["head", "Pearson", "Spearman", "with length"], rows)


def data_read(source: Source) -> dict[str, Any]:
    """What was read of each data file."""
    table = data_table([DataReport.of(one) for one in source.reports])
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
