"""What feasibility.json says: asked for what can be had, and beyond it, how does a system answer?

Of reward targets: how far the answers are from what was asked. Of directions: whether the second objective goes
on to follow the angle beyond the trained range, and what asking there loses (regret). Of both: how often an
answer is degenerate.

Shapes: P prompts, V conditions, S samples, K objectives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from dpalign.measure.bootstrap import Array, Bootstrap, Estimate
from dpalign.measure.control import regret
from dpalign.measure.degeneracy import (
    RUN,
    SENTENCE_WORDS,
    Degenerate,
    Faults,
    degenerate_share,
    faults,
    share_by_prompt,
)
from dpalign.measure.points import Rewards, points
from dpalign.measure.reading import Reading, read_rewards
from dpalign.measure.record import Record, rounded
from dpalign.measure.system import System
from dpalign.paper.direction import Arc, Preference
from dpalign.rows import CANDIDATES, read_table

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


class Condition(Record):
    """What one condition asked for, and what it got."""

    group: str
    asked: dict[str, float]
    """The direction's weights, or the rewards asked for, by objective."""
    angle: float | None = None
    """Of a direction."""
    highest: float | None = None
    """Of a target: the highest annotated first objective near it."""
    share: float | None = None
    """Of a target: the share of the way from there to the top of the scale."""
    rewards: dict[str, Estimate]
    degenerate: Degenerate
    distance: dict[str, Estimate] = {}
    """|asked - got|, of a target."""
    optimum: dict[str, float] = {}
    """What the world's best answers earn there, where that is known."""


class MoreThanAnnotated(Record):
    """What asking for more changed, against the annotated target that asks for the same of the rest."""

    degenerate: Estimate
    distance: dict[str, Estimate]


class Group(Record):
    """What can be had, or one kind of beyond: several conditions together."""

    name: str
    conditions: int
    degenerate: Degenerate
    regret: Estimate | None = None
    """What asking for v loses against asking for the best other angle."""
    follows: Estimate | None = None
    """How far the second objective moves with the angle."""
    distance: dict[str, Estimate] = {}
    more_than_annotated: MoreThanAnnotated | None = None


class Rule(Record):
    """When an answer counts as degenerate (`degeneracy.py`)."""

    sentence_words: int = SENTENCE_WORDS
    run: int = RUN
    repetition: float


class Feasibility(Record):
    """What feasibility.json holds; measured on true rewards where they are known."""

    asked_for: Literal["directions", "targets"]
    measure: Literal["true", "judged"]
    prompts: int
    samples: int
    rule: Rule
    conditions: tuple[Condition, ...]
    groups: tuple[Group, ...]
    asked_range: tuple[float, float] | None = None
    """Of directions: the ends in degrees of the arc that users ask for."""
    trained_range: tuple[float, float] | None = None
    """Of directions: the ends of what was trained on, the margin included."""


def figures(
    system: Rewards,
    fault_PVS: Faults,
    wishes: Sequence[Wish],
    most_repetition: float,
    bootstrap: Bootstrap,
    optimum_VK: Array | None = None,
) -> Feasibility:
    """What a system answered to some wishes, by condition and by group."""
    measured, names = system.measured, list(wishes[0].objectives)
    of_targets = wishes[0].kind == "target"
    conditions = [
        Condition(
            group=wish.group,
            asked=dict(zip(names, wish.value, strict=True)),
            **wish.about,
            rewards=dict(zip(names, point, strict=True)),
            degenerate=degenerate_share([[row[v]] for row in fault_PVS], bootstrap),
            distance=distance(measured, wishes, [v], names, bootstrap) if of_targets else {},
            optimum={} if optimum_VK is None else dict(zip(names, optimum_VK[v].tolist(), strict=True)),
        )
        for v, (wish, point) in enumerate(zip(wishes, points(measured, bootstrap), strict=True))
    ]
    places = {wish.group: [v for v, other in enumerate(wishes) if other.group == wish.group] for wish in wishes}
    groups = [
        Group(
            name=name,
            conditions=len(at),
            degenerate=degenerate_share([[row[v] for v in at] for row in fault_PVS], bootstrap),
            **_of_group(measured, fault_PVS, wishes, at, bootstrap),
        )
        for name, at in places.items()
    ]
    found = Feasibility(
        asked_for="targets" if of_targets else "directions",
        measure="judged" if system.true_reward_PVSK is None else "true",
        prompts=len(system.prompt_ids),
        samples=system.reward_PVSK.shape[2],
        rule=Rule(repetition=most_repetition),
        conditions=tuple(conditions),
        groups=tuple(groups),
    )
    return rounded(found)


def _of_group(
    system: Rewards, fault_PVS: Faults, wishes: Sequence[Wish], at: Sequence[int], bootstrap: Bootstrap
) -> dict[str, Any]:
    if wishes[0].kind == "direction":
        lost = regret(system, bootstrap, at) if len(system.prompt_ids) > 1 else None
        return {"regret": lost, "follows": follows_on(system, wishes, at, bootstrap)}
    own = {"distance": distance(system, wishes, at, wishes[0].objectives, bootstrap)}
    return own | {"more_than_annotated": more_than_annotated(system, fault_PVS, wishes, at, bootstrap)}


