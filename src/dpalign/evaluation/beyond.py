"""What feasibility.json says: asked for what can be had, and beyond it, how does a system answer?

Of reward targets: how far the answers are from what was asked. Of directions: whether the second objective goes
on to follow the angle beyond the trained range, and what asking there loses (regret). Of both: how often an
answer is degenerate.

Shapes: P prompts, V conditions, S samples, K objectives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from dpalign.evaluation.bootstrap import Array, Bootstrap, Estimate
from dpalign.evaluation.control import regret
from dpalign.evaluation.degeneracy import RUN, SENTENCE_WORDS, Faults, degenerate_share
from dpalign.evaluation.points import SystemRewards, judged_by_truth, points
from dpalign.evaluation.summary import jsonable

TRAINED: Final = "trained range"
AS_ANNOTATED: Final = "as annotated"


@dataclass(frozen=True)
class Wish:
    """What is asked of a system in one condition."""

    kind: str
    """direction or target."""
    value: tuple[float, ...]
    """The direction, or the rewards that the line states, by objective."""
    line: str
    group: str
    objectives: tuple[str, ...]
    about: Mapping[str, Any]
    """What the page says of it: the angle, or the highest annotated reward and the share of the way beyond."""


def figures(
    system: SystemRewards,
    fault_PVS: Faults,
    wishes: Sequence[Wish],
    most_repetition: float,
    bootstrap: Bootstrap,
    optimum_VK: Array | None = None,
) -> dict[str, Any]:
    """What feasibility.json holds; measured on true rewards where they are known.

    Returns:
        conditions: one a wish; groups: what can be had, and each kind of beyond, together.
    """
    truth_known = system.true_reward_PVSK is not None
    measured = judged_by_truth(system) if truth_known else system
    names = list(wishes[0].objectives)
    conditions = []
    for v, (wish, point) in enumerate(zip(wishes, points(measured, bootstrap), strict=True)):
        entry = {
            "group": wish.group,
            "asked": dict(zip(names, wish.value, strict=True)),
            **wish.about,
            "rewards": dict(zip(names, point, strict=True)),
            "degenerate": degenerate_share([[row[v]] for row in fault_PVS], bootstrap),
        }
        if wish.kind == "target":
            entry["distance"] = distance(measured, wishes, [v], names, bootstrap)
        if optimum_VK is not None:
            entry["optimum"] = dict(zip(names, optimum_VK[v].tolist(), strict=True))
        conditions.append(entry)
    groups = {wish.group: [v for v, other in enumerate(wishes) if other.group == wish.group] for wish in wishes}
    result: dict[str, Any] = jsonable(
        {
            "asked_for": "directions" if wishes[0].kind == "direction" else "targets",
            "measure": "true" if truth_known else "judged",
            "prompts": len(system.prompt_ids),
            "samples": system.reward_PVSK.shape[2],
            "rule": {"sentence_words": SENTENCE_WORDS, "run": RUN, "repetition": most_repetition},
            "conditions": conditions,
            "groups": [
                {
                    "name": name,
                    "conditions": len(at),
                    "degenerate": degenerate_share([[row[v] for v in at] for row in fault_PVS], bootstrap),
                    **_of_group(measured, wishes, at, names, bootstrap),
                }
                for name, at in groups.items()
            ],
        }
    )
    return result


def _of_group(
    system: SystemRewards, wishes: Sequence[Wish], at: Sequence[int], names: Sequence[str], bootstrap: Bootstrap
) -> dict[str, Any]:
    if wishes[0].kind == "target":
        return {"distance": distance(system, wishes, at, names, bootstrap)}
    found: dict[str, Any] = {"regret": regret(system, bootstrap, at) if len(system.prompt_ids) > 1 else None}
    return found | {"follows": follows_on(system, wishes, at, bootstrap)}


def distance(
    system: SystemRewards, wishes: Sequence[Wish], at: Sequence[int], names: Sequence[str], bootstrap: Bootstrap
) -> dict[str, Any]:
    """|asked - got| in reward points, an answer at a time, averaged over some conditions: by objective."""
    asked_VK = np.array([wishes[v].value for v in at])
    off_PK = np.abs(system.reward_PVSK[:, list(at)] - asked_VK[None, :, None]).mean(axis=(1, 2))
    replicate_RK = bootstrap.weights(len(off_PK)) @ off_PK
    return {name: bootstrap.interval(off_PK[:, k].mean(), replicate_RK[:, k]) for k, name in enumerate(names)}


def follows_on(
    system: SystemRewards, wishes: Sequence[Wish], at: Sequence[int], bootstrap: Bootstrap
) -> Estimate | None:
    """How far the second objective goes on to follow the angle: from the trained end to the farthest angle beyond.

    Of the trained range itself, from one of its ends to the other; None where it has one angle. Positive when it
    obeys: a smaller angle weighs the second objective less, so that it is to fall.
    """
    rising = sorted(range(len(wishes)), key=lambda v: float(wishes[v].about["angle"]))
    inside = [v for v in rising if wishes[v].group == TRAINED]
    asked = [v for v in rising if v in at]
    if asked[0] in inside:
        low, high = inside[0], inside[-1]
    elif rising.index(asked[0]) < rising.index(inside[0]):
        low, high = asked[0], inside[0]
    else:
        low, high = inside[-1], asked[-1]
    if low == high:
        return None
    rise_P = system.mean_PVK[:, high, 1] - system.mean_PVK[:, low, 1]
    return bootstrap.interval(rise_P.mean(), bootstrap.weights(len(rise_P)) @ rise_P)
