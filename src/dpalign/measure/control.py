"""Control: does the answer follow the dial?

The dial is the direction's angle in degrees (two objectives). It turns the second objective: verbosity in the
paper. All figures are positive if the policy obeys: on the paper's arc verbosity falls as the angle goes from 0 to
-45. Beyond 90 or -90 degrees the second weight goes back as the angle goes on, so the angle is mirrored there
(`dial_angles`). Directions are no dial if the weight of the second objective both rises and falls, as on a whole
circle or on an arc across 90 degrees. The words of the answers are measured in the same way (`length`). With three
objectives or more there is no dial: each mean reward is compared with each weight (`weight_taus`).

Shapes: R replicates, P prompts, V directions (in the order of the dial), K = 2 objectives unless said otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeGuard

import numpy as np

from dpalign.measure.bootstrap import Array, Bootstrap, Estimate, Mask, replicate_means
from dpalign.measure.points import Rewards, require_same_prompts
from dpalign.measure.record import Record
from dpalign.paper.direction import rng_for

COMMON: Final = 5
"""Number of conditions at which the taus of systems are compared. Fewer conditions lie further apart, and tau comes
out higher."""


@dataclass(frozen=True)
class Control:
    """How the second objective (verbosity) follows the angle; intervals by prompt."""

    kendall_tau: Estimate
    """Mean over prompts of Kendall's tau-b of verbosity against angle."""
    constant_prompts: int
    """Prompts whose verbosity is the same at every direction; they have no ranks and count as tau 0."""
    slope: Estimate
    """Reward points a degree of `dial_angles`, by least squares through the means."""
    span: Estimate
    """Reward points between the first and the last direction."""
    drops: tuple[Estimate, ...]
    """Reward points from each direction to the next; each interval covers its own step, not all at once."""
    spearman: float | None
    """Rank correlation of the V averages with the angle. Near 1 for any steady trend, however small: read
    it last. None if all averages are equal."""

    steps_beyond_doubt: int
    """Steps whose whole interval lies above 0."""


def angles(directions_V2: Array) -> Array:
    """The angle of each direction, in degrees: (V,)."""
    return np.degrees(np.arctan2(directions_V2[:, 1], directions_V2[:, 0]))


def dial_angles(directions_V2: Array) -> Array:
    """The angle of each direction, mirrored into -90..90 degrees, where it rises with the second weight: (V,).

    130 degrees count as 50, for example. On an arc across 90 degrees, two angles with one second weight count as one.
    """
    return angles(np.stack([np.abs(directions_V2[:, 0]), directions_V2[:, 1]], axis=1))


def is_dial(directions_VK: Array | None) -> TypeGuard[Array]:
    """Whether control can be measured: two objectives, and two directions or more that turn the second one way."""
    if directions_VK is None or directions_VK.shape[1] != 2 or len(directions_VK) < 2:
        return False
    step_V = np.diff(directions_VK[:, 1])
    return bool((step_V > 0).all() or (step_V < 0).all())


def control(system: Rewards, bootstrap: Bootstrap) -> Control:
    """Measure a policy sampled at directions that are a dial (`is_dial`)."""
    directions_V2 = system.directions_VK
    assert is_dial(directions_V2), f"the directions of {system.name!r} are no dial"
    return _turned(directions_V2, system.mean_PVK[:, :, 1], bootstrap)


class Length(Record):
    """How the words of the answers follow the dial: `Control` with words in place of reward points."""

    kendall_tau: Estimate
    """Mean over prompts of Kendall's tau-b of words against angle."""
    drops: tuple[Estimate, ...]
    """Words from each direction to the next, positive when they go the way of the second objective."""
    steps_beyond_doubt: int
    """Steps whose whole interval lies above 0."""
    last_to_first: Estimate | None
    """Mean words at the last direction over those at the first; None where the first has no words."""


def length(system: Rewards, bootstrap: Bootstrap) -> Length | None:
    """Measure the words of a policy along its dial; None without a dial, or without texts."""
    if system.words_PVS is None or not is_dial(system.directions_VK):
        return None
    words_PV = system.words_PVS.mean(axis=2)
    found = _turned(system.directions_VK, words_PV, bootstrap)
    first_R, last_R = (bootstrap.weights(len(words_PV)) @ words_PV[:, [0, -1]]).T
    ratio = None
    if (first_R > 0).all():
        ratio = bootstrap.interval(words_PV[:, -1].mean() / words_PV[:, 0].mean(), last_R / first_R)
    return Length(
        kendall_tau=found.kendall_tau,
        drops=found.drops,
        steps_beyond_doubt=found.steps_beyond_doubt,
        last_to_first=ratio,
    )


