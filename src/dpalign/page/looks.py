"""The look of each system, the same in every figure and table, and the order in which the page shows them.

Colours are safe for the colour-blind (after Okabe and Ito). The iterations are steps of one ramp. All other systems
differ in marker as well as in colour. Each colour has a light and a dark form. Figures are drawn in the light one,
and the page replaces it with a variable that has both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, get_args

from dpalign.measure.summary import Measured, Summary
from dpalign.measure.system import Role
from dpalign.page.words import degrees
from dpalign.paper.direction import angle_of

INKS: Final = {
    "ink": ("#1c2026", "#eceae6"),
    "muted": ("#636973", "#a2a8b1"),
    "grid": ("#e3e5e8", "#31363f"),
    "surface": ("#fefefe", "#1a1d23"),
    "front": ("#00795f", "#45c9a0"),
}
FRONT_LINE: Final[dict[str, Any]] = {"color": INKS["front"][0], "linestyle": (0, (5, 2.5)), "linewidth": 1.4}
"""How the true front is drawn wherever it appears."""
_LOOKS: Final[dict[Role, tuple[tuple[str, str, str], ...]]] = {
    "baseline": (
        ("#3f444d", "#d0d3d8", "s"),
        ("#c75000", "#ff9d57", "D"),
        ("#9c3f83", "#ea93cb", "^"),
        ("#6b2a8c", "#cf9bf0", "v"),
        ("#767b84", "#b4b8bf", "<"),
        ("#d9822b", "#ffc07a", "d"),
        ("#8a6d00", "#e5c441", "p"),
        ("#5b5fc7", "#a9abff", "h"),
    ),
    "control": (("#858b95", "#8e949d", "X"), ("#a08c79", "#a8957f", "P"), ("#7a9a8c", "#7f9f91", "*")),
    "specialist": (("#22262c", "#e4e2de", "*"), ("#7048b6", "#bfa2f2", "P"), ("#4f7a1f", "#a6d16f", "X")),
    "soup": (("#a3123f", "#ff7d9c", "h"), ("#7a4a21", "#d9a679", "H")),
    "ablation": (
        ("#56708c", "#93adc9", "<"),
        ("#64857f", "#93b8b1", ">"),
        ("#8c7a56", "#c9b58e", "8"),
        ("#7d5f80", "#bd9cc0", "H"),
    ),
}
_BEST_OF: Final = "SFT, best of"
_SEATS: Final = (
    *("SFT", "DPO", "SteerLM", "SteerLM, tuned", "SFT, asked to be brief", "DPO, asked to be brief", _BEST_OF),
)
"""Baselines that look the same in every run."""
_RAMP: Final = (
    ((148, 190, 226), (74, 124, 178), (8, 48, 107)),  # on white: pale to deep
    ((52, 92, 138), (92, 150, 208), (176, 218, 255)),  # on black: dim to bright
)


@dataclass(frozen=True)
class Look:
    """A system's colour: its name on the page and both its forms; and its marker in matplotlib."""

    name: str
    light: str
    dark: str
    marker: str
    hollow: bool = False
    """The marker is drawn as an outline."""


def in_order(summary: Summary) -> list[Measured]:
    """All systems: what DPA is compared with, role by role, then the iterations in their order."""
    return [one for role in get_args(Role) for one in summary.of_role(role)]


def looks_of(summary: Summary) -> dict[str, Look]:
    """The look of each system by its name; specialists of one method share one."""
    found: dict[str, Look] = {}
    for role in get_args(Role):
        own = summary.of_role(role)
        seats = _seats(role, own)
        found |= {one.name: _look(role, seats[one.name], len(own)) for one in own}
    return found


def _seats(role: Role, own: Sequence[Measured]) -> dict[str, int]:
    """The number of each system's look within its role. A family shares one; known baselines always keep theirs."""
    groups = list(dict.fromkeys(one.system.group for one in own))
    if role != "baseline":
        return {one.name: groups.index(one.system.group) for one in own}
    seats = {one.name: _BEST_OF if one.name.startswith(_BEST_OF) else one.name for one in own}
    known = {name: _SEATS.index(seat) for name, seat in seats.items() if seat in _SEATS}
    free = [seat for seat in range(len(_LOOKS[role]) + len(own)) if seat not in known.values()]
    return known | dict(zip([name for name in seats if name not in known], free, strict=False))


def _look(role: Role, seat: int, of: int) -> Look:
    if role == "iteration":
        at = seat / (of - 1) if of > 1 else 1.0
        light, dark = (_mixed(stops, at) for stops in _RAMP)
        return Look(f"iteration-{seat}", light, dark, "o")
    looks = _LOOKS[role]
    light, dark, marker = looks[seat % len(looks)]
    return Look(f"{role}-{seat % len(looks)}", light, dark, marker, hollow=role == "specialist")


def _mixed(stops: Sequence[tuple[int, int, int]], at: float) -> str:
    """The colour at a position from 0 to 1 of a ramp of three stops."""
    low = min(int(at * 2), 1)
    part = at * 2 - low
    return "#" + "".join(f"{round(a + part * (b - a)):02x}" for a, b in zip(stops[low], stops[low + 1], strict=True))


def trained_for(one: Measured) -> float | None:
    """The angle in degrees that a specialist of two objectives was trained for."""
    direction = one.system.direction
    return angle_of(direction) if direction and len(direction) == 2 else None


def label(one: Measured) -> str:
    """A system's short name; a specialist of two objectives is named by its angle."""
    angle = trained_for(one)
    return one.name if angle is None else f"{one.system.group} at {degrees(angle)}"


def headliners(summary: Summary) -> list[Measured]:
    """The systems in the loop's figures: all, or the paper's only if a comparison has figures of its own."""
    systems = in_order(summary)
    if summary.comparison is None:
        return systems
    kept = ("SFT", "DPO", "SteerLM")
    return [s for s in systems if s.system.role in ("iteration", "control") or s.name in kept]


def colours(summary: Summary) -> dict[str, tuple[str, str]]:
    """Every colour of the page by its name, light and dark."""
    return {**INKS, **{look.name: (look.light, look.dark) for look in looks_of(summary).values()}}
