"""The tables of a comparison, as data that the template lays out."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from dpalign.measure.beyond import reachable, trained_on
from dpalign.measure.control import COMMON
from dpalign.page.compared_words import misunderstood
from dpalign.page.systems import System
from dpalign.page.tables import Cell, Row, Table, called, cell, name_of, without_empty_columns, word
from dpalign.page.words import COUNTED, MINUS, MISSING, Figure, degrees, figure, listed, number, percent, size, whole
from dpalign.run.progress import spell_seconds

Summary = Mapping[str, Any]

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
FEWER: Final = (
    "The fewer conditions a system was asked under, the further they lie apart and the higher both correlations come "
    f"out: compare Kendall's tau at {COMMON} evenly spread conditions, both ends among them, where a system has as "
    "many. Of two conditions neither correlation is given. To switch: what another direction takes beside its prompt."
)
"""Of Table 1's columns of control."""
AT_THE_EDGE: Final = "at the edge of its grid: a wider one may do better"
"""Of a setting that was chosen."""


def differences_table(summary: Summary, systems: Sequence[System]) -> Table | None:
    """Every other system beside the last iteration, and who is ahead."""
    compared = summary["comparison"]
    last, shown = compared["last"], {system.name: system for system in systems}
    if last is None:
        return None
    decided = {(row["a"], row["b"]): row["dominates"] for row in summary["dominance"]}
    leads = {row["system"]: row for row in compared["differences"]}
    own = shown[last].entry
    dash = Cell(MISSING)
    deaf = misunderstood(summary)
    rows = [
        Row((name_of(shown[last]), cell(figure(own, "objective")), dash, word(MISSING),
             cell(figure(own, "hypervolume"), 0), dash, dash, dash), strong=True)
    ]  # fmt: skip
    for system in systems:
        if system.name not in leads or system.role == "ablation" or system.copied:
            continue
        lead = Figure.read(leads[system.name]["objective"])
        rows.append(
            Row(
                (
                    replace(name_of(system), note="no briefer for being asked" if system.name in deaf else ""),
                    cell(figure(system.entry, "objective")),
                    cell(lead, sign=True),
                    word(ahead(lead, last, system.said)),
                    cell(figure(system.entry, "hypervolume"), 0),
                    cell(Figure.read(leads[system.name]["hypervolume_ratio"]), 2),
                    _yes_or_not(decided.get((last, system.name))),
                    _yes_or_not(decided.get((system.name, last))),
                )
            )
        )
    columns = (
        *("system", "E_v J(v)", f"lead of {last}", "ahead", "hypervolume", f"{last}'s over it"),
        *(f"{last} dominates it", f"it dominates {last}"),
    )
    caption = (
        f"The lead is E_v J(v) of {last} minus the other's, paired by prompt; an interval each, not adjusted for their "
        "number. Systems that no direction steers serve each v with the best of their points. Dominance is decided "
        f"after Holm over all pairs of the run; whether a system dominates {last} is asked where it has a front."
    )
    return without_empty_columns(Table(caption, columns, tuple(rows)))


def ahead(lead: Figure, last: str, other: str) -> str:
    """Who is ahead by an interval of the lead; nobody where it holds 0."""
    if lead.low is None or lead.high is None or lead.low <= 0 <= lead.high:
        return "not significant"
    return last if lead.low > 0 else other


def _yes_or_not(decided: bool | None) -> Cell:
    if decided is None:
        return Cell(MISSING)
    return Cell("yes", tone="yes") if decided else Cell("not shown", tone="no")


def table_1(summary: Summary, systems: Sequence[System]) -> Table | None:
    """The paper's Table 1, measured."""
    rows = summary["comparison"]["table_1"]
    if not rows:
        return None
    looks = {system.family: system.look.name for system in systems}
    body = []
    for row in rows:
        first, beyond = _degenerate(summary, row["system"])
        body.append(
            Row(
                (
                    Cell(row["system"], row.get("setting", ""), tone="word", colour=looks.get(row["system"], "")),
                    Cell(
                        str(len(row["objectives_read"])), listed(row["objectives_read"]) or "none of them", tone="word"
                    ),
                    word(row["told_by"]),
                    Cell(str(row["conditions"])),
                    *(cell(Figure.read(row[name]), 2) for name in ("kendall_tau", "kendall_tau_common")),
                    Cell(number(row["spearman"], 2)),
                    cell(Figure.read(row["span"])),
                    word(_switch(row)),
                    Cell(str(row["models"]), _upkeep(row), tone="word"),
                    first,
                    beyond,
                    word(_paper_says(row["system"])),
                ),
                strong=row["role"] == "iteration",
            )
        )
    second = summary["objectives"][-1]
    columns = (
        *("system", "objectives trained on", "told by", "conditions"),
        *("Kendall tau", f"at {COMMON} conditions", "Spearman", f"span of {second}", "to switch"),
        *("models to keep", "degenerate, %", "asked for more: the worst, %", "the paper's Table 1"),
    )
    caption = (
        f"Control is how {second} follows what was asked: within a prompt (Kendall), over the averages (Spearman), and "
        f"from end to end (span); of specialists, over the models. {FEWER} Models to keep are those without which some "
        "direction could not be served, the reward model among them where it chooses at inference. Degenerate answers "
        "are counted where the system was asked for what it serves, and for more than can be had, of which the worst "
        "group is shown (see below). "
        "The paper's columns: multi-objective rewards, preference arithmetic, single model, feasibility "
        f"guarantee. {_paper_rows([row['system'] for row in rows])}"
    )
    return without_empty_columns(Table(caption, columns, tuple(body)))