def _turned(directions_V2: Array, figure_PV: Array, bootstrap: Bootstrap) -> Control:
    """How a figure of each prompt's answers follows the dial."""
    angle_V = dial_angles(directions_V2)
    mean_V = figure_PV.mean(axis=0)
    mean_RV = bootstrap.weights(len(figure_PV)) @ figure_PV
    tau_P, constant_P = kendall_tau_b(angle_V, figure_PV)
    way = way_of(directions_V2)
    drop_V, drop_RV = way * np.diff(mean_V), way * np.diff(mean_RV, axis=1)
    drops = tuple(bootstrap.interval(drop, drop_RV[:, v]) for v, drop in enumerate(drop_V))
    return Control(
        kendall_tau=bootstrap.mean(tau_P),
        constant_prompts=int(constant_P.sum()),
        slope=bootstrap.interval(float(slope(angle_V, mean_V)), slope(angle_V, mean_RV)),
        span=bootstrap.interval(drop_V.sum(), drop_RV.sum(axis=1)),
        drops=drops,
        spearman=rank_correlation(angle_V, mean_V),
        steps_beyond_doubt=sum(drop.above_zero for drop in drops),
    )


def way_of(directions_V2: Array) -> float:
    """Where the second objective should go from the dial's first direction to its last: 1 up, -1 down."""
    return float(np.sign(directions_V2[-1, 1] - directions_V2[0, 1]))


def kendall_tau_b(dial_V: Array, reward_PV: Array) -> tuple[Array, Mask]:
    """Kendall's tau-b of each prompt's rewards against the dial, and which prompts have constant rewards.

    tau-b = (concordant - discordant pairs) / sqrt(pairs not tied in one * pairs not tied in the other);
    where all rewards of a prompt are tied it is undefined, and 0 here. Differences below 1e-9 reward
    points are ties: they come from the order in which samples were summed.
    """
    i, j = np.triu_indices(len(dial_V), k=1)
    dial_sign_I = np.sign(dial_V[i] - dial_V[j])
    reward_sign_PI = np.sign(np.round(reward_PV[:, i] - reward_PV[:, j], 9))
    untied_P = np.abs(reward_sign_PI).sum(axis=1) * np.abs(dial_sign_I).sum()
    constant_P = untied_P == 0
    return (reward_sign_PI @ dial_sign_I) / np.sqrt(np.where(constant_P, 1, untied_P)), constant_P


def weight_taus(system: Rewards, bootstrap: Bootstrap) -> list[list[Estimate | None]]:
    """How the mean reward of each objective follows the weight of each over the system's directions; any K.

    Kendall's tau-b, K rows of K: rows are rewards, columns are weights. Above 0 the reward rises with the weight, also
    if less of it is wanted: a weight of 0 is above one of -1. The weights of a direction are correlated, so figures off
    the diagonal are no interference; the true front has them too. Intervals are by prompt. None: all directions give
    that objective the same weight.
    """
    directions_VK = system.directions_VK
    assert directions_VK is not None, system.name
    mean_RVK = replicate_means(bootstrap.weights(len(system.prompt_ids)), system.mean_PVK)
    found_XVK = np.concatenate([system.point_VK[None], mean_RVK])
    objectives = range(directions_VK.shape[1])
    varied = [bool(np.ptp(directions_VK[:, j]) > 1e-9) for j in objectives]
    taus: list[list[Estimate | None]] = [[None for _ in objectives] for _ in objectives]
    for i, j in ((i, j) for i in objectives for j in objectives if varied[j]):
        tau_X, _ = kendall_tau_b(directions_VK[:, j], found_XVK[:, :, i])
        taus[i][j] = bootstrap.interval(tau_X[0], tau_X[1:])
    return taus


def slope(dial_V: Array, mean_XV: Array) -> Array:
    """The least-squares slope of the rewards on the dial, reward points a degree: (...,)."""
    centred_V = dial_V - dial_V.mean()
    return np.asarray(mean_XV @ centred_V / (centred_V @ centred_V))


def rank_correlation(a_V: Array, b_V: Array) -> float | None:
    """Spearman's rank correlation (ties share their mean rank); None if one of the two is constant."""
    from scipy import stats  # type: ignore[import-untyped]  # slow to import, and `dpa --help` comes through here

    rank_a_V, rank_b_V = (stats.rankdata(value_V.round(9)) for value_V in (a_V, b_V))
    if rank_a_V.std() == 0 or rank_b_V.std() == 0:
        return None
    return float(np.corrcoef(rank_a_V, rank_b_V)[0, 1])


@dataclass(frozen=True)
class Following:
    """How the second objective follows the request: an angle, or a reward target (SteerLM)."""

    conditions: int
    kendall_tau: Estimate | None
    """None with two conditions, whose order says next to nothing."""
    kendall_tau_common: Estimate | None
    """The same at `COMMON` evenly spread conditions; None if there are fewer."""
    spearman: float | None
    span: Estimate
    """Reward points between the conditions that ask for the least and for the most."""


def following(system: Rewards, asked_V: Array, bootstrap: Bootstrap) -> Following:
    """Measure a system by what its conditions ask for, as `control` measures a dial.

    Args:
        asked_V: what each condition asks of the second objective: an angle, or reward points.
    """
    assert len(asked_V) == system.reward_PVSK.shape[1] > 1, system.name
    tau_P, common_P = _tau(system, asked_V), _tau(system, asked_V, COMMON)
    return Following(
        conditions=len(asked_V),
        kendall_tau=None if tau_P is None else bootstrap.mean(tau_P),
        kendall_tau_common=None if common_P is None else bootstrap.mean(common_P),
        spearman=rank_correlation(asked_V, system.point_VK[:, 1]) if len(asked_V) > 2 else None,
        span=bootstrap.mean(_span(system, asked_V)),
    )


