"""Tables of what can be trusted: answers beyond what can be had, the reward model against its check, and on pairs."""

from collections.abc import Mapping
from typing import Any

from dpalign.report.tables import Cell, Row, Table, cell, word
from dpalign.report.words import MINUS, MISSING, Figure, listed, percent, whole

Summary = Mapping[str, Any]


def feasibility_tables(summary: Summary) -> dict[str, Table]:
    """By system: asked for what can be had, and for more."""
    return {
        name: _targets(summary, found) if found["asked_for"] == "targets" else _angles(summary, found)
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
    rows = tuple(
        Row(
            (
                word(group["name"]),
                Cell(str(group["conditions"])),
                *_shares(group),
                *(cell(Figure.read(group["distance"][name])) for name in names),
            )
        )
        for group in found["groups"]
    )
    columns = ("asked for", "targets", "degenerate, %", "why", *(f"off in {name}, points" for name in names))
    caption = (
        f"As annotated: {names[0]} as high as the best annotated answers near each target; beyond: that share of the "
        "way from there to the top of the scale. Off: the distance of an answer's reward from what was asked, "
        f"{'true' if found['measure'] == 'true' else 'by the reward model'}. {_rule(found)}"
    )
    return Table(caption, columns, rows)


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
    caption = (
        f"Follows: how far {second} moves with the angle, over the trained range, and beyond it from its end to the "
        "farthest angle asked; above 0 it obeys. Regret: what asking for v loses against asking for the best other "
        f"angle. {_rule(found)}"
    )
    return Table(caption, columns, rows)


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
