"""The objective itself: J(v) of Eq. 3 and its mean over directions, Eq. 4.

A system steered by direction is sampled at v and scored by v. Any other system offers the same points to
every v. If it has several points (SteerLM's reward targets), its user is assumed to pick the best of them
for each v, with hindsight. This flatters such a system a little, so a lead of DPA over it is all the safer.

Shapes: U evaluation directions, R replicates, P prompts, V conditions, K objectives.
"""

import numpy as np

from dpalign.measure.bootstrap import Array, Bootstrap, Estimate, replicate_means
from dpalign.measure.points import Rewards, require_same_prompts


def objective_by_direction(system: Rewards, directions_UK: Array, bootstrap: Bootstrap) -> list[Estimate]:
    """J(v) = E[v . r(x, y)], y sampled at v (Eq. 3), at each evaluation direction."""
    value_U, replicate_RU = _attained(system, directions_UK, bootstrap)
    return [bootstrap.interval(value, replicate_RU[:, u]) for u, value in enumerate(value_U)]


def expected_objective(system: Rewards, directions_UK: Array, bootstrap: Bootstrap) -> Estimate:
    """E_v J(v) (Eq. 4): the plain mean over the evaluation directions, which represent P_v evenly."""
    value_U, replicate_RU = _attained(system, directions_UK, bootstrap)
    return bootstrap.interval(value_U.mean(), replicate_RU.mean(axis=1))


def objective_difference(a: Rewards, b: Rewards, directions_UK: Array, bootstrap: Bootstrap) -> Estimate:
    """E_v J(v) of `a` minus that of `b`, on the same prompts (a paired interval)."""
    return objective_lead(a, b, directions_UK, bootstrap)[0]


def objective_lead(a: Rewards, b: Rewards, directions_UK: Array, bootstrap: Bootstrap) -> tuple[Estimate, float]:
    """The same difference, and its two-sided p-value: about the smallest error rate whose interval excludes 0."""
    require_same_prompts([a, b])
    a_U, a_RU = _attained(a, directions_UK, bootstrap)
    b_U, b_RU = _attained(b, directions_UK, bootstrap)
    lead_R = (a_RU - b_RU).mean(axis=1)
    beyond = min(int((lead_R <= 0).sum()), int((lead_R >= 0).sum()))
    p_value = min(1.0, 2 * (1 + beyond) / (bootstrap.replicates + 1))
    return bootstrap.interval((a_U - b_U).mean(), lead_R), p_value


def _attained(system: Rewards, directions_UK: Array, bootstrap: Bootstrap) -> tuple[Array, Array]:
    """J at each direction: (U,), and in each replicate: (R, U)."""
    own_VK = system.directions_VK
    if own_VK is not None and (own_VK.shape != directions_UK.shape or not np.allclose(own_VK, directions_UK)):
        raise ValueError(
            f"system {system.name!r} was sampled at {len(own_VK)} directions that are not the {len(directions_UK)} "
            "evaluation directions; J(v) needs samples drawn at v, so sample it there"
        )
    replicate_RVK = replicate_means(bootstrap.weights(len(system.prompt_ids)), system.mean_PVK)
    steered = own_VK is not None
    return _score(system.point_VK, directions_UK, steered), _score(replicate_RVK, directions_UK, steered)


def _score(point_XVK: Array, directions_UK: Array, steered: bool) -> Array:
    if steered:
        score_XU: Array = np.einsum("...uk,uk->...u", point_XVK, directions_UK)
        return score_XU
    return reach(point_XVK, directions_UK)


def reach(point_XVK: Array, directions_UK: Array) -> Array:
    """The best score of a system's points for each direction u: max_v u . r(v), (..., U)."""
    reach_XU: Array = (point_XVK @ directions_UK.T).max(axis=-2)
    return reach_XU
