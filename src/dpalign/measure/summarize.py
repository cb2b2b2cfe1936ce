"""From the rewards of the compared systems to the Summary's figures.

Shapes: U evaluation directions, V conditions, K objectives.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dpalign.measure.bootstrap import Array, holm
from dpalign.measure.control import angles, control, is_dial, length, regret, span_share, weight_taus
from dpalign.measure.dominance import dominance
from dpalign.measure.front import coverage
from dpalign.measure.hypervolume import hypervolume_estimate, hypervolume_share, nearby_references, sensitivity
from dpalign.measure.objective import expected_objective, objective_by_direction, objective_lead
from dpalign.measure.points import Rewards, by_condition, by_judge, by_truth, opinion_gap, points, require_same_prompts
from dpalign.measure.setting import REFERENCE_SHIFTS, Setting
from dpalign.measure.summary import (
    Cost,
    DominanceRow,
    Figures,
    Intervals,
    Measured,
    Point,
    Summary,
    Weights,
    WeightTaus,
)


def summarize(
    systems: Sequence[Rewards],
    setting: Setting,
    true_front: Rewards | None = None,
    pairs: Sequence[tuple[str, str]] | None = None,
    costs: Mapping[str, Cost] | None = None,
) -> Summary:
    """Compute the figures of all systems and pairs; `model_copy(update=...)` adds the rest of a report.

    Args:
        systems: evaluated on the same prompts; all with true rewards, or none.
        true_front: the rewards of each prompt's best answers at the evaluation directions, if known.
        pairs: the (a, b) of the dominance table; None: those of `claims`.
        costs: the cost to make each system, where known.

    Raises:
        ValueError: systems that cannot be compared; the message names them.
    """
    _check_systems(systems, setting, true_front)
    truth_known = systems[0].true_reward_PVSK is not None
    judges = [by_judge(one) for one in systems if one.judge_PVSK is not None]
    measured = [rewards.measured for rewards in systems]
    front = true_front if truth_known else None
    reference_K = setting.reference_K
    references_MK = [] if reference_K is None else nearby_references(reference_K, REFERENCE_SHIFTS)
    return Summary(
        objectives=setting.objectives,
        senses=tuple(setting.senses_K.tolist()),
        directions=tuple(_weights(v_K, setting) for v_K in setting.directions_UK),
        is_dial=is_dial(setting.directions_UK),
        reference=None if reference_K is None else _weights(reference_K, setting),
        measure="true" if truth_known else "judged",
        intervals=Intervals(bootstrap=setting.bootstrap, prompts=len(systems[0].prompt_ids)),
        systems={one.name: measured_system(one, setting, front, (costs or {}).get(one.name)) for one in systems},
        true_front=tuple(_weights(point_K, setting) for point_K in true_front.point_VK) if true_front else None,
        true_front_weight_taus=_weight_taus(true_front, setting) if true_front else {},
        dominance=tuple(dominance_table(measured, setting, pairs)),
        dominance_judged=tuple(dominance_table(systems, setting, pairs)) if truth_known else None,
        dominance_by_judge=tuple(dominance_table(judges, setting, pairs)) if len(judges) == len(systems) else None,
        sensitivity=tuple(sensitivity(measured, setting.senses_K, references_MK, front)),
    )


def _check_systems(systems: Sequence[Rewards], setting: Setting, true_front: Rewards | None) -> None:
    names = [system.name for system in systems]
    if len(set(names)) != len(names):
        raise ValueError(f"two systems share a name among {', '.join(names)}; name them apart")
    require_same_prompts([*systems, *([true_front] if true_front else [])])
    with_truth = [system.name for system in systems if system.true_reward_PVSK is not None]
    if with_truth and len(with_truth) < len(systems):
        without = next(name for name in names if name not in with_truth)
        raise ValueError(f"system {with_truth[0]!r} has true rewards and {without!r} has none; give all or none")


def measured_system(
    rewards: Rewards, setting: Setting, true_front: Rewards | None = None, cost: Cost | None = None
) -> Measured:
    """A system's points and figures by the truth, the reward model and the judge, as far as they are known."""
    known = rewards.true_reward_PVSK is not None
    judge = None if rewards.judge_PVSK is None else by_judge(rewards)
    gaps = opinion_gap(rewards, setting.bootstrap) if known else None
    return Measured(
        system=rewards.system,
        points=tuple(_points(rewards, setting)),
        figures=_figures(rewards.measured, setting, true_front if known else None),
        judged=_figures(rewards, setting, None) if known else None,
        by_judge=_figures(judge, replace(setting, reference_K=None), None) if judge else None,
        opinion_gap=dict(zip(setting.objectives, gaps, strict=True)) if gaps else None,
        length=length(rewards, setting.bootstrap),
        cost=cost,
    )


