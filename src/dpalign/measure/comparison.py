"""The last iteration beside every other system: who is compared with whom, and by how much they differ.

A system that a direction steers is compared on its whole front. A specialist was trained for one direction
only and says what can be had there: about the ceiling of the steered policy at that direction.

Shapes: U evaluation directions, R replicates, P prompts, V conditions, K objectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from dpalign.measure.bootstrap import Array, Bootstrap, Estimate, replicate_means
from dpalign.measure.hypervolume import hypervolume_share
from dpalign.measure.objective import objective_difference, reach
from dpalign.measure.points import SystemRewards, require_same_prompts


def comparison_pairs(iterations: Sequence[str], others: Sequence[str], rivals: Sequence[str]) -> list[tuple[str, str]]:
    """The (a, b) of a comparison's dominance table.

    The last iteration over every other system and every earlier iteration; each iteration over the one before it;
    and each rival over the last iteration, so that a rival's win shows. Few pairs lose less to Holm's adjustment.

    Args:
        iterations: in their order.
        others: every system that the last iteration is to beat.
        rivals: those of them that have a front of their own.
    """
    if not iterations:
        return []
    last = iterations[-1]
    pairs = [(last, other) for other in (*others, *iterations[:-1])]
    pairs += [(b, a) for a, b in pairwise(iterations)]
    return list(dict.fromkeys([*pairs, *((rival, last) for rival in rivals)]))


@dataclass(frozen=True)
class Difference:
    """A system beside the last iteration, on the same prompts."""

    system: str
    objective: Estimate
    """E_v J(v) of the last iteration minus the system's."""
    hypervolume_ratio: Estimate | None
    """The last iteration's hypervolume over the system's; None where the system has none."""


def differences(
    last: SystemRewards,
    others: Sequence[SystemRewards],
    directions_UK: Array,
    senses_K: Array,
    reference_K: Array | None,
    bootstrap: Bootstrap,
) -> list[Difference]:
    """The last iteration against each of the others, paired by prompt; without a reference there is no hypervolume."""
    return [
        Difference(
            other.name,
            objective_difference(last, other, directions_UK, bootstrap),
            None if reference_K is None else hypervolume_share(last, other, senses_K, reference_K, bootstrap),
        )
        for other in others
    ]


@dataclass(frozen=True, eq=False)
class Specialist:
    """A system trained for one direction, which it was not told of when it was sampled."""

    rewards: SystemRewards
    family: str
    direction_K: Array


def shortfalls(
    last: SystemRewards, specialists: Sequence[Specialist], objectives: Sequence[str], bootstrap: Bootstrap
) -> dict[str, Any]:
    """What a user of the steered policy loses at each specialist's own direction, in reward points.

    The steered policy is asked at the evaluation direction nearest to the specialist's, or at both where two are as
    near. Negative where the steered policy is better.

    Returns:
        rows: {system, family, direction, specialist, steered, shortfall}; families: family -> its mean shortfall.
    """
    rows: list[dict[str, Any]] = []
    by_family: dict[str, list[tuple[float, Array]]] = {}
    for one in specialists:
        require_same_prompts([last, one.rewards])
        weight_RP = bootstrap.weights(len(last.prompt_ids))
        own, own_R = _at(one.rewards, one.direction_K, weight_RP, range(one.rewards.reward_PVSK.shape[1]))
        asked, asked_R = _steered_at(last, one.direction_K, weight_RP)
        rows.append(
            {
                "system": one.rewards.name,
                "family": one.family,
                "direction": dict(zip(objectives, one.direction_K.tolist(), strict=True)),
                "specialist": bootstrap.interval(own, own_R),
                "steered": bootstrap.interval(asked, asked_R),
                "shortfall": bootstrap.interval(own - asked, own_R - asked_R),
            }
        )
        by_family.setdefault(one.family, []).append((own - asked, own_R - asked_R))
    families = {
        family: bootstrap.interval(
            float(np.mean([value for value, _ in found])), np.mean([each_R for _, each_R in found], axis=0)
        )
        for family, found in by_family.items()
    }
    return {"rows": rows, "families": families}


def nearest_directions(directions_VK: Array, direction_K: Array) -> list[int]:
    """The conditions whose directions are nearest to another: one, or several that are as near."""
    cosine_V = directions_VK @ direction_K
    return np.flatnonzero(cosine_V >= cosine_V.max() - 1e-9).tolist()


def _steered_at(system: SystemRewards, direction_K: Array, weight_RP: Array) -> tuple[float, Array]:
    if system.directions_VK is None:
        return _at(system, direction_K, weight_RP, range(system.reward_PVSK.shape[1]))
    near = nearest_directions(system.directions_VK, direction_K)
    scores = [_at(system, direction_K, weight_RP, [v]) for v in near]
    return float(np.mean([value for value, _ in scores])), np.mean([each_R for _, each_R in scores], axis=0)


def _at(system: SystemRewards, direction_K: Array, weight_RP: Array, among: Sequence[int]) -> tuple[float, Array]:
    """The best score of some of a system's points at a direction, and in each replicate: (R,)."""
    mean_PVK = system.mean_PVK[:, list(among)]
    value = reach(mean_PVK.mean(axis=0), direction_K[None])[0]
    return float(value), reach(replicate_means(weight_RP, mean_PVK), direction_K[None])[:, 0]
