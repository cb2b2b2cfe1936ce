"""The figures of the loop itself, each drawn once, from the Summary alone."""

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from dpalign.measure.bootstrap import Estimate
from dpalign.measure.summary import Measured, Summary
from dpalign.measure.system import Role
from dpalign.measure.trust import Optimised, optimised
from dpalign.page.drawing import Plot, arms, house_style, legend, names_beside, new_canvas, panels, values
from dpalign.page.looks import FRONT_LINE, INKS, Look, headliners, in_order, label, looks_of
from dpalign.page.words import DEGREE, MINUS, by_prompt, by_prompt_or_seed, degrees, turns
from dpalign.paper.direction import angle_of

_INK, _MUTED, _SURFACE = (INKS[name][0] for name in ("ink", "muted", "surface"))
_LINES: Final[dict[Role, str]] = {"iteration": "-", "soup": "-.", "ablation": "--"}


def loop_plots(summary: Summary) -> list[Plot]:
    """All figures of the loop that this summary has the data for."""
    last = summary.last
    drawn = [objective(summary)]
    if summary.angled:
        drawn.append(front(summary))
        if last is not None and last.steered and summary.measure == "true":
            drawn.append(gap(summary))
    if any(one.steered for one in summary.systems.values()):
        drawn.append(control(summary))
    if any(one.steered and one.points[0].words for one in summary.systems.values()):
        drawn.append(words(summary))
    if last is not None and any(row.a == last.name for row in summary.dominance):
        drawn.append(leads(summary))
    if summary.trust and len(summary.trust.curve) > 1:
        drawn.append(trust(summary))
    if summary.curves:
        drawn.append(training(summary))
    return drawn


# --- fronts in reward space ---


def points_of(
    axes: Axes, one: Measured, look: Look, verbose: str, helpful: str, *, named: bool = True, joined: bool = True
) -> None:
    """Draw a system's points with their intervals. `joined` links them along the dial; targets, from left to right."""
    x, y, role = one.rewards(verbose), one.rewards(helpful), one.system.role
    if not one.steered:  # reward targets have no order of their own
        order = np.argsort(values(x))
        x, y = [x[i] for i in order], [y[i] for i in order]
    axes.errorbar(
        values(x), values(y), xerr=arms(x), yerr=arms(y), fmt="none", ecolor=look.light, elinewidth=0.8, alpha=0.55,
        zorder=2,
    )  # fmt: skip
    single = role in ("baseline", "specialist")
    axes.plot(
        values(x),
        values(y),
        color=look.light,
        marker=look.marker,
        markersize=8.0 if look.hollow else 6.0 if single else 4.6,
        markerfacecolor=_SURFACE if look.hollow else look.light,
        markeredgecolor=look.light if look.hollow else _SURFACE,
        markeredgewidth=1.1 if look.hollow else 0.6,
        linewidth=1.7 if role == "iteration" else 1.1,
        linestyle="" if len(x) == 1 or not joined else _LINES.get(role, ":"),
        label=one.system.group if named else None,
        zorder=4 if single else 3,
    )


def reward_space(axes: Axes, summary: Summary, *, measured_from: bool = True) -> None:
    """Label the axes of a front; mark what the run is measured against, and the last policy's angles at both ends."""
    helpful, verbose = summary.objectives
    last = summary.last
    if measured_from:
        if summary.true_front:
            x, y = ([point[name] for point in summary.true_front] for name in (verbose, helpful))
            axes.plot(x, y, **FRONT_LINE, label="true front", zorder=1)
        if summary.reference:
            axes.plot(
                summary.reference[verbose], summary.reference[helpful], linestyle="", marker="+", markersize=9,
                color=_MUTED, label="hypervolume's reference",
            )  # fmt: skip
        if last is not None and last.steered:
            for i in (0, -1):
                axes.annotate(
                    degrees(last.points[i].angle or 0.0),
                    (last.rewards(verbose)[i].value, last.rewards(helpful)[i].value),
                    xytext=(0, 8),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8.5,
                    color=looks_of(summary)[last.name].light,
                )
    axes.set(xlabel=f"{verbose}, reward points", ylabel=f"{helpful}, reward points")
    axes.margins(0.06)


