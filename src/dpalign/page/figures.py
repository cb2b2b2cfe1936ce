"""The figures of the page, drawn from summary.json alone; each for a wide screen and for a phone."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure as Canvas

from dpalign.page.compared_figures import compared_plots
from dpalign.page.curves import control, leads, objective, trust
from dpalign.page.drawing import Plot, by_prompt, drawn_twice, legend, values
from dpalign.page.fronts import end_angles, points_of, reference_and_front
from dpalign.page.systems import INKS, System, headliners, last_iteration

Summary = Mapping[str, Any]


def plots(summary: Summary, systems: Sequence[System]) -> dict[str, Plot]:
    """All figures that this summary has the data for, by name, in the order of the page."""
    last = last_iteration(systems)
    found = {"objective": objective(summary, systems)}
    if len(summary["objectives"]) > 1:
        found["front"] = front(summary, systems)
        if last is not None and last.steered and summary["measure"] == "true":
            found["gap"] = _gap(summary, systems)
    if any(system.steered for system in systems):
        found["control"] = control(summary, systems)
    rows = [row for row in summary["dominance"] if last is not None and row["a"] == last.name]
    if last is not None and rows:
        found["leads"] = leads(summary, systems, last, rows)
    if summary.get("trust") and len(summary["trust"]["curve"]) > 1:
        found["trust"] = trust(summary)
    found |= compared_plots(summary, systems)
    order = ("front", "control", "objective", "leads", "comparison", "range", "tokens", "feasibility", "ablations")
    return {name: found[name] for name in (*order, "gap", "trust") if name in found}


def front(summary: Summary, systems: Sequence[System]) -> Plot:
    """Every system's points in the first two objectives."""
    helpful, verbose = summary["objectives"][:2]
    true_front = summary.get("true_front")
    angled = len(summary["objectives"]) == 2
    shown = headliners(summary, systems)

    def draw(width: float, narrow: bool) -> Canvas:
        canvas = Canvas(figsize=(width, 4.9 if narrow else 5.2), layout="constrained")
        axes = canvas.subplots()
        for system in shown:
            points_of(axes, system, verbose, helpful, joined=angled)
        if angled:
            end_angles(axes, systems, verbose, helpful)
        reference_and_front(axes, summary, verbose, helpful)
        axes.set(xlabel=f"{verbose}, reward points", ylabel=f"{helpful}, reward points")
        axes.margins(0.06)
        legend(canvas, axes, narrow, 5)
        return canvas

    wide, narrow = drawn_twice(draw)
    joined = "; points of one policy are joined in the order of the dial" if angled else ""
    caption = f"Each point is the mean reward of one condition{joined}. "
    if all(summary["senses"][:2]):
        up, right = (sense > 0 for sense in summary["senses"][:2])
        caption += (
            f"Look for {'curves' if angled else 'points'} that lie further {'up' if up else 'down'} and to the "
            f"{'right' if right else 'left'} with each iteration, and for how far they reach: a front can rise and "
            "still narrow. "
        )
    else:
        caption += "The directions differ in which side of this plot they want; look for how far the points reach. "
    caption += f"Crosses are {by_prompt(summary)} (the checkpoints held fixed)."
    if true_front:
        caption += (
            f" {'The dashed line' if angled else 'Green'} is the best that any answers to these prompts can earn."
        )
    return Plot("front", "The front, by iteration", caption, wide, narrow)


def _gap(summary: Summary, systems: Sequence[System]) -> Plot:
    helpful, verbose = summary["objectives"][:2]
    policies = [system for system in systems if system.role == "iteration" and system.steered]
    shown = policies[-1:] if len(policies) == 1 else [policies[0], policies[-1]]
    angled = len(summary["objectives"]) == 2

    def draw(width: float, narrow: bool) -> Canvas:
        canvas = Canvas(figsize=(width, 4.6 if narrow else 4.4), layout="constrained")
        axes = canvas.subplots()
        for system in shown:
            (tx, ty), (ox, oy) = (
                [values(system.rewards(name, judged)) for name in (verbose, helpful)] for judged in (False, True)
            )
            colour = system.look.light
            axes.plot([tx, ox], [ty, oy], color=colour, linewidth=0.9, alpha=0.6)
            dots: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 4.6}
            axes.plot(tx, ty, **dots, linestyle="-" if angled else "", linewidth=1.6, label=f"{system.name}, true")
            dots["markerfacecolor"] = INKS["surface"][0]
            axes.plot(ox, oy, **dots, linestyle=":" if angled else "", linewidth=1.0, label=f"{system.name}, judged")
        axes.set(xlabel=f"{verbose}, reward points", ylabel=f"{helpful}, reward points")
        axes.margins(0.06)
        legend(canvas, axes, narrow, 4)
        return canvas

    wide, narrow = drawn_twice(draw)
    caption = (
        "Filled points are true rewards, hollow ones what the reward model believed of the same answers; a thin line "
        "joins the two. Hollow points that float above the filled ones, and more so at the last iteration, are "
        f"over-optimisation: the policy pleases the model more than the truth. {summary['intervals']['prompts']:,} "
        "prompts; the intervals of the gap stand in the table below."
    )
    return Plot("gap", "Opinion and truth", caption, wide, narrow)
