"""The figures as data: what RUN/report/summary.json holds, and so all that the page shows.

Where the truth is known (the world), the figures are measured on true rewards and the same ones by
the reward model's opinion stand beside them under "judged"; elsewhere the opinion is all there is.
All intervals here are by prompt; "seeds" alone speaks of other training runs.

Shapes: U evaluation directions, V conditions, K objectives. Angles in degrees, rewards 0-100.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np

from dpalign.measure.bootstrap import Array, Bootstrap, Estimate, holm
from dpalign.measure.control import angles, control, is_dial, regret, span_share
from dpalign.measure.dominance import dominance
from dpalign.measure.front import coverage
from dpalign.measure.hypervolume import hypervolume_estimate, hypervolume_share, nearby_references, sensitivity
from dpalign.measure.objective import expected_objective, objective_by_direction, objective_difference
from dpalign.measure.points import SystemRewards, judged_by_truth, opinion_gap, points, require_same_prompts, senses_of

COSTS = ("sampled_tokens", "scored_responses", "scored_tokens", "trained_tokens", "total_tokens", "seconds")
"""What a system cost, as the stages' ledgers count it."""

COVERED = ("share", "under", "inside", "outside", "outside_dominated")
"""Of B's points as seen from A's front (`front.Coverage`); None where a front has no side."""


@dataclass(frozen=True, eq=False)
class Setting:
    """What is fixed before any system is evaluated."""

    objectives: tuple[str, ...]
    directions_UK: Array
    """The evaluation directions, in the order of the dial."""
    reference_K: Array | None
    """Hypervolume's reference, in reward points: fixed before any DPA run. None leaves hypervolume out."""
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    reference_shifts: tuple[float, ...] = (-5.0, 0.0, 5.0)
    """Reward points by which the sensitivity table moves each coordinate of the reference."""
    senses: tuple[int, ...] | None = None
    """+1 for an objective to maximise, -1 for one to minimise; None: as the directions have it."""

    def __post_init__(self) -> None:
        k = len(self.objectives)
        reference = (k,) if self.reference_K is None else self.reference_K.shape
        if self.directions_UK.ndim != 2 or self.directions_UK.shape[1] != k or reference != (k,):
            raise ValueError(
                f"{k} objectives ({', '.join(self.objectives)}) with directions of shape {self.directions_UK.shape} "
                f"and a reference of shape {reference}; (directions, {k}) and ({k},) are needed"
            )
        if self.senses is not None and (len(self.senses) != k or not set(self.senses) <= {1, -1}):
            raise ValueError(f"senses are {self.senses}: {k} of them are needed, each 1 or -1")
        if self.disputed and self.reference_K is not None:
            raise ValueError(
                f"some directions want more {self.disputed[0]} and others less, so no front has a side and hypervolume "
                "no reference: give none, or give the senses"
            )

    @property
    def senses_K(self) -> Array:
        """+1 for an objective to maximise, -1 for one to minimise, 0 for a disputed one: (K,)."""
        return senses_of(self.directions_UK) if self.senses is None else np.array(self.senses, dtype=float)

    @property
    def disputed(self) -> tuple[str, ...]:
        """The objectives that some directions want more of and others less, where no senses are given."""
        return tuple(name for name, sense in zip(self.objectives, self.senses_K, strict=True) if not sense)