def read_answers(
    folder: Path, reading: Reading, wishes: Sequence[Wish], most_repetition: float
) -> tuple[Rewards, Faults]:
    """The rewards of a feasibility folder's answers, and the faults of each."""
    rewards = read_rewards(folder, System("asked"), reading)
    rows = read_table(folder / "answers", CANDIDATES, ["response", "finished"])
    each = iter(rows.to_pylist())
    prompts, conditions, samples, _ = rewards.reward_PVSK.shape
    assert conditions == len(wishes), f"{folder}: {conditions} conditions for {len(wishes)} wishes"

    def of_next() -> tuple[str, ...]:
        row = next(each)
        return faults(row["response"], row["finished"], most_repetition)

    return rewards, [[[of_next() for _ in range(samples)] for _ in wishes] for _ in range(prompts)]


def read_feasibility(
    folder: Path, reading: Reading, arc: Arc | None, margin: float, bootstrap: Bootstrap
) -> Feasibility:
    """What a feasibility step measured; of directions, with the ends of the arc.

    The step tells the arc from all else. What lies in the margin around it was trained on and nobody asks for it, so
    its answers are measured apart here.

    Args:
        arc: that users ask for; None where the population is none.
    """
    measured = Feasibility.model_validate_json((folder / "feasibility.json").read_text(encoding="utf-8"))
    if arc is None or measured.asked_for != "directions":
        return measured
    if margin:
        names, most, rows = reading.names, measured.rule.repetition, measured.conditions
        wishes = []
        for row in rows:
            angle = row.angle or 0.0
            group = margin_group(angle, arc.low, arc.high, margin)
            wishes.append(Wish("direction", Preference.from_angle(angle, names).v, "", group, names, {"angle": angle}))
        rewards, fault_PVS = read_answers(folder, reading, wishes, most)
        known = all(row.optimum for row in rows)
        optimum_VK = np.array([[row.optimum[name] for name in names] for row in rows]) if known else None
        measured = figures(rewards, fault_PVS, wishes, most, bootstrap, optimum_VK)
    ranges = {"asked_range": (arc.low, arc.high), "trained_range": (arc.low - margin, arc.high + margin)}
    return measured.model_copy(update=ranges)


def margin_group(angle: float, low: float, high: float, margin: float) -> str:
    """The group of an angle, by the ends of the arc and the margin around it."""
    if low <= angle <= high:
        return ASKED
    if high < angle <= high + margin:
        return f"{MARGIN}, {high:g} to {high + margin:g} degrees"
    if low - margin <= angle < low:
        return f"{MARGIN}, {low:g} to {low - margin:g} degrees"
    return f"above {high + margin:g} degrees" if angle > high else f"below {low - margin:g} degrees"


def distance(
    system: Rewards, wishes: Sequence[Wish], at: Sequence[int], names: Sequence[str], bootstrap: Bootstrap
) -> dict[str, Estimate]:
    """|asked - got| in reward points, an answer at a time, averaged over some conditions: by objective."""
    return _estimates(_off(system, wishes, at), names, bootstrap)


def more_than_annotated(
    system: Rewards, fault_PVS: Faults, wishes: Sequence[Wish], at: Sequence[int], bootstrap: Bootstrap
) -> MoreThanAnnotated | None:
    """What asking for more does, against the annotated target that differs in the first objective alone, by prompt.

    Groups may hold other targets (at the top of the scale there is no more to ask for), so their own means do not
    compare.

    None of what can be had.
    """
    if wishes[at[0]].group == AS_ANNOTATED:
        return None
    base = [_annotated_beside(wishes, v) for v in at]
    before, after = ([[row[v] for v in which] for row in fault_PVS] for which in (base, at))
    more_P = share_by_prompt(after) - share_by_prompt(before)
    off_PK = _off(system, wishes, at) - _off(system, wishes, base)
    return MoreThanAnnotated(
        degenerate=bootstrap.mean(more_P),
        distance=_estimates(off_PK, wishes[0].objectives, bootstrap),
    )


def _annotated_beside(wishes: Sequence[Wish], v: int) -> int:
    """The annotated target that asks for the same of all objectives but the first."""
    same = [u for u, wish in enumerate(wishes) if wish.group == AS_ANNOTATED and wish.value[1:] == wishes[v].value[1:]]
    return same[0]


def _off(system: Rewards, wishes: Sequence[Wish], at: Sequence[int]) -> Array:
    asked_VK = np.array([wishes[v].value for v in at])
    return np.asarray(np.abs(system.reward_PVSK[:, list(at)] - asked_VK[None, :, None]).mean(axis=(1, 2)))


def _estimates(value_PK: Array, names: Sequence[str], bootstrap: Bootstrap) -> dict[str, Estimate]:
    return {name: bootstrap.mean(value_P) for name, value_P in zip(names, value_PK.T, strict=True)}


def follows_on(system: Rewards, wishes: Sequence[Wish], at: Sequence[int], bootstrap: Bootstrap) -> Estimate | None:
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
    return bootstrap.mean(rise_P)
