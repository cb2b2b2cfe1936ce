"""The tables of a comparison, as data that the template lays out."""

from collections.abc import Sequence
from typing import Final

from dpalign.measure.beyond import MARGIN, Condition, Feasibility, Group, reachable, trained_on
from dpalign.measure.control import COMMON
from dpalign.measure.degeneracy import Degenerate
from dpalign.measure.summary import Comparison, Measured, Summary, TableRow, misunderstood
from dpalign.page.looks import in_order, looks_of, trained_for
from dpalign.page.tables import DASH, Cell, Row, Table, ahead, cell, line, name_of, verdict, without_empty_columns, word
from dpalign.page.words import MINUS, MISSING, degrees, listed, number, size

PAPER_TABLE_1: Final = {
    "PPO": "no, no, yes, yes",
    "DPO": "no, no, yes, yes",
    "rewarded soups": "yes, yes, no, yes",
    "SteerLM": "yes, yes, yes, no",
    "DPA": "yes, yes, yes, yes",
}
"""The paper's Table 1: multi-objective rewards, preference arithmetic, single model, feasibility guarantee."""
STANDS_FOR: Final = {"GRPO": "PPO", "RLOO": "PPO", "SteerLM, tuned": "SteerLM"}
"""Rows of that table by the systems that stand for them here."""


def wishes_table(summary: Summary, compared: Comparison) -> Table | None:
    """What a wish in words to be brief changed."""
    unheard = misunderstood(summary)
    rows = tuple(
        line(
            name_of(summary, name),
            cell(wish.unasked),
            cell(wish.asked),
            cell(wish.change, sign=True),
            verdict(name not in unheard),
        )
        for name, wish in compared.wishes.items()
        if summary.systems[name].same_as is None
    )
    if not rows:
        return None
    objective = next(iter(compared.wishes.values())).objective
    caption = (
        f"Mean {objective} unasked and asked, paired by prompt. A model that does not follow the words is no rival at "
        "being brief: no victory over it is claimed."
    )
    return Table(caption, ("system", f"{objective}, unasked", "asked", "change", "briefer"), rows)


def table_1(summary: Summary, compared: Comparison) -> Table | None:
    """The paper's Table 1, measured."""
    if not compared.table_1:
        return None
    groups = {one.system.group: one for one in in_order(summary)}
    looks = looks_of(summary)
    rows = []
    for row in compared.table_1:
        first = groups[row.name]
        lead = compared.control_leads.get(row.name)
        setting = "" if first.system.role == "specialist" else first.system.setting
        rows.append(
            line(
                Cell(row.name, setting, tone="word", colour=looks[first.name].name),
                word(str(len(row.objectives_read)), listed(row.objectives_read) or "none of them"),
                word(row.told_by),
                Cell(str(row.conditions)),
                cell(row.kendall_tau, 2),
                cell(row.kendall_tau_common, 2),
                cell(lead.kendall_tau if lead else None, 2, sign=True),
                Cell(number(row.spearman, 2)),
                cell(row.span),
                cell(lead.span if lead else None, sign=True),
                word(_switch(row, first)),
                word(str(row.models), _upkeep(row)),
                *_degenerate(compared.feasibility.get(row.name)),
                word(_paper_says(row.name)),
                strong=first is summary.last,
            )
        )
    second, last = summary.objectives[-1], summary.last.name if summary.last else ""
    columns = (
        *("system", "objectives trained on", "told by", "conditions", "Kendall tau", f"tau at {COMMON} conditions"),
        *(f"lead of {last} in that", "Spearman", f"span of {second}", f"lead of {last} in span", "to switch"),
        *("models to keep", "degenerate, %", "asked for more: the worst, %", "the paper's Table 1"),
    )
    caption = (
        f"Control is how {second} follows what was asked. Fewer conditions lie further apart, so both "
        "correlations come "
        f"out higher: compare tau at {COMMON} evenly spread conditions. To switch: what another direction takes beside "
        "its prompt. Models to keep: those without which some direction could not be served. The paper's columns: "
        f"multi-objective rewards, preference arithmetic, single model, feasibility guarantee. {_paper_rows(compared)}"
    )
    return without_empty_columns(Table(caption, columns, tuple(rows)))


def _upkeep(row: TableRow) -> str:
    """The bytes of the weights, and the answers that are sampled for one."""
    parts = [size(row.bytes)] if row.bytes else []
    return ", ".join([*parts, *([f"{row.answers_a_reply} answers sampled a reply"] if row.answers_a_reply > 1 else [])])