@house_style()
def front(summary: Summary) -> Plot:
    """Every system's points in the two objectives."""
    helpful, verbose = summary.objectives
    looks, canvas = looks_of(summary), new_canvas(5.2)
    axes = canvas.subplots()
    for one in headliners(summary):
        points_of(axes, one, looks[one.name], verbose, helpful)
    reward_space(axes, summary)
    legend(canvas, axes, 5)
    caption = "Each point is the mean reward of one condition; the points of a policy are joined along the dial. "
    if all(summary.senses):
        up, right = (sense > 0 for sense in summary.senses)
        caption += f"Better is {'up' if up else 'down'} and to the {'right' if right else 'left'}. "
    else:
        caption += "The directions differ in which side they want. "
    caption += f"Crosses are {by_prompt(summary)}; the checkpoints are held fixed."
    if summary.true_front:
        caption += " Dashed: the best that any answers to these prompts can earn."
    return Plot("front", "The trade-off each system offers", caption, canvas)


@house_style()
def gap(summary: Summary) -> Plot:
    """The reward model's opinion of the first and the last policy, beside the truth."""
    helpful, verbose = summary.objectives
    policies = [one for one in summary.of_role("iteration") if one.steered]
    looks, canvas = looks_of(summary), new_canvas(4.4)
    axes = canvas.subplots()
    for one in dict.fromkeys([policies[0].name, policies[-1].name]):
        system = summary.systems[one]
        (tx, ty), (ox, oy) = (
            [values(system.rewards(name, judged)) for name in (verbose, helpful)] for judged in (False, True)
        )
        dots: dict[str, Any] = {"color": looks[one].light, "marker": "o", "markersize": 4.6}
        axes.plot([tx, ox], [ty, oy], color=looks[one].light, linewidth=0.9, alpha=0.6)
        axes.plot(tx, ty, **dots, linestyle="-", linewidth=1.6, label=f"{one}, true")
        axes.plot(
            ox, oy, **dots, markerfacecolor=_SURFACE, linestyle=":", linewidth=1.0, label=f"{one}, by the reward model"
        )
    reward_space(axes, summary, measured_from=False)
    legend(canvas, axes, 4)
    caption = (
        "Filled points are true rewards; hollow ones are what the reward model believed of the same answers. Hollow "
        "points that rise above the filled ones with the iterations are over-optimisation."
    )
    return Plot("gap", "Opinion and truth", caption, canvas)


# --- along the dial ---


def dial_positions(summary: Summary) -> list[float]:
    """Where the directions lie on the dial: degrees for two objectives, else their place in the list."""
    if not summary.angled:
        return [float(i + 1) for i in range(len(summary.directions))]
    angles = [angle_of([v[name] for name in summary.objectives]) for v in summary.directions]
    return [float(angle) for angle in np.unwrap(angles, period=360)]  # a full circle continues past 180


def _set_dial(axes: Axes, at: Sequence[float], angled: bool) -> None:
    pad = 0.03 * (abs(at[-1] - at[0]) or 1.0)
    down = -1 if at[-1] < at[0] else 1  # the dial starts at the left, whichever way it turns
    axes.set_xlim(at[0] - down * pad, at[-1] + down * pad)
    axes.set_xticks(at if len(at) <= 4 or not angled else [at[round(i * (len(at) - 1) / 3)] for i in range(4)])
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}".replace("-", MINUS))


def _dial_name(angled: bool) -> str:
    return f"angle, {DEGREE}" if angled else "direction"


