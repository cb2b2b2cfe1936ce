"""The tables of the page, as data that the template lays out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

from dpalign.measure.bootstrap import Estimate
from dpalign.measure.quality import HeadQuality
from dpalign.measure.seeds import OverSeeds, Seeds
from dpalign.measure.summary import DataReport, DominanceRow, Measured, Summary, misunderstood, verdicts
from dpalign.measure.system import Role
from dpalign.page.looks import in_order, label, looks_of
from dpalign.page.words import MISSING, between, degrees, number, probability, turns, whole
from dpalign.run.progress import spell_seconds

COUNTED: Final = (
    "Trained tokens include prompts, which DPO reads with each of its two answers; sampled and scored ones do not."
)
"""What the ledgers' tokens are of."""
_EXPLAINED: Final = (
    ("SFT, asked to be brief", "the SFT model, asked in words to be brief"),
    ("SFT, asked", "the SFT model given directions, which it never learnt"),
    ("SFT, best of", "the SFT model; the reward model picks the best of several answers"),
    ("SFT", "the model after supervised fine-tuning, from which all others start"),
    ("base, asked", "the base model given directions, which it never learnt"),
    ("SteerLM", "told the rewards that its answer should earn"),
    ("DPO, asked to be brief", "the DPO model, asked in words to be brief"),
    ("DPO", "trained on preference pairs, one behaviour for all users"),
    ("DPA t=0", "the SteerLM model that samples for the first iteration"),
)
"""What known systems are, by how their names begin."""
_ROLES: Final[Mapping[Role, str]] = {
    "baseline": "what users have without DPA",
    "control": "a model that never learnt directions, asked for them",
    "specialist": "trained for one direction alone: about the ceiling there",
    "soup": "the weights of specialists, mixed for each direction",
    "ablation": "the loop without one of its parts",
    "iteration": "directional preference alignment after this iteration: one model with a dial",
}


def explained(one: Measured) -> str:
    """What a system is, in one line."""
    known = next((text for start, text in _EXPLAINED if one.name.startswith(start)), None)
    return known if known and one.system.role not in ("specialist", "ablation") else _ROLES[one.system.role]


@dataclass(frozen=True)
class Cell:
    """What a cell says: a figure, and below it in small its interval or a remark."""

    text: str
    note: str = ""
    bar: float | None = None
    """A length from 0 to 1, drawn behind the figure."""
    tone: Literal["", "yes", "no", "word"] = ""
    """yes and no are verdicts; a word is set to the left."""
    colour: str = ""
    """The name of a system's colour, for a dot before the text."""


@dataclass(frozen=True)
class Row:
    cells: tuple[Cell, ...]
    strong: bool = False


def line(*cells: Cell, strong: bool = False) -> Row:
    """A row of cells."""
    return Row(cells, strong)


