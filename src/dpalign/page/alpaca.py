"""Fig. 5: mean length against win rate, a curve for each steered system; and its table. It computes nothing."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from dpalign.measure.alpaca import AlpacaSummary, PointFigures
from dpalign.page.drawing import arms, house_style, legend, new_canvas, png, svg, values
from dpalign.page.words import MISSING, degrees, said
from dpalign.runs.ledger import write_json, write_text

_LOOKS: Final = (
    ("#08306b", "o"),
    ("#c75000", "D"),
    ("#00795f", "v"),
    ("#9c3f83", "^"),
    ("#8a6d00", "p"),
    ("#3f444d", "s"),
)
"""Colour and marker of each system in turn, safe for the colour-blind (after Okabe and Ito)."""
_PAPER: Final = {"DPA": "o", "SteerLM": "^", "SFT": "s", "DPO": "D"}


def write_figure(folder: Path, summary: AlpacaSummary) -> None:
    """Write alpaca.json, table.md, fig5.svg and fig5.png."""
    write_json(folder / "alpaca.json", asdict(summary))
    write_text(folder / "table.md", table(summary))
    drawing = fig_5(summary)
    write_text(folder / "fig5.svg", svg(drawing, "fig5"))
    (folder / "fig5.png").write_bytes(png(drawing))


@house_style("fig5")
def fig_5(summary: AlpacaSummary) -> Canvas:
    """Our points with their intervals; the paper's behind them, hollow and grey, where the summary has them."""
    drawing = new_canvas(5.0)
    axes = drawing.subplots()
    for i, (system, points) in enumerate(groupby(summary.points, key=lambda point: point.system)):
        _curve(axes, system, list(points), *_LOOKS[i % len(_LOOKS)])
    for system, points in (summary.paper or {}).items():
        look: dict[str, Any] = {"color": "#636973", "marker": _PAPER[system], "markerfacecolor": "white"}
        axes.plot(*zip(*points, strict=True), **look, linestyle="--", linewidth=0.9, label=f"paper: {system}", zorder=2)
    axes.set_xlabel("mean length, characters")
    axes.set_ylabel(f"win rate against {summary.reference['generator']}, %")
    axes.margins(0.07)
    legend(drawing, axes, 4)
    return drawing


def _curve(axes: Axes, system: str, points: Sequence[PointFigures], colour: str, marker: str) -> None:
    lengths, rates = [point.length for point in points], [point.win_rate for point in points]
    x, y = values(lengths), values(rates)
    axes.errorbar(
        x, y, xerr=arms(lengths), yerr=arms(rates), fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.55, zorder=3
    )
    axes.plot(x, y, color=colour, marker=marker, markersize=5.5, linewidth=1.7, label=system, zorder=4)
    for i in (0, -1) if len(points) > 1 else ():
        axes.annotate(
            _at(points[i]), (x[i], y[i]), xytext=(7, 5), textcoords="offset points", fontsize=8.5, color=colour
        )


def table(summary: AlpacaSummary) -> str:
    """All points, then the paired differences between the ends of the curves, as Markdown."""
    controlled = any(point.length_controlled for point in summary.points)
    head = ["system", "at", "length, characters", "win rate, %", "judged", "failed"]
    rows = [head + ["length-controlled win rate, %"] * controlled]
    for point in summary.points:
        cells = [point.system, _at(point), said(point.length, 0), said(point.win_rate), f"{point.judged:,}"]
        rows.append([*cells, f"{len(point.failed):,}"] + [said(point.length_controlled)] * controlled)
    reference, level = summary.reference, 100 * summary.intervals["level"]
    notes = [
        f"{reference['instructions']:,} instructions. Judge: {summary.judge['name']}. Reference: "
        f"{reference['generator']}, {reference['length']:,.0f} characters. Intervals: {level:.0f}%, by bootstrap over "
        "instructions."
    ]
    if not controlled:
        notes.append("Length-controlled win rates need the benchmark's df_gamed.csv (--difficulty).")
    lines = [*_markdown(rows), "", *notes]
    if summary.differences:
        rows = [["paired difference", "win rate, points", "length, characters", "instructions"]]
        for one in summary.differences:
            name = f"{one.a} less {one.b}"
            rows.append([name, said(one.win_rate, sign=True), said(one.length, 0, sign=True), f"{one.instructions:,}"])
        lines += ["", *_markdown(rows), "", "Differences are not corrected for multiple comparisons."]
    return "\n".join(lines) + "\n"


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (rows[0], ["---"] * len(rows[0]), *rows[1:])]


def _at(point: PointFigures) -> str:
    return degrees(point.angle) if point.angle is not None else point.label or MISSING