def _switch(row: TableRow, first: Measured) -> str:
    """What lies between a direction and the next: the time where it was timed; a dash where there is no other."""
    if row.conditions < 2:
        return MISSING
    if first.system.role == "specialist":
        return "another model to load"
    return "none" if row.switch_seconds is None else f"{number(row.switch_seconds, 2)} s to mix and load"


def _method(system: str) -> str:
    """The row of the paper's Table 1 that a system stands for, if any."""
    return "DPA" if system.startswith("DPA ") else STANDS_FOR.get(system, system)


def _paper_rows(compared: Comparison) -> str:
    """Which rows of the paper's table another system stands for, and which were not run."""
    run = {_method(row.name): row.name for row in compared.table_1}
    stand_in = f"{run['PPO']} stands for PPO. " if run.get("PPO", "PPO") != "PPO" else ""
    missing = [method for method in PAPER_TABLE_1 if method not in run]
    return f"{stand_in}Not run here: {listed(missing)}." if missing else stand_in.strip()


def _paper_says(system: str) -> str:
    method = _method(system)
    row = PAPER_TABLE_1.get(method, MISSING)
    return row if method in (system, "DPA") or row == MISSING else f"{method}: {row}"


def _degenerate(found: Feasibility | None) -> tuple[Cell, Cell]:
    """The share of degenerate answers where the system was asked for what it serves, and the worst group beyond."""
    if found is None:
        return DASH, DASH
    inside = next((group for group in found.groups if reachable(group.name)), None)
    beyond = [group for group in found.groups if not trained_on(group.name)]
    worst = max(beyond, key=lambda group: group.degenerate.share.value, default=None)
    shares = [row.degenerate.share.value for row in found.conditions if reachable(row.group)]
    known, more = (cell(group.degenerate.share if group else None, scale=100) for group in (inside, worst))
    if len(shares) > 1:
        known = Cell(known.text, f"{known.note}; up to {number(100 * max(shares))} in one condition")
    if worst is not None:
        more = Cell(more.text, f"{more.note}, {_signed(worst.name)}")
    return known, more


def tuning_table(summary: Summary, compared: Comparison) -> Table | None:
    """Every setting that was tried, and which was chosen; one at the edge of its grid is marked."""
    edge = "at the edge of its grid: a wider one may do better"
    rows = tuple(
        line(
            name_of(summary, system),
            word(one.setting),
            cell(one.tuning_objective),
            cell(one.objective),
            Cell("chosen", edge if one.at_edge else "", tone="yes") if one.chosen else DASH,
            strong=one.chosen,
        )
        for system, settings in compared.tuning.items()
        for one in settings
    )
    fixed = [
        one.system.group
        for one in summary.of_role("baseline", "soup", "specialist")
        if one.name not in compared.tuning and one.same_as is None
    ]
    measure = "true" if summary.measure == "true" else "by the reward model"
    columns = (
        "system",
        "setting",
        "E_v J(v), tuning prompts, by the reward model",
        f"E_v J(v), validation, {measure}",
        "",
    )
    caption = (
        "The best by the reward model on the tuning prompts stands for its system everywhere: neither the truth nor a "
        f"validation prompt chose. One setting each had {listed(list(dict.fromkeys(fixed))) or 'none'}."
    )
    return Table(caption, columns, rows) if rows else None


def specialists_table(summary: Summary, compared: Comparison) -> Table | None:
    """The last iteration at each specialist's own direction."""
    if not compared.shortfalls or summary.last is None:
        return None
    rows = [
        line(
            name_of(summary, row.system),
            Cell(_direction(summary.systems[row.system])),
            *(cell(one) for one in (row.specialist, row.steered, row.shortfall)),
        )
        for row in compared.shortfalls
    ]
    for family, mean in compared.family_shortfalls.items():
        rows.append(line(word(f"{family}, mean"), Cell(""), Cell(""), Cell(""), cell(mean), strong=True))
    columns = ("specialist", "trained for", "v . r there", f"v . r of {summary.last.name} there", "what DPA loses")
    caption = (
        "DPA is asked at the evaluation directions nearest to the specialist's. Negative: DPA is better. Paired by "
        "prompt, with an interval each."
    )
    return Table(caption, columns, tuple(rows))


def _direction(one: Measured) -> str:
    angle = trained_for(one)
    return MISSING if angle is None else degrees(angle)


