"""Dominance of one system over another, at every direction at once.

A dominates B when, at every evaluation direction u, the best of A's points beats the best of B's:
max_v u . r_A(v) > max_v u . r_B(v). The leads get one simultaneous band over all directions (max-t
over directions, prompts resampled in pairs). So "at every direction" is one claim with one error rate.

Shapes: R replicates, P prompts, V conditions, U evaluation directions, K objectives.
"""

from dataclasses import dataclass

import numpy as np

from dpalign.measure.bootstrap import Array, Bootstrap, Estimate, replicate_means
from dpalign.measure.objective import reach
from dpalign.measure.points import Rewards, require_same_prompts

_SMALLEST_ERROR = 1e-9
"""Standard errors (reward points) below this are rounding. The floor keeps the ratio of a constant lead finite."""


@dataclass(frozen=True)
class Dominance:
    """The lead of A over B in reward points: at each direction, and at the worst of them."""

    leads: tuple[Estimate, ...]
    """One a direction, with simultaneous intervals."""
    margin: Estimate
    """The smallest lead. Its interval runs from the band's smallest low end to its smallest high end. It
    contains the true margin whenever the band contains all true leads."""
    p_value: float
    """The smallest error rate at which the band lies above zero at every direction."""


def lead(a_XVK: Array, b_XWK: Array, directions_UK: Array) -> Array:
    """max_v u . r_A(v) - max_v u . r_B(v) at each direction: (..., U)."""
    return reach(a_XVK, directions_UK) - reach(b_XWK, directions_UK)


def dominance(a: Rewards, b: Rewards, directions_UK: Array, bootstrap: Bootstrap) -> Dominance:
    """Test whether A dominates B; at the bootstrap's level it does if `margin.low` is above 0.

    The best of several noisy points looks better than it is. The band allows for that: the replicates
    overshoot the estimate as the estimate overshoots the truth, and their distances set its width.

    Raises:
        ValueError: the systems were not evaluated on the same prompts.
    """
    require_same_prompts([a, b])
    weight_RP = bootstrap.weights(len(a.prompt_ids))
    lead_U = lead(a.point_VK, b.point_VK, directions_UK)
    lead_RU = lead(replicate_means(weight_RP, a.mean_PVK), replicate_means(weight_RP, b.mean_PVK), directions_UK)
    error_U = np.maximum(lead_RU.std(axis=0, ddof=1), _SMALLEST_ERROR)
    largest_R = (np.abs(lead_RU - lead_U) / error_U).max(axis=1)
    width = np.quantile(largest_R, bootstrap.level, method="higher")
    low_U, high_U = lead_U - width * error_U, lead_U + width * error_U
    weakest = (lead_U / error_U).min()
    p_value = (1 + int((largest_R >= weakest).sum())) / (bootstrap.replicates + 1)
    ends = zip(lead_U.tolist(), low_U.tolist(), high_U.tolist(), strict=True)
    return Dominance(
        leads=tuple(Estimate(*end) for end in ends),
        margin=Estimate(float(lead_U.min()), float(low_U.min()), float(high_U.min())),
        p_value=p_value,
    )
