"""What the run shows, in words: only what its intervals support, and beside it what they do not.

A claim of dominance is decided over the whole table (Holm); with several full-pipeline seeds it must
hold in every one of them, and its mean margin's t-interval must lie above zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from dpalign.measure.control import is_dial
from dpalign.page.compared_words import Claim, misunderstood, rivals_claims
from dpalign.page.systems import System, last_iteration
from dpalign.page.words import (
    MISSING,
    Figure,
    agreeing,
    between,
    degrees,
    figure,
    listed,
    number,
    percent,
    probability,
    seed_count,
    turns,
)


@dataclass(frozen=True)
class Tile:
    """One large figure below the headline."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Headline:
    sentence: str
    scope: str
    """Whose rewards, which prompts, what the intervals are over."""
    claims: tuple[Claim, ...]
    tiles: tuple[Tile, ...]


def headline(summary: Mapping[str, Any], systems: Sequence[System]) -> Headline:
    last = last_iteration(systems)
    if last is None:
        names = listed([system.name for system in systems])
        return Headline(f"No policy was aligned in this run; it evaluates {names}.", scope(summary), (), ())
    return Headline(
        _sentence(summary, systems, last), scope(summary), _claims(summary, systems, last), _tiles(summary, last)
    )


def scope(summary: Mapping[str, Any]) -> str:
    runs = seed_count(summary)
    whose = (
        "Rewards are the true ones, computed by rule."
        if summary["measure"] == "true"
        else "Rewards are a reward model's opinion: the truth is not known here."
    )
    over = f"{_level(summary)} intervals resample the {summary['intervals']['prompts']:,} evaluation prompts"
    if runs > 1:
        return f"{whose} {over}; where it says so they run over {runs} seeds of the whole pipeline."
    return f"{whose} {over} of one training run: another seed's run may differ by more."


def left_out(summary: Mapping[str, Any]) -> str:
    """Which figures these directions do not allow, and why; nothing where they allow all."""
    said = ""
    if disputed := summary.get("disputed"):
        said = (
            f"Some directions want more {listed(disputed)} and others less, so that no side of a front is the better "
            "one: hypervolume, the share of the true front and the points under a front are left out "
            "(evaluation.senses can state a sense)."
        )
    asked = [list(direction.values()) for direction in summary["directions"]]
    if len(summary["objectives"]) == 2 and len(asked) > 1 and not is_dial(np.array(asked)):
        said += (
            f" The weight of {summary['objectives'][1]} rises and falls from direction to direction, so that control "
            "by an angle is left out too."
        )
    return said.strip()


def _level(summary: Mapping[str, Any]) -> str:
    return f"{100 * summary['intervals']['bootstrap']['level']:.0f}%"


def _sentence(summary: Mapping[str, Any], systems: Sequence[System], last: System) -> str:
    deaf = misunderstood(summary)
    baselines = [s.name for s in systems if s.role in ("baseline", "soup") and not s.copied and s.name not in deaf]
    said = {system.name: system.said for system in systems}

    def spoken(names: Sequence[str]) -> str:
        return listed([said[name] for name in names])

    leads = {name: lead for name in baselines if (lead := _lead(summary, last.name, name)) is not None}
    beaten = [name for name, (holds, _) in leads.items() if holds]
    lost = [name for name in baselines if (back := _lead(summary, name, last.name)) is not None and back[0]]
    rest = [name for name in leads if name not in beaten and name not in lost]
    every = f"every one of {len(summary['directions'])} directions"
    seeds = seed_count(summary)
    start = f"Over {seeds} seeds of the whole pipeline, " if seeds > 1 and leads else ""
    clauses = []
    if beaten:
        margin = min((leads[name][1] for name in beaten), key=lambda found: found.value or 0.0)
        interval = between(margin.low, margin.high)
        least = f"{number(margin.value)} reward points" + (f" ({interval})" if interval else "")
        clauses.append(f"{last.name} beats {spoken(beaten)} at {every}, by at least {least}")
    if rest:
        subject = "it" if beaten else last.name
        where = "all of them" if beaten else every
        clauses.append(f"{subject} is not shown to beat {spoken(rest)} at {where}")
    if lost:
        clauses.append(f"{spoken(lost)} {agreeing(lost, 'beats', 'beat')} {last.name} at {every}")
    follows = _dial_words(summary, last, "its" if clauses else f"{last.name}'s")
    if follows is not None:
        clauses.append(f"in the run shown, {follows.text}" if seeds > 1 else follows.text)
    if not clauses:
        clauses.append(f"{last.name} reaches {figure(last.entry, 'objective')} reward points over the directions")
    text = "; ".join(clauses) if len(clauses) > 2 else (", and " if len(clauses) == 2 else "").join(clauses)
    return start + text + "."


def _lead(summary: Mapping[str, Any], a: str, b: str) -> tuple[bool, Figure] | None:
    """Whether a is shown to dominate b, and by which margin: over seeds where there are several."""
    if seed_count(summary) > 1:
        rows = (summary["seeds"].get("dominance")) or []
        row = next((row for row in rows if (row["a"], row["b"]) == (a, b)), None)
        if row is None:
            return None
        margin = Figure.read(row["margin"])
        return row["dominates_in"] == seed_count(summary) and margin.above_zero, margin
    row = _row(summary, a, b)
    return (bool(row["dominates"]), Figure.read(row["margin"])) if row is not None else None


