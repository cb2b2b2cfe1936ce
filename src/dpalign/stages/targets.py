"""What a SteerLM is asked for: reward targets that are distinct as the model reads them.

Shapes: N annotated answers, V targets, K objectives.
"""

from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from dpalign.paper.direction import rng_for
from dpalign.paper.prompts import stated_reward

if TYPE_CHECKING:
    from dpalign.recipe import Recipe

Array = NDArray[np.float64]

FIRST_QUANTILE: Final = 0.9
"""The helpfulness asked for at t = 1 with each verbosity, as a quantile of the annotated answers' like it."""


def reward_targets(recipe: "Recipe", reward_NK: Array, count: int, quantile: float) -> Array:
    """Reward targets to condition SteerLM on, from annotated answers: (V, K), no two of which have the same line.

    The objectives after the first are spread over what the annotated answers have, and the first is the given quantile
    of theirs among the answers like that in the others: 1.0 is section 3.2's "highest corresponding helpfulness".
    V is `count`, or less where the condition's template can state fewer.
    """
    match recipe.steerlm.template:
        case "steerlm":
            target_VK = _of_labels(recipe, reward_NK, count, quantile)
        case "world-v1":
            target_VK = _of_quantiles(recipe, reward_NK, count, quantile)
    _, first = np.unique(stated(recipe, target_VK), axis=0, return_index=True)
    return target_VK[np.sort(first)]


def stated(recipe: "Recipe", reward_NK: Array) -> Array:
    """The rewards that the condition lines of some rewards state."""
    template = recipe.steerlm.template
    return np.array([stated_reward(value, template) for value in reward_NK.flat]).reshape(reward_NK.shape)


def _of_labels(recipe: "Recipe", reward_NK: Array, count: int, quantile: float) -> Array:
    """Targets of a template that states few labels.

    Over two objectives the second takes the labels that occur, evenly spread where there are more than are asked for,
    and the first its quantile among the answers that have the label. Over more, it is so with rows of labels, drawn at
    random where there are more.
    """
    stated_NK = stated(recipe, reward_NK)
    label_LK, of_N = np.unique(stated_NK[:, 1:], axis=0, return_inverse=True)
    occur = len(label_LK)
    if count >= occur or reward_NK.shape[1] == 2:
        chosen = ((np.arange(min(count, occur)) + 0.5) / min(count, occur) * occur).astype(int)
    else:
        chosen = np.sort(rng_for(recipe.seed, "targets").choice(occur, size=count, replace=False))
    best = [np.quantile(reward_NK[of_N.ravel() == label, 0], quantile) for label in chosen]
    return stated(recipe, np.column_stack([best, label_LK[chosen]]))


def _of_quantiles(recipe: "Recipe", reward_NK: Array, count: int, quantile: float) -> Array:
    """Targets of a template that states any reward.

    Over two objectives the second takes evenly spaced quantiles of the answers' own, and the first its quantile among
    the answers nearest in the second. Over more, the later objectives are those of answers drawn at random.
    """
    n = len(reward_NK)
    near = max(1, n // (2 * count))
    if reward_NK.shape[1] == 2:
        anchors = np.quantile(reward_NK[:, 1:], (np.arange(count) + 0.5) / count, axis=0)
    else:
        anchors = reward_NK[rng_for(recipe.seed, "targets").choice(n, size=count, replace=n < count), 1:]
    rows = []
    for anchor in anchors:
        distance_N = np.linalg.norm(reward_NK[:, 1:] - anchor, axis=1)
        nearest = np.argsort(distance_N, kind="stable")[:near]
        rows.append([np.quantile(reward_NK[nearest, 0], quantile), *anchor])
    return np.array(rows)


def shares(answers: int, targets: int) -> list[int]:
    """So many answers among so many targets, as evenly as can be, the first ones having one more."""
    return [answers // targets + (target < answers % targets) for target in range(targets)]