@dataclass(frozen=True)
class Table:
    """The first column names the row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        assert all(len(row.cells) == len(self.columns) for row in self.rows), self.columns


DASH: Final = Cell(MISSING)


def cell(estimate: Estimate | None, digits: int = 1, sign: bool = False, scale: float = 1) -> Cell:
    """A figure with its interval below it."""
    if estimate is None:
        return DASH
    value, low, high = (None if x is None else scale * x for x in (estimate.value, estimate.low, estimate.high))
    return Cell(number(value, digits, sign), between(low, high, digits))


def word(text: str, note: str = "") -> Cell:
    """Text, set to the left."""
    return Cell(text, note, tone="word")


def verdict(decided: bool | None) -> Cell:
    """Whether a claim is established."""
    if decided is None:
        return DASH
    return Cell("established", tone="yes") if decided else Cell("not established", tone="no")


def name_of(summary: Summary, name: str, note: str = "") -> Cell:
    """A system by its name, with its colour where the page shows it."""
    if name not in summary.systems:
        return word(name, note)
    return Cell(label(summary.systems[name]), note, tone="word", colour=looks_of(summary)[name].name)


def without_empty_columns(table: Table) -> Table:
    """Drop the columns that no row has a figure for, but never the first."""
    columns = range(len(table.columns))
    keep = [i for i in columns if i == 0 or any(row.cells[i].text != MISSING for row in table.rows)]
    rows = tuple(Row(tuple(row.cells[i] for i in keep), row.strong) for row in table.rows)
    return Table(table.caption, tuple(table.columns[i] for i in keep), rows)


def verdicts_table(summary: Summary) -> Table | None:
    """The last iteration against every other system: who beats whom, and by how much; over seeds where there are."""
    found, last = {one.system: one for one in verdicts(summary)}, summary.last
    if not found or last is None:
        return None
    runs = len(summary.seeds.seeds) if summary.seeds else 1
    unheard, compared = misunderstood(summary), summary.comparison.differences if summary.comparison else {}
    rows = []
    for system in in_order(summary):
        one = found.get(system.name)
        if one is None:
            continue
        outcome = verdict(one.outcome == "ahead" if one.margin else None)
        if one.outcome == "behind":
            outcome = Cell(f"it beats {last.name}", tone="no")
        elif one.system in unheard:
            outcome = Cell("no claim", "the words made it no briefer", tone="no")
        decided = f"{one.decided_in} of {runs}" if one.decided_in is not None else MISSING
        beside = compared.get(one.system)
        lead = one.lead or (beside.objective if beside else None)
        rows.append(
            line(
                name_of(summary, one.system, explained(system)),
                outcome,
                cell(one.margin),
                Cell(decided),
                cell(system.figures.objective),
                cell(lead, sign=True),
                word(ahead(lead, last.name, label(system))),
                cell(system.figures.hypervolume if beside else None, 0),
                cell(beside.hypervolume_ratio if beside else None, 2),
            )
        )
    columns = (
        *("against", f"{last.name} beats it for every user", "smallest lead", "in seeds", "E_v J(v)"),
        *(f"lead of {last.name}", "ahead on average", "hypervolume", f"{last.name}'s over it"),
    )
    every = f"at each of the {len(summary.directions)} directions"
    over = f" Intervals are over {runs} seeds; a claim must hold in each." if runs > 1 else ""
    caption = (
        f"For every user: {every} the best of {last.name}'s points earns more than the best of the other's (dominance, "
        f"decided over all pairs at once). The lead is in E_v J(v), paired by prompt.{over}"
    )
    return without_empty_columns(Table(caption, columns, tuple(rows)))


def ahead(lead: Estimate | None, last: str, other: str) -> str:
    """Who is ahead by an interval of the lead; nobody where it holds 0."""
    if lead is None:
        return MISSING
    return last if lead.above_zero else other if lead.below_zero else "not significant"


def systems_table(summary: Summary, judged: bool = False) -> Table:
    """One row a system. `judged`: by the reward model's opinion, where the main figures are true."""
    rows = []
    for one in in_order(summary):
        figures = one.judged if judged and one.judged else one.figures
        steps = f"{figures.steps_beyond_doubt} of {len(figures.drops)}" if figures.drops else MISSING
        rows.append(
            line(
                name_of(summary, one.name),
                cell(figures.objective),
                cell(figures.hypervolume, 0),
                cell(figures.true_front_share, scale=100),
                cell(figures.kendall_tau, 2),
                cell(figures.span),
                cell(figures.span_share, 0, scale=100),
                cell(figures.slope, 2),
                Cell(steps),
                cell(figures.regret, 2),
                Cell(number(figures.spearman, 2)),
                strong=one is summary.last,
            )
        )
    second = summary.objectives[1] if len(summary.objectives) > 1 else "reward"
    notes = {
        "system": f"Small figures are intervals over the {summary.intervals.prompts:,} prompts.",
        "E_v J(v)": "E_v J is the field's MIP, mean inner product.",
        "hypervolume, square points" if summary.angled else "hypervolume": "",
        "share of the true front, %": "",
        "Kendall tau": f"Kendall tau (as in MOC): rank agreement of {second} with the angle within a prompt, averaged.",
        "span": f"Span: {second} between the ends of the dial.",
        "share of the true span, %": "",
        "slope per degree": "",
        f"steps that {second} {turns(summary)}": "Steps: those whose own interval is clear of zero.",
        "regret": "Regret: what asking for v loses against the best other direction for v.",
        "Spearman": "Spearman, over averages, is near 1 for any steady trend, so it comes last.",
    }
    table = without_empty_columns(Table("", tuple(notes), tuple(rows)))
    return Table(" ".join(notes[column] for column in table.columns if notes[column]), table.columns, table.rows)


