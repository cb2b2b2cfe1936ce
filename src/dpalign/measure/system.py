"""A compared system: what it is, said once where its evaluation is planned, and read wherever it is shown."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal

Role = Literal["baseline", "control", "specialist", "soup", "ablation", "iteration"]
"""baseline: what users have without DPA. control: a model that never learnt directions, asked for them. specialist:
trained for one direction. soup: mixed from specialists for each direction. ablation: the loop without a part of it."""

FILE: Final = "system.json"
"""Where an evaluate folder keeps its system."""


@dataclass(frozen=True)
class System:
    """One system in one of its settings. An evaluate folder keeps it as system.json."""

    name: str
    """What the page calls it. Settings of one system share the name."""
    role: Role = "baseline"
    setting: str = ""
    """What tells it from the system's other settings, such as "beta 0.1"."""
    at_edge: bool = False
    """Its setting is the first or the last of a grid that could go on there."""
    iteration: int | None = None
    """Of a policy of the loop: t; 0 for the SteerLM that samples first."""
    direction: tuple[float, ...] | None = None
    """Of a specialist: the unit vector it was trained for."""
    family: str = ""
    """Of a specialist: what those of all directions are called together."""
    compared: bool = False
    """Made by `dpa compare` alone."""

    @property
    def group(self) -> str:
        """Its family, or its own name: specialists of one method share a row of Table 1."""
        return self.family or self.name


def read_system_description(folder: Path, step: str) -> System:
    """The system of an evaluate folder.

    A folder without the file was made by a stage that ran alone: it is a baseline under the name of its step.

    Raises:
        ValueError: the file has unknown keys.
    """
    path = folder / FILE
    if not path.is_file():
        return System(step.partition("-")[2] or step)
    values: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    known = {field.name for field in fields(System)}
    unknown = [key for key in values if key not in known]
    if unknown or "name" not in values:
        raise ValueError(f"{path}: {unknown or 'no name'}; a system has {', '.join(sorted(known))}")
    direction = values.get("direction")
    return System(**{**values, "direction": None if direction is None else tuple(direction)})