@dataclass(frozen=True)
class FollowingLead:
    """By how much one system follows better than another, paired by prompt."""

    kendall_tau: Estimate | None
    """At `COMMON` conditions of each; None if one has fewer."""
    span: Estimate


def following_lead(a: Rewards, asked_a_V: Array, b: Rewards, asked_b_V: Array, bootstrap: Bootstrap) -> FollowingLead:
    """System a's figures of `following` minus system b's."""
    require_same_prompts([a, b])
    tau_a_P, tau_b_P = _tau(a, asked_a_V, COMMON), _tau(b, asked_b_V, COMMON)
    return FollowingLead(
        kendall_tau=None if tau_a_P is None or tau_b_P is None else bootstrap.mean(tau_a_P - tau_b_P),
        span=bootstrap.mean(_span(a, asked_a_V) - _span(b, asked_b_V)),
    )


def _tau(system: Rewards, asked_V: Array, of: int | None = None) -> Array | None:
    """Each prompt's tau: (P,); with `of`, at that many evenly spread conditions, both ends included.

    None with fewer than `of` conditions, or fewer than three.
    """
    order_V = np.argsort(asked_V, kind="stable")
    if len(order_V) < max(3, of or 0):
        return None
    if of is not None:
        order_V = order_V[np.linspace(0, len(order_V) - 1, of).round().astype(int)]
    tau_P, _ = kendall_tau_b(asked_V[order_V], system.mean_PVK[:, order_V, 1])
    return tau_P


def _span(system: Rewards, asked_V: Array) -> Array:
    """Each prompt's reward points between the conditions that ask for the least and for the most: (P,)."""
    order_V = np.argsort(asked_V, kind="stable")
    return np.asarray(system.mean_PVK[:, order_V[-1], 1] - system.mean_PVK[:, order_V[0], 1])


def span_share(system: Rewards, reference: Rewards, bootstrap: Bootstrap) -> Estimate | None:
    """The system's span over a reference's (the true front's), paired by prompt.

    None if the reference's span is not above 0 in every resample.
    """
    require_same_prompts([system, reference])
    assert system.directions_VK is not None, system.name
    way = way_of(system.directions_VK)
    own_P, whole_P = (way * (one.mean_PVK[:, -1, 1] - one.mean_PVK[:, 0, 1]) for one in (system, reference))
    weight_RP = bootstrap.weights(len(system.prompt_ids))
    whole_R = weight_RP @ whole_P
    if whole_P.mean() <= 0 or (whole_R <= 0).any():
        return None
    return bootstrap.interval(own_P.mean() / whole_P.mean(), (weight_RP @ own_P) / whole_R)


def regret(system: Rewards, bootstrap: Bootstrap, at: Sequence[int] | None = None) -> Estimate:
    """What asking for v loses against the best direction u for v: mean over v of max_u v . r(u) - v . r(v).

    u is chosen on one half of the prompts and judged on the other, both ways, and the two are averaged.
    On the same prompts the best of V noisy averages would always seem to gain something. The figure can
    be below 0, if the choice from one half loses on the other. Any K.

    Args:
        at: indices of the v to average over, among the system's directions; None takes all.
    """
    directions_VK, prompts = system.directions_VK, len(system.prompt_ids)
    assert directions_VK is not None, system.name
    assert prompts > 1, "regret needs two halves of prompts"
    shuffled_P = rng_for("halves", bootstrap.seed, prompts).permutation(prompts)
    halves = (shuffled_P[: prompts // 2], shuffled_P[prompts // 2 :])
    first, second = (system.mean_PVK[half] for half in halves)
    # each half is resampled separately: a prompt in both would be used for choosing and judging
    first_R = replicate_means(bootstrap.weights(len(first), "first half"), first)
    second_R = replicate_means(bootstrap.weights(len(second), "second half"), second)
    asked = list(range(len(directions_VK)) if at is None else at)
    value = _regret_both_ways(first.mean(axis=0), second.mean(axis=0), directions_VK)[asked].mean()
    replicate_R = _regret_both_ways(first_R, second_R, directions_VK)[:, asked].mean(axis=1)
    return bootstrap.interval(float(value), replicate_R)


def _regret_both_ways(a_XVK: Array, b_XVK: Array, directions_VK: Array) -> Array:
    a_XUV, b_XUV = a_XVK @ directions_VK.T, b_XVK @ directions_VK.T
    return (_regret(a_XUV, b_XUV) + _regret(b_XUV, a_XUV)) / 2


def _regret(choosing_XUV: Array, judging_XUV: Array) -> Array:
    chosen_X1V = choosing_XUV.argmax(axis=-2, keepdims=True)
    best_XV = np.take_along_axis(judging_XUV, chosen_X1V, axis=-2).squeeze(-2)
    asked_XV = np.diagonal(judging_XUV, axis1=-2, axis2=-1)
    return np.asarray(best_XV - asked_XV)
