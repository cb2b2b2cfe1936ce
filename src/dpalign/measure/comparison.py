"""The last iteration against every other system: which pairs are compared, and by how much they differ.

A system that a direction steers is compared on its whole front. A specialist was trained for one direction
only. Its reward there is about the ceiling of the steered policy at that direction.

Shapes: U evaluation directions, R replicates, P prompts, V conditions, K objectives.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dpalign.measure.bootstrap import Array, Bootstrap, Estimate, replicate_means
from dpalign.measure.control import dial_angles, following, following_lead, is_dial
from dpalign.measure.hypervolume import hypervolume_share
from dpalign.measure.lineage import condition_of, footprint, objectives_read, unasked_twin
from dpalign.measure.objective import expected_objective, objective_difference, reach
from dpalign.measure.points import Rewards, require_same_prompts
from dpalign.measure.reading import Reading, asked_targets, read_rewards
from dpalign.measure.setting import Setting
from dpalign.measure.summarize import fewest_replicates
from dpalign.measure.summary import BriefWish, Comparison, Difference, Shortfall, TableRow, TunedSetting
from dpalign.paper.direction import Population


def comparison_pairs(systems: Sequence[Rewards]) -> list[tuple[str, str]]:
    """The (a, b) of a comparison's dominance table.

    - The last iteration over every other system and every earlier iteration, but over no ablation.
    - Each iteration over the one before it.
    - Each baseline or soup with several points over the last iteration, so that a rival's win shows.

    Fewer pairs lose less to Holm's adjustment.
    """
    iterations = [one.name for one in sorted(_of(systems, "iteration"), key=lambda one: one.system.iteration or 0)]
    others = _of(systems, "baseline", "control", "specialist", "soup")
    rivals = [one for one in _of(systems, "baseline", "soup") if one.reward_PVSK.shape[1] > 1]
    if not iterations:
        return []
    last = iterations[-1]
    pairs = [(last, other) for other in (*(one.name for one in others), *iterations[:-1])]
    pairs += [(b, a) for a, b in pairwise(iterations)]
    return list(dict.fromkeys([*pairs, *((rival.name, last) for rival in rivals)]))


def _of(systems: Sequence[Rewards], *roles: str) -> list[Rewards]:
    return [one for one in systems if one.system.role in roles]


def last_of(systems: Sequence[Rewards]) -> Rewards | None:
    """The policy that the run ends with; None without iterations."""
    return max(_of(systems, "iteration"), key=lambda one: one.system.iteration or 0, default=None)


def enough_replicates(bootstrap: Bootstrap, pairs: int) -> Bootstrap:
    """The bootstrap, with more replicates if a decision over this many pairs needs them."""
    needed = 2 * fewest_replicates(pairs, bootstrap.level)  # with the fewest a p-value just reaches the level
    return bootstrap if needed <= bootstrap.replicates else replace(bootstrap, replicates=needed)


def copies_of(systems: Sequence[Rewards]) -> dict[str, str]:
    """Each system that shares its evaluation with an earlier one -> that one's name."""
    first: dict[Path | None, str] = {}
    for one in systems:
        first.setdefault(one.folder, one.name)
    return {one.name: first[one.folder] for one in systems if one.folder and first[one.folder] != one.name}


@dataclass(frozen=True)
class Sources:
    """What a comparison reads beside the rewards of the shown systems."""

    reading: Reading
    folders: tuple[Path, ...]
    """All evaluate folders of the report, including those of settings that were not chosen."""
    best_of: int
    """Answers that best-of-n samples for each answer it returns."""
    population: Callable[[Mapping[str, Any]], Population]
    """Gives the population that a stage's knobs state."""


def comparison(systems: Sequence[Rewards], copies: Mapping[str, str], setting: Setting, sources: Sources) -> Comparison:
    """Compare the last iteration with all others; the caller adds tuning and feasibility.

    Args:
        copies: the systems that are copies of another; they get no row in Table 1.
    """
    last = last_of(systems)
    groups: dict[str, list[Rewards]] = {}
    for one in systems:
        if (one is last or one.system.role in ("baseline", "soup", "specialist")) and one.name not in copies:
            groups.setdefault(one.system.group, []).append(one)
    told = {name: told_by(members, setting) for name, members in groups.items()}
    found = Comparison(
        table_1=tuple(_row(name, members, told[name], setting, sources) for name, members in groups.items()),
        wishes=wishes(systems, setting, sources),
    )
    if last is None:
        return found
    others = [one.measured for one in systems if one is not last]
    own = told[last.system.group]
    shortfall, families = shortfalls(last.measured, _of(systems, "specialist"), setting.bootstrap)
    return found.model_copy(
        update={
            "differences": {one.name: difference(last.measured, one, setting) for one in others},
            "shortfalls": tuple(shortfall),
            "family_shortfalls": families,
            "control_leads": {
                name: following_lead(own.rewards, own.asked_V, one.rewards, one.asked_V, setting.bootstrap)
                for name, one in told.items()
                if one is not own and own.asked_V is not None and one.asked_V is not None
            },
        }
    )


