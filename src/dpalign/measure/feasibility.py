"""The figures of feasibility.json: how a system answers requests within its reach and beyond it.

Reward targets: how far the answers are from the target. Directions: whether the second objective still follows the
angle beyond the trained range, and what asking there loses (regret). Both: how often an answer is degenerate.

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
"""The arc that users ask for, if training went no further."""
ASKED: Final = "asked arc"
"""The same arc, if training had a margin around it."""
MARGIN: Final = "margin"
"""Prefix of the margin's groups: trained on, but not what users ask for."""
AS_ANNOTATED: Final = "as annotated"


def reachable(group: str) -> bool:
    """Whether the system is meant to serve a group's requests."""
    return group in (TRAINED, ASKED, AS_ANNOTATED)


def trained_on(group: str) -> bool:
    """Whether the system was trained on a group's requests."""
    return reachable(group) or group.startswith(MARGIN)


@dataclass(frozen=True)
class Wish:
    """The request of one condition."""

    kind: str
    """direction or target."""
    value: tuple[float, ...]
    """The direction, or the rewards that the line states, by objective."""
    line: str
    group: str
    objectives: tuple[str, ...]
    about: Mapping[str, Any]
    """Further fields of its `Condition`: `angle`, or `highest` and `share`."""


class Condition(Record):
    """The request of one condition, and the figures of its answers."""

    group: str
    asked: dict[str, float]
    """The direction's weights, or the rewards asked for, by objective."""
    angle: float | None = None
    """Directions only."""
    highest: float | None = None
    """Targets only: the highest annotated first objective near the target."""
    share: float | None = None
    """Targets only: the share of the way from there to the top of the scale."""
    rewards: dict[str, Estimate]
    degenerate: Degenerate
    distance: dict[str, Estimate] = {}
    """Targets only: |asked - got|."""
    optimum: dict[str, float] = {}
    """What the world's best answers earn there, if known."""


class MoreThanAnnotated(Record):
    """What asking for more changed, against the annotated target with the same other objectives."""

    degenerate: Estimate
    distance: dict[str, Estimate]


class Group(Record):
    """Several conditions together: those within reach, or one kind beyond it."""

    name: str
    conditions: int
    degenerate: Degenerate
    regret: Estimate | None = None
    """What asking for v loses against asking for the best angle."""
    follows: Estimate | None = None
    """How far the second objective moves with the angle (`follows_on`)."""
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
    """Directions only: the ends, in degrees, of the arc that users ask for."""
    trained_range: tuple[float, float] | None = None
    """Directions only: the ends of the trained arc, margin included."""


def figures(
    system: Rewards,
    fault_PVS: Faults,
    wishes: Sequence[Wish],
    most_repetition: float,
    bootstrap: Bootstrap,
    optimum_VK: Array | None = None,
) -> Feasibility:
    """Measure a system's answers to wishes, by condition and by group."""
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
    """Read the rewards and the faults of a feasibility folder's answers."""
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
    """Read what a feasibility step measured; for directions, add the ends of the arc.

    The step only separates the arc from the rest. The margin around the arc was trained on, but users do not ask for
    it. So its answers are measured separately here.

    Args:
        arc: the arc that users ask for; None if the population is not an arc.
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
    """Mean |asked - got| over the answers of the conditions `at`, in reward points, by objective."""
    return _estimates(_off(system, wishes, at), names, bootstrap)


def more_than_annotated(
    system: Rewards, fault_PVS: Faults, wishes: Sequence[Wish], at: Sequence[int], bootstrap: Bootstrap
) -> MoreThanAnnotated | None:
    """What asking for more changes, against the annotated target that differs in the first objective only, by prompt.

    Groups may hold different targets (at the top of the scale there is no more to ask for), so their means are not
    comparable.

    None for the annotated targets themselves.
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
    """The annotated target that equals target v in all objectives but the first."""
    same = [u for u, wish in enumerate(wishes) if wish.group == AS_ANNOTATED and wish.value[1:] == wishes[v].value[1:]]
    return same[0]


def _off(system: Rewards, wishes: Sequence[Wish], at: Sequence[int]) -> Array:
    asked_VK = np.array([wishes[v].value for v in at])
    return np.asarray(np.abs(system.reward_PVSK[:, list(at)] - asked_VK[None, :, None]).mean(axis=(1, 2)))


def _estimates(value_PK: Array, names: Sequence[str], bootstrap: Bootstrap) -> dict[str, Estimate]:
    return {name: bootstrap.mean(value_P) for name, value_P in zip(names, value_PK.T, strict=True)}


def follows_on(system: Rewards, wishes: Sequence[Wish], at: Sequence[int], bootstrap: Bootstrap) -> Estimate | None:
    """How far the second objective still follows the angle: from the trained end to the farthest angle beyond.

    For the arc itself: from one end to the other; None if it has one angle. For a margin: from the arc's end to the
    margin's. Positive if the system obeys: a smaller angle weighs the second objective less, so it should fall.
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
