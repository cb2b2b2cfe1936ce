"""The figures of a comparison: Fig. 4 with every system, how far the dial reaches, the cost, beyond the dial."""

from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from dpalign.measure.bootstrap import Estimate
from dpalign.measure.feasibility import Feasibility
from dpalign.measure.paper_curves import FIG_4
from dpalign.measure.summary import Comparison, Measured, Summary
from dpalign.page.drawing import Plot, arms, house_style, legend, names_beside, new_canvas, values
from dpalign.page.figures import points_of, reward_space
from dpalign.page.looks import FRONT_LINE, INKS, Look, in_order, label, looks_of, trained_for
from dpalign.page.words import DEGREE, MINUS, by_prompt, degrees, number, turns

_MUTED, _GRID, _SURFACE = (INKS[name][0] for name in ("muted", "grid", "surface"))
_PAPER: Final[dict[str, Any]] = {"color": _MUTED, "linewidth": 0.9, "alpha": 0.75, "markersize": 3.5}

_NAMED: Final = {"SFT": "left", "DPO": "left", "SteerLM": "left", "t=1": "right", "t=4": "left"}
"""The paper's curves that get a name, at the concise end (right) or the verbose end (left); others lie between."""
Side = tuple[Literal["center", "left", "right"], int, int]
BESIDE: Final[tuple[Side, ...]] = (("center", 0, -14), ("left", 8, -3), ("right", -8, -3))
"""Where a specialist's angle is written, a side for each family: the alignment, and the offset in points."""


def comparison_plots(summary: Summary) -> Iterator[Plot]:
    """All figures of a comparison that this summary has the data for; none without a comparison."""
    compared = summary.comparison
    if compared is None:
        return
    if summary.angled:
        yield fig_4(summary, compared)
        yield control_range(summary)
        if summary.of_role("ablation"):
            yield ablations(summary)
    if summary.reference and any(one.cost for one in summary.systems.values()):
        yield tokens(summary)
    if summary.angled and compared.feasibility:
        yield feasibility(summary, compared)


@house_style()
def fig_4(summary: Summary, compared: Comparison) -> Plot:
    """The paper's Fig. 4 with every system."""
    helpful, verbose = summary.objectives
    looks, canvas = looks_of(summary), new_canvas(6.0)
    shown = [s for s in in_order(summary) if not s.is_copy and s.system.role not in ("control", "ablation")]
    families = list(dict.fromkeys(s.system.family for s in shown if s.system.role == "specialist"))
    axes = canvas.subplots()
    paper = compared.paper_curves and (helpful, verbose) == ("helpfulness", "verbosity")
    for name, curve in FIG_4.items() if paper else ():
        x, y = zip(*curve, strict=True)
        axes.plot(x, y, **_PAPER, linestyle=":", marker="." if len(x) == 1 else "")
        if name in _NAMED:
            end = 0 if _NAMED[name] == "right" else -1
            axes.annotate(
                f"paper, {name}", (x[end], y[end]), xytext=(5 * (1 if end else -1), -1), fontsize=6.5,
                textcoords="offset points", ha=_NAMED[name], color=_MUTED,
            )  # fmt: skip
    named: set[str] = set()
    for one in shown:
        points_of(axes, one, looks[one.name], verbose, helpful, named=one.system.group not in named)
        named.add(one.system.group)
        angle = trained_for(one)
        if angle is not None:
            side, right, up = BESIDE[families.index(one.system.family) % len(BESIDE)]
            axes.annotate(
                degrees(angle), (one.rewards(verbose)[0].value, one.rewards(helpful)[0].value), xytext=(right, up),
                textcoords="offset points", ha=side, fontsize=7.5, color=looks[one.name].light,
            )  # fmt: skip
    reward_space(axes, summary)
    legend(canvas, axes, 5)
    caption = (
        "The paper's Fig. 4 with every system of this run. A curve is one model that is told what is wanted, or "
        "mixtures of models. A single point is one model with one behaviour. Hollow markers are specialists, each "
        "trained for the direction beside it: about the ceiling there. Of several settings, tuning chose the one "
        f"drawn. Crosses are {by_prompt(summary)}."
    )
    if paper:
        caption += " Dotted: the paper's own curves, t=0 to t=4 from below, read by eye, on its own reward scale."
    return Plot("comparison", "Every system on one plot", caption, canvas)


@house_style()
def ablations(summary: Summary) -> Plot:
    """The loop without each of its parts."""
    helpful, verbose = summary.objectives
    looks, canvas = looks_of(summary), new_canvas(4.6)
    axes = canvas.subplots()
    for one in [*summary.of_role("ablation"), *([summary.last] if summary.last else [])]:
        points_of(axes, one, looks[one.name], verbose, helpful)
    reward_space(axes, summary, measured_from=False)
    legend(canvas, axes, 3)
    caption = f"The same loop without one of its parts, to the same iteration. Crosses are {by_prompt(summary)}."
    return Plot("ablations", "Without one part of the loop", caption, canvas)


