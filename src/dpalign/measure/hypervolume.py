"""Hypervolume: the volume of reward space between a reference point and a front.

With two objectives it is the area under the interpolated front (`front.py`), so that gaps between the sampled
directions cost nothing. With more it is the usual hypervolume of the points (moocore). The reference is fixed before
any DPA run: SFT's helpfulness, and the most verbosity of the true optimum (on the arc at 0 degrees). Any reference is
a choice, so a table shows several.

Shapes: R replicates, P prompts, V points, K objectives, M references. The unit is reward points to the power K.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import moocore  # type: ignore[import-untyped]
import numpy as np

from dpalign.measure.bootstrap import Array, Bootstrap, Estimate, replicate_means
from dpalign.measure.front import front_height, front_knots
from dpalign.measure.points import Rewards, require_same_prompts


def hypervolume(point_VK: Array, senses_K: Array, reference_K: Array) -> float:
    """The volume between the reference and the front of a system's points; 0 if no point passes the reference."""
    if len(senses_K) == 2:
        return _area(front_knots(point_VK, senses_K), reference_K * senses_K)
    return float(moocore.hypervolume(point_VK, ref=reference_K, maximise=(senses_K > 0).tolist()))


def _area(knot_N2: Array, reference_2: Array) -> float:
    """The integral of max(0, front - reference) over the second gain, from the reference to the front's end."""
    floor, start = reference_2
    if start >= knot_N2[-1, 1]:
        return 0.0
    beyond_N2 = knot_N2[knot_N2[:, 1] > start]
    x_N = np.concatenate([[start], beyond_N2[:, 1]])
    above_N = np.concatenate([front_height(knot_N2, x_N[:1]), beyond_N2[:, 0]]) - floor
    left_N, right_N = above_N[:-1], above_N[1:]  # the front falls: left >= right
    mean_height_N = (left_N + right_N) / 2
    sinks_N = (right_N < 0) & (left_N > 0)  # a segment that ends below the floor counts as a triangle
    mean_height_N[sinks_N] = left_N[sinks_N] ** 2 / (2 * (left_N - right_N)[sinks_N])
    return float((np.diff(x_N) * np.maximum(mean_height_N, 0)).sum())


def hypervolume_estimate(system: Rewards, senses_K: Array, reference_K: Array, bootstrap: Bootstrap) -> Estimate:
    """The hypervolume of a system's points, with its interval by prompt."""
    value = hypervolume(system.point_VK, senses_K, reference_K)
    return bootstrap.interval(value, _replicates(system, senses_K, reference_K, bootstrap))


def hypervolume_share(
    system: Rewards, front: Rewards, senses_K: Array, reference_K: Array, bootstrap: Bootstrap
) -> Estimate | None:
    """A system's hypervolume over another front's, such as the true front's; paired by prompt.

    None if the other front, or a resample of it, does not pass the reference.
    """
    require_same_prompts([system, front])
    whole = hypervolume(front.point_VK, senses_K, reference_K)
    whole_R = _replicates(front, senses_K, reference_K, bootstrap)
    if whole <= 0 or (whole_R <= 0).any():
        return None
    part = hypervolume(system.point_VK, senses_K, reference_K)
    return bootstrap.interval(part / whole, _replicates(system, senses_K, reference_K, bootstrap) / whole_R)


def _replicates(system: Rewards, senses_K: Array, reference_K: Array, bootstrap: Bootstrap) -> Array:
    return _replicates_of(system, tuple(senses_K.tolist()), tuple(reference_K.tolist()), bootstrap)


@lru_cache(maxsize=64)  # a comparison asks for the last iteration's and the true front's again and again
def _replicates_of(
    system: Rewards, senses: tuple[float, ...], reference: tuple[float, ...], bootstrap: Bootstrap
) -> Array:
    replicate_RVK = replicate_means(bootstrap.weights(len(system.prompt_ids)), system.mean_PVK)
    senses_K, reference_K = np.array(senses), np.array(reference)
    return np.array([hypervolume(point_VK, senses_K, reference_K) for point_VK in replicate_RVK])


@dataclass(frozen=True)
class AtReference:
    """The hypervolumes of all systems from one reference, and their shares of the true front's."""

    reference: tuple[float, ...]
    hypervolumes: dict[str, float]
    shares: dict[str, float | None]


def nearby_references(reference_K: Array, shifts: Sequence[float]) -> list[Array]:
    """The reference moved by every combination of shifts (reward points) of its coordinates."""
    return [reference_K + np.array(shift) for shift in product(shifts, repeat=len(reference_K))]


def sensitivity(
    systems: Sequence[Rewards], senses_K: Array, references_MK: Sequence[Array], front: Rewards | None
) -> list[AtReference]:
    """The hypervolumes, and shares of a true front's if one is given, from each of several references."""
    rows = []
    for reference_K in references_MK:
        values = {system.name: hypervolume(system.point_VK, senses_K, reference_K) for system in systems}
        whole = hypervolume(front.point_VK, senses_K, reference_K) if front is not None else 0.0
        shares = {name: value / whole if whole > 0 else None for name, value in values.items()}
        rows.append(AtReference(tuple(reference_K.tolist()), values, shares))
    return rows