def dominance_table(summary: Summary, rows: Sequence[DominanceRow]) -> Table | None:
    """Some pairs of the run."""
    if not rows:
        return None
    columns = (
        "A",
        "over B",
        "dominates",
        "smallest lead",
        "Holm p",
        "lead in E_v J(v)",
        "B under A's front",
        "outside",
    )
    caption = (
        "A dominates B where, at every evaluation direction, the best of A's points beats the best of "
        "B's. The smallest "
        "lead has a simultaneous interval; p is Holm's over all pairs of the run. The last columns count B's points "
        "under A's interpolated front, out of those inside A's range, and those outside it."
    )
    body = []
    for row in rows:
        seen = row.coverage
        beaten = f"{seen.outside_dominated} of them beaten all the same" if seen and seen.outside else ""
        body.append(
            line(
                name_of(summary, row.a),
                name_of(summary, row.b),
                verdict(row.dominates),
                cell(row.margin),
                Cell(probability(row.p_holm)),
                cell(row.objective_lead),
                Cell(f"{seen.under} of {seen.inside}" if seen and seen.inside else MISSING),
                Cell(str(seen.outside) if seen and seen.outside else MISSING, beaten),
            )
        )
    return without_empty_columns(Table(caption, columns, tuple(body)))


def gap_table(summary: Summary) -> Table | None:
    """By how much the reward model's opinion exceeds the truth, over all conditions of a system."""
    rows = [
        line(
            name_of(summary, one.name),
            *(cell(one.opinion_gap[name], 2, sign=True) for name in summary.objectives),
            cell(one.figures.objective),
            cell(one.judged.objective),
            strong=one is summary.last,
        )
        for one in in_order(summary)
        if one.opinion_gap and one.judged
    ]
    columns = ("system", *(f"gap in {name}" for name in summary.objectives), "E_v J(v), true", "by the reward model")
    caption = (
        "Opinion minus truth in reward points, over all conditions; intervals over prompts. The data "
        "rescales ratings to "
        "10..90, so even a perfect reward model is 8 points low at a truth of 90, and 8 high at 10."
    )
    return Table(caption, columns, tuple(rows)) if rows else None


def sensitivity_table(summary: Summary) -> Table | None:
    """Hypervolume, and how it and the order of the systems move with the reference."""
    references = summary.sensitivity
    if not references:
        return None
    shares = [{name: share for name, share in at.shares.items() if share is not None} for at in references]
    known = all(len(found) == len(at.shares) for found, at in zip(shares, references, strict=True))
    at_each = shares if known else [at.hypervolumes for at in references]
    scale, digits = (100.0, 1) if known else (1.0, 0)
    rows = []
    for one in in_order(summary):
        own = [scale * values[one.name] for values in at_each]
        ranks = [1 + sum(other > values[one.name] for other in values.values()) for values in at_each]
        main = one.figures.true_front_share if known else one.figures.hypervolume
        cells = [
            number(scale * main.value if main else None, digits),
            number(min(own), digits),
            number(max(own), digits),
        ]
        rank = str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"
        rows.append(line(name_of(summary, one.name), *map(Cell, cells), Cell(rank)))
    places = ", ".join(f"{name} {number(value)}" for name, value in (summary.reference or {}).items())
    caption = (
        f"The reference ({places}) was fixed beforehand; here each coordinate is also moved, {len(references)} "
        "references in all. Where the ranks stand still, the choice of reference does not matter."
    )
    what = "share of the true front, %" if known else "hypervolume"
    return Table(caption, ("system", what, "least", "most", "rank"), tuple(rows))