@house_style()
def tokens(summary: Summary) -> Plot:
    """Hypervolume against all tokens that a system took."""
    looks, canvas = looks_of(summary), new_canvas(4.8)
    axes = canvas.subplots()
    shown = [
        (one, one.cost.total_tokens / 1e6, one.figures.hypervolume)
        for one in in_order(summary)
        if not one.is_copy and one.system.role not in ("control", "ablation")
        and one.cost and one.cost.total_tokens and one.figures.hypervolume
    ]  # fmt: skip
    iterated = [(x, volume) for one, x, volume in shown if one.system.role == "iteration"]
    axes.plot([x for x, _ in iterated], [v.value for _, v in iterated], color=_MUTED, linewidth=0.8, zorder=1)
    named: set[str] = set()
    for one, x, volume in shown:
        _cost_point(axes, one, x, volume, looks[one.name], named=one.system.group not in named)
        named.add(one.system.group)
    axes.set(xlabel="million tokens sampled, scored and trained", ylabel="hypervolume")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    axes.margins(0.07)
    legend(canvas, axes, 5)
    caption = (
        "All tokens that were used to make a system; shared stages count for each system. If a system was tuned, the "
        "hollow point at the end of the dotted line counts all settings tried. Higher for the same tokens is better. "
        f"Bars are {by_prompt(summary)}."
    )
    for row in summary.comparison.table_1 if summary.comparison else ():
        if row.answers_a_reply > 1:
            caption += (
                f" {row.name} also samples and scores {row.answers_a_reply} answers for every question it is asked."
            )
    return Plot("tokens", "Hypervolume against tokens", caption, canvas)


def _cost_point(axes: Axes, one: Measured, x: float, volume: Estimate, look: Look, *, named: bool) -> None:
    style: dict[str, Any] = {"color": look.light, "markersize": 6.5, "markeredgewidth": 0.7}
    filled: dict[str, Any] = {"markeredgecolor": look.light if look.hollow else _SURFACE}
    filled |= {"markerfacecolor": _SURFACE} if look.hollow else {}
    group = one.system.group if named else None
    axes.errorbar(
        [x], [volume.value], yerr=arms([volume]), fmt=look.marker, elinewidth=1.0, label=group, **style, **filled
    )
    angle = trained_for(one)
    if angle is not None:
        axes.annotate(
            degrees(angle), (x, volume.value), xytext=(5, 6), textcoords="offset points", fontsize=7.5, color=look.light
        )
    if one.sweep and one.sweep.total_tokens:
        end = one.sweep.total_tokens / 1e6
        axes.plot([x, end], [volume.value] * 2, color=look.light, linewidth=0.8, linestyle=":", zorder=1)
        hollow: dict[str, Any] = {"markerfacecolor": _SURFACE, "markeredgecolor": look.light}
        axes.plot([end], [volume.value], marker=look.marker, **style, **hollow)


