"""The best reachable answer for every direction: the true front of the world.

For each thing, an answer without faults and padding earns nothing (left out), the trait's share (covered) or the whole
(detailed), at a cost in words. For a direction, the best answer to a prompt maximises v . r over these 3^n plans. The
front averages the best answers over prompts.

One of the plans is the best of all answers unless a fault pays. In the paper none does: dropping a fault loses
nothing. A fault may pay if
- more words are wanted: padding adds words too;
- less of another head is wanted;
- fewer words are wanted beside correctness or coherence: one empty word has both in full.
Then `faultless_is_best` is false, and the best plan may not be the optimum.

Shapes: P tasks, N plans, V directions, K objectives, H heads.
"""

from collections.abc import Sequence
from itertools import product
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dpalign.paper.objectives import PAPER_OBJECTIVES, Objective, by_name, read_objectives
from dpalign.rows import HEADS
from dpalign.world.language import Claim, Task, fact, say
from dpalign.world.truth import true_rewards

Array = NDArray[np.float64]

VERBOSITY: Final = HEADS.index("helpsteer-verbosity")
HAD_BY_A_WORD: Final = tuple(HEADS.index(f"helpsteer-{name}") for name in ("correctness", "coherence"))
"""Heads on which an answer of one empty word earns all points."""
_TINY: Final = 1e-9


def faultless_is_best(
    directions_VK: Array, objectives: Sequence[Objective] = PAPER_OBJECTIVES, heads: Sequence[str] = HEADS
) -> bool:
    """Whether at each direction some faultless plan is the best of all answers."""
    unit_HK = read_objectives(np.eye(len(heads)), heads, objectives)
    weight_VH = np.nan_to_num(by_name(directions_VK @ unit_HK.T, heads, HEADS))
    others_VH = np.delete(weight_VH, VERBOSITY, axis=1)
    fewer_V = weight_VH[:, VERBOSITY] < -_TINY
    return not (
        (others_VH < -_TINY).any()
        or (weight_VH[:, VERBOSITY] > _TINY).any()
        or (weight_VH[fewer_V][:, list(HAD_BY_A_WORD)] > _TINY).any()
    )


def plans(task: Task) -> list[list[Claim]]:
    """Every faultless answer to a task: each thing is left out, covered or detailed."""
    options = [[[], [fact(thing)], [fact(thing, detailed=True)]] for thing in task.things]
    return [[claim for part in choice for claim in part] for choice in product(*options)]


def rewards_of_plans(task: Task) -> Array:
    """The ten true rewards of every plan, in the order of `HEADS`, 0-100: (3^n, 10)."""
    return np.array([true_rewards(task, say(plan)) for plan in plans(task)])


def best_answer(
    task: Task,
    direction_K: Array,
    objectives: Sequence[Objective] = PAPER_OBJECTIVES,
    heads: Sequence[str] = HEADS,
) -> str:
    """The plan that maximises v . r(x, y) (Eq. 2) for a prompt, as text; ties go to the shorter."""
    reward_NH = rewards_of_plans(task)
    return say(plans(task)[_best(reward_NH, direction_K[None], objectives, heads)[0][0]])


def optimal_rewards(
    tasks: Sequence[Task],
    directions_VK: Array,
    objectives: Sequence[Objective] = PAPER_OBJECTIVES,
    heads: Sequence[str] = HEADS,
) -> Array:
    """True objectives of each task's best plan at each direction: (P, V, K).

    Args:
        heads: the reward model's; those that the objectives read must be among `HEADS`.
    """
    best = []
    for task in tasks:
        index_V, reward_NK = _best(rewards_of_plans(task), directions_VK, objectives, heads)
        best.append(reward_NK[index_V])
    return np.stack(best)


def _best(
    reward_NH: Array, directions_VK: Array, objectives: Sequence[Objective], heads: Sequence[str]
) -> tuple[NDArray[np.intp], Array]:
    """The best plan at each direction, the shortest of a tie; and the objectives of every plan."""
    reward_NK = read_objectives(by_name(reward_NH, HEADS, heads), heads, objectives)
    score_VN = np.round(directions_VK @ reward_NK.T, 9)
    shorter_first_N = np.argsort(reward_NH[:, VERBOSITY], kind="stable")
    return shorter_first_N[score_VN[:, shorter_first_N].argmax(axis=1)], reward_NK