def difference(last: Rewards, other: Rewards, setting: Setting) -> Difference:
    """Compare the last iteration with another system, paired by prompt; the ratio is None without a reference."""
    ratio = None
    if setting.reference_K is not None:
        ratio = hypervolume_share(last, other, setting.senses_K, setting.reference_K, setting.bootstrap)
    return Difference(
        objective=objective_difference(last, other, setting.directions_UK, setting.bootstrap), hypervolume_ratio=ratio
    )


@dataclass(frozen=True, eq=False)
class Told:
    """A row of Table 1 as its user steers it: a system, or the specialists of a method as one."""

    by: str
    """How its user says what is wanted."""
    rewards: Rewards
    asked_V: Array | None
    """What each condition asks of the second objective, an angle or reward points; None without a dial."""


def told_by(members: Sequence[Rewards], setting: Setting) -> Told:
    """Find how a row's user says what is wanted; members with a direction are models to choose among."""
    first = members[0]
    rewards, folder = first.measured, first.source
    targets_VK = asked_targets(folder)
    if first.system.direction is not None:
        by, rewards = f"a model a direction ({len(members)} trained)", _together(members)
    elif rewards.directions_VK is not None:
        by = "weights of a mixture" if first.system.role == "soup" else "a direction"
        if condition_of(folder) == "best-of-n":
            by = "a direction, which chooses"
    elif targets_VK is not None:
        several = len(setting.objectives) > 1 and len(targets_VK) > 1
        return Told("reward targets", rewards, targets_VK[:, 1] if several else None)
    else:
        by = "words alone" if condition_of(folder) == "brief" else "nothing"
    return Told(by, rewards, dial_angles(rewards.directions_VK) if is_dial(rewards.directions_VK) else None)


def _together(members: Sequence[Rewards]) -> Rewards:
    """Join the specialists of a method into one system, steered by changing the model."""
    in_order = sorted(members, key=lambda member: tuple(-w for w in reversed(member.system.direction or ())))
    return replace(
        in_order[0].measured,
        directions_VK=np.array([member.system.direction for member in in_order]),
        reward_PVSK=np.concatenate([member.measured.reward_PVSK for member in in_order], axis=1),
        true_reward_PVSK=None,
    )


def _row(name: str, members: Sequence[Rewards], told: Told, setting: Setting, sources: Sources) -> TableRow:
    folders = [member.source for member in members]
    kept = [footprint(folder) for folder in folders]
    sizes = [one.bytes for one in kept]
    read = [objectives_read(folder, setting.objectives, sources.population) for folder in folders]
    control: dict[str, Any] = {"conditions": told.rewards.reward_PVSK.shape[1]}
    if told.asked_V is not None:
        control = vars(following(told.rewards, told.asked_V, setting.bootstrap))
    return TableRow(
        name=name,
        members=tuple(member.name for member in members),
        objectives_read=tuple(dict.fromkeys(objective for each in read for objective in each)),
        told_by=told.by,
        models=sum(one.models for one in kept),
        bytes=None if None in sizes else sum(size for size in sizes if size is not None),
        switch_seconds=kept[0].switch_seconds,
        answers_a_reply=sources.best_of if condition_of(folders[0]) == "best-of-n" else 1,
        **control,
    )


def wishes(systems: Iterable[Rewards], setting: Setting, sources: Sources) -> dict[str, BriefWish]:
    """The effect of a wish in words to be brief on each system that was asked for it, paired by prompt.

    Measured on verbosity, or on the first objective that users want less of.
    """
    unwanted = [name for name, sense in zip(setting.objectives, setting.senses_K, strict=True) if sense < 0]
    if not unwanted:
        return {}
    objective = "verbosity" if "verbosity" in unwanted else unwanted[0]
    k, found = setting.objectives.index(objective), {}
    for rewards in systems:
        twin = unasked_twin(rewards.source, sources.folders)
        if twin is None:
            continue
        other = read_rewards(twin, rewards.system, sources.reading).measured
        require_same_prompts([rewards, other])
        asked_P, unasked_P = (one.mean_PVK[:, :, k].mean(axis=1) for one in (rewards.measured, other))
        found[rewards.name] = BriefWish(
            objective=objective,
            unasked=setting.bootstrap.mean(unasked_P),
            asked=setting.bootstrap.mean(asked_P),
            change=setting.bootstrap.mean(asked_P - unasked_P),
        )
    return found


Tried = dict[str, list[tuple[Rewards, Rewards]]]
"""Tuned system -> the rewards of each setting on the validation prompts and on the tuning prompts."""


