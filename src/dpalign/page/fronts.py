"""Fronts in reward space, drawn the same in every figure that has them."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes

from dpalign.page.drawing import arms, values
from dpalign.page.systems import FRONT_LINE, INKS, Role, System, last_iteration
from dpalign.page.words import degrees

_SURFACE, _MUTED = INKS["surface"][0], INKS["muted"][0]
_LINES: Final[dict[Role, str]] = {"iteration": "-", "soup": "-.", "ablation": "--"}


def points_of(axes: Axes, system: System, verbose: str, helpful: str, *, joined: bool, label: bool = True) -> None:
    """A system's points with their intervals; joined in the order of the dial where that has one."""
    look, policy = system.look, system.role == "iteration"
    x, y = system.rewards(verbose), system.rewards(helpful)
    if not system.steered:  # reward targets have no order of their own
        order = np.argsort(values(x))
        x, y = [x[i] for i in order], [y[i] for i in order]
    axes.errorbar(
        values(x), values(y), xerr=arms(x), yerr=arms(y), fmt="none", ecolor=look.light, elinewidth=0.8, alpha=0.55,
        zorder=2,
    )  # fmt: skip
    single = system.role in ("baseline", "specialist")
    axes.plot(
        values(x),
        values(y),
        color=look.light,
        marker=look.marker,
        markersize=8.0 if look.hollow else 6.0 if single else 4.6,
        markerfacecolor=_SURFACE if look.hollow else look.light,
        markeredgecolor=look.light if look.hollow else _SURFACE,
        markeredgewidth=1.1 if look.hollow else 0.6,
        linewidth=1.7 if policy else 1.1,
        linestyle="" if len(x) == 1 or not joined else _LINES.get(system.role, ":"),
        label=system.family if label else None,
        zorder=4 if single else 3,
    )


def end_angles(axes: Axes, systems: Sequence[System], verbose: str, helpful: str) -> None:
    """The angles at both ends of the last policy's curve."""
    last = last_iteration(systems)
    if last is None or not last.steered:
        return
    for i in (0, -1):
        axes.annotate(
            degrees(last.entry["points"][i]["angle"]),
            (values(last.rewards(verbose))[i], values(last.rewards(helpful))[i]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=last.look.light,
        )


def reference_and_front(axes: Axes, summary: Mapping[str, Any], verbose: str, helpful: str) -> None:
    """What the run is measured against, where there is one: the true front, and hypervolume's reference."""
    true_front = summary.get("true_front")
    if true_front:
        x, y = ([point[name] for point in true_front] for name in (verbose, helpful))
        line = FRONT_LINE if len(summary["objectives"]) == 2 else {**FRONT_LINE, "linestyle": "", "marker": "."}
        axes.plot(x, y, **line, label="true front", zorder=1)
    reference = summary["reference"]
    if reference:
        axes.plot(
            reference[verbose], reference[helpful], linestyle="", marker="+", markersize=9, color=_MUTED,
            label="hypervolume's reference",
        )  # fmt: skip
