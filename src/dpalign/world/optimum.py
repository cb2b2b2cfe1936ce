"""The best reachable answer for every direction: the true front of the world.

An error-free answer without padding earns, for each thing asked, nothing (left out), the trait's
share (covered) or the whole (detailed), at a cost in words. For a direction the best answer of a
prompt maximises v . r over these 3^n plans; the front averages the best answers over prompts.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from dpalign.world.language import Claim, Task, fact, say
from dpalign.world.truth import read

Array = NDArray[np.float64]


def plans(task: Task) -> list[list[Claim]]:
    """Every faultless answer to a task: each thing left out, covered or detailed."""
    options = [[[], [fact(thing)], [fact(thing, detailed=True)]] for thing in task.things]
    return [[claim for part in choice for claim in part] for choice in product(*options)]


def rewards_of_plans(task: Task) -> Array:
    """(helpfulness, verbosity) of every plan, 0-100: (3^n, 2)."""
    readings = [read(task, say(plan)) for plan in plans(task)]
    return np.array([[r.helpfulness, r.verbosity] for r in readings])


def best_answer(task: Task, direction_K: Array) -> str:
    """The answer that maximises v . r(x, y) (Eq. 2) for a prompt; ties go to the shorter."""
    rewards_NK = rewards_of_plans(task)
    order = np.lexsort((rewards_NK[:, 1], -np.round(rewards_NK @ direction_K, 9)))
    return say(plans(task)[order[0]])


def true_front(tasks: Sequence[Task], directions_VK: Array) -> Array:
    """Mean true (helpfulness, verbosity) of the best answers at each direction: (V, 2)."""
    return np.asarray(optimal_rewards(tasks, directions_VK).mean(axis=0))


def optimal_rewards(tasks: Sequence[Task], directions_VK: Array) -> Array:
    """True (helpfulness, verbosity) of each task's best answer at each direction: (P, V, 2)."""
    best = []
    for task in tasks:
        rewards_NK = rewards_of_plans(task)
        score_VN = np.round(directions_VK @ rewards_NK.T, 9)
        shorter_first_N = np.argsort(rewards_NK[:, 1], kind="stable")
        best.append(rewards_NK[shorter_first_N[score_VN[:, shorter_first_N].argmax(axis=1)]])
    return np.stack(best)
