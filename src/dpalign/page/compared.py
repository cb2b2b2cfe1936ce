"""What a comparison adds to the summary: differences, specialists, tuning, Table 1 as measured, feasibility, trust."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpalign.measure.comparison import Specialist, differences, shortfalls
from dpalign.measure.objective import expected_objective
from dpalign.measure.paper_curves import FIG_4
from dpalign.measure.points import require_same_prompts
from dpalign.measure.summary import Setting, jsonable
from dpalign.measure.trust import overoptimisation
from dpalign.page.entrants import Evaluated, Trial, read
from dpalign.page.ledgers import footprint, objectives_read
from dpalign.page.steered import Steered, answers_a_reply, control_leads, control_of, steered
from dpalign.stages.feasibility import with_margin

if TYPE_CHECKING:
    from dpalign.recipe import Recipe

BESIDE_LAST = ("baseline", "soup", "specialist")
"""The roles that Table 1 has beside the last iteration."""


def comparison(
    recipe: "Recipe",
    inputs: Mapping[str, Path],
    systems: Sequence[Evaluated],
    setting: Setting,
    entries: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The last iteration beside all others.

    Args:
        inputs: the report's, which hold more evaluations than the systems shown.

    Returns:
        last: its name; differences: E_v J(v) and hypervolume against each other system; specialists: what is lost at
        each one's own direction; table_1: a row a system; control_leads: by how much it follows better than each;
        wishes: what a wish in words changed; knobs_set: what steps of its systems set, whatever the recipe
        says; paper_curves: Fig. 4's points, where the recipe asks for them.
    """
    last, groups = last_of(systems), groups_of(systems, entries)
    told = {name: steered(recipe, members, setting) for name, members in groups.items()}
    found: dict[str, Any] = {
        "last": last.entrant.title if last else None,
        "differences": [],
        "specialists": {"rows": [], "families": {}},
        "table_1": table_1(recipe, groups, told, setting),
        "control_leads": [],
        "knobs_set": [],
        "wishes": wishes(recipe, inputs, systems, setting),
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
        others_told = {name: one for name, one in told.items() if name != last.entrant.title}
        found["control_leads"] = control_leads(told[last.entrant.title], others_told, setting)
        found["specialists"] = shortfalls(last.measured, experts, setting.objectives, setting.bootstrap)
    plain: dict[str, Any] = jsonable(found)
    return plain


def last_of(systems: Sequence[Evaluated]) -> Evaluated | None:
    """The policy that the run ends with."""
    iterated = [system for system in systems if system.entrant.role == "iteration"]
    return max(iterated, key=lambda system: system.entrant.iteration or 0, default=None)


def groups_of(systems: Sequence[Evaluated], entries: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Evaluated]]:
    """The rows of Table 1: the last iteration and all that stands beside it, the specialists of a method together."""
    last = last_of(systems)
    groups: dict[str, list[Evaluated]] = {}
    for system in systems:
        entrant = system.entrant
        if (entrant.role in BESIDE_LAST or system is last) and not entries[entrant.title].get("same_as"):
            groups.setdefault(entrant.family or entrant.title, []).append(system)
    return groups


def table_1(
    recipe: "Recipe", groups: Mapping[str, Sequence[Evaluated]], told: Mapping[str, Steered], setting: Setting
) -> list[dict[str, Any]]:
    """The paper's Table 1, each cell measured: a row a system."""
    rows: list[dict[str, Any]] = []
    for name, members in groups.items():
        entrant = members[0].entrant
        kept = [footprint(member.entrant.folder) for member in members]
        sizes = [one.bytes for one in kept]
        read_by = [objectives_read(member.entrant.folder, setting.objectives) for member in members]
        rows.append(
            {
                "system": name,
                "role": entrant.role,
                "setting": entrant.setting if entrant.role != "specialist" else "",
                "members": [member.entrant.title for member in members],
                "objectives_read": list(dict.fromkeys(read for each in read_by for read in each)),
                **control_of(told[name], setting),
                "models": sum(one.models for one in kept),
                "bytes": None if None in sizes else sum(size for size in sizes if size is not None),
                "switch_seconds": kept[0].switch_seconds,
                "answers_a_reply": answers_a_reply(recipe, entrant.folder),
            }
        )
    return rows


def wishes(
    recipe: "Recipe", inputs: Mapping[str, Path], systems: Sequence[Evaluated], setting: Setting
) -> list[dict[str, Any]]:
    """What the wish to be brief changed in each system that was asked for it in words, paired by prompt.

    Returns:
        [{system, objective, unasked, asked, change}]: the objective is verbosity, or the first that users want less of.
    """
    unwanted = [name for name, sense in zip(setting.objectives, setting.senses_K, strict=True) if sense < 0]
    if not unwanted:
        return []
    objective = "verbosity" if "verbosity" in unwanted else unwanted[0]
    k, rows = setting.objectives.index(objective), []
    for system in systems:
        unasked = inputs.get(system.entrant.step.removesuffix("-brief"))
        if unasked is None or unasked == system.entrant.folder:
            continue
        other = read(recipe, replace(system.entrant, folder=unasked)).measured
        require_same_prompts([system.measured, other])
        asked_P, unasked_P = (one.mean_PVK[:, :, k].mean(axis=1) for one in (system.measured, other))
        weight_RP = setting.bootstrap.weights(len(asked_P))
        row: dict[str, Any] = {"system": system.entrant.title, "objective": objective}
        for name, figure_P in (("unasked", unasked_P), ("asked", asked_P), ("change", asked_P - unasked_P)):
            row[name] = setting.bootstrap.interval(figure_P.mean(), weight_RP @ figure_P)
        rows.append(row)
    return rows


def tuning(recipe: "Recipe", trials: Mapping[str, Sequence[Trial]], setting: Setting) -> dict[str, Any]:
    """Every setting of every tuned system: system -> [{name, setting, tuning_objective, objective, chosen, edge}].

    `tuning_objective` is by the reward model on the tuning prompts, and decided; `objective` is measured as all
    figures are, on the validation prompts, and is shown so that a reader can see what another choice would have given.
    `edge`: the setting ends a grid that could go on there.
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
                "edge": trial.edge,
            }
            for trial in tried
        ]
        for system, tried in trials.items()
    }
    plain: dict[str, Any] = jsonable(found)
    return plain


def feasibility(recipe: "Recipe", inputs: Mapping[str, Path], systems: Sequence[Evaluated]) -> dict[str, Any]:
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
