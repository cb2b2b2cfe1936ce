"""What is compared: systems, each at one or several points, whose answers are to be drawn or are there already.

A policy with a `dpa.json` beside it is asked for directions; one without answers plainly, or under system
lines of the user's choice (SteerLM's targets, a wish for brevity). Points of one name make a curve.
"""

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from dpalign.paper.direction import Arc, Preference, evaluation_grid
from dpalign.paper.prompts import render_preference
from dpalign.train.contract import Contract, read_contract

DIRECTIONS: Final = 7
"""Even steps over the trained arc where no directions are given: as many as Fig. 5 has points of DPA."""
OUTPUTS: Final = "outputs.json"
SYSTEM: Final = "system.json"


@dataclass(frozen=True)
class Point:
    """One system at one direction: one answer to each instruction."""

    system: str
    label: str = ""
    """Tells it from the system's other points; "" for a system of one point."""
    policy: Path | None = None
    """The checkpoint to draw the answers from; None where they are there already."""
    line: str | None = None
    """The system line it is asked under."""
    weights: Mapping[str, float] | None = None
    """The direction, by objective."""
    angle: float | None = None
    """Degrees, over two objectives."""
    outputs: Path | None = None
    """The file with the answers, where they are there already."""

    @property
    def name(self) -> str:
        return f"{self.system}@{self.label}" if self.label else self.system

    @property
    def slug(self) -> str:
        """The name as part of a stage's: `dpa@-7.5` is dpa-minus-7_5."""
        text = re.sub(r"(?<![\w])-(?=[\d.])", "minus-", self.name.replace("@", "\0")).replace(".", "_").lower()
        return re.sub(r"[^a-z0-9_-]+", "-", text).strip("-")


def policy_folder(stage: Path) -> Path:
    """The model in a finished stage's folder, or a plain checkpoint.

    Raises:
        ValueError: no folder: checkpoints are fetched by the user, not by us.
    """
    named = stage / "checkpoint.txt"
    folder = Path(named.read_text().strip()) if named.is_file() else stage
    folder = folder / "model" if (folder / "model").is_dir() else folder
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a policy is a local checkpoint (fetch one of the hub's first)")
    return folder


def policy_points(
    word: str, angles: Sequence[float], weights: Sequence[Sequence[float]], lines: Mapping[str, Sequence[str]]
) -> list[Point]:
    """The points of one policy as the command line names it, FOLDER or NAME=FOLDER.

    Args:
        angles: degrees; for policies of two objectives.
        weights: directions by objective, in the order of the contract.
        lines: system lines by policy name, for policies without a dial.

    Raises:
        ValueError: no such folder, or directions that this policy cannot be asked for.
    """
    name, equals, rest = word.partition("=")
    if not equals or "/" in name or Path(word).exists():
        name, rest = "", word
    model = policy_folder(Path(rest))
    name = name or (model.parent if model.name == "model" else model.resolve()).name
    contract, asked = read_contract(model), lines.get(name, ())
    if contract is not None and not asked:
        return [_steered(name, model, contract, v) for v in _directions(word, contract, angles, weights)]
    if len(asked) == 1 or not asked:
        return [Point(name, policy=model, line=asked[0] if asked else None)]
    return [Point(name, f"line-{i}", model, line) for i, line in enumerate(asked, start=1)]


def _directions(
    word: str, contract: Contract, angles: Sequence[float], weights: Sequence[Sequence[float]]
) -> list[tuple[str, Preference]]:
    """(label, direction) of what was asked for, or even steps over the trained arc."""
    names = contract.names
    if not angles and not weights:
        if contract.arc is None or len(names) != 2:
            raise ValueError(
                f"{word}: its directions are of {', '.join(names)} and of no arc; give them with --weights"
            )
        grid_VK = evaluation_grid(Arc(*contract.arc), DIRECTIONS)
        angles = [round(Preference.from_vector(v_K, names).angle, 6) + 0.0 for v_K in grid_VK.tolist()]
    try:
        asked = [(f"{angle:g}", Preference.from_angle(angle, names)) for angle in angles]
        return asked + [(",".join(f"{w:g}" for w in v_K), Preference.from_vector(v_K, names)) for v_K in weights]
    except ValueError as error:
        raise ValueError(f"{word}: {error}") from error


def _steered(name: str, model: Path, contract: Contract, asked: tuple[str, Preference]) -> Point:
    label, preference = asked
    angle = round(preference.angle, 6) + 0.0 if len(preference.v) == 2 else None
    line = render_preference(preference, contract.template)
    return Point(name, label, model, line, preference.weights, angle)


def given_point(word: str) -> Point:
    """A system whose answers are in a file: NAME=FILE, or NAME@LABEL=FILE for one of its points."""
    name, equals, file = word.partition("=")
    system, _, label = name.partition("@")
    if not equals or not system or not file:
        raise ValueError(f"--outputs {word}: give NAME=FILE, or NAME@LABEL=FILE for a point of a curve")
    if not Path(file).is_file():
        raise ValueError(f"--outputs {word}: {file}: no such file")
    angle = None
    with contextlib.suppress(ValueError):
        angle = float(label)
    return Point(system, label, angle=angle, outputs=Path(file))


def earlier_points(folder: Path) -> list[Point]:
    """All answers that an earlier command drew into its --out folder, say on a machine with a GPU.

    Raises:
        ValueError: there are none.
    """
    found = []
    for path in sorted(folder.glob(f"outputs-*/{SYSTEM}")):
        if path.parent.suffix:  # unfinished, or being replaced
            continue
        said = cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
        found.append(
            Point(
                said["system"], said["label"], None, said["line"], said["weights"], said["angle"], path.parent / OUTPUTS
            )
        )
    if not found:
        raise ValueError(f"--outputs-from {folder}: no finished answers here (outputs-*/{OUTPUTS})")
    return found


def in_order(points: Sequence[Point]) -> list[Point]:
    """Systems as they were named, each system's points along its dial: from the highest angle down.

    Raises:
        ValueError: none, or two points of one name.
    """
    if not points:
        raise ValueError("no systems: name a POLICY, or answers with --outputs or --outputs-from")
    slugs: dict[str, Point] = {}
    for point in points:
        if not point.slug:
            raise ValueError(f"{point.name!r}: no name for a system; use letters and digits")
        if (other := slugs.setdefault(point.slug, point)) is not point:
            raise ValueError(f"two systems of one name: {other.name!r} and {point.name!r}; give each its own")
    systems = list(dict.fromkeys(point.system for point in points))
    ordered = []
    for system in systems:
        own = [point for point in points if point.system == system]
        if all(point.angle is not None for point in own):
            own.sort(key=lambda point: -cast(float, point.angle))
        ordered += own
    return ordered