def _row(summary: Mapping[str, Any], a: str, b: str) -> Mapping[str, Any] | None:
    return next((row for row in summary["dominance"] if (row["a"], row["b"]) == (a, b)), None)


def _dial_words(summary: Mapping[str, Any], system: System, whose: str) -> Claim | None:
    """How the second objective follows the angle; None without a dial (k != 2, or a single direction)."""
    drops = system.entry.get("drops")
    if not drops:
        return None
    objective = summary["objectives"][1]
    verb = turns(summary)
    means = system.rewards(objective)
    ends = [system.entry["points"][i]["angle"] for i in (0, -1)]
    turn = f"as the dial turns from {degrees(ends[0])} to {degrees(ends[1])}"
    course = f"from {number(means[0].value)} to {number(means[-1].value)} {turn}"
    sure = system.entry["steps_beyond_doubt"]
    if sure == len(drops):
        return Claim(True, f"{whose} {objective} {verb} at each of {sure} steps, {course}")
    if figure(system.entry, "span").above_zero:
        return Claim(False, f"{whose} {objective} {verb} {course}, beyond doubt at {sure} of {len(drops)} steps")
    return Claim(False, f"{whose} {objective} is not shown to follow the dial ({course})")


def _claims(summary: Mapping[str, Any], systems: Sequence[System], last: System) -> tuple[Claim, ...]:
    iterations = [system for system in systems if system.role == "iteration"]
    claimed, deaf = ("baseline", "control", "soup"), misunderstood(summary)
    rivals = [s.name for s in systems if s.role in claimed and not s.copied and s.name not in deaf]
    pairs = [(last.name, name) for name in rivals]
    pairs += [(b.name, a.name) for a, b in pairwise(iterations)]
    said = {system.name: system.said for system in systems}
    claims = [_dominance_claim(summary, a, b, said) for a, b in pairs]
    first = next((system for system in iterations if system.entry["iteration"] >= 1), None)
    if first is not None and first is not last:
        claims.append(_growth_claim(summary, first.name, last.name))
    claims += rivals_claims(summary, systems)
    follows = _dial_words(summary, last, f"{last.name}'s")
    if follows is not None:
        where = "In the run shown, " if seed_count(summary) > 1 else ""
        claims.append(Claim(follows.holds, f"{where}{follows.text}."))
    return tuple(claim for claim in claims if claim is not None)


def _dominance_claim(summary: Mapping[str, Any], a: str, b: str, said: Mapping[str, str]) -> Claim | None:
    lead = _lead(summary, a, b)
    if lead is None:
        return None
    holds, margin = lead
    seeds = seed_count(summary)
    if seeds > 1:
        row = next(row for row in summary["seeds"]["dominance"] if (row["a"], row["b"]) == (a, b))
        why = f"{margin} in the mean of {seeds} seeds; decided so in {row['dominates_in']} of them"
    else:
        row = _row(summary, a, b)
        assert row is not None
        p = probability(row["p_holm"])
        why = f"{margin}; Holm p {p if p.startswith('<') else f'= {p}'}"
    return Claim(holds, f"{said[a]} beats {said[b]} at every direction: smallest lead {why}.")


def _growth_claim(summary: Mapping[str, Any], first: str, last: str) -> Claim | None:
    if seed_count(summary) > 1:
        rows = summary["seeds"].get("differences") or []
        found = next((row["objective"] for row in rows if (row["a"], row["b"]) == (last, first)), None)
        over = f", paired over {seed_count(summary)} seeds"
    else:
        row = _row(summary, last, first)
        found, over = (row or {}).get("objective_lead"), ""
    if found is None:
        return None
    growth = Figure.read(found)
    return Claim(growth.above_zero, f"E_v J(v) grows from {first} to {last}: by {growth}{over}.")


def _tiles(summary: Mapping[str, Any], last: System) -> tuple[Tile, ...]:
    entry = last.entry
    second = summary["objectives"][1] if len(summary["objectives"]) > 1 else ""
    tau = figure(entry, "kendall_tau")
    tiles = [
        _tile("E_v J(v), reward points over the directions", figure(entry, "objective")),
        _tile("of the true front's hypervolume", percent(figure(entry, "true_front_share")), "%"),
        _tile(f"{second} turned by the dial, reward points", figure(entry, "span")),
        _tile("of the true front's span", percent(figure(entry, "span_share")), "%"),
        _tile(f"Kendall tau of {second} against the angle, within a prompt", tau, digits=2),
        _tile("mean regret, reward points", figure(entry, "regret"), digits=2),
    ]
    return tuple(tile for tile in tiles if tile.value != MISSING)


def _tile(label: str, found: Figure, unit: str = "", digits: int = 1) -> Tile:
    if found.value is None:
        return Tile(label, MISSING, "")
    return Tile(label, number(found.value, digits) + unit, between(found.low, found.high, digits))
