"""Which systems the page shows, what it calls them, and which of its settings stands for a tuned one.

A setting is chosen by E_v J(v) on the tuning prompts, by the reward model's opinion: what the policies were
selected by, too. Neither the truth nor a validation prompt has a part in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dpalign.measure.bootstrap import Array, Bootstrap, Estimate
from dpalign.measure.objective import expected_objective
from dpalign.measure.points import SystemRewards, judged_by_truth
from dpalign.measure.system import System
from dpalign.page.reading import judge_rewards, read_system
from dpalign.page.systems import Role

if TYPE_CHECKING:
    from dpalign.recipe import Recipe

TITLES: Final = {
    "evaluate-sft": "SFT",
    "evaluate-steerlm": "SteerLM",
    "evaluate-dpo": "DPO",
    "evaluate-sft-asked": "SFT, asked",
    "evaluate-base-asked": "base, asked",
}
ASKED: Final = ("evaluate-sft-asked", "evaluate-base-asked")


@dataclass(frozen=True)
class Entrant:
    """An evaluated system as the page shows it."""

    step: str
    """The input that holds its evaluation: evaluate-NAME."""
    folder: Path
    title: str
    role: Role
    iteration: int | None = None
    setting: str = ""
    """Of a system with several settings, the one that was chosen; of soups, the pair of experts in any case."""
    family: str = ""
    """Of specialists, what those of all directions are called together."""
    direction: tuple[float, ...] | None = None
    """Of a specialist, what it was trained for."""


@dataclass(frozen=True, eq=False)
class Evaluated:
    """A system with its rewards."""

    entrant: Entrant
    rewards: SystemRewards
    judged_PVSK: Array | None
    """The judge's opinion, where there is a judge."""

    @property
    def measured(self) -> SystemRewards:
        """By the truth where it is known, else by the reward model."""
        return judged_by_truth(self.rewards) if self.rewards.true_reward_PVSK is not None else self.rewards


@dataclass(frozen=True)
class Trial:
    """A setting of a tuned system, on the tuning prompts."""

    entrant: Entrant
    tuned_in: Path
    objective: Estimate
    """E_v J(v) by the reward model."""
    chosen: bool
    edge: bool
    """At the edge of its grid."""


def read(recipe: "Recipe", entrant: Entrant) -> Evaluated:
    system = read_system(recipe, entrant.title, entrant.iteration, entrant.folder)
    return Evaluated(entrant, system, judge_rewards(recipe, entrant.folder, system))


def entrants(
    recipe: "Recipe", inputs: Mapping[str, Path], systems: Mapping[str, System], grid_UK: Array, bootstrap: Bootstrap
) -> tuple[list[Entrant], dict[str, list[Trial]]]:
    """The systems that a report's inputs hold, and of the tuned ones all their settings: system -> trials."""
    found: list[Entrant] = []
    trials: dict[str, list[Trial]] = {}
    given = [name for name in inputs if name.startswith("evaluate-")]
    own = {name: systems.get(name) or System(name.removeprefix("evaluate-")) for name in given}
    for name, system in own.items():
        same = [other for other, s in own.items() if s.name == system.name]
        if len(same) == 1:
            found.append(_entrant(name, inputs[name], system))
        elif system.name not in trials:
            trials[system.name] = tried(recipe, same, own, inputs, grid_UK, bootstrap)
            found += [trial.entrant for trial in trials[system.name] if trial.chosen]
    return found, trials


def _entrant(name: str, folder: Path, s: System) -> Entrant:
    return Entrant(name, folder, s.name, s.role, s.iteration, s.setting, s.family, s.direction)


def tried(
    recipe: "Recipe",
    names: Sequence[str],
    systems: Mapping[str, System],
    inputs: Mapping[str, Path],
    grid_UK: Array,
    bootstrap: Bootstrap,
) -> list[Trial]:
    folders = [inputs[f"tune-{name.removeprefix('evaluate-')}"] for name in names]
    own = [_entrant(name, inputs[name], systems[name]) for name in names]
    opinions = [
        expected_objective(read_system(recipe, entrant.title, None, folder, truth=False), grid_UK, bootstrap)
        for entrant, folder in zip(own, folders, strict=True)
    ]
    best = max(range(len(own)), key=lambda i: opinions[i].value)
    return [
        Trial(entrant, folder, opinion, i == best, systems[name].at_edge)
        for i, (name, entrant, folder, opinion) in enumerate(zip(names, own, folders, opinions, strict=True))
    ]
