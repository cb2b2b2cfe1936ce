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

from dpalign.measure.bootstrap import Array, Bootstrap, Estimate
from dpalign.measure.control import regret
from dpalign.measure.degeneracy import RUN, SENTENCE_WORDS, Faults, degenerate_share, share_by_prompt
from dpalign.measure.points import SystemRewards, judged_by_truth, points
from dpalign.measure.summary import jsonable

TRAINED: Final = "trained range"
"""The arc that users ask for, where training went no further."""
ASKED: Final = "asked arc"
"""The same arc, where training had a margin around it."""
MARGIN: Final = "margin"
"""How the groups of that margin begin: trained on, and not asked for."""
AS_ANNOTATED: Final = "as annotated"


def reachable(group: str) -> bool:
    """Whether a group is of what the system is meant to serve."""
    return group in (TRAINED, ASKED, AS_ANNOTATED)


def trained_on(group: str) -> bool:
    """Whether a system was trained on what a group asks for."""
    return reachable(group) or group.startswith(MARGIN)


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
                    **_of_group(measured, fault_PVS, wishes, at, bootstrap),
                }
                for name, at in groups.items()
            ],
        }
    )
    return result


def _of_group(
    system: SystemRewards, fault_PVS: Faults, wishes: Sequence[Wish], at: Sequence[int], bootstrap: Bootstrap
) -> dict[str, Any]:
    if wishes[0].kind == "direction":
        found: dict[str, Any] = {"regret": regret(system, bootstrap, at) if len(system.prompt_ids) > 1 else None}
        return found | {"follows": follows_on(system, wishes, at, bootstrap)}
    own = {"distance": distance(system, wishes, at, wishes[0].objectives, bootstrap)}
    return own | {"more_than_annotated": more_than_annotated(system, fault_PVS, wishes, at, bootstrap)}


def distance(
    system: SystemRewards, wishes: Sequence[Wish], at: Sequence[int], names: Sequence[str], bootstrap: Bootstrap
) -> dict[str, Any]:
    """|asked - got| in reward points, an answer at a time, averaged over some conditions: by objective."""
    return _estimates(_off(system, wishes, at), names, bootstrap)


def more_than_annotated(
    system: SystemRewards, fault_PVS: Faults, wishes: Sequence[Wish], at: Sequence[int], bootstrap: Bootstrap
) -> dict[str, Any] | None:
    """What asking for more does, against the annotated target that differs in the first objective alone, by prompt.

    Groups may hold other targets (at the top of the scale there is no more to ask for), so their own means do not
    compare.

    Returns:
        degenerate: the change of the share; distance: that of |asked - got|, by objective. None of what can be had.
    """
    if wishes[at[0]].group == AS_ANNOTATED:
        return None
    base = [_annotated_beside(wishes, v) for v in at]
    before, after = ([[row[v] for v in which] for row in fault_PVS] for which in (base, at))
    more_P = share_by_prompt(after) - share_by_prompt(before)
    off_PK = _off(system, wishes, at) - _off(system, wishes, base)
    return {
        "degenerate": bootstrap.interval(more_P.mean(), bootstrap.weights(len(more_P)) @ more_P),
        "distance": _estimates(off_PK, wishes[0].objectives, bootstrap),
    }


def _annotated_beside(wishes: Sequence[Wish], v: int) -> int:
    """The annotated target that asks for the same of all objectives but the first."""
    same = [u for u, wish in enumerate(wishes) if wish.group == AS_ANNOTATED and wish.value[1:] == wishes[v].value[1:]]
    return same[0]


def _off(system: SystemRewards, wishes: Sequence[Wish], at: Sequence[int]) -> Array:
    asked_VK = np.array([wishes[v].value for v in at])
    return np.asarray(np.abs(system.reward_PVSK[:, list(at)] - asked_VK[None, :, None]).mean(axis=(1, 2)))


def _estimates(value_PK: Array, names: Sequence[str], bootstrap: Bootstrap) -> dict[str, Estimate]:
    replicate_RK = bootstrap.weights(len(value_PK)) @ value_PK
    return {name: bootstrap.interval(value_PK[:, k].mean(), replicate_RK[:, k]) for k, name in enumerate(names)}


def follows_on(
    system: SystemRewards, wishes: Sequence[Wish], at: Sequence[int], bootstrap: Bootstrap
) -> Estimate | None:
    """How far the second objective goes on to follow the angle: from the trained end to the farthest angle beyond.

    Of the arc itself, from one of its ends to the other, None where it has one angle; of a margin, from the arc's end
    to the margin's. Positive when it obeys: a smaller angle weighs the second objective less, so that it is to fall.
    """
    rising = sorted(range(len(wishes)), key=lambda v: float(wishes[v].about["angle"]))
    asked = [v for v in rising if v in at]
    known = reachable if trained_on(wishes[asked[0]].group) else trained_on
    inside = [v for v in rising if known(wishes[v].group)]
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
