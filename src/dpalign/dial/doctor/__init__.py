"""Check what this machine can run, and whether a model's folder is sound; each fault comes with its cure."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "bad"]
"""ok: sound. note: works, but something is missing or worth knowing. bad: does not work until it is repaired."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    level: Level
    check: str
    text: str
    cure: str = ""
    """A command, or what to do; "" if there is nothing to do."""
