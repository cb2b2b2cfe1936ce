"""What a comparison adds to the summary: differences, specialists, tuning, Table 1 as measured, feasibility, trust."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dpalign.evaluation.comparison import Specialist, differences, shortfalls
from dpalign.evaluation.control import control, following, is_dial
from dpalign.evaluation.feasibility import with_margin
from dpalign.evaluation.objective import expected_objective
from dpalign.evaluation.paper_curves import FIG_4
from dpalign.evaluation.points import SystemRewards
from dpalign.evaluation.summary import Setting, jsonable
from dpalign.evaluation.trust import overoptimisation
from dpalign.ledger import LEDGER, read_ledger
from dpalign.recipe import Recipe
from dpalign.report.entrants import Evaluated, Trial, read
from dpalign.report.ledgers import footprint, objectives_read
from dpalign.report.reading import asked_targets

BESIDE_LAST = ("baseline", "soup", "specialist")
"""The roles that Table 1 has beside the last iteration."""


def comparison(
    recipe: Recipe, systems: Sequence[Evaluated], setting: Setting, entries: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The last iteration beside all others.

    Returns:
        last: its name; differences: E_v J(v) and hypervolume against each other system; specialists: what is lost at
        each one's own direction; table_1: a row a system; paper_curves: Fig. 4's points, where the recipe asks for
        them.
    """
    last = last_of(systems)
    found: dict[str, Any] = {
        "last": last.entrant.title if last else None,
        "differences": [],
        "specialists": {"rows": [], "families": {}},
        "table_1": table_1(recipe, systems, setting, entries),
        "paper_curves": {name: list(points) for name, points in FIG_4.items()} if recipe.compare.paper_curves else None,
    }
    if last is not None:
        others = [system.measured for system in systems if system is not last]
        found["differences"] = differences(
            last.measured, others, setting.directions_UK, setting.senses_K, setting.reference_K, setting.bootstrap
        )
        experts = [
            Specialist(system.measured, system.entrant.family, np.array(system.entrant.direction))
            for system in systems
            if system.entrant.direction is not None
        ]
        found["specialists"] = shortfalls(last.measured, experts, setting.objectives, setting.bootstrap)
    plain: dict[str, Any] = jsonable(found)
    return plain


def last_of(systems: Sequence[Evaluated]) -> Evaluated | None:
    """The policy that the run ends with."""
    iterated = [system for system in systems if system.entrant.role == "iteration"]
    return max(iterated, key=lambda system: system.entrant.iteration or 0, default=None)


