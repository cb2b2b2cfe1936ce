"""Which systems the page shows, what it calls them, and which of its settings stands for a tuned one.

A setting is chosen by E_v J(v) on the tuning prompts, by the reward model's opinion: what the policies were
selected by, too. Neither the truth nor a validation prompt has a part in it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dpalign.measure.bootstrap import Array, Bootstrap, Estimate
from dpalign.measure.objective import expected_objective
from dpalign.measure.points import SystemRewards, judged_by_truth
from dpalign.page.reading import judge_rewards, read_system
from dpalign.page.systems import Role
from dpalign.page.words import listed
from dpalign.pipeline.compare import ABLATIONS, Contender, ablation_step, contenders, spelled
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


def read(recipe: Recipe, entrant: Entrant) -> Evaluated:
    system = read_system(recipe, entrant.title, entrant.iteration, entrant.folder)
    return Evaluated(entrant, system, judge_rewards(recipe, entrant.folder, system))


def entrants(
    recipe: Recipe, inputs: Mapping[str, Path], grid_UK: Array, bootstrap: Bootstrap
) -> tuple[list[Entrant], dict[str, list[Trial]]]:
    """The systems that a report's inputs hold, and of the tuned ones all their settings: system -> trials.

    Raises:
        ValueError: a system was given in several settings, and not all of them with their tuning evaluations.
    """
    given = [contender for contender in contenders(recipe) if f"evaluate-{contender.name}" in inputs]
    names = {f"evaluate-{contender.name}" for contender in given}
    compared = {contender.system for contender in given}
    found = [
        _fixed(recipe, step, path, compared)
        for step, path in inputs.items()
        if step.startswith("evaluate-") and step not in names
    ]
    trials: dict[str, list[Trial]] = {}
    for system in dict.fromkeys(contender.system for contender in given):
        settings = [contender for contender in given if contender.system == system]
        own = [_entrant(recipe, contender, inputs[f"evaluate-{contender.name}"]) for contender in settings]
        if len(own) == 1 and own[0].role != "soup":  # whose experts tell what it is
            own = [replace(own[0], setting="")]  # nothing was chosen
        elif len(own) > 1:
            trials[system] = tried(recipe, settings, own, inputs, grid_UK, bootstrap)
            own = [trial.entrant for trial in trials[system] if trial.chosen]
        found += own
    return found, trials


def tried(
    recipe: Recipe,
    settings: Sequence[Contender],
    own: Sequence[Entrant],
    inputs: Mapping[str, Path],
    grid_UK: Array,
    bootstrap: Bootstrap,
) -> list[Trial]:
    """The settings of a system on the tuning prompts; the best by the reward model is chosen, of equals the first."""
    folders = []
    for contender in settings:
        if f"tune-{contender.name}" not in inputs:
            raise ValueError(
                f"system {contender.system!r} has {len(settings)} settings, and tune-{contender.name} is not given to "
                "choose among them; give the tuning evaluation of each, or one setting alone"
            )
        folders.append(inputs[f"tune-{contender.name}"])
    opinions = [
        expected_objective(read_system(recipe, entrant.title, None, folder, truth=False), grid_UK, bootstrap)
        for entrant, folder in zip(own, folders, strict=True)
    ]
    best = max(range(len(own)), key=lambda i: opinions[i].value)
    return [
        Trial(entrant, folder, opinion, i == best, contender.edge)
        for i, (contender, entrant, folder, opinion) in enumerate(zip(settings, own, folders, opinions, strict=True))
    ]


def _entrant(recipe: Recipe, contender: Contender, folder: Path) -> Entrant:
    step, system = f"evaluate-{contender.name}", contender.system
    direction = direction_of(contender)
    role: Role = "specialist" if direction is not None else "soup" if contender.asked.kind == "soup" else "baseline"
    family = system.partition(" at ")[0] if direction is not None else ""
    setting = _experts(recipe, folder) if role == "soup" else contender.setting
    return Entrant(step, folder, system, role, None, setting, family, direction)


def _experts(recipe: Recipe, folder: Path) -> str:
    """What a soup's experts were trained for, as its evaluation mixed them."""
    mixed = json.loads((folder / "soup.json").read_text(encoding="utf-8"))
    return listed([spelled(recipe, v_K) for v_K in mixed["experts"]])


def direction_of(contender: Contender) -> tuple[float, ...] | None:
    """The one direction that a specialist was trained for; None of any other system."""
    listed = [step.knobs["preference.listed"] for step in contender.made_by if "preference.listed" in step.knobs]
    distinct = {tuple(directions[0]) for directions in listed}
    return next(iter(distinct)) if len(distinct) == 1 and contender.asked.kind != "soup" else None


def _fixed(recipe: Recipe, step: str, folder: Path, compared: set[str]) -> Entrant:
    """A system that is evaluated in one way: by the loop itself, or named on the command line."""
    iteration = iteration_of(step)
    if iteration is not None:
        return Entrant(step, folder, f"DPA t={iteration}", "iteration", iteration)
    for name in ABLATIONS:
        if step == f"evaluate-{ablation_step(name, 'policy')}":
            return Entrant(step, folder, f"DPA t={recipe.iterations}, {name}", "ablation")
    title = TITLES.get(step, step.removeprefix("evaluate-"))
    if title in compared:  # a checkpoint taken as it is, beside one of the same method that this run trained
        title = f"{title}, {Path(recipe.evaluation.dpo).name}"
    return Entrant(step, folder, title, "control" if step in ASKED else "baseline")


def iteration_of(step: str) -> int | None:
    """The iteration of an evaluated policy; pi_0, the SteerLM on D2, is t = 0 as in Fig. 4."""
    number = step.removeprefix("evaluate-policy-")
    if number != step and number.isdecimal():
        return int(number)
    return 0 if step == "evaluate-steerlm-d2" else None
