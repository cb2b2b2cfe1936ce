"""Trust in the reward model: does what it believes of the policies agree with a check that never selected?

The check is the truth where it is known, else the judge, a second reward model trained on prompts of its
own. Over-optimisation is the proxy rising while the check falls (Goodhart's law); it is tested on paired
prompts between the first and the last iteration that was selected by the proxy.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from dpalign.measure.bootstrap import Array, Bootstrap, Estimate
from dpalign.measure.objective import expected_objective, objective_difference
from dpalign.measure.points import SystemRewards, judged_by_truth


def overoptimisation(
    iterations: Sequence[SystemRewards], check: str, directions_UK: Array, bootstrap: Bootstrap
) -> dict[str, Any]:
    """E_v J(v) of every iteration by the proxy and by the check, and how both changed.

    Args:
        iterations: in their order, the check's rewards in place of the true ones.
        check: what checks: truth or judge.

    Returns:
        check; curve: [{system, iteration, proxy, check}]; steps: [{a, b, proxy, check}] from each selected iteration to
        the next; change: the same from the first to the last of them, None where there is one alone; warning: the
        proxy rose in that change and the check fell, beyond their intervals.
    """
    checks = [judged_by_truth(system) for system in iterations]
    curve = [
        {
            "system": proxy.name,
            "iteration": proxy.iteration,
            "proxy": expected_objective(proxy, directions_UK, bootstrap),
            "check": expected_objective(checked, directions_UK, bootstrap),
        }
        for proxy, checked in zip(iterations, checks, strict=True)
    ]
    selected = [i for i, system in enumerate(iterations) if (system.iteration or 0) >= 1]

    def changed(i: int, j: int) -> dict[str, Any]:
        return {
            "a": iterations[j].name,
            "b": iterations[i].name,
            "proxy": objective_difference(iterations[j], iterations[i], directions_UK, bootstrap),
            "check": objective_difference(checks[j], checks[i], directions_UK, bootstrap),
        }

    change = changed(selected[0], selected[-1]) if len(selected) > 1 else None
    return {
        "check": check,
        "curve": curve,
        "steps": [changed(i, j) for i, j in pairwise(selected)],
        "change": change,
        "warning": change is not None and _rises(change["proxy"]) and _falls(change["check"]),
    }


def _rises(change: Estimate) -> bool:
    return change.low is not None and change.low > 0


def _falls(change: Estimate) -> bool:
    return change.high is not None and change.high < 0