def table_1(
    recipe: Recipe, systems: Sequence[Evaluated], setting: Setting, entries: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The paper's Table 1, each cell measured: a row a system, the specialists of a method together."""
    last = last_of(systems)
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for system in systems:
        entrant = system.entrant
        name = entrant.family or entrant.title
        if name in seen or (entrant.role not in BESIDE_LAST and system is not last):
            continue
        if entries[entrant.title].get("same_as"):
            continue
        seen.add(name)
        members = [other for other in systems if (other.entrant.family or other.entrant.title) == name]
        kept = [footprint(member.entrant.folder) for member in members]
        sizes = [one.bytes for one in kept]
        read_by = [objectives_read(member.entrant.folder, setting.objectives) for member in members]
        rows.append(
            {
                "system": name,
                "role": entrant.role,
                "members": [member.entrant.title for member in members],
                "objectives_read": list(dict.fromkeys(read for each in read_by for read in each)),
                **_control(recipe, members, setting),
                "models": sum(one.models for one in kept),
                "bytes": None if None in sizes else sum(size for size in sizes if size is not None),
                "switch_seconds": kept[0].switch_seconds,
                "answers_a_reply": _answers_a_reply(recipe, entrant.folder),
            }
        )
    return rows


def _control(recipe: Recipe, members: Sequence[Evaluated], setting: Setting) -> dict[str, Any]:
    """How a system is told what is wanted, and how its second objective follows."""
    system, entrant = members[0].measured, members[0].entrant
    unmeasured = {"kendall_tau": None, "spearman": None, "span": None}
    if entrant.direction is not None:
        told = f"a model a direction ({len(members)} trained)"
        system = _together(members)
    elif system.directions_VK is not None:
        told = "weights of a mixture" if entrant.role == "soup" else "a direction"
        if _answers_a_reply(recipe, entrant.folder) > 1:
            told = "a direction, which chooses"
    elif (asked_VK := asked_targets(recipe, entrant.folder)) is not None:
        told = "reward targets"
        if len(setting.objectives) > 1 and len(asked_VK) > 1:
            found = following(system, asked_VK[:, 1], setting.bootstrap)
            return {"told_by": told} | {name: getattr(found, name) for name in unmeasured}
    else:
        told = "words alone" if "brief" in entrant.step else "nothing"
    if not is_dial(system.directions_VK):
        return {"told_by": told} | unmeasured
    dial = control(system, setting.bootstrap)
    return {"told_by": told} | {name: getattr(dial, name) for name in unmeasured}


def _together(members: Sequence[Evaluated]) -> SystemRewards:
    """The specialists of a method as one system that is steered by taking another model."""
    in_order = sorted(members, key=lambda member: tuple(-w for w in reversed(member.entrant.direction or ())))
    first = in_order[0].measured
    return replace(
        first,
        directions_VK=np.array([member.entrant.direction for member in in_order]),
        reward_PVSK=np.concatenate([member.measured.reward_PVSK for member in in_order], axis=1),
        true_reward_PVSK=None,
    )


def _answers_a_reply(recipe: Recipe, folder: Path) -> int:
    """Answers that are sampled for each that a user reads."""
    ledger = read_ledger(folder) if (folder / LEDGER).is_file() else None
    best_of_n = ledger is not None and ledger["knobs"].get("step.condition") == "best-of-n"
    return recipe.evaluation.best_of if best_of_n else 1


def tuning(recipe: Recipe, trials: Mapping[str, Sequence[Trial]], setting: Setting) -> dict[str, Any]:
    """Every setting of every tuned system: system -> [{name, setting, tuning_objective, objective, chosen}].

    `tuning_objective` is by the reward model on the tuning prompts, and decided; `objective` is measured as all
    figures are, on the validation prompts, and is shown so that a reader can see what another choice would have given.
    """
    found: dict[str, Any] = {
        system: [
            {
                "name": trial.entrant.step.removeprefix("evaluate-"),
                "setting": trial.entrant.setting,
                "tuning_objective": trial.objective,
                "objective": expected_objective(
                    read(recipe, trial.entrant).measured, setting.directions_UK, setting.bootstrap
                ),
                "chosen": trial.chosen,
            }
            for trial in tried
        ]
        for system, tried in trials.items()
    }
    plain: dict[str, Any] = jsonable(found)
    return plain


def feasibility(recipe: Recipe, inputs: Mapping[str, Path], systems: Sequence[Evaluated]) -> dict[str, Any]:
    """What each feasibility step found: the system's title -> its feasibility.json, the training's margin apart."""
    titles = {system.entrant.step.removeprefix("evaluate-"): system.entrant.title for system in systems}
    found = {}
    for name, folder in inputs.items():
        if name.startswith("feasible-"):
            own = name.removeprefix("feasible-")
            told = json.loads((folder / "feasibility.json").read_text(encoding="utf-8"))
            found[titles.get(own, own)] = with_margin(told, folder, recipe)
    return found


def trust(systems: Sequence[Evaluated], setting: Setting) -> dict[str, Any] | None:
    """The over-optimisation curve over the iterations; None without iterations, or without a check."""
    iterated = [system for system in systems if system.entrant.role == "iteration"]
    iterated.sort(key=lambda system: system.entrant.iteration or 0)
    known = [system.rewards.true_reward_PVSK is not None for system in iterated]
    judged = [system.judged_PVSK is not None for system in iterated]
    if not iterated or not (all(known) or all(judged)):
        return None
    by_judge = [replace(system.rewards, true_reward_PVSK=system.judged_PVSK) for system in iterated]
    checked = [system.rewards for system in iterated] if all(known) else by_judge
    check = "truth" if all(known) else "judge"
    found = overoptimisation(checked, check, setting.directions_UK, setting.bootstrap)
    if all(known) and all(judged):  # what a run without a truth would have seen
        for row, system in zip(found["curve"], iterated, strict=True):
            assert system.judged_PVSK is not None
            opinion = replace(system.rewards, reward_PVSK=system.judged_PVSK)
            row["judge"] = expected_objective(opinion, setting.directions_UK, setting.bootstrap)
    plain: dict[str, Any] = jsonable(found)
    return plain