def choose_settings(
    evaluated: Sequence[tuple[str, Rewards]], tuning: Mapping[str, Rewards], directions_UK: Array, bootstrap: Bootstrap
) -> tuple[list[Rewards], Tried]:
    """Keep each system once, in the best setting by the reward model on the tuning prompts (the first of a tie).

    The choice uses neither the truth nor validation prompts.

    Args:
        evaluated: the systems by the names of their evaluations.
        tuning: the same systems on the tuning prompts, by the same names.

    Raises:
        ValueError: a system has several settings, and one of them has no tuning evaluation.
    """
    by_name: dict[str, list[str]] = {}
    rewards = dict(evaluated)
    for name, one in rewards.items():
        by_name.setdefault(one.name, []).append(name)
    shown: list[Rewards] = []
    tried: Tried = {}
    for system, names in by_name.items():
        if len(names) == 1:
            shown.append(rewards[names[0]])
            continue
        missing = next((name for name in names if name not in tuning), None)
        if missing is not None:
            raise ValueError(
                f"system {system!r} has {len(names)} settings, and tune-{missing} is not given to choose among them; "
                "give the tuning evaluation of each, or one setting alone"
            )
        tried[system] = [(rewards[name], tuning[name]) for name in names]
        settings = tuned_settings(tried[system], directions_UK, bootstrap, bootstrap)
        shown += [rewards[name] for name, one in zip(names, settings, strict=True) if one.chosen]
    return shown, tried


def tuned_settings(
    tried: Sequence[tuple[Rewards, Rewards]], directions_UK: Array, choosing: Bootstrap, final: Bootstrap
) -> tuple[TunedSetting, ...]:
    """E_v J(v) of each setting of a system on the tuning prompts, which decide, and on the validation prompts.

    Args:
        choosing: for the intervals on the tuning prompts.
        final: for those on the validation prompts.
    """
    opinions = [expected_objective(tuning, directions_UK, choosing) for _, tuning in tried]
    best = max(range(len(tried)), key=lambda i: opinions[i].value)
    return tuple(
        TunedSetting(
            setting=shown.system.setting,
            at_edge=shown.system.at_edge,
            tuning_objective=opinions[i],
            objective=expected_objective(shown.measured, directions_UK, final),
            chosen=i == best,
        )
        for i, (shown, _) in enumerate(tried)
    )


def shortfalls(
    last: Rewards, specialists: Sequence[Rewards], bootstrap: Bootstrap
) -> tuple[list[Shortfall], dict[str, Estimate]]:
    """What the steered policy loses at each specialist's own direction, and in the mean of each family.

    The steered policy is asked at the evaluation direction nearest to the specialist's; equally near ones are averaged.
    """
    rows: list[Shortfall] = []
    by_family: dict[str, list[tuple[float, Array]]] = {}
    for one in specialists:
        rewards, direction_K = one.measured, np.array(one.system.direction)
        require_same_prompts([last, rewards])
        weight_RP = bootstrap.weights(len(last.prompt_ids))
        own, own_R = _at(rewards, direction_K, weight_RP, range(rewards.reward_PVSK.shape[1]))
        steered, steered_R = _steered_at(last, direction_K, weight_RP)
        rows.append(
            Shortfall(
                system=one.name,
                specialist=bootstrap.interval(own, own_R),
                steered=bootstrap.interval(steered, steered_R),
                shortfall=bootstrap.interval(own - steered, own_R - steered_R),
            )
        )
        by_family.setdefault(one.system.group, []).append((own - steered, own_R - steered_R))
    families = {
        family: bootstrap.interval(
            float(np.mean([value for value, _ in each])), np.mean([replicate_R for _, replicate_R in each], axis=0)
        )
        for family, each in by_family.items()
    }
    return rows, families


def nearest_directions(directions_VK: Array, direction_K: Array) -> list[int]:
    """The conditions whose directions are nearest to a given one; several if they are equally near."""
    cosine_V = directions_VK @ direction_K
    return np.flatnonzero(cosine_V >= cosine_V.max() - 1e-9).tolist()


def _steered_at(system: Rewards, direction_K: Array, weight_RP: Array) -> tuple[float, Array]:
    if system.directions_VK is None:
        return _at(system, direction_K, weight_RP, range(system.reward_PVSK.shape[1]))
    near = nearest_directions(system.directions_VK, direction_K)
    scores = [_at(system, direction_K, weight_RP, [v]) for v in near]
    return float(np.mean([value for value, _ in scores])), np.mean([each_R for _, each_R in scores], axis=0)


def _at(system: Rewards, direction_K: Array, weight_RP: Array, among: Sequence[int]) -> tuple[float, Array]:
    """The best score of some of a system's points at a direction, and in each replicate: (R,)."""
    mean_PVK = system.mean_PVK[:, list(among)]
    value = reach(mean_PVK.mean(axis=0), direction_K[None])[0]
    return float(value), reach(replicate_means(weight_RP, mean_PVK), direction_K[None])[:, 0]
