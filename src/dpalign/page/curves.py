"""Figures over the directions: control against the dial, E_v J(v), and the lead at each direction."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from dpalign.page.drawing import Plot, arms, by_prompt, drawn_twice, legend, values
from dpalign.page.systems import FRONT_LINE, INKS, System, headliners
from dpalign.page.words import DEGREE, MINUS, Figure, figure, turns

Summary = Mapping[str, Any]
_INK, _MUTED, _SURFACE = (INKS[name][0] for name in ("ink", "muted", "surface"))


def control(summary: Summary, systems: Sequence[System]) -> Plot:
    """Every objective against the dial, the one that the dial turns first."""
    objectives = list(summary["objectives"])
    angled = len(objectives) == 2
    shown = objectives[::-1] if angled else objectives
    at = dial(summary)
    turned = [s for s in systems if s.role in ("soup", "baseline") and s.steered]
    shown_systems = [s for s in systems if s in turned or s in headliners(summary, systems)]

    def draw(width: float, narrow: bool) -> Canvas:
        shape = (len(shown), 1) if narrow else (1, len(shown))
        canvas = Canvas(figsize=(width, 3.1 * len(shown) + 0.7 if narrow else 4.1), layout="constrained")
        grid = canvas.subplots(*shape, squeeze=False)
        for axes, name in zip(grid.ravel(), shown, strict=True):
            _against_dial(axes, summary, shown_systems, name, at)
            axes.set_title(f"{name}, reward points")
            _set_dial(axes, at, angled)
            axes.set_xlabel(_dial_name(angled))
        legend(canvas, grid[0, 0], narrow, 6)
        return canvas

    wide, narrow = drawn_twice(draw)
    bands = f"Bands are {by_prompt(summary)}, each for itself."
    if angled:
        way = turns(summary)
        caption = (
            f"The dial turns from left to right. Look for {shown[0]} that {way} all the way, and for how much of the "
            "true front's range it uses, where that is drawn. Level lines obey no dial: so do models that were never "
            f"trained on directions and are given one all the same. {bands}"
        )
    else:
        caption = (
            "The evaluation directions stand in their order, which has no meaning of its own. Look for an objective "
            f"that is high where its weight is. {bands}"
        )
    return Plot("control", "Control: rewards against the dial", caption, wide, narrow)


def dial(summary: Summary) -> list[float]:
    """Where the directions stand on the dial: degrees for two objectives, else their place in the list."""
    directions = summary["directions"]
    if len(summary["objectives"]) != 2:
        return [float(i + 1) for i in range(len(directions))]
    first, second = summary["objectives"]
    angles = [math.atan2(v[second], v[first]) for v in directions]
    return [float(angle) for angle in np.degrees(np.unwrap(angles))]  # round a circle they go on past 180


def _dial_name(angled: bool) -> str:
    return f"angle, {DEGREE}" if angled else "direction"


def _set_dial(axes: Axes, at: Sequence[float], angled: bool) -> None:
    pad = 0.03 * (abs(at[-1] - at[0]) or 1.0)
    down = -1 if at[-1] < at[0] else 1  # the dial starts at the left, whichever way it turns
    axes.set_xlim(at[0] - down * pad, at[-1] + down * pad)
    axes.set_xticks(at if len(at) <= 4 or not angled else [at[round(i * (len(at) - 1) / 3)] for i in range(4)])
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}".replace("-", MINUS))


def _against_dial(axes: Axes, summary: Summary, systems: Sequence[System], name: str, at: Sequence[float]) -> None:
    if summary.get("true_front"):
        axes.plot(at, [point[name] for point in summary["true_front"]], **FRONT_LINE, label="true front")
    for system in systems:
        found, look = system.rewards(name), system.look
        if system.steered:
            _band(axes, at, found, look.light, 0.16)
            width = 1.7 if system.role == "iteration" else 1.1
            axes.plot(
                at, values(found), color=look.light, marker=look.marker, markersize=3.6, linewidth=width,
                label=system.name,
            )  # fmt: skip
        elif len(found) == 1:
            axes.axhline(values(found)[0], color=look.light, linestyle=":", linewidth=1.2, label=system.name)


def _band(axes: Axes, at: Sequence[float], found: Sequence[Figure], colour: str, alpha: float) -> None:
    below, above = arms(found)
    axes.fill_between(at, values(found) - below, values(found) + above, color=colour, alpha=alpha, linewidth=0)


def objective(summary: Summary, systems: Sequence[System]) -> Plot:
    """E_v J(v) of every system, one below the other."""
    found = [figure(system.entry, "objective") for system in systems]
    optimum = best_objective(summary)

    def draw(width: float, narrow: bool) -> Canvas:
        canvas = Canvas(figsize=(width, 0.33 * len(systems) + (1.05 if narrow else 0.9)), layout="constrained")
        axes = canvas.subplots()
        places = np.arange(len(systems))[::-1]
        iterations = [i for i, system in enumerate(systems) if system.role == "iteration"]
        axes.plot(values(found)[iterations], places[iterations], color=_MUTED, linewidth=0.8, zorder=1)
        for place, system, one in zip(places, systems, found, strict=True):
            axes.errorbar(
                values([one]), [place], xerr=arms([one]), fmt=system.look.marker, color=system.look.light,
                markersize=6, elinewidth=1.6, markeredgecolor=system.look.light if system.look.hollow else _SURFACE,
                markerfacecolor=_SURFACE if system.look.hollow else system.look.light, markeredgewidth=0.8,
            )  # fmt: skip
        if optimum is not None:
            axes.axvline(optimum, **FRONT_LINE)
            axes.annotate(
                "true front", (optimum, 1), xycoords=("data", "axes fraction"), xytext=(-5, -2),
                textcoords="offset points", ha="right", va="top", fontsize=8.5, color=FRONT_LINE["color"],
            )  # fmt: skip
        axes.set_yticks(places, [system.label for system in systems])
        axes.tick_params(axis="y", labelcolor=_INK)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("E$_v$ J(v), reward points")
        axes.margins(x=0.08)
        axes.set_ylim(-0.6, len(systems) - 0.4)
        return canvas

    wide, narrow = drawn_twice(draw)
    caption = (
        "The quantity that DPA maximises (Eq. 4): the reward v \N{DOT OPERATOR} r of an answer sampled at v, averaged "
        f"over the {len(summary['directions'])} evaluation directions. Look for points that move right with t. Systems "
        "that no direction steers are scored at every v with the same answers, and with the best of their reward "
        f"targets, which flatters them a little. Bars are {by_prompt(summary)}; compare two systems by the paired "
        "leads in the table of dominance, not by whether these bars overlap."
    )
    return Plot("objective", "The objective, by iteration", caption, wide, narrow)


def best_objective(summary: Summary) -> float | None:
    """E_v J(v) of the true front: at each direction the best of its mean points; None where it is not known."""
    front = summary.get("true_front")
    if not front:
        return None
    best = [max(sum(v[name] * point[name] for name in v) for point in front) for v in summary["directions"]]
    return sum(best) / len(best)


def leads(summary: Summary, systems: Sequence[System], last: System, rows: Sequence[Mapping[str, Any]]) -> Plot:
    """The last iteration against every other system, a small panel each; `rows` of the dominance table."""
    at, angled = dial(summary), len(summary["objectives"]) == 2
    shown = {system.name: system for system in systems}

    def draw(width: float, narrow: bool) -> Canvas:
        columns = min(len(rows), 2 if narrow else 4)
        lines = math.ceil(len(rows) / columns)
        canvas = Canvas(figsize=(width, (1.75 if narrow else 2.15) * lines + 0.35), layout="constrained")
        grid = canvas.subplots(lines, columns, sharey=True, squeeze=False)
        for axes, row in zip(grid.ravel(), rows, strict=False):
            found, colour = [Figure.read(one) for one in row["leads"]], shown[row["b"]].look.light
            axes.axhline(0, color=_INK, linewidth=0.9)
            _band(axes, at, found, colour, 0.22)
            axes.plot(at, values(found), color=colour, marker="o", markersize=3, linewidth=1.6)
            axes.set_title(f"over {shown[row['b']].label}")
            _set_dial(axes, at, angled)
        for axes in grid.ravel()[len(rows) :]:
            axes.set_visible(False)
        canvas.supxlabel(_dial_name(angled), color=_MUTED, fontsize=9)
        canvas.supylabel("lead, reward points", color=_MUTED, fontsize=9)
        return canvas

    wide, narrow = drawn_twice(draw)
    caption = (
        f"How far {last.name} leads each other system, for a user at each direction who picks the best of either's "
        "points. It dominates where the whole band lies above the line. Bands hold for all directions at once "
        f"({by_prompt(summary)}, resampled in pairs)."
    )
    return Plot("leads", f"The lead of {last.name}, direction by direction", caption, wide, narrow)


def trust(summary: Summary) -> Plot:
    found_trust = summary["trust"]
    lines = [("proxy", "the reward model, which selects", INKS["ink"][0], "o", "-")]
    name = "the truth" if found_trust["check"] == "truth" else "the judge, which never selects"
    lines.append(("check", name, INKS["front"][0], "s", "-"))
    if all("judge" in row for row in found_trust["curve"]):
        lines.append(("judge", "the judge, which never selects", _MUTED, "D", ":"))
    at = [row["iteration"] for row in found_trust["curve"]]

    def draw(width: float, narrow: bool) -> Canvas:
        canvas = Canvas(figsize=(width, 3.9 if narrow else 3.7), layout="constrained")
        axes = canvas.subplots()
        for key, label, colour, marker, style in lines:
            found = [Figure.read(row[key]) for row in found_trust["curve"]]
            axes.errorbar(
                at, values(found), yerr=arms(found), color=colour, marker=marker, linestyle=style, linewidth=1.5,
                markersize=5, elinewidth=0.9, label=label,
            )  # fmt: skip
        axes.set_xticks(at, [f"t={t}" for t in at])
        axes.set(ylabel="E$_v$ J(v), reward points")
        axes.margins(x=0.06, y=0.1)
        legend(canvas, axes, narrow, 1 if narrow else 3)
        return canvas

    wide, narrow = drawn_twice(draw)
    caption = (
        "What the reward model believes of each iteration, and what a check that had no part in selecting says. Look "
        "for lines that part: a proxy that rises while the check falls is over-optimised (Goodhart's law). The "
        f"distance of the lines is a matter of scale, their slopes are not. Bars are {by_prompt(summary)}; the test "
        "below pairs the iterations by prompt."
    )
    return Plot("trust", "Over-optimisation: proxy and check", caption, wide, narrow)
