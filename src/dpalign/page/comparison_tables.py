"""The tables of a comparison, as data that the template lays out."""

from collections.abc import Sequence
from typing import Final

from dpalign.measure.control import COMMON
from dpalign.measure.degeneracy import Degenerate
from dpalign.measure.feasibility import MARGIN, Feasibility, reachable, trained_on
from dpalign.measure.summary import Comparison, Measured, Summary, TableRow, misunderstood
from dpalign.page.cells import DASH, Cell, Row, Table, ahead, cell, name_of, table, verdict, word
from dpalign.page.looks import in_order, looks_of, trained_for
from dpalign.page.words import MINUS, MISSING, degenerate_rule, degrees, number, size
from dpalign.paper.direction import listed

PAPER_TABLE_1: Final = {
    "PPO": "no, no, yes, yes",
    "DPO": "no, no, yes, yes",
    "rewarded soups": "yes, yes, no, yes",
    "SteerLM": "yes, yes, yes, no",
    "DPA": "yes, yes, yes, yes",
}
"""The paper's Table 1: multi-objective rewards, preference arithmetic, single model, feasibility guarantee."""
STANDS_FOR: Final = {"GRPO": "PPO", "RLOO": "PPO", "SteerLM, tuned": "SteerLM"}
"""Our system -> the row of that table that it stands for."""


def wishes_table(summary: Summary, compared: Comparison) -> Table | None:
    """What asking in words to be brief changed."""
    unheard = misunderstood(summary)
    rows = []
    for name, wish in compared.wishes.items():
        if not summary.systems[name].is_copy:
            cells = {
                "system": name_of(summary, name),
                f"{wish.objective}, unasked": cell(wish.unasked),
                "asked": cell(wish.asked),
                "change": cell(wish.change, sign=True),
                "briefer": verdict(name not in unheard),
            }
            rows.append(Row(cells))
    caption = (
        "Means without the request (unasked) and with it (asked), paired by prompt. If a model does not follow the "
        "request, no win over it is claimed."
    )
    return table(caption, rows)


def table_1(summary: Summary, compared: Comparison) -> Table | None:
    """The paper's Table 1, measured."""
    groups = {one.system.group: one for one in in_order(summary)}
    looks = looks_of(summary)
    second, last = summary.objectives[:2][-1], summary.last.name if summary.last else ""
    rows = []
    for row in compared.table_1:
        first, lead = groups[row.name], compared.control_leads.get(row.name)
        setting = "" if first.system.role == "specialist" else first.system.setting
        known, beyond = _degenerate(compared.feasibility.get(row.name))
        cells = {
            "system": Cell(row.name, setting, tone="word", colour=looks[first.name].name),
            "objectives trained on": word(str(len(row.objectives_read)), listed(row.objectives_read) or "none of them"),
            "told by": word(row.told_by),
            "conditions": Cell(str(row.conditions)),
            "Kendall tau": cell(row.kendall_tau, 2),
            f"tau at {COMMON} conditions": cell(row.kendall_tau_common, 2),
            f"lead of {last} in that": cell(lead.kendall_tau if lead else None, 2, sign=True),
            "Spearman": Cell(number(row.spearman, 2)),
            f"span of {second}": cell(row.span),
            f"lead of {last} in span": cell(lead.span if lead else None, sign=True),
            "to switch": word(_switch(row, first)),
            "models to keep": word(str(row.models), _upkeep(row)),
            "degenerate, %": known,
            "asked for more: the worst, %": beyond,
            "the paper's Table 1": word(_paper_says(row.name)),
        }
        rows.append(Row(cells, strong=first is summary.last))
    caption = (
        f"Control is how well {second} follows what was asked. Fewer conditions lie further apart, so both "
        f"correlations come out higher: compare tau at {COMMON} evenly spread conditions. To switch: what a change of "
        "direction needs besides another prompt. Models to keep: how many are needed to serve every direction. The "
        "paper's columns: multi-objective rewards, preference arithmetic, single model, feasibility guarantee. "
        f"{_paper_rows(compared)}"
    )
    return table(caption, rows)


def _upkeep(row: TableRow) -> str:
    """The size of the weights, and how many answers are sampled for a reply."""
    sampled = f"{row.answers_a_reply} answers sampled a reply" if row.answers_a_reply > 1 else ""
    return ", ".join(part for part in (size(row.bytes) if row.bytes else "", sampled) if part)


def _switch(row: TableRow, first: Measured) -> str:
    """What a change of direction needs, with its time if measured; a dash for a single condition."""
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
    """The share of degenerate answers within what the system serves, and in the worst group beyond it."""
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
    measure = "true" if summary.measure == "true" else "by the reward model"
    rows = []
    for system, settings in compared.tuning.items():
        for one in settings:
            edge = "at the edge of its grid: a wider one may do better" if one.at_edge else ""
            cells = {
                "system": name_of(summary, system),
                "setting": word(one.setting),
                "E_v J(v), tuning prompts, by the reward model": cell(one.tuning_objective),
                f"E_v J(v), validation, {measure}": cell(one.objective),
                "": Cell("chosen", edge, tone="yes") if one.chosen else DASH,
            }
            rows.append(Row(cells, strong=one.chosen))
    others = [one for one in summary.of_role("baseline", "soup", "specialist") if not one.is_copy]
    fixed = dict.fromkeys(one.system.group for one in others if one.name not in compared.tuning)
    caption = (
        "The best setting by the reward model on the tuning prompts stands for its system everywhere. Neither the "
        f"truth nor a validation prompt chose it. Systems with one setting: {listed(list(fixed)) or 'none'}."
    )
    return table(caption, rows)