def _band(axes: Axes, at: Sequence[float], found: Sequence[Estimate], colour: str, alpha: float) -> None:
    below, above = arms(found)
    axes.fill_between(at, values(found) - below, values(found) + above, color=colour, alpha=alpha, linewidth=0)


@house_style()
def control(summary: Summary) -> Plot:
    """Every objective against the dial, the second one first; three or more, each against its weight."""
    shown = summary.objectives[::-1] if summary.angled else summary.objectives
    looks, canvas = looks_of(summary), new_canvas(4.1)
    turned = [one.name for one in in_order(summary) if one.system.role in ("soup", "baseline") and one.steered]
    names = {one.name for one in headliners(summary)} | set(turned)
    grid = canvas.subplots(1, len(shown), squeeze=False)[0]
    for axes, objective_name in zip(grid, shown, strict=True):
        at = dial_positions(summary) if summary.angled else [v[objective_name] for v in summary.directions]
        if summary.true_front:
            best = FRONT_LINE if summary.angled else {**FRONT_LINE, "linestyle": "", "marker": "_", "markersize": 7}
            axes.plot(at, [point[objective_name] for point in summary.true_front], **best, label="true front")
        for one in in_order(summary):
            if one.name in names:
                _against_dial(axes, one, looks[one.name], one.rewards(objective_name), at, joined=summary.angled)
        axes.set_title(f"{objective_name}, reward points")
        if summary.angled:
            _set_dial(axes, at, summary.angled)
        axes.set_xlabel(_dial_name(True) if summary.angled else f"weight of {objective_name}")
    legend(canvas, grid[0], 6)
    if summary.angled:
        caption = (
            f"The dial turns from left to right. Look for {shown[0]} that {turns(summary)} all the way. A level line "
            "does not follow the dial. "
        )
    else:
        caption = (
            "Each point is a direction, at its weight of the objective. Look for rewards that rise to the right. The "
            "other weights change too, so even the best answers do not rise at every step. "
        )
    title = "Control: rewards along the dial" if summary.angled else "Control: each reward along its weight"
    bands = "Bands" if summary.angled else "Bars"
    return Plot("control", title, f"{caption}{bands} are {by_prompt(summary)}.", canvas)


@house_style()
def words(summary: Summary) -> Plot:
    """Mean words against the dial, for all systems except specialists and ablations."""
    at, looks, canvas = dial_positions(summary), looks_of(summary), new_canvas(3.6)
    axes = canvas.subplots()
    for one in in_order(summary):
        if not one.is_copy and one.system.role not in ("specialist", "ablation"):
            _against_dial(axes, one, looks[one.name], [point.words for point in one.points if point.words], at)
    axes.set(ylabel="mean words", xlabel=_dial_name(summary.angled))
    axes.set_ylim(bottom=0)
    _set_dial(axes, at, summary.angled)
    legend(canvas, axes, 6)
    caption = f"Mean words of the answers, counted in the texts. Bands are {by_prompt(summary)}."
    return Plot("words", "Words along the dial", caption, canvas)


def _against_dial(
    axes: Axes, one: Measured, look: Look, found: Sequence[Estimate], at: Sequence[float], joined: bool = True
) -> None:
    if one.steered and not joined:
        axes.errorbar(
            at, values(found), yerr=arms(found), color=look.light, fmt=look.marker, markersize=3.6, elinewidth=0.8,
            label=one.name,
        )  # fmt: skip
    elif one.steered:
        _band(axes, at, found, look.light, 0.16)
        axes.plot(
            at, values(found), color=look.light, marker=look.marker, markersize=3.6,
            linewidth=1.7 if one.system.role == "iteration" else 1.1, label=one.name,
        )  # fmt: skip
    elif len(found) == 1:
        axes.axhline(found[0].value, color=look.light, linestyle=":", linewidth=1.2, label=one.name)


