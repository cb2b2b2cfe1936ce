"""The figures of a run's report that an export shows: the only reader of summary.json here."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from dpalign.dial.export.source import Source
from dpalign.page.words import Figure, degrees, number
from dpalign.paper.direction import Preference
from dpalign.train.contract import FrontPoint

PICTURE: Final = "front.png"


def measured(source: Source) -> Mapping[str, Any] | None:
    """The policy's entry in the report; None where it has none."""
    if source.report is None:
        return None
    summary = json.loads((source.report / "summary.json").read_text(encoding="utf-8"))
    for name, entry in summary["systems"].items():
        if (entry["role"], entry["iteration"]) == ("iteration", source.contract.iteration):
            steered = all(point.get("direction") is not None for point in entry["points"])
            return {**entry, "name": name, "prompts": summary["intervals"]["prompts"]} if steered else None
    return None


def front_of(source: Source) -> tuple[FrontPoint, ...]:
    """The reward model's mean rewards, a point an evaluation direction."""
    names, entry = source.contract.names, measured(source)
    return tuple(
        FrontPoint(
            Preference.from_weights(point["direction"], names),
            {name: float(point["rewards"][name]["mean"]) for name in names},
        )
        for point in (entry["points"] if entry is not None else ())
    )


def picture_of(source: Source) -> bytes | None:
    """The report's figure of the front."""
    path = None if source.report is None else source.report / "figures" / PICTURE
    return path.read_bytes() if path is not None and path.is_file() else None


def figures(source: Source) -> dict[str, Any]:
    """What the card shows of them: a table of rewards by direction, and the cost."""
    entry, names = measured(source), source.contract.names
    if entry is None:
        return {"system": None, "columns": (), "points": (), "prompts": 0, "tau": None, "truth": False, "cost": {}}
    truth = "true_rewards" in entry["points"][0]
    tables = [("rewards", "by the reward model"), ("true_rewards", "true")] if truth else [("rewards", "")]
    columns = [f"{name}, {whose}" if whose else name for _, whose in tables for name in names]
    points = [
        (_direction(point, names), [str(Figure.read(point[key][name])) for key, _ in tables for name in names])
        for point in entry["points"]
    ]
    cost = {
        "tokens sampled": entry["sampled_tokens"],
        "answers scored": entry["scored_responses"],
        "tokens trained on": entry["trained_tokens"],
    }
    return {
        "system": entry["name"],
        "columns": columns,
        "points": points,
        "prompts": entry["prompts"],
        "tau": None if entry["kendall_tau"] is None else number(entry["kendall_tau"], 2),
        "truth": truth,
        "cost": {what: n for what, n in cost.items() if n},
    }


def _direction(point: Mapping[str, Any], names: Sequence[str]) -> str:
    if len(names) == 2:
        return degrees(point["angle"])
    return ", ".join(f"{name} {number(point['direction'][name], 2)}" for name in names)