def summarize(
    systems: Sequence[SystemRewards],
    setting: Setting,
    true_front: SystemRewards | None = None,
    pairs: Sequence[tuple[str, str]] | None = None,
    costs: Mapping[str, Mapping[str, float]] | None = None,
    reward_model: Mapping[str, Any] | None = None,
    counts: Mapping[str, Any] | None = None,
    seeds: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The whole of summary.json, ready for json.dump (no NaN: what is undefined is None).

    Args:
        systems: evaluated on the same prompts; all with true rewards, or none.
        true_front: the rewards of each prompt's best answers at the evaluation directions, if known.
        pairs: the (a, b) of the dominance table; None: each iteration against all that came before it.
        costs: for each system, any of `COSTS`.
        reward_model, counts, seeds: passed through.

    Raises:
        ValueError: systems that cannot be compared; the message names them.
    """
    _check_systems(systems, setting, true_front)
    truth_known = systems[0].true_reward_PVSK is not None
    measured = [judged_by_truth(system) for system in systems] if truth_known else list(systems)
    front = true_front if truth_known else None
    reference_K = setting.reference_K
    summary = {
        "objectives": list(setting.objectives),
        "senses": setting.senses_K,
        "disputed": setting.disputed,
        "directions": [_weights(v_K, setting) for v_K in setting.directions_UK],
        "reference": _weights(reference_K, setting) if reference_K is not None else None,
        "measure": "true" if truth_known else "judged",
        "intervals": {"by": "prompt", "bootstrap": setting.bootstrap, "prompts": len(systems[0].prompt_ids)},
        "systems": {
            system.name: system_summary(system, setting, true_front, (costs or {}).get(system.name))
            for system in systems
        },
        "true_front": [_weights(point_K, setting) for point_K in true_front.point_VK] if true_front else None,
        "dominance": dominance_table(measured, setting, pairs),
        "dominance_judged": dominance_table(systems, setting, pairs) if truth_known else None,
        "hypervolume_sensitivity": []
        if reference_K is None
        else sensitivity(measured, setting.senses_K, nearby_references(reference_K, setting.reference_shifts), front),
        "reward_model": reward_model or {},
        "counts": counts or {},
        "seeds": seeds or {},
    }
    plain: dict[str, Any] = jsonable(summary)
    return plain


def _check_systems(systems: Sequence[SystemRewards], setting: Setting, true_front: SystemRewards | None) -> None:
    if not systems:
        raise ValueError("no systems to summarise; evaluate at least one")
    names = [system.name for system in systems]
    if len(set(names)) != len(names):
        raise ValueError(f"two systems share a name among {', '.join(names)}; name them apart")
    require_same_prompts([*systems, *([true_front] if true_front else [])])
    k = len(setting.objectives)
    for system in systems:
        if system.reward_PVSK.shape[-1] != k:
            raise ValueError(f"system {system.name!r} has {system.reward_PVSK.shape[-1]} objectives, not {k}")
    with_truth = [system.name for system in systems if system.true_reward_PVSK is not None]
    if with_truth and len(with_truth) < len(systems):
        without = next(name for name in names if name not in with_truth)
        raise ValueError(f"system {with_truth[0]!r} has true rewards and {without!r} has none; give all or none")


def system_summary(
    system: SystemRewards,
    setting: Setting,
    true_front: SystemRewards | None = None,
    cost: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """One entry of `systems`: points, figures, intervals and cost."""
    truth = judged_by_truth(system) if system.true_reward_PVSK is not None else None
    unknown = [key for key in cost or {} if key not in COSTS]
    if unknown:
        raise ValueError(f"system {system.name!r}: unknown cost {unknown[0]!r}; known are {', '.join(COSTS)}")
    figures = _figures(truth, setting, true_front) if truth is not None else _figures(system, setting, None)
    gaps = opinion_gap(system, setting.bootstrap) if truth is not None else None
    entry = {
        "iteration": system.iteration,
        "points": _points(system, truth, setting),
        **figures,
        **{key: (cost or {}).get(key) for key in COSTS},
        "judged": _figures(system, setting, None) if truth is not None else None,
        "opinion_gap": dict(zip(setting.objectives, gaps, strict=True)) if gaps is not None else None,
    }
    plain: dict[str, Any] = jsonable(entry)
    return plain


def _points(system: SystemRewards, truth: SystemRewards | None, setting: Setting) -> list[dict[str, Any]]:
    judged = points(system, setting.bootstrap)
    true = points(truth, setting.bootstrap) if truth is not None else [None] * len(judged)
    directions_VK = system.directions_VK
    rows = []
    for v, (opinion, fact) in enumerate(zip(judged, true, strict=True)):
        direction_K = directions_VK[v] if directions_VK is not None else None
        rows.append(
            {
                "direction": _weights(direction_K, setting) if direction_K is not None else None,
                "angle": angles(direction_K[None])[0] if direction_K is not None and len(direction_K) == 2 else None,
                "rewards": _mean_rewards(opinion, setting),
                "true_rewards": _mean_rewards(fact, setting) if fact is not None else None,
            }
        )
    return rows


def _mean_rewards(estimates: Sequence[Estimate], setting: Setting) -> dict[str, dict[str, float | None]]:
    pairs = zip(setting.objectives, estimates, strict=True)
    return {name: {"mean": one.value, "low": one.low, "high": one.high} for name, one in pairs}


def _weights(value_K: Array, setting: Setting) -> dict[str, float]:
    return dict(zip(setting.objectives, value_K.tolist(), strict=True))


def _figures(system: SystemRewards, setting: Setting, true_front: SystemRewards | None) -> dict[str, Any]:
    """A system's figures on the rewards it holds: bare numbers, with their intervals under "intervals"."""
    bootstrap, senses_K, directions_UK = setting.bootstrap, setting.senses_K, setting.directions_UK
    steered = system.directions_VK is not None
    dial = control(system, bootstrap) if is_dial(system.directions_VK) else None
    volume, share, reference_K = None, None, setting.reference_K
    if reference_K is not None:
        volume = hypervolume_estimate(system, senses_K, reference_K, bootstrap)
        if true_front is not None:
            share = hypervolume_share(system, true_front, senses_K, reference_K, bootstrap)
    spans = span_share(system, true_front, bootstrap) if dial is not None and true_front is not None else None
    estimates: dict[str, Estimate | None] = {
        "true_front_share": share,
        "objective": expected_objective(system, directions_UK, bootstrap),
        "kendall_tau": dial.kendall_tau if dial is not None else None,
        "regret": regret(system, bootstrap) if steered and len(system.prompt_ids) > 1 else None,
        "slope": dial.slope if dial is not None else None,
        "span": dial.span if dial is not None else None,
        "span_share": spans,
    }
    return {
        "hypervolume": volume,
        **{name: one.value if one is not None else None for name, one in estimates.items()},
        "spearman": dial.spearman if dial is not None else None,
        "intervals": {name: {"low": one.low, "high": one.high} for name, one in estimates.items() if one is not None},
        "objective_by_direction": objective_by_direction(system, directions_UK, bootstrap),
        "constant_prompts": dial.constant_prompts if dial is not None else None,
        "drops": dial.drops if dial is not None else None,
        "falls_at_every_step": dial.falls_at_every_step if dial is not None else None,
        "steps_beyond_doubt": dial.steps_beyond_doubt if dial is not None else None,
    }


def dominance_table(
    systems: Sequence[SystemRewards], setting: Setting, pairs: Sequence[tuple[str, str]] | None = None
) -> list[dict[str, Any]]:
    """Who dominates whom, on the rewards that the systems hold, Holm over the pairs.

    `dominates` is the decision over the whole table; a margin's interval speaks of its own pair.
    Beside it the paired lead in E_v J(v) (Eq. 4).

    Raises:
        ValueError: a pair names an unknown system, or the replicates are too few for any decision.
    """
    by_name = {system.name: system for system in systems}
    pairs = claims(systems) if pairs is None else pairs
    unknown = [name for pair in pairs for name in pair if name not in by_name]
    if unknown:
        raise ValueError(f"the dominance table asks for system {unknown[0]!r}; known are {', '.join(by_name)}")
    error_rate = 1 - setting.bootstrap.level
    fewest = fewest_replicates(len(pairs), setting.bootstrap.level)
    if setting.bootstrap.replicates < fewest:
        raise ValueError(
            f"{setting.bootstrap.replicates} bootstrap replicates cannot decide {len(pairs)} pairs at once: "
            f"set at least {fewest}, or name fewer pairs"
        )
    tests = [dominance(by_name[a], by_name[b], setting.directions_UK, setting.bootstrap) for a, b in pairs]
    rows = []
    for (a, b), test, p_holm in zip(pairs, tests, holm([test.p_value for test in tests]), strict=True):
        seen = None if setting.disputed else coverage(by_name[a].point_VK, by_name[b].point_VK, setting.senses_K)
        rows.append(
            {
                "a": a,
                "b": b,
                **{name: getattr(seen, name, None) for name in COVERED},
                "margin": test.margin,
                "leads": test.leads,
                "objective_lead": objective_difference(
                    by_name[a], by_name[b], setting.directions_UK, setting.bootstrap
                ),
                "p_value": test.p_value,
                "p_holm": p_holm,
                "dominates": p_holm <= error_rate,
            }
        )
    plain: list[dict[str, Any]] = jsonable(rows)
    return plain


def fewest_replicates(pairs: int, level: float) -> int:
    """The bootstrap replicates without which no decision over so many pairs could be reached (Holm)."""
    return math.ceil(round(pairs / (1 - level), 9))


def claims(systems: Sequence[SystemRewards]) -> list[tuple[str, str]]:
    """The pairs of the paper's claim (section 3.2): each iteration t >= 1 over the baselines and all earlier t."""
    later = [system for system in systems if system.iteration is not None and system.iteration >= 1]
    return [
        (a.name, b.name)
        for a in later
        for b in systems
        if b.iteration is None or (a.iteration is not None and b.iteration < a.iteration)
    ]


def jsonable(value: Any) -> Any:
    """Plain JSON values: arrays and dataclasses taken apart, NaN and infinity as None, six decimals kept.

    Six decimals lie far below any interval, and far above what the order of a sum can change: so the
    same figures give the same bytes.
    """
    match value:
        case bool() | int() | str() | None:
            return value
        case np.bool_() | np.integer():
            return value.item()
        case float() | np.floating():
            return round(float(value), 6) + 0.0 if math.isfinite(value) else None  # + 0.0: no -0.0
        case np.ndarray():
            return jsonable(value.tolist())
        case Mapping():
            return {str(key): jsonable(one) for key, one in value.items()}
        case list() | tuple():
            return [jsonable(one) for one in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: jsonable(getattr(value, one.name)) for one in fields(value)}
    raise ValueError(f"a summary cannot hold {value!r} of type {type(value).__name__}")
