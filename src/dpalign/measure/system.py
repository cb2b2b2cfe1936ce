"""A compared system: defined once, where its evaluation is planned, and read wherever it is shown."""

from dataclasses import dataclass
from typing import Final, Literal

Role = Literal["baseline", "control", "specialist", "soup", "ablation", "iteration"]
"""baseline: what users have without DPA. control: a model that never learnt directions, asked for them. specialist:
trained for one direction. soup: mixed from specialists for each direction. ablation: the loop without a part of it.
iteration: a policy of the loop."""


@dataclass(frozen=True)
class System:
    """One system in one of its settings. A run tells its report which system each of its inputs is."""

    name: str
    """Its name on the page. Settings of one system share the name."""
    role: Role = "baseline"
    setting: str = ""
    """Distinguishes it from the system's other settings, such as "beta 0.1"."""
    at_edge: bool = False
    """Its setting is the first or the last of a grid that could be extended there."""
    iteration: int | None = None
    """The t of a policy of the loop; 0 for the SteerLM that samples first."""
    direction: tuple[float, ...] | None = None
    """The unit vector that a specialist was trained for."""
    family: str = ""
    """The common name of a method's specialists, such as "RSF"."""
    compared: bool = False
    """Only `dpa compare` makes it."""

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
"""Systems that a run evaluates beside its policies, some only on request; by the NAME of the step evaluate-NAME."""
