"""The people of the world: those who ask, answer and rate.

Tasks come in roles (test, tuning, sft, ...). The hash of a set of things decides its one role: no two roles share a
prompt or a composition, at any seed. Answers are written in styles of differing care. Raters see the truth
through noise, and round it to their scale.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from dpalign.world.language import DEPTHS, FILLERS, THINGS, Claim, Task, fact

ROLES: Final = {"pretrain": 20, "sft": 15, "helpsteer": 15, "ultrafeedback": 35, "tuning": 7, "test": 8}
"""Each role's share of all sets of things, in percent."""

THINGS_ASKED: Final = (3, 4)

RATER_NOISE: Final = 10.0
"""Standard deviation of a rater's opinion around the truth, in points of 0-100: less than half a level of the coarsest
scale, but enough to make the mean of many ratings nearly linear in the truth."""


def role_of(things: tuple[str, ...]) -> str:
    """The one role that a set of things belongs to."""
    bucket = int(hashlib.sha256(" ".join(sorted(things)).encode()).hexdigest(), 16) % 100
    for role, share in ROLES.items():
        if bucket < share:
            return role
        bucket -= share
    raise AssertionError("the shares of the roles sum to 100")


def draw_tasks(
    role: str, count: int, rng: np.random.Generator, things_asked: Sequence[int] = THINGS_ASKED
) -> list[Task]:
    """`count` distinct tasks of a role."""
    names, depths = list(THINGS), list(DEPTHS)
    tasks: dict[Task, None] = {}
    while len(tasks) < count:
        size = things_asked[int(rng.integers(len(things_asked)))]
        things = tuple(names[i] for i in rng.permutation(len(names))[:size])
        if role_of(things) == role:
            tasks[Task(depths[rng.integers(len(depths))], things)] = None
    return list(tasks)


@dataclass(frozen=True)
class Style:
    """A way of writing: probabilities for each thing of the task, and fillers per answer."""

    covers: float
    details: float
    errs: float = 0.03
    fillers: float = 0.1  # mean number an answer
    repeats: float = 0.02
    strays: float = 0.03  # adds a claim about something else
    mistakes: float = 0.0  # speaks of something else in place of a thing of the task


STYLES: Final[Mapping[str, Style]] = {
    "terse": Style(covers=0.6, details=0.05),
    "plain": Style(covers=0.85, details=0.35),
    "thorough": Style(covers=0.97, details=0.85),
    "rambling": Style(covers=0.7, details=0.4, fillers=2.2, repeats=0.2, strays=0.2),
    "careless": Style(covers=0.75, details=0.5, errs=0.35, fillers=0.5, strays=0.1),
}


RATED_STYLES: Final[Mapping[str, Style]] = {
    **STYLES,
    "brief": Style(covers=0.95, details=0.1),
    "straying": Style(covers=0.9, details=0.7, strays=0.7),
    "mistaking": Style(covers=0.9, details=0.5, mistakes=0.35),
    "repeating": Style(covers=0.95, details=0.6, repeats=0.3),
}
"""The styles of rated answers.

Some stray, repeat themselves or mistake a thing for another, as small models do. A reward model that never saw such
answers rewards every true statement as help, and policies learn to stray. Some are complete in few words. A reward
model that never saw such answers rewards length as help."""


def write_answer(task: Task, style: Style, rng: np.random.Generator) -> list[Claim | str]:
    """An answer to a task in a style; at least one sentence."""
    answer: list[Claim | str] = []
    for thing in task.things:
        if rng.random() < style.covers:
            if style.mistakes and rng.random() < style.mistakes:
                thing = _other(task.things, rng)
            claim = _claim(thing, rng.random() < style.details, rng.random() < style.errs, rng)
            answer.extend([claim] * (2 if rng.random() < style.repeats else 1))
    if rng.random() < style.strays:
        answer.append(_claim(_other(task.things, rng), False, False, rng))
    if rng.random() < 0.1:
        rng.shuffle(answer)
    for _ in range(rng.poisson(style.fillers)):
        answer.insert(int(rng.integers(len(answer) + 1)), FILLERS[rng.integers(len(FILLERS))])
    return answer or [fact(task.things[0])]


def _claim(thing: str, detailed: bool, wrong: bool, rng: np.random.Generator) -> Claim:
    if not wrong:
        return fact(thing, detailed)
    other = fact(_other((thing,), rng), detailed)
    if detailed and rng.random() < 0.5:
        return Claim(thing, THINGS[thing][0], other.detail)
    return Claim(thing, other.trait, other.detail)


def _other(things: Sequence[str], rng: np.random.Generator) -> str:
    others = [thing for thing in THINGS if thing not in things]
    return others[rng.integers(len(others))]


def rate(true_reward: float, low: int, high: int, rng: np.random.Generator) -> int:
    """A rater's integer opinion on low..high: the nearest of levels spread evenly over 0-100.

    The ends of the scale mean 0 and 100, so that good answers do not all look alike.
    """
    opinion = true_reward + rng.normal(0, RATER_NOISE)
    level = np.rint(opinion * (high - low) / 100)
    return int(np.clip(level, 0, high - low) + low)
