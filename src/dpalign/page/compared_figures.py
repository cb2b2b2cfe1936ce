"""The figures of a comparison: Fig. 4 with every system, what it cost, how far the dial reaches, beyond the dial."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from dpalign.page.control_figures import control_range, feasibility
from dpalign.page.drawing import Plot, arms, by_prompt, drawn_twice, legend, values
from dpalign.page.fronts import end_angles, points_of, reference_and_front
from dpalign.page.systems import INKS, System, last_iteration
from dpalign.page.words import COUNTED, degrees, figure

Summary = Mapping[str, Any]
_INK, _MUTED, _GRID, _SURFACE = (INKS[name][0] for name in ("ink", "muted", "grid", "surface"))
_PAPER: Final[dict[str, Any]] = {"color": _MUTED, "linewidth": 0.9, "alpha": 0.75, "markersize": 3.5}

_NAMED: Final = {"SFT": "left", "DPO": "left", "SteerLM": "left", "t=1": "right", "t=4": "left"}
"""The paper's curves that are named, at their concise end (right) or their verbose one; the others lie between."""
Side = tuple[Literal["center", "left", "right"], int, int]
BESIDE: Final[tuple[Side, ...]] = (("center", 0, -14), ("left", 8, -3), ("right", -8, -3))
"""Where specialists have their angle, each family on a side of its own: how it is aligned, how far off in points."""


def compared_plots(summary: Summary, systems: Sequence[System]) -> dict[str, Plot]:
    """All figures of a comparison that this summary has the data for; none of a run without one."""
    found: dict[str, Plot] = {}
    compared = summary.get("comparison")
    if compared and len(summary["objectives"]) > 1:
        found["comparison"] = _fig_4(summary, systems)
        found["range"] = control_range(summary, systems)
        if any(system.role == "ablation" for system in systems):
            found["ablations"] = _ablations(summary, systems)
    if compared and summary["reference"] and any(system.entry.get("total_tokens") for system in systems):
        found["tokens"] = _tokens(summary, systems)
    if len(summary["objectives"]) == 2 and summary.get("feasibility"):
        found["feasibility"] = feasibility(summary, systems)
    return found


def _fig_4(summary: Summary, systems: Sequence[System]) -> Plot:
    helpful, verbose = summary["objectives"][:2]
    angled = len(summary["objectives"]) == 2
    shown = [s for s in systems if s.role not in ("control", "ablation") and not s.copied]
    families = list(dict.fromkeys(s.family for s in shown if s.role == "specialist"))
    curves = (
        (summary["comparison"].get("paper_curves") or {}) if (helpful, verbose) == ("helpfulness", "verbosity") else {}
    )

    def draw(width: float, narrow: bool) -> Canvas:
        canvas = Canvas(figsize=(width, 6.8 if narrow else 6.0), layout="constrained")
        axes = canvas.subplots()
        for name, points in curves.items():
            x, y = zip(*points, strict=True)
            axes.plot(x, y, **_PAPER, linestyle=":", marker="." if len(x) == 1 else "")
            if name in _NAMED:
                end = 0 if _NAMED[name] == "right" else -1
                axes.annotate(
                    f"paper, {name}", (x[end], y[end]), xytext=(5 * (1 if end else -1), -1), fontsize=6.5,
                    textcoords="offset points", ha=_NAMED[name], color=_MUTED,
                )  # fmt: skip
        labelled: set[str] = set()
        for system in shown:
            points_of(axes, system, verbose, helpful, joined=angled, label=system.family not in labelled)
            labelled.add(system.family)
            if system.role == "specialist" and angled:
                _name_specialist(axes, system, verbose, helpful, BESIDE[families.index(system.family) % len(BESIDE)])
        if angled:
            end_angles(axes, systems, verbose, helpful)
        reference_and_front(axes, summary, verbose, helpful)
        axes.set(xlabel=f"{verbose}, reward points", ylabel=f"{helpful}, reward points")
        axes.margins(0.06)
        legend(canvas, axes, narrow, 5)
        return canvas

    wide, narrow = drawn_twice(draw)
    caption = (
        "The paper's Fig. 4 with every system of this run. A curve belongs to one model that is told what is wanted, "
        "or, of soups, to mixtures; a single point can be had by one model in one way only. Hollow markers are "
        "specialists, each trained for the direction beside it: about what a policy can reach there. Of a system with "
        f"several settings the one that the tuning prompts chose is drawn. Crosses are {by_prompt(summary)} (the "
        "checkpoints held fixed)."
    )
    if curves:
        caption += (
            " Dotted in grey: the paper's own figure, its iterations t=0 to t=4 from below, read off by eye, on its "
            "own reward model's scale."
        )
    return Plot("comparison", "Every system on one plot", caption, wide, narrow)