def ablation_table(summary: Summary, compared: Comparison) -> Table | None:
    """What each part of the loop is worth."""
    last, ablated = summary.last, summary.of_role("ablation")
    if not ablated or last is None:
        return None
    rows = []
    for one in (last, *ablated):
        lead = compared.differences.get(one.name)
        rows.append(
            line(
                name_of(summary, one.name),
                cell(one.figures.objective),
                cell(lead.objective if lead else None),
                cell(lead.hypervolume_ratio if lead else None, 2),
                cell(one.figures.span),
                word(ahead(lead.objective if lead else None, "with it", "without it")),
                strong=one is last,
            )
        )
    columns = ("system", "E_v J(v)", "lost without it", "hypervolume, with over without", "span", "better")
    caption = (
        f"E_v J(v) of {last.name} minus that of the same loop without one part, paired by prompt: above 0 the part "
        "helps. One training each: another seed may differ by more than these intervals."
    )
    return Table(caption, columns, tuple(rows))


def feasibility_tables(summary: Summary, compared: Comparison) -> dict[str, tuple[Table, Table]]:
    """By system: asked for what can be had, and for more; in groups, and each condition by itself."""
    return {
        name: (
            _targets(summary, found) if found.asked_for == "targets" else _angles(summary, found),
            _conditions(summary.objectives, found),
        )
        for name, found in compared.feasibility.items()
    }


def _rule(found: Feasibility) -> str:
    rule = found.rule
    return (
        "Degenerate: cut at the longest allowed length, without a word, with a sentence of "
        f"{rule.sentence_words} words "
        f"or more twice, or with over {100 * rule.repetition:g}% of its runs of {rule.run} words repeated. "
        f"{found.prompts:,} prompts, {found.samples} to each in each condition; intervals over prompts."
    )


def _shares(degenerate: Degenerate) -> tuple[Cell, Cell]:
    reasons = [f"{100 * part:.1f}% {reason}" for reason, part in degenerate.reasons.items() if part]
    return cell(degenerate.share, scale=100), word(listed(reasons) or MISSING)


def _signed(group: str) -> str:
    return group.replace("-", MINUS)


def _targets(summary: Summary, found: Feasibility) -> Table:
    def row(group: Group) -> Row:
        more = group.more_than_annotated
        cells = [*_shares(group.degenerate), cell(more.degenerate if more else None, sign=True, scale=100)]
        for name in summary.objectives:
            cells += [cell(group.distance[name]), cell(more.distance[name] if more else None, sign=True)]
        return line(word(group.name), Cell(str(group.conditions)), *cells)

    columns = (
        *("asked for", "targets", "degenerate, %", "why", "change"),
        *(column for name in summary.objectives for column in (f"off in {name}, points", "change")),
    )
    caption = (
        f"As annotated: {summary.objectives[0]} as high as the best annotated answers near each target; beyond: that "
        "share of the way from there to the top of the scale. Off: the distance of an answer's reward from what was "
        f"asked{', true' if found.measure == 'true' else ', by the reward model'}. Change: against the "
        "annotated target "
        f"that asks for the same of the rest, paired by prompt. {_rule(found)}"
    )
    return Table(caption, columns, tuple(map(row, found.groups)))


def _angles(summary: Summary, found: Feasibility) -> Table:
    second = summary.objectives[1]
    rows = tuple(
        line(
            word(_signed(group.name)),
            Cell(str(group.conditions)),
            *_shares(group.degenerate),
            cell(group.follows),
            cell(group.regret, 2),
        )
        for group in found.groups
    )
    columns = ("asked for", "angles", "degenerate, %", "why", f"{second} goes on to follow, points", "regret, points")
    margin = any(group.name.startswith(MARGIN) for group in found.groups)
    caption = (
        f"Follows: how far {second} moves with the angle over the arc, and beyond it from the trained end to the "
        "farthest angle; above 0 it obeys. "
        + ("Margin: directions that training had around the arc and nobody asks for. " if margin else "")
        + f"Regret: what asking for v loses against the best other angle. {_rule(found)}"
    )
    return Table(caption, columns, rows)


def _conditions(names: Sequence[str], found: Feasibility) -> Table:
    """Each condition by itself: a group's average may hide its worst."""

    def asked(row: Condition) -> list[Cell]:
        if row.angle is not None:
            return [Cell(degrees(row.angle))]
        return [Cell(number(row.asked[name])) for name in names]

    whose = "" if found.measure == "true" else ", by the reward model"
    worst = max(found.conditions, key=lambda row: row.degenerate.share.value)
    rows = tuple(
        line(
            *asked(row),
            word(_signed(row.group)),
            *_shares(row.degenerate),
            *(cell(row.rewards[n]) for n in names),
            strong=row is worst,
        )
        for row in found.conditions
    )
    columns = ("angle",) if found.asked_for == "directions" else tuple(f"{name} asked" for name in names)
    columns += ("of the group", "degenerate, %", "why", *(f"{name} given{whose}" for name in names))
    return Table("Each condition by itself; the one with the most degenerate answers is set bold.", columns, rows)
