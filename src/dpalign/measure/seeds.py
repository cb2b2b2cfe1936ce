"""Several seeds of the whole pipeline: what another training run would have given.

An interval by prompt (`bootstrap.py`) holds the checkpoints fixed. Headline claims rest on runs that
differ in every draw, from the first to the last stage; each gives one figure, and few figures call
for Student's t.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

SYSTEM_FIGURES = (
    "objective",
    "true_front_share",
    "hypervolume",
    "kendall_tau",
    "regret",
    "span",
    "span_share",
    "slope",
    "spearman",
)
"""The figures of a system's summary that are combined over seeds."""


@dataclass(frozen=True)
class OverSeeds:
    """A figure's mean over seeds, its t-interval (None with one seed), and the figures themselves."""

    value: float
    low: float | None
    high: float | None
    values: tuple[float, ...]


def over_seeds(values: Sequence[float], level: float = 0.95) -> OverSeeds:
    """Mean and t-interval of one figure over seeds."""
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"figures over seeds are {list(values)}: at least one is needed, and all must be numbers")
    figures = np.array(values, dtype=float)
    mean = float(figures.mean())
    if len(figures) == 1:
        return OverSeeds(mean, None, None, tuple(figures.tolist()))
    half = float(stats.t.ppf((1 + level) / 2, len(figures) - 1)) * figures.std(ddof=1) / math.sqrt(len(figures))
    return OverSeeds(mean, float(mean - half), float(mean + half), tuple(figures.tolist()))


