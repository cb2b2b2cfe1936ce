"""The systems of a summary in the order of the page, and the look of each: the same in every figure and table.

Colours are safe for the colour-blind (after Okabe and Ito): the iterations are steps of one ramp, all
else differs in marker as well as in colour. Each colour has a light and a dark form; figures are drawn
in the light one, and the page exchanges it for a variable that knows both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from dpalign.report.words import Figure

Role = Literal["baseline", "control", "iteration"]

INKS: Final = {
    "ink": ("#1c2026", "#eceae6"),
    "muted": ("#636973", "#a2a8b1"),
    "grid": ("#e3e5e8", "#31363f"),
    "surface": ("#fefefe", "#1a1d23"),
    "front": ("#00795f", "#45c9a0"),
}
FRONT_LINE: Final[dict[str, Any]] = {"color": INKS["front"][0], "linestyle": (0, (5, 2.5)), "linewidth": 1.4}
"""How the true front is drawn wherever it appears."""
_BASELINES: Final = (
    ("#3f444d", "#d0d3d8", "s"),
    ("#c75000", "#ff9d57", "D"),
    ("#9c3f83", "#ea93cb", "^"),
    ("#8a6d00", "#e5c441", "v"),
    ("#5b5fc7", "#a9abff", "p"),
)
_CONTROLS: Final = (("#858b95", "#8e949d", "X"), ("#a08c79", "#a8957f", "P"), ("#7a9a8c", "#7f9f91", "*"))
_RAMP: Final = (
    ((148, 190, 226), (74, 124, 178), (8, 48, 107)),  # on white: pale to deep
    ((52, 92, 138), (92, 150, 208), (176, 218, 255)),  # on black: dim to bright
)


@dataclass(frozen=True)
class Look:
    """A colour by its name on the page, in both its forms, with a marker of matplotlib's."""

    name: str
    light: str
    dark: str
    marker: str


@dataclass(frozen=True, eq=False)
class System:
    """One system as the page shows it."""

    name: str
    role: Role
    entry: Mapping[str, Any]
    look: Look

    @property
    def steered(self) -> bool:
        """Sampled at directions."""
        return self.entry["points"][0].get("direction") is not None

    def rewards(self, objective: str, judged: bool = False) -> list[Figure]:
        """Its points in one objective: true where known, unless the reward model's opinion is asked for."""
        rows = self.entry["points"]
        return [Figure.read(((not judged and row.get("true_rewards")) or row["rewards"])[objective]) for row in rows]


def systems_of(summary: Mapping[str, Any]) -> tuple[System, ...]:
    """Baselines, then controls (steered, but no iteration), then the iterations in their order."""
    entries = summary["systems"]
    iterated = sorted(
        (n for n in entries if entries[n]["iteration"] is not None), key=lambda n: entries[n]["iteration"]
    )
    rest = [name for name in entries if name not in iterated]
    controls = [name for name in rest if entries[name]["points"][0].get("direction") is not None]
    baselines = [name for name in rest if name not in controls]
    groups: list[tuple[Role, list[str]]] = [("baseline", baselines), ("control", controls), ("iteration", iterated)]
    return tuple(
        System(name, role, entries[name], _look(role, i, len(names)))
        for role, names in groups
        for i, name in enumerate(names)
    )


def _look(role: Role, index: int, of: int) -> Look:
    match role:
        case "iteration":
            at = index / (of - 1) if of > 1 else 1.0
            light, dark = (_mixed(stops, at) for stops in _RAMP)
            return Look(f"iteration-{index}", light, dark, "o")
        case "baseline":
            light, dark, marker = _BASELINES[index % len(_BASELINES)]
        case "control":
            light, dark, marker = _CONTROLS[index % len(_CONTROLS)]
    return Look(f"{role}-{index % (len(_BASELINES) if role == 'baseline' else len(_CONTROLS))}", light, dark, marker)


def _mixed(stops: Sequence[tuple[int, int, int]], at: float) -> str:
    """The colour at a position from 0 to 1 of a ramp of three stops."""
    low = min(int(at * 2), 1)
    part = at * 2 - low
    return "#" + "".join(f"{round(a + part * (b - a)):02x}" for a, b in zip(stops[low], stops[low + 1], strict=True))


def colours(systems: Sequence[System]) -> dict[str, tuple[str, str]]:
    """Every colour of the page by its name, light and dark."""
    return {**INKS, **{system.look.name: (system.look.light, system.look.dark) for system in systems}}


def last_iteration(systems: Sequence[System]) -> System | None:
    """The policy that the run ends with; None where only baselines were evaluated."""
    return next((system for system in reversed(systems) if system.role == "iteration"), None)