def _name_specialist(axes: Axes, system: System, verbose: str, helpful: str, beside: Side) -> None:
    angle = system.entry.get("trained_for")
    if angle is None:
        return
    at = (values(system.rewards(verbose))[0], values(system.rewards(helpful))[0])
    side, right, up = beside
    axes.annotate(
        degrees(angle),
        at,
        xytext=(right, up),
        textcoords="offset points",
        ha=side,
        fontsize=7.5,
        color=system.look.light,
    )


def _tokens(summary: Summary, systems: Sequence[System]) -> Plot:
    shown = [
        s for s in systems if s.role not in ("control", "ablation") and s.entry.get("total_tokens") and not s.copied
    ]

    def draw(width: float, narrow: bool) -> Canvas:
        canvas = Canvas(figsize=(width, 6.2 if narrow else 4.8), layout="constrained")
        axes = canvas.subplots()
        labelled: set[str] = set()
        iterated = [s for s in shown if s.role == "iteration"]
        spent = [s.entry["total_tokens"] / 1e6 for s in iterated]
        axes.plot(
            spent, values([figure(s.entry, "hypervolume") for s in iterated]), color=_MUTED, linewidth=0.8, zorder=1
        )
        for system in shown:
            look, found = system.look, figure(system.entry, "hypervolume")
            style: dict[str, Any] = {"color": look.light, "markersize": 6.5, "markeredgewidth": 0.7}
            style |= {"markeredgecolor": look.light if look.hollow else _SURFACE}
            style |= {"markerfacecolor": _SURFACE} if look.hollow else {}
            x, y = system.entry["total_tokens"] / 1e6, values([found])
            label = None if system.family in labelled else system.family
            if system.entry.get("trained_for") is not None:
                axes.annotate(
                    degrees(system.entry["trained_for"]), (x, y[0]), xytext=(5, 6), textcoords="offset points",
                    fontsize=7.5, color=look.light,
                )  # fmt: skip
            axes.errorbar([x], y, yerr=arms([found]), fmt=look.marker, elinewidth=1.0, label=label, **style)
            labelled.add(system.family)
            sweep = (system.entry.get("sweep") or {}).get("total_tokens")
            if sweep:
                axes.plot([x, sweep / 1e6], [y[0], y[0]], color=look.light, linewidth=0.8, linestyle=":", zorder=1)
                axes.plot(
                    [sweep / 1e6],
                    y,
                    marker=look.marker,
                    **style | {"markerfacecolor": _SURFACE, "markeredgecolor": look.light},
                )
        axes.set(xlabel="million tokens sampled, scored and trained", ylabel="hypervolume")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
        axes.margins(0.07)
        legend(canvas, axes, narrow, 5)
        return canvas

    wide, narrow = drawn_twice(draw)
    caption = (
        "Total tokens of all that a system was made from, stages that systems share counted for each, on a logarithmic "
        f"scale: {COUNTED}. Of a tuned system the filled point is the setting shown, the hollow one at "
        "the end of the dotted line all settings that were tried, with their tuning evaluations. Look for points that "
        "are higher for the same tokens; an iteration costs the ones before it too. Bars are "
        f"{by_prompt(summary)}."
    )
    for row in summary["comparison"]["table_1"]:
        if row["answers_a_reply"] > 1:
            caption += (
                f" {row['system']} is dearer than it looks: the {row['answers_a_reply']} answers that it samples and "
                "scores for every question at inference are not on this axis."
            )
    return Plot("tokens", "Hypervolume against tokens", caption, wide, narrow)


def _ablations(summary: Summary, systems: Sequence[System]) -> Plot:
    helpful, verbose = summary["objectives"][:2]
    last = last_iteration(systems)
    shown = [s for s in systems if s.role == "ablation" or s is last]
    angled = len(summary["objectives"]) == 2

    def draw(width: float, narrow: bool) -> Canvas:
        canvas = Canvas(figsize=(width, 4.6), layout="constrained")
        axes = canvas.subplots()
        for system in shown:
            points_of(axes, system, verbose, helpful, joined=angled)
        axes.set(xlabel=f"{verbose}, reward points", ylabel=f"{helpful}, reward points")
        axes.margins(0.06)
        legend(canvas, axes, narrow, 3)
        return canvas

    wide, narrow = drawn_twice(draw)
    caption = (
        "The same loop, each time without one of its parts, to the same number of iterations. Crosses are "
        f"{by_prompt(summary)}; the paired differences stand in the table below."
    )
    return Plot("ablations", "Without one part of the loop", caption, wide, narrow)