def _upkeep(row: Mapping[str, Any]) -> str:
    """The bytes of the weights, and the answers that are sampled for one."""
    sampled = row["answers_a_reply"]
    parts = [size(row["bytes"])] if row["bytes"] else []
    return ", ".join([*parts, *([f"{sampled} answers sampled a reply"] if sampled > 1 else [])])


def _switch(row: Mapping[str, Any]) -> str:
    """What lies between a direction and the next: the time where it was timed; a dash where there is no other."""
    if row["conditions"] < 2:
        return MISSING
    if row["role"] == "specialist":
        return "another model to load"
    return "none" if row["switch_seconds"] is None else f"{number(row['switch_seconds'], 2)} s to mix and load"


def _method(system: str) -> str:
    """The row of the paper's Table 1 that a system stands for, if any."""
    return "DPA" if system.startswith("DPA ") else STANDS_FOR.get(system, system)


def _paper_rows(systems: Sequence[str]) -> str:
    """Which rows of the paper's table another system stands for, and which were not run."""
    run = {_method(system): system for system in systems}
    said = f"PPO's row is run with {run['PPO']} in its place. " if "PPO" in run else ""
    missing = [method for method in PAPER_TABLE_1 if method not in run]
    return f"{said}Not run here: {listed(missing)}." if missing else said.strip()


def _paper_says(system: str) -> str:
    method = _method(system)
    said = PAPER_TABLE_1.get(method, MISSING)
    return said if method in (system, "DPA") or said == MISSING else f"{method}: {said}"


def _degenerate(summary: Summary, system: str) -> tuple[Cell, Cell]:
    """The share of degenerate answers where the system was asked for what it serves, and the worst group beyond."""
    found = (summary.get("feasibility") or {}).get(system)
    if not found:
        return Cell(MISSING), Cell(MISSING)
    inside = next((group for group in found["groups"] if reachable(group["name"])), None)
    others = [group for group in found["groups"] if not trained_on(group["name"])]
    worst = max(others, key=lambda group: group["degenerate"]["share"]["value"], default=None)
    known, beyond = (
        cell(percent(Figure.read(group["degenerate"]["share"])) if group else Figure(None)) for group in (inside, worst)
    )
    shares = [row["degenerate"]["share"]["value"] for row in found["conditions"] if reachable(row["group"])]
    if len(shares) > 1:
        known = replace(known, note=f"{known.note}; up to {number(100 * max(shares))} in one condition")
    if worst is not None:
        beyond = replace(beyond, note=f"{beyond.note}, {worst['name'].replace('-', MINUS)}")
    return known, beyond


def tuning_table(summary: Summary, systems: Sequence[System]) -> Table | None:
    """Every setting that was tried, and which was chosen; one at the edge of its grid is marked."""
    tried, shown = summary.get("tuning") or {}, {system.name: system for system in systems}
    if not tried:
        return None
    rows = tuple(
        Row(
            (
                called(system, shown),
                word(row["setting"]),
                cell(Figure.read(row["tuning_objective"])),
                cell(Figure.read(row["objective"])),
                Cell("chosen", AT_THE_EDGE if row.get("edge") else "", tone="yes") if row["chosen"] else Cell(MISSING),
            ),
            strong=row["chosen"],
        )
        for system, found in tried.items()
        for row in found
    )
    measure = "true" if summary["measure"] == "true" else "judged"
    columns = ("system", "setting", "E_v J(v), tuning prompts, judged", f"E_v J(v), validation, {measure}", "")
    caption = (
        "Each setting was evaluated on the tuning prompts, and the best by the reward model's opinion stands for its "
        "system everywhere else: neither the truth nor a validation prompt chose. The validation figures show what "
        f"another choice would have given. {_settings_each(tried, systems)} DPA's knobs are the recipe's too, and what "
        "it took to choose the recipe is counted nowhere here."
    )
    return Table(caption, columns, rows)


