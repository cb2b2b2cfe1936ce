"""Tables of what can be trusted: answers beyond what can be had, the reward model against its check, and on pairs."""

from collections.abc import Mapping
from typing import Any

from dpalign.measure.beyond import MARGIN
from dpalign.page.tables import Cell, Row, Table, cell, word
from dpalign.page.words import MINUS, MISSING, Figure, degrees, listed, number, percent, whole

Summary = Mapping[str, Any]


def feasibility_tables(summary: Summary) -> dict[str, tuple[Table, Table]]:
    """By system: asked for what can be had, and for more; in groups, and each condition by itself."""
    return {
        name: (
            _targets(summary, found) if found["asked_for"] == "targets" else _angles(summary, found),
            _conditions(summary, found),
        )
        for name, found in (summary.get("feasibility") or {}).items()
    }


def _rule(found: Mapping[str, Any]) -> str:
    rule = found["rule"]
    return (
        f"Degenerate: cut at the longest allowed length, without a word, with a sentence of {rule['sentence_words']} "
        f"words or more that occurs twice, or with over {100 * rule['repetition']:g}% of its runs of {rule['run']} "
        f"words repeated. {found['prompts']:,} prompts, {found['samples']} to each in each condition; "
        "intervals over prompts."
    )


def _shares(group: Mapping[str, Any]) -> tuple[Cell, Cell]:
    share = percent(Figure.read(group["degenerate"]["share"]))
    reasons = [f"{100 * part:.1f}% {reason}" for reason, part in group["degenerate"]["reasons"].items() if part]
    return cell(share), word(listed(reasons) or MISSING)


def _targets(summary: Summary, found: Mapping[str, Any]) -> Table:
    names = summary["objectives"]
    rows = []
    for group in found["groups"]:
        more = group.get("more_than_annotated") or {"degenerate": None, "distance": {}}
        cells = [*_shares(group), cell(percent(Figure.read(more["degenerate"])), sign=True)]
        for name in names:
            cells += [cell(Figure.read(group["distance"][name]))]
            cells += [cell(Figure.read(more["distance"].get(name)), sign=True)]
        rows.append(Row((word(group["name"]), Cell(str(group["conditions"])), *cells)))
    columns = (
        *("asked for", "targets", "degenerate, %", "why", "change"),
        *(column for name in names for column in (f"off in {name}, points", "change")),
    )
    caption = (
        f"As annotated: {names[0]} as high as the best annotated answers near each target; beyond: that share of the "
        "way from there to the top of the scale. Off: the distance of an answer's reward from what was asked, "
        f"{'true' if found['measure'] == 'true' else 'by the reward model'}. Change: against the annotated target that "
        f"asks for the same of the rest, paired by prompt; groups may hold other targets. {_rule(found)}"
    )
    return Table(caption, columns, tuple(rows))


def _angles(summary: Summary, found: Mapping[str, Any]) -> Table:
    second = summary["objectives"][1]
    rows = tuple(
        Row(
            (
                word(group["name"].replace("-", MINUS)),
                Cell(str(group["conditions"])),
                *_shares(group),
                cell(Figure.read(group["follows"])),
                cell(Figure.read(group["regret"]), 2),
            )
        )
        for group in found["groups"]
    )
    columns = ("asked for", "angles", "degenerate, %", "why", f"{second} goes on to follow, points", "regret, points")
    margin = any(group["name"].startswith(MARGIN) for group in found["groups"])
    caption = (
        f"Follows: how far {second} moves with the angle, over the arc that users ask for, and beyond what was trained "
        "on from its end to the farthest angle asked; above 0 it obeys. "
        + ("Margin: directions that training had around the arc and nobody asks for; from the arc's end. " * margin)
        + f"Regret: what asking for v loses against asking for the best other angle. {_rule(found)}"
    )
    return Table(caption, columns, rows)


def _conditions(summary: Summary, found: Mapping[str, Any]) -> Table:
    """Each condition by itself: a group's average may hide its worst."""
    names = summary["objectives"]
    whose = "" if found["measure"] == "true" else ", judged"
    rows = []
    for row in found["conditions"]:
        asked = [number(row["asked"][name]) for name in names]
        told = [Cell(degrees(row["angle"]))] if "angle" in row else [Cell(one) for one in asked]
        got = [cell(Figure.read(row["rewards"][name])) for name in names]
        rows.append(Row((*told, word(row["group"].replace("-", MINUS)), *_shares(row), *got)))
    of_angles = found["asked_for"] == "directions"
    columns = ("angle",) if of_angles else tuple(f"{name} asked" for name in names)
    columns += ("of the group", "degenerate, %", "why", *(f"{name} given{whose}" for name in names))
    worst = max(found["conditions"], key=lambda row: float(row["degenerate"]["share"]["value"]))
    share, group = percent(Figure.read(worst["degenerate"]["share"])), worst["group"].replace("-", MINUS)
    at = (
        f"at {degrees(worst['angle'])}"
        if of_angles
        else f"asked for {listed([number(worst['asked'][n]) for n in names])}"
    )
    caption = (
        f"Each {'angle' if of_angles else 'target'} by itself. Most answers are degenerate {at} ({group}): {share}%."
    )
    return Table(caption, columns, tuple(rows))


def trust_table(summary: Summary) -> Table | None:
    """How the proxy and the check changed from iteration to iteration."""
    trust = summary.get("trust")
    if not trust or not trust["steps"]:
        return None
    steps = [*trust["steps"], *([trust["change"]] if len(trust["steps"]) > 1 else [])]
    rows = tuple(
        Row(
            (word(f"{step['b']} to {step['a']}"), cell(Figure.read(step["proxy"])), cell(Figure.read(step["check"]))),
            strong=step is trust["change"],
        )
        for step in steps
    )
    check = "the truth" if trust["check"] == "truth" else "the judge"
    caption = "Changes of E_v J(v), paired by prompt, with an interval each. The last row is what a warning rests on."
    return Table(caption, ("change", "by the reward model", f"by {check}"), rows)


def pairwise_table(summary: Summary) -> Table | None:
    """The reward model on a file of preference pairs."""
    found = summary.get("pairwise")
    if not found:
        return None
    rows = tuple(
        Row(
            (
                word(name),
                cell(percent(Figure.read(one["accuracy"]))),
                Cell(whole(one["pairs"])),
                Cell(whole(one["ties"])),
            ),
            strong=name == "all",
        )
        for name, one in found["subsets"].items()
    )
    caption = (
        f"How often the chosen answer of a pair earns more {found['objective']} than the rejected one; ties count "
        "half. Intervals over pairs."
    )
    return Table(caption, ("subset", "right, %", "pairs", "ties"), rows)
