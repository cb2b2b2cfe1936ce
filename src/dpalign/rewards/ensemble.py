"""Heads that disagree where the ratings leave room: an ensemble on one backbone, beside the reward model's own heads.

Each member has every head once more, and learns it from a random half of the prompts. Its heads are ordinary outputs of
the classifier, named HEAD~1, HEAD~2 and so on: any engine scores them, and the records keep them. The spread of the
members about their mean stands for what the reward model does not know. Half samples spread as much as the full one
errs: the halving bootstrap (Efron and Tibshirani 1993, section 10).

Shapes: N answers, H heads, E members, K objectives, V directions.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dpalign.paper.direction import rng_for
from dpalign.paper.objectives import Objective, head_indices, read_objectives

Array = NDArray[np.float64]

MARK: Final = "~"
"""Between a head's name and the number of a member."""


def with_members(heads: Sequence[str], members: int) -> tuple[str, ...]:
    """The heads, and after them those of every member."""
    return (*heads, *(f"{head}{MARK}{member}" for member in range(1, members + 1) for head in heads))


def head_of(name: str) -> str:
    """The head that a member's head stands beside; another's own name."""
    return name.rpartition(MARK)[0] or name


def masked_labels(labels: Sequence[float | None], prompt: str, members: int, seed: int) -> list[float | None]:
    """A row's labels, and after them each member's: as they are in its half of the prompts, else None."""
    every = list(labels)
    for member in range(1, members + 1):
        inside = rng_for(seed, "ensemble", member, prompt).random() < 0.5
        every += labels if inside else [None] * len(labels)
    return every


def members_of(heads: Sequence[str]) -> int:
    """How many members the heads of a scorer have."""
    numbers = [name.rpartition(MARK)[2] for name in heads if MARK in name]
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def member_objectives(reward_NH: Array, heads: Sequence[str], objectives: Sequence[Objective]) -> Array:
    """reward_NEK: the objectives as each member reads them; heads without members, such as functions', are shared."""
    known = set(heads)
    read = []
    for member in range(1, members_of(heads) + 1):
        own = [
            Objective(
                one.name,
                tuple(
                    f"{name}{MARK}{member}" if f"{name}{MARK}{member}" in known else name
                    for name in (heads[index] for index in head_indices(one, heads))
                ),
                one.weights,
            )
            for one in objectives
        ]
        read.append(read_objectives(reward_NH, heads, own))
    return np.stack(read, axis=1) if read else np.empty((len(reward_NH), 0, len(objectives)))


def value_spread(member_NEK: Array, v_NVK: Array) -> Array:
    """The standard deviation over the members of each answer's v . r, in points, under each of its directions: (N, V).

    The spread is of the whole sum: errors of two objectives that cancel in it cost nothing.
    """
    spread_NV: Array = np.einsum("nek,nvk->nev", member_NEK, v_NVK).std(axis=1, ddof=1)
    return spread_NV
