"""What the dial of the page shows: real answers, by prompt, system and direction."""

from collections.abc import Sequence
from typing import Any

from dpalign.measure.summary import Answer, Summary, Weights
from dpalign.page.looks import in_order, looks_of
from dpalign.page.words import degrees
from dpalign.paper.direction import angle_of, arithmetic


def dial_data(summary: Summary) -> dict[str, Any] | None:
    """Everything that page.js reads, as plain JSON; None if no answer has a direction.

    Of several answers to one prompt under one condition the first is shown: none is hand-picked.
    """
    order = [one.name for one in in_order(summary)]
    steered = [name for name in order[::-1] if any(a.system == name and a.direction for a in summary.answers)]
    plain = [name for name in order if any(a.system == name and not a.direction for a in summary.answers)]
    by_prompt: dict[str, list[Answer]] = {}
    for answer in summary.answers:
        by_prompt.setdefault(answer.prompt, []).append(answer)
    prompts = []
    for prompt, own in by_prompt.items():
        dials = {name: _stops([a for a in own if a.system == name and a.direction], summary) for name in steered}
        beside = {a.system: _shown(a) for a in own[::-1] if not a.direction}
        if any(dials.values()):
            prompts.append({"prompt": prompt, "dials": dials, "plain": beside})
    if not prompts:
        return None
    return {
        "objectives": summary.objectives,
        "senses": summary.senses,
        "angled": summary.angled,
        "true": summary.measure == "true",
        "steered": steered,
        "plain": plain,
        "prompts": prompts,
        "colours": {name: look.name for name, look in looks_of(summary).items()},
        "means": {name: _means(summary, name) for name in summary.systems} if summary.angled else {},
        "true_front": [list(point.values()) for point in summary.true_front or ()] if summary.angled else [],
    }


def _stops(answers: Sequence[Answer], summary: Summary) -> list[dict[str, Any]]:
    """The answers along the dial: at most one for each evaluation direction, in their order."""
    stops: dict[int, dict[str, Any]] = {}
    for answer in answers:
        weights = answer.direction
        assert weights is not None
        nearest = _nearest(weights, summary.directions)
        if nearest not in stops:
            angle = angle_of(list(weights.values())) if summary.angled else None
            stops[nearest] = {
                **_shown(answer),
                "index": nearest,
                "weights": list(weights.values()),
                "angle": angle,
                "name": f"direction {nearest + 1}" if angle is None else degrees(angle),
                "arithmetic": arithmetic(weights, summary.senses),
            }
    return [stops[i] for i in sorted(stops)]


def _nearest(weights: Weights, directions: Sequence[Weights]) -> int:
    return max(range(len(directions)), key=lambda i: sum(directions[i][name] * weights[name] for name in weights))


def _shown(answer: Answer) -> dict[str, Any]:
    return {
        "response": answer.response,
        "words": len(answer.response.split()),
        "rewards": _short(answer.rewards),
        "true_rewards": _short(answer.true_rewards) if answer.true_rewards else None,
    }


def _short(rewards: Weights) -> Weights:
    return {name: round(value, 2) for name, value in rewards.items()}


def _means(summary: Summary, name: str) -> list[list[float]]:
    """(first, second) objective of each of a system's points."""
    return [[point.by(objective).value for objective in summary.objectives] for point in summary.systems[name].points]