def trust_table(summary: Summary) -> Table | None:
    """How the proxy and the check changed from iteration to iteration."""
    trust = summary.trust
    if trust is None or not trust.steps:
        return None
    steps = [*trust.steps, *([trust.change] if trust.change and len(trust.steps) > 1 else [])]
    rows = tuple(
        line(word(f"{step.b} to {step.a}"), cell(step.proxy), cell(step.check), strong=step is trust.change)
        for step in steps
    )
    check = "the truth" if trust.check == "truth" else "the judge"
    caption = "Changes of E_v J(v), paired by prompt. The last row decides whether the page warns."
    return Table(caption, ("change", "by the reward model", f"by {check}"), rows)


def pairwise_table(summary: Summary) -> Table | None:
    """The reward model on a file of preference pairs."""
    found = summary.pairwise
    if found is None:
        return None
    rows = tuple(
        line(
            word(name),
            cell(one.accuracy, scale=100),
            Cell(whole(one.pairs)),
            Cell(whole(one.ties)),
            strong=name == "all",
        )
        for name, one in found.subsets.items()
    )
    caption = (
        f"How often the chosen answer of a pair earns more {found.objective} than the rejected one; ties count half. "
        "Intervals over pairs."
    )
    return Table(caption, ("subset", "right, %", "pairs", "ties"), rows)


_QUALITY: Final = {
    "R2": "r2",
    "Pearson": "pearson",
    "Spearman": "spearman",
    "Spearman within a prompt": "within_prompt_spearman",
    "pairs in order within a prompt": "within_prompt_accuracy",
    "with length": "length_correlation",
    "labels with length": "label_length_correlation",
}
_QUALITY_NOTE: Final = (
    "Pairs in order: of two answers to one prompt with different labels, how often the better one is scored higher. "
    "Selection asks nothing else of the reward model. With length: the correlation with the answer's length. Ridge: a "
    "regression on what an answer looks like, which a model must beat."
)


def quality_tables(summary: Summary) -> dict[str, Table]:
    """By title: heads and objectives on held-out ratings and the truth, then each system's own samples."""
    found = summary.reward_model
    own = {
        f"{objective}, of {system}": head
        for system, heads in found.on_policy.items()
        for objective, head in heads.items()
    }
    parts = {
        "Objectives, on held-out ratings": found.objectives,
        "Objectives, on the truth of held-out answers": found.truth,
        "Heads, on held-out ratings": found.heads,
        "Objectives, on the policies' own samples": own,
    }
    tables = {title: _quality(heads, found.baseline) for title, heads in parts.items() if heads}
    for i, (title, table) in enumerate(tables.items()):
        tables[title] = Table(_QUALITY_NOTE if i == 0 else "", table.columns, table.rows)
    return tables


def _quality(heads: Mapping[str, HeadQuality], baseline: Mapping[str, HeadQuality]) -> Table:
    rows = tuple(
        line(
            word(name),
            Cell(whole(head.n)),
            *(cell(getattr(head, key), 2) for key in _QUALITY.values()),
            cell(baseline[name].pearson, 2) if name in baseline else DASH,
        )
        for name, head in heads.items()
    )
    return without_empty_columns(Table("", ("", "answers", *_QUALITY, "ridge, Pearson"), rows))


