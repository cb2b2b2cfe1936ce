"""Ensembles, whose members disagree where the ratings leave room: on one backbone, or as several reward models.

Each member of an ensemble has its own copy of every head, trained on a random half of the prompts. These heads are
ordinary outputs of the classifier, named HEAD~1, HEAD~2 and so on: any engine scores them, and the records keep them.
The spread of the members about their mean estimates the reward model's error: half samples spread as much as the full
sample errs. This is the halving bootstrap (Efron and Tibshirani 1993, section 10). Several reward models that one
objective averages are members too, each with its own backbone.

Shapes: N answers, H heads, E members, K objectives, V directions.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dpalign.paper.direction import rng_for
from dpalign.paper.objectives import Objective, head_indices, read_objectives

Array = NDArray[np.float64]

MARK: Final = "~"
"""Separates a head's name from a member's number."""


def with_members(heads: Sequence[str], members: int) -> tuple[str, ...]:
    """The heads, followed by those of every member."""
    return (*heads, *(f"{head}{MARK}{member}" for member in range(1, members + 1) for head in heads))


def head_of(name: str) -> str:
    """The head that a member's head copies; any other name is returned as it is."""
    return name.rpartition(MARK)[0] or name


def masked_labels(labels: Sequence[float | None], prompt: str, members: int, seed: int) -> list[float | None]:
    """A row's labels, followed by each member's: the same if the prompt is in its half, else None."""
    every = list(labels)
    for member in range(1, members + 1):
        inside = rng_for(seed, "ensemble", member, prompt).random() < 0.5
        every += labels if inside else [None] * len(labels)
    return every


def readings(heads: Sequence[str], objectives: Sequence[Objective]) -> list[list[Objective]]:
    """The objectives as each member reads them; with fewer than two entries there is nothing to compare.

    The members of the trained model's ensemble read their own heads, and share the heads that have no members.
    Without an ensemble the rewards `[rewards.NAME]` are the members if an objective is a mean over several of them.
    Each reads that objective by its own heads, and shares the objectives that it has no part in.
    """
    named = [replace(one, heads=tuple(heads[index] for index in head_indices(one, heads))) for one in objectives]
    known = set(heads)
    if numbers := sorted({int(name.rpartition(MARK)[2]) for name in heads if head_of(name) in known - {name}}):

        def of_member(number: int) -> list[Objective]:
            member = {head: f"{head}{MARK}{number}" for head in heads if f"{head}{MARK}{number}" in known}
            return [replace(one, heads=tuple(member.get(head, head) for head in one.heads)) for one in named]

        return [of_member(number) for number in numbers]
    parts = [_by_reward(one) for one in named]
    rewards = dict.fromkeys(reward for part in parts if len(part) > 1 for reward in part)
    return [[part.get(reward, one) for one, part in zip(named, parts, strict=True)] for reward in rewards]


def _by_reward(objective: Objective) -> dict[str, Objective]:
    """Split a mean over heads REWARD/HEAD by reward; empty if the heads have weights, or one names no reward."""
    if objective.weights is not None or not all("/" in head for head in objective.heads):
        return {}
    rewards = dict.fromkeys(head.partition("/")[0] for head in objective.heads)
    return {
        reward: replace(objective, heads=tuple(h for h in objective.heads if h.partition("/")[0] == reward))
        for reward in rewards
    }


def member_objectives(reward_NH: Array, heads: Sequence[str], objectives: Sequence[Objective]) -> Array:
    """reward_NEK: the objectives as each member reads them (`readings`); E is 0 without members."""
    read = [read_objectives(reward_NH, heads, own) for own in readings(heads, objectives)]
    return np.stack(read, axis=1) if read else np.empty((len(reward_NH), 0, len(objectives)))


def spread_of(reward_NH: Array, heads: Sequence[str], objectives: Sequence[Objective]) -> Array | None:
    """The standard deviation of each objective over the members: (N, K); None with fewer than two."""
    if not objectives:
        return None
    member_NEK = member_objectives(reward_NH, heads, objectives)
    return np.asarray(member_NEK.std(axis=1, ddof=1)) if member_NEK.shape[1] > 1 else None


def value_spread(member_NEK: Array, v_NVK: Array) -> Array:
    """The standard deviation over the members of each answer's v . r, in points, under each of its directions: (N, V).

    The spread is of the whole sum: errors of two objectives that cancel in it cost nothing.
    """
    spread_NV: Array = np.einsum("nek,nvk->nev", member_NEK, v_NVK).std(axis=1, ddof=1)
    return spread_NV