def paired_over_seeds(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> OverSeeds:
    """Mean and t-interval of a - b, where both have a figure of each seed, in the same order."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} figures against {len(b)}: a paired difference needs both of every seed")
    return over_seeds([x - y for x, y in zip(a, b, strict=True)], level)


def combine_seeds(
    summaries: Mapping[int, Mapping[str, Any]], differences: Sequence[tuple[str, str]] = (), level: float = 0.95
) -> dict[str, Any]:
    """The `seeds` part of a summary, from the summaries of several seeds' runs.

    `differences` names pairs of systems whose E_v J(v) is compared, paired by seed. A system or a
    figure that one of the runs lacks is left out.

    Raises:
        ValueError: no summaries, or a difference names a system that not all runs have.
    """
    if not summaries:
        raise ValueError("no summaries to combine; finish at least one run's evaluation first")
    runs = [summaries[seed] for seed in sorted(summaries)]
    names = [name for name in runs[0]["systems"] if all(name in run["systems"] for run in runs)]
    unknown = [name for pair in differences for name in pair if name not in names]
    if unknown:
        raise ValueError(f"no system {unknown[0]!r} in every seed's run; they share {', '.join(names)}")
    return {
        "seeds": sorted(summaries),
        "level": level,
        "systems": {name: _figures([run["systems"][name] for run in runs], level) for name in names},
        "differences": [
            {"a": a, "b": b, "objective": _json(paired_over_seeds(_objective(runs, a), _objective(runs, b), level))}
            for a, b in differences
        ],
        "dominance": _dominance([run["dominance"] for run in runs], level),
        **_compared(runs, level),
    }


def _compared(runs: Sequence[Mapping[str, Any]], level: float) -> dict[str, Any]:
    """What comparisons add, where every run is one: ratios of hypervolume, specialists, settings, feasibility.

    Returns:
        hypervolume_ratios: [{a, b, ratio}]; control_leads: system -> {kendall_tau, span}; specialists: family -> mean
        shortfall; understood_in: system -> in how many runs a wish in words made it briefer; settings: system -> the
        setting that each seed's tuning chose; degenerate: system -> group -> share; trust: how proxy and check changed.
    """
    found: dict[str, Any] = {}
    trusts = [run.get("trust") for run in runs]
    if all(trust and trust["change"] for trust in trusts):
        found["trust"] = {
            name: _json(over_seeds([trust["change"][name]["value"] for trust in trusts if trust], level))
            for name in ("proxy", "check")
        } | {"warned_in": sum(bool(trust and trust["warning"]) for trust in trusts)}
    compared = [run.get("comparison") for run in runs]
    if not all(compared):
        return found
    each = [one for one in compared if one]
    ratios = [{row["system"]: row["hypervolume_ratio"] for row in one["differences"]} for one in each]
    families = [one["specialists"]["families"] for one in each]
    followed = [
        {(row["system"], name): row[name] for row in one.get("control_leads", ()) for name in ("kendall_tau", "span")}
        for one in each
    ]
    tried = [run.get("tuning") or {} for run in runs]
    asked = [
        {
            (system, group["name"]): group["degenerate"]["share"]
            for system, one in feasible.items()
            for group in one["groups"]
        }
        for feasible in (run.get("feasibility") or {} for run in runs)
    ]
    return found | {
        "hypervolume_ratios": [
            {"a": each[0]["last"], "b": system, "ratio": ratio} for system, ratio in _of_all(ratios, level).items()
        ],
        "control_leads": _nested(_of_all(followed, level)),
        "specialists": _of_all(families, level),
        "understood_in": _understood(each),
        "settings": {
            system: [next(row["setting"] for row in one[system] if row["chosen"]) for one in tried]
            for system in tried[0]
            if all(system in one for one in tried)
        },
        "degenerate": _nested(_of_all(asked, level)),
    }


def _understood(runs: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """In how many runs a wish in words made each system briefer, by its interval."""
    names = [row["system"] for row in runs[0].get("wishes") or []]
    brief = [row["system"] for run in runs for row in run.get("wishes") or [] if row["change"]["high"] < 0]
    return {name: brief.count(name) for name in names}


def _nested(table: Mapping[tuple[str, str], Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for (outer, inner), value in table.items():
        found.setdefault(outer, {})[inner] = value
    return found


def _of_all(tables: Sequence[Mapping[Any, Any]], level: float) -> dict[Any, dict[str, Any]]:
    """The estimates that every run has under a name, over seeds."""
    return {
        key: _json(over_seeds([table[key]["value"] for table in tables], level))
        for key in tables[0]
        if all(table.get(key) is not None for table in tables)
    }


def _objective(runs: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [run["systems"][name]["objective"] for run in runs]


def _figures(systems: Sequence[Mapping[str, Any]], level: float) -> dict[str, Any]:
    combined: dict[str, Any] = {}
    for figure in SYSTEM_FIGURES:
        values = [_value(system.get(figure)) for system in systems]
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            combined[figure] = _json(over_seeds(known, level))
    drops = [system.get("drops") or () for system in systems]
    if drops[0] and len({len(of_seed) for of_seed in drops}) == 1:
        steps = zip(*([drop["value"] for drop in of_seed] for of_seed in drops), strict=True)
        combined["drops"] = [_json(over_seeds(step, level)) for step in steps]
    return combined


def _value(figure: Any) -> float | None:
    bare = figure["value"] if isinstance(figure, Mapping) else figure
    return None if bare is None else float(bare)


def _dominance(tables: Sequence[Sequence[Mapping[str, Any]]], level: float) -> list[dict[str, Any]]:
    by_pair = [{(row["a"], row["b"]): row for row in table} for table in tables]
    combined = []
    for pair in by_pair[0]:
        rows = [table[pair] for table in by_pair if pair in table]
        if len(rows) == len(tables):
            margin = over_seeds([row["margin"]["value"] for row in rows], level)
            dominates = sum(bool(row["dominates"]) for row in rows)
            combined.append({"a": pair[0], "b": pair[1], "dominates_in": dominates, "margin": _json(margin)})
    return combined


def _json(figure: OverSeeds) -> dict[str, Any]:
    return {"value": figure.value, "low": figure.low, "high": figure.high, "values": list(figure.values)}
