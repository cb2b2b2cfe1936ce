"""What the dial of the page shows: real answers, by prompt, system and direction."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpalign.page.systems import System
from dpalign.page.words import arithmetic, degrees

Answer = Mapping[str, Any]


def dial_data(
    answers: Sequence[Answer], summary: Mapping[str, Any], systems: Sequence[System]
) -> dict[str, Any] | None:
    """Everything that page.js reads, plain JSON; None where no answer was given for a direction.

    Of several answers to one prompt under one condition the first is shown: none is picked for its beauty.

    Raises:
        ValueError: an answer lacks its prompt, system or response, or rewards for an objective.
    """
    for i, answer in enumerate(answers):
        _check(i, answer, summary["objectives"])
    steered = _in_order([a["system"] for a in answers if a.get("condition")], systems, newest_first=True)
    plain = _in_order([a["system"] for a in answers if not a.get("condition")], systems)
    prompts = []
    for prompt in dict.fromkeys(answer["prompt"] for answer in answers):
        own = [answer for answer in answers if answer["prompt"] == prompt]
        dials = {
            name: _stops([a for a in own if a["system"] == name and a.get("condition")], summary) for name in steered
        }
        besides = {name: [_shown(a) for a in own if a["system"] == name and not a.get("condition")] for name in plain}
        if any(dials.values()):
            prompts.append(
                {"prompt": prompt, "dials": dials, "plain": {n: found[0] for n, found in besides.items() if found}}
            )
    if not prompts:
        return None
    return {
        "objectives": summary["objectives"],
        "senses": summary["senses"],
        "angled": len(summary["objectives"]) == 2,
        "true": summary["measure"] == "true",
        "steered": steered,
        "plain": plain,
        "prompts": prompts,
        "colours": {system.name: system.look.name for system in systems},
        "means": {system.name: _means(system, summary) for system in systems},
        "true_front": [list(point.values())[:2] for point in summary.get("true_front") or []],
    }


def _check(i: int, answer: Answer, objectives: Sequence[str]) -> None:
    for key in ("prompt", "system", "response", "rewards"):
        if key not in answer:
            raise ValueError(f"answer {i} has no {key!r}; it has {', '.join(answer)}")
    for key in ("rewards", "true_rewards", "condition"):
        lacking = [name for name in objectives if answer.get(key) and name not in answer[key]]
        if lacking or (key == "rewards" and not answer[key]):
            raise ValueError(
                f"answer {i} (system {answer['system']!r}): {key} lack {(lacking or list(objectives))[0]!r}"
            )


def _in_order(names: Sequence[str], systems: Sequence[System], newest_first: bool = False) -> list[str]:
    """The names in the order of the page; for dials the last iteration first, and controls after all iterations."""
    order = {system.name: i for i, system in enumerate(systems)}
    found = sorted(dict.fromkeys(names), key=lambda name: order.get(name, len(order)))
    return found[::-1] if newest_first else found


def _stops(answers: Sequence[Answer], summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The answers along the dial: one an evaluation direction, in their order."""
    stops: dict[int, dict[str, Any]] = {}
    for answer in answers:
        weights = {name: float(answer["condition"][name]) for name in summary["objectives"]}
        nearest = _nearest(weights, summary["directions"])
        if nearest not in stops:
            angle = answer.get("angle")
            if angle is None and len(weights) == 2:
                x, y = weights.values()
                angle = math.degrees(math.atan2(y, x))
            stops[nearest] = {
                **_shown(answer),
                "index": nearest,
                "weights": list(weights.values()),
                "angle": angle,
                "name": degrees(angle)
                if angle is not None
                else f"direction {nearest + 1} of {len(summary['directions'])}",
                "arithmetic": arithmetic(weights, summary["senses"]),
            }
    return [stops[i] for i in sorted(stops)]


def _nearest(weights: Mapping[str, float], directions: Sequence[Mapping[str, float]]) -> int:
    return max(range(len(directions)), key=lambda i: sum(directions[i][name] * weights[name] for name in weights))


def _shown(answer: Answer) -> dict[str, Any]:
    return {
        "response": answer["response"],
        "words": len(answer["response"].split()),
        "rewards": answer["rewards"],
        "true_rewards": answer.get("true_rewards"),
    }


def _means(system: System, summary: Mapping[str, Any]) -> list[list[float | None]]:
    """(first, second) objective of each of its points."""
    columns = [[found.value for found in system.rewards(name)] for name in summary["objectives"][:2]]
    return [list(point) for point in zip(*columns, strict=True)]
