"""Trust in the reward model: does its opinion of the policies agree with a check that never selected?

The check is the truth where it is known. Else it is the judge, a second reward model trained on its own
prompts. Over-optimisation: the proxy rises while the check falls (Goodhart's law). It is tested on paired
prompts, between the first and the last iteration that the proxy selected.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from dpalign.measure.bootstrap import Array, Bootstrap, Estimate
from dpalign.measure.objective import expected_objective, objective_difference
from dpalign.measure.points import Rewards, by_judge
from dpalign.measure.seeds import BY_JUDGE, BY_REWARD, DIVERGENCE, SCORED
from dpalign.measure.summary import Measured, Summary, Trust, TrustChange, TrustPoint


def trust(systems: Sequence[Rewards], directions_UK: Array, bootstrap: Bootstrap) -> Trust | None:
    """The over-optimisation curve over the iterations; None without iterations, or without a check of all of them."""
    iterations = [rewards for rewards in systems if rewards.system.role == "iteration"]
    iterations.sort(key=lambda rewards: rewards.system.iteration or 0)
    true = all(rewards.true_reward_PVSK is not None for rewards in iterations)
    judged = all(rewards.judge_PVSK is not None for rewards in iterations)
    if not iterations or not (true or judged):
        return None
    judges = [by_judge(rewards) for rewards in iterations] if judged else None
    checks = [rewards.measured for rewards in iterations] if true else judges
    assert checks is not None

    curve = [
        TrustPoint(
            system=proxy.name,
            iteration=proxy.system.iteration or 0,
            proxy=expected_objective(proxy, directions_UK, bootstrap),
            check=expected_objective(check, directions_UK, bootstrap),
            judge=expected_objective(judges[i], directions_UK, bootstrap) if true and judges else None,
        )
        for i, (proxy, check) in enumerate(zip(iterations, checks, strict=True))
    ]
    selected = [i for i, rewards in enumerate(iterations) if (rewards.system.iteration or 0) >= 1]

    def change(i: int, j: int) -> TrustChange:
        return TrustChange(
            a=iterations[j].name,
            b=iterations[i].name,
            proxy=objective_difference(iterations[j], iterations[i], directions_UK, bootstrap),
            check=objective_difference(checks[j], checks[i], directions_UK, bootstrap),
        )

    whole = change(selected[0], selected[-1]) if len(selected) > 1 else None
    return Trust(
        check="truth" if true else "judge",
        curve=tuple(curve),
        steps=tuple(change(i, j) for i, j in pairwise(selected)),
        change=whole,
        warning=whole is not None and whole.over_optimised,
    )


@dataclass(frozen=True)
class Optimised:
    """How far a system was optimised, and E_v J(v) by each measure; None if unknown."""

    system: str
    divergence: Estimate | None
    """KL divergence from SFT, in nats an answer."""
    scored: float | None
    """Answers scored to make it."""
    proxy: Estimate
    """E_v J(v) by the reward model that selects."""
    truth: Estimate | None
    judge: Estimate | None


def optimised(summary: Summary) -> list[Optimised]:
    """Every iteration, and every system whose divergence from SFT is known, but no copies; over seeds if several."""
    shown = [one for one in summary.systems.values() if not one.is_copy]
    rows = [_optimised(summary, one) for one in shown]
    kept = {one.name for one in shown if one.system.role == "iteration"}
    return [row for row in rows if row.divergence or row.system in kept]


def _optimised(summary: Summary, one: Measured) -> Optimised:
    seeds, known = summary.seeds, summary.measure == "true"
    if seeds is not None and len(seeds.seeds) > 1 and one.name in seeds.systems:
        own = seeds.systems[one.name]
        return Optimised(
            system=one.name,
            divergence=own.get(DIVERGENCE),
            scored=own[SCORED].value if SCORED in own else None,
            proxy=own[BY_REWARD if known else "objective"],
            truth=own["objective"] if known else None,
            judge=own.get(BY_JUDGE),
        )
    return Optimised(
        system=one.name,
        divergence=one.divergence,
        scored=one.cost.scored_responses if one.cost else None,
        proxy=(one.judged or one.figures).objective,
        truth=one.figures.objective if known else None,
        judge=one.by_judge.objective if one.by_judge else None,
    )