def specialists_table(summary: Summary, compared: Comparison) -> Table | None:
    """The last iteration at each specialist's own direction."""
    if summary.last is None:
        return None
    there, lost = f"v . r of {summary.last.name} there", "what DPA loses"
    rows = []
    for row in compared.shortfalls:
        angle = trained_for(summary.systems[row.system])
        cells = {
            "specialist": name_of(summary, row.system),
            "trained for": DASH if angle is None else Cell(degrees(angle)),
            "v . r there": cell(row.specialist),
            there: cell(row.steered),
            lost: cell(row.shortfall),
        }
        rows.append(Row(cells))
    empty = dict.fromkeys(("trained for", "v . r there", there), Cell(""))
    for family, mean in compared.family_shortfalls.items():
        rows.append(Row({"specialist": word(f"{family}, mean"), **empty, lost: cell(mean)}, strong=True))
    caption = (
        "DPA answers at the evaluation directions nearest to the specialist's. Negative: DPA is better. Paired by "
        "prompt; each interval is for one row."
    )
    return table(caption, rows)


def ablation_table(summary: Summary, compared: Comparison) -> Table | None:
    """How much each part of the loop contributes."""
    last, ablated = summary.last, summary.of_role("ablation")
    if not ablated or last is None:
        return None
    rows = []
    for one in (last, *ablated):
        difference = compared.differences.get(one.name)
        lead = difference.objective if difference else None
        cells = {
            "system": name_of(summary, one.name),
            "E_v J(v)": cell(one.figures.objective),
            "lost without it": cell(lead),
            "hypervolume, with over without": cell(difference.hypervolume_ratio if difference else None, 2),
            "span": cell(one.figures.span),
            "better": word(ahead(lead, "with it", "without it")),
        }
        rows.append(Row(cells, strong=one is last))
    caption = (
        f"E_v J(v) of {last.name} minus that of the same loop without one part, paired by prompt: above 0 the part "
        "helps. Each was trained once: another seed may differ by more than these intervals."
    )
    return table(caption, rows)


def feasibility_tables(summary: Summary, compared: Comparison) -> dict[str, tuple[Table | None, Table | None]]:
    """By system: a table of its groups of requests, within reach and beyond, and one of each condition."""
    return {
        name: (_groups(summary, measured), _conditions(summary.objectives, measured))
        for name, measured in compared.feasibility.items()
    }


def _groups(summary: Summary, measured: Feasibility) -> Table | None:
    """One row for each group of requests."""
    targets = measured.asked_for == "targets"
    first, second = summary.objectives[:2]
    rows = []
    for group in measured.groups:
        more = group.more_than_annotated
        cells = {
            "asked for": word(_signed(group.name)),
            measured.asked_for if targets else "angles": Cell(str(group.conditions)),
            **_shares(group.degenerate),
        }
        if targets:
            cells["change"] = cell(more.degenerate if more else None, sign=True, scale=100)
            for name in summary.objectives:
                cells[f"off in {name}, points"] = cell(group.distance[name])
                cells[f"change in {name}"] = cell(more.distance[name] if more else None, sign=True)
        else:
            cells[f"{second} follows, points"] = cell(group.follows)
            cells["regret, points"] = cell(group.regret, 2)
        rows.append(Row(cells))
    if targets:
        caption = (
            f"As annotated: {first} as high as the best annotated answers near each target; beyond: that share of the "
            "way from there to the top of the scale. Off: the distance of an answer's reward from what was asked"
            f"{', true' if measured.measure == 'true' else ', by the reward model'}. Change: against the annotated "
            "target that asks for the same in all else, paired by prompt."
        )
    else:
        margin = any(group.name.startswith(MARGIN) for group in measured.groups)
        caption = (
            f"Follows: how far {second} moves with the angle; beyond the arc, from the trained end to the farthest "
            "angle. Above 0 it obeys. "
            f"{'Margin: directions around the arc that training had and no user asks for. ' if margin else ''}"
            "Regret: what asking for v loses against the best other angle."
        )
    caption += (
        f" {degenerate_rule(measured.rule)} "
        f"{measured.prompts:,} prompts, {measured.samples} answers to each in each condition; intervals over prompts."
    )
    return table(caption, rows)


def _shares(degenerate: Degenerate) -> dict[str, Cell]:
    reasons = [f"{100 * part:.1f}% {reason}" for reason, part in degenerate.reasons.items() if part]
    return {"degenerate, %": cell(degenerate.share, scale=100), "why": word(listed(reasons) or MISSING)}


def _signed(group: str) -> str:
    return group.replace("-", MINUS)


def _conditions(names: Sequence[str], measured: Feasibility) -> Table | None:
    """Each condition by itself: a group's average may hide its worst."""
    whose = "" if measured.measure == "true" else ", by the reward model"
    worst = max(measured.conditions, key=lambda row: row.degenerate.share.value)
    rows = []
    for row in measured.conditions:
        asked = {f"{name} asked": Cell(number(row.asked[name])) for name in names}
        cells = {
            **(asked if row.angle is None else {"angle": Cell(degrees(row.angle))}),
            "group": word(_signed(row.group)),
            **_shares(row.degenerate),
            **{f"{name} given{whose}": cell(row.rewards[name]) for name in names},
        }
        rows.append(Row(cells, strong=row is worst))
    return table("Each condition by itself; the one with the most degenerate answers is in bold.", rows)