@house_style()
def control_range(summary: Summary) -> Plot:
    """The range of the second objective, from one end of the dial or of the targets to the other."""
    objective, falls, looks = summary.objectives[1], turns(summary) == "falls", looks_of(summary)
    shown = [one for one in in_order(summary) if not one.is_copy]
    shown = [s for s in shown if len(s.points) > 1 and s.system.role in ("baseline", "soup", "iteration")]
    rows = [
        (label(s), _ends(s.rewards(objective), s.steered, falls), looks[s.name].light, looks[s.name].marker)
        for s in shown
    ]
    panels = [("this run", rows)]
    if objective == "verbosity":
        paper = [(name, [Estimate(x) for x, _ in curve]) for name, curve in FIG_4.items() if len(curve) > 1]
        panels.append(("the paper, Fig. 4", [(name, _ends(x, False, falls), _MUTED, "o") for name, x in paper]))
    canvas = new_canvas(0.3 * max(len(found) for _, found in panels) + 1.1)
    for axes, (title, found) in zip(canvas.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _ranges(axes, found)
        axes.set_xlabel(f"{objective}, reward points")
        axes.set_title(title)
    caption = (
        f"Mean {objective} at both ends of the dial or of the targets; the hollow end is the last. The number beside "
        f"it is the range in reward points. A front can rise while its range narrows. Bars are {by_prompt(summary)}."
    )
    if len(panels) > 1:
        caption += " The paper's fronts are read off its Fig. 4, on its own reward scale."
    return Plot("range", "How far the dial reaches", caption, canvas)


def _ends(found: Sequence[Estimate], steered: bool, falls: bool) -> tuple[Estimate, Estimate]:
    """The first and the last direction; for targets, which have no order, the two extremes of what was given."""
    if steered:
        return found[0], found[-1]
    low, high = (pick(found, key=lambda one: one.value) for pick in (min, max))
    return (high, low) if falls else (low, high)


def _ranges(axes: Axes, rows: Sequence[tuple[str, tuple[Estimate, Estimate], str, str]]) -> None:
    places = names_beside(axes, [name for name, *_ in rows])
    for place, (_, (first, last), colour, marker) in zip(places, rows, strict=True):
        axes.plot(values([first, last]), [place, place], color=colour, linewidth=2.2, alpha=0.55, zorder=1)
        for end, face in ((first, colour), (last, _SURFACE)):
            axes.errorbar(
                [end.value], [place], xerr=arms([end]), fmt=marker, color=colour, markersize=5, elinewidth=1.1,
                markerfacecolor=face, markeredgecolor=colour, markeredgewidth=1.1,
            )  # fmt: skip
        right = max(one.value if one.high is None else one.high for one in (first, last))
        axes.annotate(
            number(abs(first.value - last.value)), (right, place), xytext=(7, 0), textcoords="offset points",
            va="center", fontsize=7.5, color=_MUTED,
        )  # fmt: skip
    axes.margins(x=0.14)


@house_style()
def feasibility(summary: Summary, compared: Comparison) -> Plot:
    """What systems answer within their training range, and beyond it."""
    helpful, verbose = summary.objectives
    looks, canvas = looks_of(summary), new_canvas(4.0)
    panels = [(name, found) for name, found in compared.feasibility.items() if name in looks]
    for axes, (name, found) in zip(canvas.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        if found.asked_for == "directions":
            _beyond_angles(axes, found, verbose, looks[name].light)
        else:
            _beyond_targets(axes, found, helpful, verbose, looks[name].light)
        axes.set_title(name)
    parts = []
    if any(found.asked_for == "directions" for _, found in panels):
        parts.append(
            f"Policies: mean {verbose} at each angle. Shaded: the arc that users ask for; lighter: a margin that "
            "training had around it. Dashed: the best answers, where they are known"
        )
    if any(found.asked_for == "targets" for _, found in panels):
        parts.append(
            "Models that are told rewards: what was asked (hollow), joined to what was given (filled). A stronger "
            "colour means a request for more than any annotated answer had"
        )
    caption = ". ".join([*parts, f"Bars are {by_prompt(summary)}."])
    return Plot("feasibility", "Within the training range, and beyond it", caption, canvas)


def _beyond_angles(axes: Axes, found: Feasibility, verbose: str, colour: str) -> None:
    angle = [row.angle or 0.0 for row in found.conditions]
    got = [row.rewards[verbose] for row in found.conditions]
    assert found.asked_range is not None
    assert found.trained_range is not None
    (low, high), (lowest, highest) = found.asked_range, found.trained_range
    axes.axvspan(low, high, color=_GRID, alpha=0.55, linewidth=0, zorder=0)
    for ends in ((lowest, low), (high, highest)):
        axes.axvspan(*ends, color=_GRID, alpha=0.25, linewidth=0, zorder=0)
    axes.errorbar(
        angle, values(got), yerr=arms(got), color=colour, marker="o", markersize=4.5, linewidth=1.5, elinewidth=0.9
    )
    if all(row.optimum for row in found.conditions):
        axes.plot(angle, [row.optimum[verbose] for row in found.conditions], **FRONT_LINE)
    axes.set_xlim(max(angle) + 4, min(angle) - 4)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}".replace("-", MINUS))
    axes.set(xlabel=f"angle, {DEGREE}", ylabel=f"{verbose}, reward points")


def _beyond_targets(axes: Axes, found: Feasibility, helpful: str, verbose: str, colour: str) -> None:
    for row in found.conditions:
        x, y = row.rewards[verbose], row.rewards[helpful]
        asked = (row.asked[verbose], row.asked[helpful])
        strength = 0.45 + 0.55 * (row.share or 0.0)
        axes.plot([asked[0], x.value], [asked[1], y.value], color=colour, linewidth=0.8, alpha=strength)
        axes.errorbar(
            [x.value], [y.value], xerr=arms([x]), yerr=arms([y]), fmt="^", color=colour, markersize=5, elinewidth=0.8,
            alpha=strength,
        )  # fmt: skip
        axes.plot(
            *asked, marker="^", markersize=6, markerfacecolor=_SURFACE, markeredgecolor=colour, linestyle="",
            alpha=strength,
        )  # fmt: skip
    handles = [
        Line2D([], [], marker="^", linestyle="", color=colour, label="given"),
        Line2D([], [], marker="^", linestyle="", markerfacecolor=_SURFACE, markeredgecolor=colour, label="asked"),
    ]
    axes.legend(handles=handles, loc="lower right")
    axes.set(xlabel=f"{verbose}, reward points", ylabel=f"{helpful}, reward points")
    axes.margins(0.08)
