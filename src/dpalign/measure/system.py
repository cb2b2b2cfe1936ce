"""A compared system: what it is, said once where its evaluation is planned, and read wherever it is shown."""

from dataclasses import dataclass
from typing import Final, Literal

Role = Literal["baseline", "control", "specialist", "soup", "ablation", "iteration"]
"""baseline: what users have without DPA. control: a model that never learnt directions, asked for them. specialist:
trained for one direction. soup: mixed from specialists for each direction. ablation: the loop without a part of it."""


@dataclass(frozen=True)
class System:
    """One system in one of its settings. A run tells its report which system each of its inputs is."""

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


def policy_at(t: int) -> System:
    """A policy of the loop; t = 0 is the SteerLM that samples first."""
    return System(f"DPA t={t}", "iteration", iteration=t)


BESIDE_THE_LOOP: Final = {
    "steerlm": System("SteerLM"),
    "sft": System("SFT"),
    "dpo": System("DPO"),
    "sft-asked": System("SFT, asked", "control"),
    "base-asked": System("base, asked", "control"),
    "steerlm-d2": policy_at(0),
}
"""What every run evaluates, by the NAME of its step evaluate-NAME."""
