"""The figures of a run's report that an export shows. Only this module reads `Source.summary`."""

from typing import Any, Final

from dpalign.dial.export.source import Source
from dpalign.measure.summary import Cost, Measured
from dpalign.page.words import direction, number, said
from dpalign.paper.direction import Preference
from dpalign.train.contract import FrontPoint

PICTURE: Final = "front.png"


def measured(source: Source) -> Measured | None:
    """Return the exported policy's part of the report; None if it has none."""
    policies = source.summary.of_role("iteration") if source.summary is not None else []
    return next((one for one in policies if one.steered and one.system.iteration == source.contract.iteration), None)


def front_of(source: Source) -> tuple[FrontPoint, ...]:
    """Return the reward model's mean rewards, one point per evaluation direction."""
    names, policy = source.contract.names, measured(source)
    return tuple(
        FrontPoint(Preference.from_weights(point.direction, names), {name: point.rewards[name].value for name in names})
        for point in (policy.points if policy is not None else ())
        if point.direction is not None
    )


def picture_of(source: Source) -> bytes | None:
    """The report's front up to the exported policy; None unless two objectives were measured."""
    summary = source.summary
    if summary is None or measured(source) is None or len(source.contract.names) != 2:
        return None
    from dpalign.page.drawing import png
    from dpalign.page.figures import front

    last = source.contract.iteration or 0
    systems = {name: one for name, one in summary.systems.items() if (one.system.iteration or 0) <= last}
    return png(front(summary.model_copy(update={"systems": systems})).canvas)


def figures(source: Source) -> dict[str, Any]:
    """Return the figures that the card shows: a table of rewards by direction, and the cost."""
    summary, policy, names = source.summary, measured(source), source.contract.names
    if summary is None or policy is None:
        return {"system": None, "columns": (), "points": (), "prompts": 0, "tau": None, "truth": False, "cost": {}}
    truth = summary.measure == "true"
    tables = [(True, "by the reward model"), (False, "true")] if truth else [(True, "")]
    columns = [f"{name}, {whose}" if whose else name for _, whose in tables for name in names]
    points = [
        (direction(point), [said(point.by(name, judged=judged)) for judged, _ in tables for name in names])
        for point in policy.points
    ]
    spent = policy.cost or Cost()
    cost = {
        "tokens sampled": spent.sampled_tokens,
        "answers scored": spent.scored_responses,
        "tokens trained on": spent.trained_tokens,
    }
    tau = policy.figures.kendall_tau
    return {
        "system": policy.name,
        "columns": columns,
        "points": points,
        "prompts": summary.intervals.prompts,
        "tau": None if tau is None else number(tau.value, 2),
        "truth": truth,
        "cost": {what: n for what, n in cost.items() if n},
    }