@house_style()
def objective(summary: Summary) -> Plot:
    """E_v J(v) of every system, one below the other."""
    systems, looks = in_order(summary), looks_of(summary)
    canvas = new_canvas(0.33 * len(systems) + 0.9)
    axes = canvas.subplots()
    places = names_beside(axes, [label(one) for one in systems])
    iterations = [i for i, one in enumerate(systems) if one.system.role == "iteration"]
    reached = values([one.figures.objective for one in systems])
    axes.plot(reached[iterations], places[iterations], color=_MUTED, linewidth=0.8, zorder=1)
    for place, one in zip(places, systems, strict=True):
        look, estimate = looks[one.name], one.figures.objective
        axes.errorbar(
            [estimate.value], [place], xerr=arms([estimate]), fmt=look.marker, color=look.light, markersize=6,
            elinewidth=1.6, markeredgecolor=look.light if look.hollow else _SURFACE,
            markerfacecolor=_SURFACE if look.hollow else look.light, markeredgewidth=0.8,
        )  # fmt: skip
    if summary.best_objective is not None:
        axes.axvline(summary.best_objective, **FRONT_LINE)
        axes.annotate(
            "true front", (summary.best_objective, 1), xycoords=("data", "axes fraction"), xytext=(-5, -2),
            textcoords="offset points", ha="right", va="top", fontsize=8.5, color=FRONT_LINE["color"],
        )  # fmt: skip
    axes.set_xlabel("E$_v$ J(v), reward points")
    axes.margins(x=0.08)
    caption = (
        "What DPA maximises (Eq. 4): the reward v \N{DOT OPERATOR} r of an answer sampled at v, averaged over the "
        f"{len(summary.directions)} evaluation directions. Systems without a dial give every v the same answers; of "
        f"several reward targets the best counts, which flatters them a little. Bars are {by_prompt(summary)}; compare "
        "two systems by the paired leads of the tables."
    )
    return Plot("objective", "Average reward for what each user wants", caption, canvas)


@house_style()
def leads(summary: Summary) -> Plot:
    """The last iteration against every other system, a small panel each."""
    last, at, looks = summary.last, dial_positions(summary), looks_of(summary)
    assert last is not None
    rows = [row for row in summary.dominance if row.a == last.name]
    titles = [f"over {label(summary.systems[row.b])}" for row in rows]
    canvas, grid = panels(titles, 2.15, 0.35, _dial_name(summary.angled), "lead, reward points", sharey=True)
    for axes, row in zip(grid, rows, strict=True):
        colour = looks[row.b].light
        axes.axhline(0, color=_INK, linewidth=0.9)
        _band(axes, at, row.leads, colour, 0.22)
        axes.plot(at, values(row.leads), color=colour, marker="o", markersize=3, linewidth=1.6)
        _set_dial(axes, at, summary.angled)
    caption = (
        f"How far {last.name} leads each other system at each direction, by the best of each one's points. It "
        "dominates where the whole band lies above the line. Bands are simultaneous for all directions "
        f"({by_prompt(summary)}, in pairs)."
    )
    return Plot("leads", f"The lead of {last.name}, direction by direction", caption, canvas)


# --- training and trust ---