def costs_table(summary: Summary) -> Table | None:
    """What each system took to make, and what it reached for it."""
    rows = tuple(
        line(
            name_of(summary, one.name, one.system.setting),
            *(Cell(whole(n)) for n in (cost.sampled_tokens, cost.scored_responses, cost.trained_tokens)),
            Cell(whole(cost.total_tokens)),
            Cell(spell_seconds(cost.seconds)),
            Cell(whole(one.sweep.total_tokens if one.sweep else None)),
            Cell(spell_seconds(one.sweep.seconds) if one.sweep else MISSING),
            cell(one.figures.objective),
            cell(one.figures.hypervolume, 0),
            strong=one is summary.last,
        )
        for one in in_order(summary)
        if (cost := one.cost) and cost.total_tokens and one.same_as is None
    )
    columns = (
        *("system", "tokens sampled", "answers scored", "tokens trained", "tokens in all", "time"),
        *("tokens, all settings", "time, all settings", "E_v J(v)", "hypervolume"),
    )
    caption = (
        "What making each system took, its evaluation left out. Stages that systems share count for each, so the rows "
        f"do not add up. {COUNTED} All settings: with the tuning evaluations that chose among them. Choosing the "
        "recipe's own knobs, DPA's among them, is not counted."
    )
    return without_empty_columns(Table(caption, columns, rows)) if rows else None


def stages_table(summary: Summary) -> Table | None:
    """What each stage took; the bar is its share of the whole time."""
    stages = summary.stages
    if not stages:
        return None
    total = sum(stage.seconds for stage in stages)
    rows = [
        line(
            word(stage.name),
            Cell(spell_seconds(stage.seconds), bar=stage.seconds / total if total else 0.0),
            *(Cell(whole(n)) for n in (stage.sampled, stage.scored, stage.trained)),
            Cell(whole(stage.rows_in)),
            Cell(whole(stage.rows_out)),
            word(_reasons(stage.filtered) or MISSING),
        )
        for stage in stages
    ]
    sums = [sum(getattr(stage, unit) for stage in stages) for unit in ("sampled", "scored", "trained")]
    empty = Cell("")
    rows.append(
        line(
            word("together"),
            Cell(spell_seconds(total)),
            *(Cell(whole(n)) for n in sums),
            empty,
            empty,
            empty,
            strong=True,
        )
    )
    columns = ("stage", "time", "tokens sampled", "answers scored", "tokens trained", "rows in", "rows out", "left out")
    caption = (
        "Time at work, over all resumes of a stage; bars show its share. An answer counts as scored "
        "once for each model "
        f"that scores it. {COUNTED}"
    )
    return Table(caption, columns, tuple(rows))


def data_table(reports: Sequence[DataReport]) -> Table | None:
    """What was read and kept, and why the rest was not."""
    rows = tuple(
        line(
            word(one.source),
            word(one.file),
            Cell(f"{one.read:,}"),
            Cell(f"{one.kept:,}", bar=one.kept / one.read if one.read else 0.0),
            word(_reasons(one.filtered) or MISSING, f"kept, but: {_reasons(one.notes)}" if one.notes else ""),
        )
        for one in reports
    )
    caption = "Every row that was read is counted: kept, or filtered for the reason given. Bars show the share kept."
    return Table(caption, ("source", "file", "read", "kept", "filtered, and why"), rows) if rows else None


