"""The systems of a summary in the order of the page, and the look of each: the same in every figure and table.

Colours are safe for the colour-blind (after Okabe and Ito): the iterations are steps of one ramp, all
else differs in marker as well as in colour. Each colour has a light and a dark form; figures are drawn
in the light one, and the page exchanges it for a variable that knows both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from dpalign.page.words import Figure, degrees

Role = Literal["baseline", "control", "specialist", "soup", "ablation", "iteration"]
"""baseline: what users have without DPA. control: a model that never learnt directions, asked for them. specialist:
trained for one direction. soup: mixed from specialists for each direction. ablation: the loop without a part of it."""

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
    """A colour by its name on the page, in both its forms, with a marker of matplotlib's."""

    name: str
    light: str
    dark: str
    marker: str
    hollow: bool = False
    """The marker is drawn as an outline."""


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

    @property
    def family(self) -> str:
        """What it is called together with others of its kind: specialists of one method; else its own name."""
        return self.entry.get("family") or self.name

    @property
    def label(self) -> str:
        """Its name, short: a specialist's direction as an angle where it has one."""
        angle = self.entry.get("trained_for")
        return self.name if angle is None else f"{self.family} at {degrees(angle)}"

    @property
    def said(self) -> str:
        """Its label within a sentence, where a comma would divide it in two."""
        return self.label.replace(",", "")

    @property
    def copied(self) -> bool:
        """It is another of the systems under a name of its own: a tuning that chose the untuned setting."""
        return self.entry.get("same_as") is not None

    def rewards(self, objective: str, judged: bool = False) -> list[Figure]:
        """Its points in one objective: true where known, unless the reward model's opinion is asked for."""
        rows = self.entry["points"]
        return [Figure.read(((not judged and row.get("true_rewards")) or row["rewards"])[objective]) for row in rows]


def systems_of(summary: Mapping[str, Any]) -> tuple[System, ...]:
    """All systems of a summary: what DPA is compared with, role by role, then the iterations in their order."""
    entries = summary["systems"]
    roles = {name: role_of(entry) for name, entry in entries.items()}
    names = sorted(entries, key=lambda name: entries[name]["iteration"] or 0)
    found: list[System] = []
    for role in get_args(Role):
        own = [name for name in (names if role == "iteration" else entries) if roles[name] == role]
        seats = _seats(role, own, entries)
        found += [System(name, role, entries[name], _look(role, seats[name], len(own))) for name in own]
    return tuple(found)


def role_of(entry: Mapping[str, Any]) -> Role:
    """The role that the summary gives a system, or what its figures say where it gives none."""
    given: Role | None = entry.get("role")
    if given is not None:
        return given
    if entry["iteration"] is not None:
        return "iteration"
    return "baseline" if entry["points"][0].get("direction") is None else "control"


def _seats(role: Role, names: Sequence[str], entries: Mapping[str, Any]) -> dict[str, int]:
    """Which look each system of a role has: specialists of one family the same, known baselines always their own."""
    if role == "specialist":
        families = list(dict.fromkeys(entries[name].get("family") or name for name in names))
        return {name: families.index(entries[name].get("family") or name) for name in names}
    if role != "baseline":
        return {name: i for i, name in enumerate(names)}
    seats = {name: _BEST_OF if name.startswith(_BEST_OF) else name for name in names}
    known = {name: _SEATS.index(seat) for name, seat in seats.items() if seat in _SEATS}
    free = [seat for seat in range(len(_LOOKS[role]) + len(names)) if seat not in known.values()]
    return known | dict(zip([name for name in names if name not in known], free, strict=False))


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


def headliners(summary: Mapping[str, Any], systems: Sequence[System]) -> list[System]:
    """The systems of the loop's own figures: all, or beside a comparison, which has its own, those of the paper."""
    if not summary.get("comparison"):
        return list(systems)
    kept = ("SFT", "DPO", "SteerLM")
    return [s for s in systems if s.role in ("iteration", "control") or (s.role == "baseline" and s.name in kept)]


def colours(systems: Sequence[System]) -> dict[str, tuple[str, str]]:
    """Every colour of the page by its name, light and dark."""
    return {**INKS, **{system.look.name: (system.look.light, system.look.dark) for system in systems}}


def last_iteration(systems: Sequence[System]) -> System | None:
    """The policy that the run ends with; None where only baselines were evaluated."""
    return next((system for system in reversed(systems) if system.role == "iteration"), None)