def _settings_each(tried: Mapping[str, Sequence[Any]], systems: Sequence[System]) -> str:
    """Which systems were tuned, among how many settings, and which had one; a family's members count as one system."""
    rivals = [s for s in systems if s.role in ("baseline", "soup", "specialist") and not s.copied]
    tuned: dict[str, int] = {}
    for system in rivals:
        if system.name in tried:
            name = system.family.replace(",", "")
            tuned[name] = max(tuned.get(name, 0), len(tried[system.name]))
    fixed = list(dict.fromkeys(name for s in rivals if (name := s.family.replace(",", "")) not in tuned))
    said = f"Tuned were {listed([f'{name} ({n} settings)' for name, n in tuned.items()])}."
    return f"{said} One setting each, the recipe's, had {listed(fixed)}." if fixed else said


def budget_table(summary: Summary, systems: Sequence[System]) -> Table | None:
    """What each system took to make, and what it reached for it."""
    rows = []
    for system in systems:
        entry, sweep = system.entry, system.entry.get("sweep") or {}
        if not entry.get("total_tokens") or system.copied:
            continue
        rows.append(
            Row(
                (
                    Cell(system.label, entry.get("setting") or "", tone="word", colour=system.look.name),
                    *(Cell(whole(entry.get(key))) for key in ("sampled_tokens", "scored_responses", "trained_tokens")),
                    Cell(whole(entry["total_tokens"])),
                    Cell(spell_seconds(entry["seconds"])),
                    Cell(whole(sweep.get("total_tokens"))),
                    Cell(spell_seconds(sweep["seconds"]) if sweep else MISSING),
                    cell(figure(entry, "objective")),
                    cell(figure(entry, "hypervolume"), 0),
                ),
                strong=system.name == summary["comparison"]["last"],
            )
        )
    columns = (
        *("system", "tokens sampled", "answers scored", "tokens trained", "tokens in all", "time"),
        *("tokens, all settings", "time, all settings", "E_v J(v)", "hypervolume"),
    )
    caption = (
        "All that was needed to make a system (SFT needs no reward model, DPO on ratings none either); stages that "
        "systems share count for each, so the rows do not add up. Tokens in all are those sampled, those of the scored "
        f"answers, and those trained: {COUNTED}. All settings: those that were tried to find the one shown, their "
        "evaluations on the tuning prompts, and the reward model that chose; what it took to choose the recipe's own "
        "knobs, DPA's among them, is not counted."
    )
    return without_empty_columns(Table(caption, columns, tuple(rows))) if rows else None


def specialists_table(summary: Summary, systems: Sequence[System]) -> Table | None:
    """The last iteration at each specialist's own direction."""
    compared = summary["comparison"]
    if not compared["specialists"]["rows"]:
        return None
    looks = {system.name: system for system in systems}
    rows = [
        Row(
            (
                name_of(looks[row["system"]]),
                Cell(_direction(looks[row["system"]])),
                cell(Figure.read(row["specialist"])),
                cell(Figure.read(row["steered"])),
                cell(Figure.read(row["shortfall"])),
            )
        )
        for row in compared["specialists"]["rows"]
    ]
    for family, mean in compared["specialists"]["families"].items():
        rows.append(Row((word(f"{family}, mean"), Cell(""), Cell(""), Cell(""), cell(Figure.read(mean))), strong=True))
    columns = ("specialist", "trained for", "v . r there", f"v . r of {compared['last']} there", "what DPA loses")
    caption = (
        "A specialist is trained for one direction alone and is about the ceiling there; DPA is asked at the "
        "evaluation directions nearest to it. Negative: DPA is better. Paired by prompt, an interval each."
    )
    return Table(caption, columns, tuple(rows))


def _direction(system: System) -> str:
    angle = system.entry.get("trained_for")
    return degrees(angle) if angle is not None else MISSING


def ablation_table(summary: Summary, systems: Sequence[System]) -> Table | None:
    """What each part of the loop is worth."""
    leads = {row["system"]: row for row in summary["comparison"]["differences"]}
    ablated = [system for system in systems if system.role == "ablation"]
    whole_loop = next((system for system in systems if system.name == summary["comparison"]["last"]), None)
    if not ablated or whole_loop is None:
        return None
    rows = [
        Row(
            (
                name_of(system),
                cell(figure(system.entry, "objective")),
                cell(Figure.read((leads.get(system.name) or {}).get("objective"))),
                cell(Figure.read((leads.get(system.name) or {}).get("hypervolume_ratio")), 2),
                cell(figure(system.entry, "span")),
                word(ahead(Figure.read(leads[system.name]["objective"]), "with it", "without it"))
                if system.name in leads
                else word(MISSING),
            ),
            strong=system is whole_loop,
        )
        for system in (whole_loop, *ablated)
    ]
    columns = ("system", "E_v J(v)", "lost without it", "hypervolume, with over without", "span", "better")
    caption = (
        f"E_v J(v) of {whole_loop.name} minus that of the same loop without one part, paired by prompt: above 0 the "
        "part helps. One training each: another seed may differ by more than these intervals."
    )
    return Table(caption, columns, tuple(rows))