@house_style()
def trust(summary: Summary) -> Plot:
    """E_v J(v) by the reward model and by its check, over the scored answers and over the divergence from SFT."""
    found = summary.trust
    assert found is not None
    rows = {row.system: row for row in optimised(summary)}
    curve = [rows[point.system] for point in found.curve]
    axes_of: list[tuple[str, Callable[[Optimised], float | None]]] = [
        ("answers scored so far", lambda row: row.scored),
        ("KL divergence from SFT, nats an answer", lambda row: row.divergence.value if row.divergence else None),
    ]
    shown = [(title, x) for title, x in axes_of if all(x(row) is not None for row in curve)]
    steps = {row.system: float(point.iteration) for row, point in zip(curve, found.curve, strict=True)}
    canvas = new_canvas(3.9)
    grid = canvas.subplots(1, len(shown) or 1, squeeze=False, sharey=True)[0]
    for axes, (title, x) in zip(grid, shown or [("iteration", lambda row: steps.get(row.system))], strict=True):
        _opinions(axes, summary, curve, x)
        for row in rows.values():
            if row not in curve:
                _beside(axes, summary, row, x)
        axes.set_xlabel(title)
        axes.margins(x=0.08, y=0.1)
    grid[0].set_ylabel("E$_v$ J(v), reward points")
    legend(canvas, grid[-1], 4)
    caption = (
        "The reward model's opinion of each iteration, and that of a check that never selects. If the opinion rises "
        "and the check falls, the policy is over-optimised (Goodhart's law). The lines' distance is a matter of scale. "
    )
    if any(row.divergence for row in rows.values()):
        caption += (
            "Other systems: hollow by the reward model, filled by the check. "
            "The divergence is a mean over sampled answers, at the temperature that they were sampled at. "
        )
    caption += f"Bars are {by_prompt_or_seed(summary)}."
    return Plot("trust", "Over-optimisation: proxy and check", caption, canvas)


def _opinions(axes: Axes, summary: Summary, curve: Sequence[Optimised], x: Callable[[Optimised], float | None]) -> None:
    """Draw the iterations: one line for each scorer that scored them all."""
    lines: list[tuple[str, list[Estimate | None], str, str, str]] = [
        ("the reward model, which selects", [row.proxy for row in curve], _INK, "o", "-"),
        ("the truth", [row.truth for row in curve], INKS["front"][0], "s", "-"),
        ("the judge, which never selects", [row.judge for row in curve], _MUTED, "D", ":"),
    ]
    at = [x(row) or 0.0 for row in curve]
    for text, found, colour, marker, style in lines:
        estimates = [one for one in found if one is not None]
        if len(estimates) == len(curve):
            axes.errorbar(
                at, values(estimates), yerr=arms(estimates), color=colour, marker=marker, linestyle=style,
                linewidth=1.5, markersize=5, elinewidth=0.9, label=text, zorder=3,
            )  # fmt: skip
    for place, row in zip(at, curve, strict=True):
        top = max(one.high or one.value for one in (row.proxy, row.truth, row.judge) if one)
        axes.annotate(
            f"t={summary.systems[row.system].system.iteration}", (place, top), xytext=(0, 5),
            textcoords="offset points", ha="center", fontsize=8, color=_MUTED,
        )  # fmt: skip


def _beside(axes: Axes, summary: Summary, row: Optimised, x: Callable[[Optimised], float | None]) -> None:
    """Draw another system: its figure by the reward model, joined to its figure by the check."""
    one, at, check = summary.systems[row.system], x(row), row.truth or row.judge
    if one.system.role in ("control", "specialist") or at is None or check is None:
        return
    look = looks_of(summary)[row.system]
    style: dict[str, Any] = {"color": look.light, "markersize": 5, "elinewidth": 0.7, "alpha": 0.9, "zorder": 2}
    axes.plot([at, at], [row.proxy.value, check.value], color=look.light, linewidth=0.7, alpha=0.6, zorder=1)
    axes.errorbar([at], [check.value], yerr=arms([check]), fmt=look.marker, label=label(one), **style)
    axes.errorbar([at], [row.proxy.value], yerr=arms([row.proxy]), fmt=look.marker, markerfacecolor=_SURFACE, **style)


@house_style()
def training(summary: Summary) -> Plot:
    """The loss of every training, a small panel each."""
    canvas, grid = panels([curve.stage for curve in summary.curves], 1.75, 0.4, "step", "loss")
    for axes, curve in zip(grid, summary.curves, strict=True):
        axes.add_line(Line2D(curve.step, curve.loss, color=_INK, linewidth=1.1))
        axes.autoscale_view()
    caption = "The loss that each training logged, as its trainer reports it. Losses from two methods do not compare."
    return Plot("training", "Training loss", caption, canvas)