def _points(rewards: Rewards, setting: Setting) -> list[Point]:
    judged = points(rewards, setting.bootstrap)
    true = points(by_truth(rewards), setting.bootstrap) if rewards.true_reward_PVSK is not None else None
    counted = {
        name: by_condition(figure_PVS, setting.bootstrap)
        for name, figure_PVS in (("words", rewards.words_PVS), ("degenerate", rewards.degenerate_PVS))
        if figure_PVS is not None
    }
    directions_VK = rewards.directions_VK
    angle_V = angles(directions_VK) if directions_VK is not None and directions_VK.shape[1] == 2 else None
    return [
        Point(
            direction=None if directions_VK is None else _weights(directions_VK[v], setting),
            angle=None if angle_V is None else float(angle_V[v]),
            rewards=dict(zip(setting.objectives, opinion, strict=True)),
            true_rewards=dict(zip(setting.objectives, true[v], strict=True)) if true else None,
            **{name: by_v[v] for name, by_v in counted.items()},
        )
        for v, opinion in enumerate(judged)
    ]


def _weights(value_K: Array, setting: Setting) -> Weights:
    return dict(zip(setting.objectives, value_K.tolist(), strict=True))


def _figures(rewards: Rewards, setting: Setting, true_front: Rewards | None) -> Figures:
    """A system's figures on the rewards it holds."""
    bootstrap, senses_K, directions_UK = setting.bootstrap, setting.senses_K, setting.directions_UK
    steered = rewards.directions_VK is not None
    dial = control(rewards, bootstrap) if is_dial(rewards.directions_VK) else None
    volume, share, reference_K = None, None, setting.reference_K
    if reference_K is not None:
        volume = hypervolume_estimate(rewards, senses_K, reference_K, bootstrap)
        if true_front is not None:
            share = hypervolume_share(rewards, true_front, senses_K, reference_K, bootstrap)
    return Figures(
        objective=expected_objective(rewards, directions_UK, bootstrap),
        objective_by_direction=tuple(objective_by_direction(rewards, directions_UK, bootstrap)),
        hypervolume=volume,
        true_front_share=share,
        span_share=span_share(rewards, true_front, bootstrap) if dial and true_front is not None else None,
        regret=regret(rewards, bootstrap) if steered and len(rewards.prompt_ids) > 1 else None,
        weight_taus=_weight_taus(rewards, setting),
        **(vars(dial) if dial else {}),
    )


def _weight_taus(rewards: Rewards, setting: Setting) -> WeightTaus:
    """Taus by the objectives' names; empty with fewer than three objectives, which have a dial, or three directions."""
    names, directions_VK = setting.objectives, rewards.directions_VK
    if directions_VK is None or len(names) < 3 or len(directions_VK) < 3:
        return {}
    return {
        name: {of: tau for of, tau in zip(names, row, strict=True) if tau is not None}
        for name, row in zip(names, weight_taus(rewards, setting.bootstrap), strict=True)
    }


def dominance_table(
    systems: Sequence[Rewards], setting: Setting, pairs: Sequence[tuple[str, str]] | None = None
) -> list[DominanceRow]:
    """Test dominance for each pair, on the rewards that the systems hold, with Holm over the pairs.

    `dominates` is the decision over the whole table; a margin's interval covers its own pair only.
    Each row also has the paired lead in E_v J(v) (Eq. 4), with a Holm adjustment of its own.

    Raises:
        ValueError: the replicates are too few for any decision.
    """
    by_name = {system.name: system for system in systems}
    pairs = claims(systems) if pairs is None else pairs
    error_rate = 1 - setting.bootstrap.level
    fewest = fewest_replicates(len(pairs), setting.bootstrap.level)
    if setting.bootstrap.replicates < fewest:
        raise ValueError(
            f"{setting.bootstrap.replicates} bootstrap replicates cannot decide {len(pairs)} pairs at once: "
            f"set at least {fewest}, or name fewer pairs"
        )
    tests = [dominance(by_name[a], by_name[b], setting.directions_UK, setting.bootstrap) for a, b in pairs]
    leads = [objective_lead(by_name[a], by_name[b], setting.directions_UK, setting.bootstrap) for a, b in pairs]
    lead_holm, test_holm = holm([p_value for _, p_value in leads]), holm([test.p_value for test in tests])
    return [
        DominanceRow(
            a=a,
            b=b,
            margin=test.margin,
            leads=test.leads,
            objective_lead=lead,
            lead_p_holm=lead_p_holm,
            p_value=test.p_value,
            p_holm=p_holm,
            dominates=p_holm <= error_rate,
            coverage=None if setting.disputed else coverage(by_name[a].point_VK, by_name[b].point_VK, setting.senses_K),
        )
        for (a, b), test, p_holm, (lead, _), lead_p_holm in zip(pairs, tests, test_holm, leads, lead_holm, strict=True)
    ]


def fewest_replicates(pairs: int, level: float) -> int:
    """The fewest bootstrap replicates with which a decision over this many pairs is possible (Holm)."""
    return math.ceil(round(pairs / (1 - level), 9))


def claims(systems: Sequence[Rewards]) -> list[tuple[str, str]]:
    """The pairs of the paper's claim (section 3.2): each iteration t >= 1 over all non-iterations and all earlier t."""
    iterations = {one.name: one.system.iteration for one in systems}
    return [
        (a, b)
        for a, t in iterations.items()
        for b, earlier in iterations.items()
        if t is not None and t >= 1 and (earlier is None or earlier < t)
    ]
