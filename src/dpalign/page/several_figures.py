"""Figures for three objectives or more: every pair of objectives, and a policy's directions across all of them."""

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
from matplotlib.axes import Axes

from dpalign.measure.front import front_knots
from dpalign.measure.summary import Measured, Summary, Weights
from dpalign.page.drawing import Plot, house_style, legend, new_canvas, panels, values
from dpalign.page.figures import points_of
from dpalign.page.looks import FRONT_LINE, INKS, headliners, in_order, looks_of
from dpalign.page.words import by_prompt

_MUTED = INKS["muted"][0]


def several_plots(summary: Summary) -> Iterator[Plot]:
    """All figures of three objectives or more that this summary has the data for."""
    if len(summary.objectives) < 3:
        return
    yield pairs(summary)
    if summary.last is not None and summary.last.steered:
        yield across(summary, summary.last)


@house_style()
def pairs(summary: Summary) -> Plot:
    """Every system's points in each pair of objectives."""
    found = list(combinations(summary.objectives, 2))
    columns = min(len(found), 3)
    lines = -(-len(found) // columns)
    canvas = new_canvas(2.75 * lines + 1.1)
    grid = canvas.subplots(lines, columns, squeeze=False).ravel()
    for axes, (up, right) in zip(grid, found, strict=False):
        _pair(axes, summary, right, up)
    for axes in grid[len(found) :]:
        axes.set_visible(False)
    legend(canvas, grid[0], 5)
    better = ", ".join(
        f"{'more' if sense > 0 else 'less'} {name}"
        for name, sense in zip(summary.objectives, summary.senses, strict=True)
        if sense
    )
    caption = (
        "Each point is the mean reward of one condition, in two of the objectives at a time. A line joins those "
        "points of a system that none of its others beats in these two. A point behind the line still counts: it may "
        f"be the best for its direction. {f'Better is {better}. ' if better else ''}Crosses are {by_prompt(summary)}."
    )
    return Plot("pairs", "The trade-offs, two objectives at a time", caption, canvas)


def _pair(axes: Axes, summary: Summary, right: str, up: str) -> None:
    """Draw one panel: the systems of the page, the true front and the reference, in two objectives."""
    looks, named = looks_of(summary), set[str]()
    shown = [one for one in in_order(summary) if not one.is_copy] if summary.comparison else headliners(summary)
    for one in (s for s in shown if s.system.role not in ("control", "ablation")):
        look = looks[one.name]
        points_of(axes, one, look, right, up, named=one.system.group not in named, joined=False)
        named.add(one.system.group)
        if one.steered:
            own = [{name: point.by(name).value for name in (right, up)} for point in one.points]
            axes.plot(*_joined(own, summary, right, up), color=look.light, linewidth=1.1, alpha=0.7, zorder=2)
    if summary.true_front:
        axes.plot(
            *_joined(summary.true_front, summary, right, up), **FRONT_LINE, marker=".", label="true front", zorder=1
        )
    if summary.reference:
        axes.plot(
            summary.reference[right], summary.reference[up], linestyle="", marker="+", markersize=8, color=_MUTED,
            label="hypervolume's reference",
        )  # fmt: skip
    axes.set(xlabel=right, ylabel=up)
    axes.margins(0.07)


def _joined(points: Sequence[Weights], summary: Summary, right: str, up: str) -> tuple[list[float], list[float]]:
    """The points that no other beats in two objectives, in order; empty if the directions dispute one of these."""
    sense = dict(zip(summary.objectives, summary.senses, strict=True))
    sense_2 = np.array([sense[up], sense[right]])
    if not sense_2.all():
        return [], []
    knot_N2 = front_knots(np.array([[point[up], point[right]] for point in points]), sense_2) * sense_2
    return knot_N2[:, 1].tolist(), knot_N2[:, 0].tolist()


@house_style()
def across(summary: Summary, last: Measured) -> Plot:
    """Parallel coordinates: one line for each direction. Each objective's panel highlights those that weigh it most."""
    names, colour = summary.objectives, looks_of(summary)[last.name].light
    few = max(1, len(last.points) // 4)
    titles = [f"{'against' if s < 0 else 'for'} {name}" for name, s in zip(names, summary.senses, strict=True)]
    canvas, grid = panels(titles, 2.3, 0.5, "", "reward points", sharey=True)
    reward_VK = np.stack([values(last.rewards(name)) for name in names], axis=1)
    places = np.arange(len(names))
    for axes, name, sense in zip(grid, names, summary.senses, strict=True):
        asked_V = np.array([(sense or 1.0) * (point.direction or {})[name] for point in last.points])
        most = np.argsort(-asked_V, kind="stable")[:few]
        for v in np.argsort(asked_V, kind="stable"):
            bright = v in most
            axes.plot(
                places, reward_VK[v], color=colour if bright else _MUTED, linewidth=1.6 if bright else 0.8,
                alpha=0.9 if bright else 0.35, marker="o" if bright else "", markersize=3.6, zorder=3 if bright else 2,
            )  # fmt: skip
        if summary.true_front and len(summary.true_front) == len(last.points):
            best_VK = np.array([[point[other] for other in names] for point in summary.true_front])
            axes.plot(places, best_VK[most].mean(axis=0), **FRONT_LINE, zorder=4)
        axes.set_xticks(places, names)
        axes.grid(visible=True, axis="x")
        axes.tick_params(axis="x", labelsize=8)
        axes.set_xlim(-0.45, len(names) - 0.55)
    caption = (
        f"Each line is {last.name} asked for one direction: its mean reward in every objective. A panel highlights the "
        f"{few} of {len(last.points)} directions that weigh its objective most, for it or against it. Their lines "
        "should stand out there."
    )
    if summary.true_front:
        caption += " Dashed: the mean of the best answers at these directions."
    return Plot("across", f"The directions of {last.name} across all objectives", caption, canvas)
