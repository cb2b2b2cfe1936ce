"""How far a dial reaches, and what answers it gets beyond its trained range."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from dpalign.measure.beyond import reachable
from dpalign.measure.paper_curves import FIG_4
from dpalign.page.drawing import Plot, arms, by_prompt, drawn_twice, values
from dpalign.page.systems import FRONT_LINE, INKS, System
from dpalign.page.words import DEGREE, MINUS, Figure, number, turns

Summary = Mapping[str, Any]
_INK, _MUTED, _GRID, _SURFACE = (INKS[name][0] for name in ("ink", "muted", "grid", "surface"))


def control_range(summary: Summary, systems: Sequence[System]) -> Plot:
    """The range of the second objective, from one end of the dial or of the targets to the other."""
    objective, falls = summary["objectives"][1], turns(summary) == "falls"
    shown = [s for s in systems if len(s.entry["points"]) > 1 and s.role in ("baseline", "soup", "iteration")]
    shown = [system for system in shown if not system.copied]
    rows = [(s.label, _ends(s.rewards(objective), s.steered, falls), s.look.light, s.look.marker) for s in shown]
    beside = objective == "verbosity"
    paper = [
        (name, _ends([Figure(x) for x, _ in points], False, falls), _MUTED, "o")
        for name, points in FIG_4.items()
        if len(points) > 1
    ]

    def draw(width: float, narrow: bool) -> Canvas:
        panels = [("this run", rows), *([("the paper, Fig. 4", paper)] if beside else [])]
        counts = [len(found) for _, found in panels]
        height = 0.3 * (sum(counts) if narrow else max(counts)) + (1.1 * len(panels) if narrow else 1.1)
        canvas = Canvas(figsize=(width, height), layout="constrained")
        shape = (len(panels), 1) if narrow else (1, len(panels))
        ratios = {"height_ratios": counts} if narrow else {}
        grid = canvas.subplots(*shape, squeeze=False, gridspec_kw=ratios).ravel()
        for axes, (title, found) in zip(grid, panels, strict=True):
            _ranges(axes, found, objective)
            axes.set_title(title)
        return canvas

    wide, narrow = drawn_twice(draw)
    caption = (
        f"Mean {objective} at both ends: filled where most is asked of it or given, of a dial at its first direction; "
        "hollow at the other end. The figure beside each is the range in reward points. A front can rise while its "
        f"range narrows. Bars are {by_prompt(summary)}."
    )
    if beside:
        caption += (
            " On the right the paper's own fronts, read off its Fig. 4 (another reward model's scale): from t=1 to t=4 "
            "they rise, and the range shrinks from 18.4 to 16.0."
        )
    return Plot("range", "How far the dial reaches", caption, wide, narrow)


def _ends(found: Sequence[Figure], steered: bool, falls: bool) -> tuple[Figure, Figure]:
    """The first and the last direction; of targets, which have no order of their own, the ends of what was given."""
    if steered:
        return found[0], found[-1]
    low, high = (pick(found, key=lambda one: one.value or 0.0) for pick in (min, max))
    return (high, low) if falls else (low, high)


def _ranges(axes: Axes, rows: Sequence[tuple[str, tuple[Figure, Figure], str, str]], objective: str) -> None:
    places = np.arange(len(rows))[::-1]
    for place, (_, (first, last), colour, marker) in zip(places, rows, strict=True):
        ends = values([first, last])
        axes.plot(ends, [place, place], color=colour, linewidth=2.2, alpha=0.55, zorder=1)
        for end, face in ((first, colour), (last, _SURFACE)):
            axes.errorbar(
                values([end]), [place], xerr=arms([end]), fmt=marker, color=colour, markersize=5, elinewidth=1.1,
                markerfacecolor=face, markeredgecolor=colour, markeredgewidth=1.1,
            )  # fmt: skip
        right = max(one.high if one.high is not None else one.value or 0.0 for one in (first, last))
        axes.annotate(
            number(abs(float(ends[0] - ends[1]))), (right, place), xytext=(7, 0), textcoords="offset points",
            va="center", fontsize=7.5, color=_MUTED,
        )  # fmt: skip
    axes.set_yticks(places, [name for name, *_ in rows])
    axes.tick_params(axis="y", labelcolor=_INK)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"{objective}, reward points")
    axes.margins(x=0.14)
    axes.set_ylim(-0.6, len(rows) - 0.4)


def feasibility(summary: Summary, systems: Sequence[System]) -> Plot:
    helpful, verbose = summary["objectives"]
    looks = {system.name: system.look for system in systems}
    found = summary["feasibility"]
    panels = [(name, one) for name, one in found.items() if name in looks]

    def draw(width: float, narrow: bool) -> Canvas:
        shape = (len(panels), 1) if narrow else (1, len(panels))
        canvas = Canvas(figsize=(width, 3.6 * len(panels) if narrow else 4.0), layout="constrained")
        grid = canvas.subplots(*shape, squeeze=False).ravel()
        for axes, (name, one) in zip(grid, panels, strict=True):
            if one["asked_for"] == "directions":
                _beyond_angles(axes, one, verbose, looks[name].light)
            else:
                _beyond_targets(axes, one, helpful, verbose, looks[name].light)
            axes.set_title(name)
        return canvas

    wide, narrow = drawn_twice(draw)
    told = {one["asked_for"] for _, one in panels}
    margin = any(
        _range(one, "trained") != _range(one, "asked") for _, one in panels if one["asked_for"] == "directions"
    )
    parts = []
    if "directions" in told:
        parts.append(
            f"Of a policy: mean {verbose} at each angle, within the arc that users ask for (shaded), "
            + ("in the margin that training had around it (shaded lighter), " if margin else "")
            + "and beyond what it was trained on"
            + (
                "; dashed, the best answers' own"
                if any("optimum" in c for _, o in panels for c in o["conditions"])
                else ""
            )
        )
    if "targets" in told:
        parts.append(
            "Of a model that is told rewards: what was asked (hollow) joined to the mean of what it gave (filled), the "
            "fuller its colour, the further beyond all annotated answers"
        )
    caption = ". ".join(parts) + f". Bars are {by_prompt(summary)}." if parts else ""
    return Plot("feasibility", "Within what was trained on, and beyond", caption, wide, narrow)


def _range(found: Mapping[str, Any], of: str) -> tuple[float, float]:
    """The ends in degrees of the arc that users ask for (asked), or of what was trained on (trained)."""
    if "ranges" in found:
        low, high = found["ranges"][of]
        return low, high
    inside = [row["angle"] for row in found["conditions"] if reachable(row["group"])]
    return min(inside), max(inside)


def _beyond_angles(axes: Axes, found: Mapping[str, Any], verbose: str, colour: str) -> None:
    rows = found["conditions"]
    angle = [row["angle"] for row in rows]
    got = [Figure.read(row["rewards"][verbose]) for row in rows]
    (low, high), (lowest, highest) = _range(found, "asked"), _range(found, "trained")
    axes.axvspan(low, high, color=_GRID, alpha=0.55, linewidth=0, zorder=0)
    for ends in ((lowest, low), (high, highest)):
        axes.axvspan(*ends, color=_GRID, alpha=0.25, linewidth=0, zorder=0)
    axes.errorbar(
        angle, values(got), yerr=arms(got), color=colour, marker="o", markersize=4.5, linewidth=1.5, elinewidth=0.9
    )
    if all("optimum" in row for row in rows):
        axes.plot(angle, [row["optimum"][verbose] for row in rows], **FRONT_LINE)
    axes.set_xlim(max(angle) + 4, min(angle) - 4)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}".replace("-", MINUS))
    axes.set(xlabel=f"angle, {DEGREE}", ylabel=f"{verbose}, reward points")


def _beyond_targets(axes: Axes, found: Mapping[str, Any], helpful: str, verbose: str, colour: str) -> None:
    for row in found["conditions"]:
        x, y = (Figure.read(row["rewards"][name]) for name in (verbose, helpful))
        asked = (row["asked"][verbose], row["asked"][helpful])
        strength = 0.45 + 0.55 * row["share"]
        axes.plot([asked[0], x.value], [asked[1], y.value], color=colour, linewidth=0.8, alpha=strength)
        axes.errorbar(
            values([x]),
            values([y]),
            xerr=arms([x]),
            yerr=arms([y]),
            fmt="^",
            color=colour,
            markersize=5,
            elinewidth=0.8,
            alpha=strength,
        )
        axes.plot(
            *asked,
            marker="^",
            markersize=6,
            markerfacecolor=_SURFACE,
            markeredgecolor=colour,
            linestyle="",
            alpha=strength,
        )
    handles = [
        Line2D([], [], marker="^", linestyle="", color=colour, label="given"),
        Line2D([], [], marker="^", linestyle="", markerfacecolor=_SURFACE, markeredgecolor=colour, label="asked"),
    ]
    axes.legend(handles=handles, loc="lower right")
    axes.set(xlabel=f"{verbose}, reward points", ylabel=f"{helpful}, reward points")
    axes.margins(0.08)