def _reasons(filtered: Mapping[str, int]) -> str:
    ordered = sorted(filtered.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{n:,} {reason}" for reason, n in ordered if n)


# --- over seeds of the whole pipeline ---


def seeds_tables(summary: Summary) -> list[Table]:
    """Figures, steps, pairs and what comparisons add, over seeds; nothing of a single run."""
    seeds = summary.seeds
    if seeds is None:
        return []
    figures = {"objective": ("E_v J(v)", 1, 1), "true_front_share": ("share of the true front, %", 100, 1),
               "hypervolume": ("hypervolume", 1, 0), "kendall_tau": ("Kendall tau", 1, 2), "span": ("span", 1, 1),
               "span_share": ("share of the true span, %", 100, 0), "regret": ("regret", 1, 2)}  # fmt: skip
    rows = tuple(
        line(name_of(summary, name), *(_mean(found.get(k), s, d) for k, (_, s, d) in figures.items()))
        for name, found in seeds.systems.items()
    )
    caption = (
        f"Means over {len(seeds.seeds)} runs of the whole pipeline (seeds {', '.join(map(str, seeds.seeds))}), with "
        "t-intervals: what another training run would have given."
    )
    columns = ("system", *(text for text, _, _ in figures.values()))
    tables = [
        without_empty_columns(Table(caption, columns, rows)),
        _seed_steps(summary, seeds),
        _seed_pairs(summary, seeds),
    ]
    tables += [_seed_comparison(summary, seeds), _seed_settings(summary, seeds)]
    return [table for table in tables if table is not None and table.rows]


def _seed_steps(summary: Summary, seeds: Seeds) -> Table | None:
    if not seeds.drops:
        return None
    points = summary.systems[next(iter(seeds.drops))].points
    steps = [f"{degrees(a.angle or 0.0)} to {degrees(b.angle or 0.0)}" for a, b in pairwise(points)]
    rows = tuple(
        line(name_of(summary, name), *(_mean(drop, 1, 1, each=True) for drop in drops))
        for name, drops in seeds.drops.items()
    )
    caption = (
        f"By how much {summary.objectives[1]} {turns(summary)} at each step of the dial: means and t-intervals over "
        "seeds, each seed's own step in brackets."
    )
    return Table(caption, ("system", *steps), rows)


def _seed_pairs(summary: Summary, seeds: Seeds) -> Table:
    leads = {(row.a, row.b): row.objective for row in seeds.differences}
    margins = {(row.a, row.b): row for row in seeds.dominance}
    rows = []
    for a, b in dict.fromkeys([*margins, *leads]):
        row = margins.get((a, b))
        rows.append(
            line(
                name_of(summary, a),
                name_of(summary, b),
                Cell(f"{row.dominates_in} of {len(seeds.seeds)}" if row else MISSING),
                _mean(row.margin if row else None, 1, 1, each=True),
                _mean(leads.get((a, b)), 1, 1, each=True),
            )
        )
    columns = ("A", "over B", "dominates in", "smallest lead", "lead in E_v J(v)")
    return without_empty_columns(
        Table("Pairs, compared within each seed; each seed's own in brackets.", columns, tuple(rows))
    )


def _seed_comparison(summary: Summary, seeds: Seeds) -> Table:
    rows = [
        ("hypervolume, the last iteration's over that of", name, ratio, 1, 2)
        for name, ratio in seeds.hypervolume_ratios.items()
    ]
    rows += [
        ("reward points lost to the specialists of", name, one, 1, 1) for name, one in seeds.family_shortfalls.items()
    ]
    rows += [
        (f"lead in {what}, over", name, one, 1, 2 if key == "kendall_tau" else 1)
        for name, found in seeds.control_leads.items()
        for key, what in (("kendall_tau", "Kendall tau"), ("span", "span"))
        if (one := found.get(key)) is not None
    ]
    rows += [
        (f"degenerate answers, %, asked for: {group}", name, share, 100, 1)
        for name, groups in seeds.degenerate.items()
        for group, share in groups.items()
    ]
    if seeds.trust is not None:
        rows.append(("change of E_v J(v), first to last iteration", "by the reward model", seeds.trust.proxy, 1, 1))
        rows.append(("change of E_v J(v), first to last iteration", "by its check", seeds.trust.check, 1, 1))
    body = tuple(
        line(word(what), name_of(summary, of), _mean(found, scale, digits, each=True))
        for what, of, found, scale, digits in rows
    )
    return Table("Over seeds, with t-intervals; each seed's own figure in brackets.", ("figure", "of", "mean"), body)


def _seed_settings(summary: Summary, seeds: Seeds) -> Table:
    columns = ("system", *(f"seed {seed}" for seed in seeds.seeds))
    rows = tuple(line(name_of(summary, name), *map(word, chosen)) for name, chosen in seeds.settings.items())
    return Table("The setting that each seed's tuning chose.", columns, rows)


def _mean(found: OverSeeds | None, scale: float, digits: int, each: bool = False) -> Cell:
    if found is None:
        return DASH
    shown = cell(found.estimate, digits, scale=scale)
    if not each:
        return shown
    values = ", ".join(number(scale * x, digits) for x in found.values)
    return Cell(shown.text, f"{shown.note} [{values}]".strip())
