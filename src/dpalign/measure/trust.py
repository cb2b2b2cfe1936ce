"""Trust in the reward model: does what it believes of the policies agree with a check that never selected?

The check is the truth where it is known, else the judge, a second reward model trained on prompts of its
own. Over-optimisation is the proxy rising while the check falls (Goodhart's law); it is tested on paired
prompts between the first and the last iteration that was selected by the proxy.
"""

from collections.abc import Sequence
from itertools import pairwise

from dpalign.measure.bootstrap import Array, Bootstrap
from dpalign.measure.objective import expected_objective, objective_difference
from dpalign.measure.points import Rewards, by_judge
from dpalign.measure.summary import Trust, TrustChange, TrustPoint


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
        warning=whole is not None and whole.proxy.above_zero and whole.check.below_zero,
    )
