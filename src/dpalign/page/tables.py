"""The tables of a run, as data that the template lays out."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Final, Literal

from dpalign.data.report import reasons
from dpalign.measure.bootstrap import Estimate
from dpalign.measure.quality import HeadQuality
from dpalign.measure.seeds import BY_JUDGE, OverSeeds, Seeds
from dpalign.measure.summary import DominanceRow, Figures, Measured, Summary, misunderstood, verdicts
from dpalign.measure.system import Role
from dpalign.measure.trust import optimised
from dpalign.page.cells import DASH, Cell, Row, Table, ahead, cell, count, name_of, table, verdict, word
from dpalign.page.looks import in_order, label
from dpalign.page.words import MISSING, by_prompt_or_seed, degenerate_rule, degrees, number, probability, turns
from dpalign.paper.direction import Preference
from dpalign.runs.progress import spell_seconds

COUNTED: Final = (
    "Trained tokens include prompts, which DPO reads with each of its two answers; sampled and scored ones do not."
)
"""What the ledgers' token counts include."""
_EXPLAINED: Final = (
    ("SFT, asked to be brief", "the SFT model, asked in words to be brief"),
    ("SFT, asked", "the SFT model given directions, which it never learnt"),
    ("SFT, best of", "the SFT model; the reward model picks the best of several answers"),
    ("SFT", "the model after supervised fine-tuning, from which all others start"),
    ("base, asked", "the base model given directions, which it never learnt"),
    ("SteerLM", "told the rewards that its answer should earn"),
    ("DPO, asked to be brief", "the DPO model, asked in words to be brief"),
    ("DPO", "trained on preference pairs, one behaviour for all users"),
    ("MO-ODPO", "a published rival with a dial: DPO under directions, on pairs of its own answers"),
    ("MOC", "a published rival with a dial: reinforcement under directions, from SFT"),
    ("DPA t=0", "the SteerLM model that samples for the first iteration"),
)
"""What known systems are, by the start of their names."""
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


def verdicts_table(summary: Summary) -> Table | None:
    """The last iteration against every other system: which wins, and by how much; over seeds if there are several."""
    by_system, last = {one.system: one for one in verdicts(summary)}, summary.last
    if last is None:
        return None
    runs = len(summary.seeds.seeds) if summary.seeds else 1
    unheard, compared = misunderstood(summary), summary.comparison.differences if summary.comparison else {}
    rows = []
    for system in in_order(summary):
        one = by_system.get(system.name)
        if one is None:
            continue
        outcome = verdict(one.outcome == "ahead" if one.margin else None)
        if one.outcome == "behind":
            outcome = Cell(f"it beats {last.name}", tone="no")
        elif one.system in unheard:
            outcome = Cell("no claim", "asking in words made it no briefer", tone="no")
        beside = compared.get(one.system)
        lead = one.lead or (beside.objective if beside else None)
        judged = one.lead_by_judge if summary.measure == "judged" else None  # the truth needs no second opinion
        cells = {
            "against": name_of(summary, one.system, explained(system)),
            f"{last.name} beats it for every user": outcome,
            "smallest lead": cell(one.margin),
            "in seeds": DASH if one.decided_in is None else Cell(f"{one.decided_in} of {runs}"),
            "E_v J(v)": cell(system.figures.objective),
            f"lead of {last.name}": cell(lead, sign=True),
            "lead by the judge": cell(judged, sign=True),
            "ahead on average": word(ahead(lead, last.name, label(system))),
            "hypervolume": cell(system.figures.hypervolume if beside else None, 0),
            f"{last.name}'s over it": cell(beside.hypervolume_ratio if beside else None, 2),
        }
        rows.append(Row(cells))
    over = f" Intervals are over {runs} seeds; a claim must hold in each." if runs > 1 else ""
    caption = (
        f"For every user: at each of the {len(summary.directions)} directions the best of {last.name}'s points earns "
        "more than the best of the other's (dominance, decided over all pairs at once). The lead is in E_v J(v), "
        f"paired by prompt.{over}"
    )
    return table(caption, rows)


_FIGURES: Final = {
    "E_v J(v)": ("objective", 1, 1),
    "hypervolume": ("hypervolume", 1, 0),
    "share of the true front, %": ("true_front_share", 100, 1),
    "Kendall tau": ("kendall_tau", 1, 2),
    "span": ("span", 1, 1),
    "share of the true span, %": ("span_share", 100, 0),
    "slope per degree": ("slope", 1, 2),
    "regret": ("regret", 1, 2),
}
"""Column -> figure of a system, scale and digits."""


def _figures(figure: Callable[[str], Estimate | None], judge: Estimate | None) -> dict[str, Cell]:
    """The cells of `_FIGURES`, with E_v J(v) by the judge beside the first."""
    first, *others = (
        (title, cell(figure(key), digits, scale=scale)) for title, (key, scale, digits) in _FIGURES.items()
    )
    return dict([first, ("by the judge", cell(judge)), *others])


def systems_table(summary: Summary, by: Literal["figures", "judged", "by_judge"] = "figures") -> Table | None:
    """One row for each system: its main figures; or its figures by the reward model (`judged`) or by the judge."""
    second = summary.objectives[:2][-1]
    steps = f"steps that {second} {turns(summary)}"
    rows = []
    for one in in_order(summary):
        figures: Figures | None = getattr(one, by)
        if figures is None:
            continue
        sure = Cell(f"{figures.steps_beyond_doubt} of {len(figures.drops)}") if figures.drops else DASH
        spearman = Cell(number(figures.spearman, 2))
        judge = one.by_judge.objective if one.by_judge and by == "figures" else None
        cells = _figures(partial(getattr, figures), judge)
        named = {"system": name_of(summary, one.name), **cells, steps: sure, "Spearman": spearman}
        rows.append(Row(named, strong=one is summary.last))
    notes = {
        "system": f"Small numbers are intervals over the {summary.intervals.prompts:,} prompts.",
        "E_v J(v)": "E_v J is the field's MIP, mean inner product.",
        "by the judge": "The judge is a second reward model, which never selects.",
        "Kendall tau": f"Kendall tau (as in MOC): rank agreement of {second} with the angle within a prompt, averaged.",
        "span": f"Span: {second} between the ends of the dial.",
        "regret": "Regret: what asking for v loses against the best other direction for v.",
        steps: "Steps: those whose own interval is clear of zero.",
        "Spearman": "Spearman, over averages, is near 1 for any steady trend, so it comes last.",
    }
    systems = table("", rows)
    return systems and Table(" ".join(notes[title] for title in systems.columns if title in notes), systems.rows)


def weights_tables(summary: Summary) -> dict[str, Table | None]:
    """For three objectives or more: each reward with its own weight, and the last policy's with every weight."""
    steered = [one for one in in_order(summary) if one.figures.weight_taus and not one.is_copy]
    if not steered:
        return {}
    names, ceiling, last = summary.objectives, summary.true_front_weight_taus, summary.last
    taus = [(name_of(summary, one.name), one.figures.weight_taus, one is last) for one in steered]
    taus += [(word("true front"), ceiling, False)] if ceiling else []
    own = [
        Row({"system": name, **{f"{k} with its weight": cell(of[k].get(k), 2) for k in names}}, strong)
        for name, of, strong in taus
    ]
    matrix = [
        Row({"reward": word(k, title.text), **{f"weight of {j}": cell(of[k].get(j), 2) for j in names}}, strong)
        for title, of, strong in taus
        if strong or of is ceiling
        for k in names
    ]
    kendall = (
        f"Kendall's tau of a mean reward with a weight, over the {len(summary.directions)} directions; above 0 the "
        "reward rises with the weight. "
    )
    also = (
        "The directions' weights are correlated, so a reward also has a tau with other weights. Compare with the true "
        "front, where several directions may have the same best answers."
    )
    return {
        "Each reward with its own weight": table(f"{kendall}{also if ceiling else ''}".strip(), own),
        "Each reward with each weight": table("", matrix),
    }


def dominance_tables(summary: Summary) -> dict[str, Table | None]:
    """The last iteration's pairs, all other pairs, and the last iteration's by the reward model and by the judge."""
    last = summary.last.name if summary.last else None
    parts: dict[str, list[DominanceRow]] = {
        "last": [row for row in summary.dominance if row.a == last],
        "others": [row for row in summary.dominance if row.a != last],
        "judged": [row for row in summary.dominance_judged or () if row.a == last],
        "by_judge": [row for row in summary.dominance_by_judge or () if row.a == last],
    }
    caption = (
        "A dominates B where, at every evaluation direction, the best of A's points beats the best of B's. The "
        "smallest lead has a simultaneous interval; each p is Holm's over all pairs of the run. The last columns count "
        "B's points under A's interpolated front, out of those inside A's range, and those outside it."
    )
    return {which: table(caption, [_dominance(summary, row) for row in rows]) for which, rows in parts.items()}


def _dominance(summary: Summary, row: DominanceRow) -> Row:
    under, outside = DASH, DASH
    if row.coverage and row.coverage.inside:
        under = Cell(f"{row.coverage.under} of {row.coverage.inside}")
    if row.coverage and row.coverage.outside:
        beaten = f"{row.coverage.outside_dominated} of them beaten too"
        outside = Cell(str(row.coverage.outside), beaten)
    return Row(
        {
            "A": name_of(summary, row.a),
            "over B": name_of(summary, row.b),
            "dominates": verdict(row.dominates),
            "smallest lead": cell(row.margin),
            "Holm p": Cell(probability(row.p_holm)),
            "lead in E_v J(v)": cell(row.objective_lead),
            "its Holm p": DASH if row.lead_p_holm is None else Cell(probability(row.lead_p_holm)),
            "B under A's front": under,
            "outside": outside,
        }
    )


def length_table(summary: Summary) -> Table | None:
    """Words and degenerate answers along the dial, counted in the texts."""
    rows = []
    for one in in_order(summary):
        points, length = one.points, one.length
        if points[0].words is None or one.is_copy:
            continue
        shown = {title: None if v is None else points[v] for title, v in _conditions_at(summary, one).items()}
        cells = {
            "system": name_of(summary, one.name),
            **{f"words {title}": cell(point.words if point else None) for title, point in shown.items()},
            "last over first, %": cell(length.last_to_first if length else None, 0, scale=100),
            "Kendall tau": cell(length.kendall_tau if length else None, 2),
            "steps": Cell(f"{length.steps_beyond_doubt} of {len(length.drops)}") if length else DASH,
            **{
                f"degenerate {title}, %": cell(point.degenerate if point else None, scale=100)
                for title, point in shown.items()
            },
        }
        rows.append(Row(cells, strong=one is summary.last))
    second, rule = summary.objectives[:2][-1], summary.degenerate_rule
    caption = (
        "Counted in the texts, without any model. Words are split at white space. "
        f"Kendall tau: rank agreement of words with the angle within a prompt. Steps: those where words move like "
        f"{second}, with an interval clear of zero. A system without a dial has the first column only; one told "
        f"reward targets shows its most, middle and fewest words. {degenerate_rule(rule) if rule else ''}"
    )
    return table(caption.strip(), rows)


def _conditions_at(summary: Summary, one: Measured) -> dict[str, int | None]:
    """Column title -> a system's condition at the first, the middle and the last direction.

    Reward targets are ordered by their words, the most first. A single condition goes to the first direction.
    """
    places = list(dict.fromkeys((0, len(summary.directions) // 2, len(summary.directions) - 1)))
    v = [Preference.from_weights(summary.directions[i], summary.objectives) for i in places]
    titles = [
        f"at {degrees(x.angle)}" if summary.angled else f"at direction {i + 1}" for i, x in zip(places, v, strict=True)
    ]
    if one.steered:
        return dict(zip(titles, places, strict=True))
    if len(one.points) == 1:
        return dict.fromkeys(titles) | {titles[0]: 0}
    order = sorted(range(len(one.points)), key=lambda i: -(one.points[i].words or Estimate(0.0)).value)
    return {title: order[i * (len(order) - 1) // max(len(titles) - 1, 1)] for i, title in enumerate(titles)}


def gap_table(summary: Summary) -> Table | None:
    """By how much the reward model's opinion exceeds the truth, over all conditions of a system."""
    rows = []
    for one in in_order(summary):
        if not (one.opinion_gap and one.judged):
            continue
        gaps = {f"gap in {name}": cell(one.opinion_gap[name], 2, sign=True) for name in summary.objectives}
        both = {"E_v J(v), true": cell(one.figures.objective), "by the reward model": cell(one.judged.objective)}
        rows.append(Row({"system": name_of(summary, one.name), **gaps, **both}, strong=one is summary.last))
    caption = (
        "Opinion minus truth in reward points, over all conditions; intervals over prompts. The data rescales ratings "
        "to 10..90, so even a perfect reward model is 8 points low at a truth of 90, and 8 high at 10."
    )
    return table(caption, rows)


def sensitivity_table(summary: Summary) -> Table | None:
    """Hypervolume, and how it and the systems' ranks change with the reference."""
    references = summary.sensitivity
    shares = [{name: share for name, share in at.shares.items() if share is not None} for at in references]
    known = all(len(own) == len(at.shares) for own, at in zip(shares, references, strict=True))
    at_each = shares if known else [at.hypervolumes for at in references]
    scale, digits = (100.0, 1) if known else (1.0, 0)
    what = "share of the true front, %" if known else "hypervolume"
    rows = []
    for one in in_order(summary) if references else ():
        own = [scale * values[one.name] for values in at_each]
        ranks = [1 + sum(other > values[one.name] for other in values.values()) for values in at_each]
        main = one.figures.true_front_share if known else one.figures.hypervolume
        cells = {
            "system": name_of(summary, one.name),
            what: Cell(number(scale * main.value if main else None, digits)),
            "least": Cell(number(min(own), digits)),
            "most": Cell(number(max(own), digits)),
            "rank": Cell(str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"),
        }
        rows.append(Row(cells))
    places = ", ".join(f"{name} {number(value)}" for name, value in (summary.reference or {}).items())
    caption = (
        f"The reference ({places}) was fixed beforehand; here each coordinate is also moved, {len(references)} "
        "references in all. Where the ranks do not change, the choice of reference does not matter."
    )
    return table(caption, rows)


def trust_table(summary: Summary) -> Table | None:
    """How the proxy and the check changed from iteration to iteration."""
    trust = summary.trust
    if trust is None:
        return None
    check = "by the truth" if trust.check == "truth" else "by the judge"
    steps = [*trust.steps, *([trust.change] if trust.change and len(trust.steps) > 1 else [])]
    rows = [
        Row(
            {
                "change": word(f"{step.b} to {step.a}"),
                "by the reward model": cell(step.proxy),
                check: cell(step.check),
                "": Cell("over-optimised", tone="no") if step.over_optimised else DASH,
            },
            strong=step is trust.change,
        )
        for step in steps
    ]
    caption = (
        "Changes of E_v J(v), paired by prompt. Over-optimised: the reward model's opinion rose and the check fell, "
        "both with intervals clear of zero. The page warns of any such row."
    )
    return table(caption, rows)


def optimised_table(summary: Summary) -> Table | None:
    """E_v J(v) of each system by the reward model, the truth and the judge, with its divergence from SFT."""
    found = {row.system: row for row in optimised(summary)}
    rows = []
    for one in in_order(summary):
        row = found.get(one.name)
        if row is None or row.divergence is None:
            continue
        cells = {
            "system": name_of(summary, one.name, one.system.setting),
            "KL from SFT, nats": cell(row.divergence),
            "answers scored": count(row.scored),
            "by the reward model": cell(row.proxy),
            "by the truth": cell(row.truth),
            "by the judge": cell(row.judge),
        }
        rows.append(Row(cells, strong=one is summary.last))
    caption = (
        "E_v J(v) against the KL divergence from SFT: the mean of log pi(y | x, v) - log pi_SFT(y | x) over sampled "
        "answers, in nats an answer. Longer answers diverge more. Mixtures of weights and best of n have no policy of "
        f"their own to measure. Intervals: {by_prompt_or_seed(summary)}; for a divergence, over the prompts it was "
        "measured on."
    )
    return table(caption, rows)


def pairwise_table(summary: Summary) -> Table | None:
    """The reward model on a file of preference pairs."""
    pairs = summary.pairwise
    if pairs is None:
        return None
    rows = []
    for name, one in pairs.subsets.items():
        counts = {"pairs": count(one.pairs), "ties": count(one.ties)}
        rows.append(Row({"subset": word(name), "right, %": cell(one.accuracy, scale=100), **counts}, name == "all"))
    caption = (
        f"How often the chosen answer of a pair earns more {pairs.objective} than the rejected one; ties count half. "
        "Intervals over pairs."
    )
    return table(caption, rows)


def rewards_table(summary: Summary) -> Table | None:
    """What scores each head, and how its raw rewards become points."""
    rows = [
        Row(
            {
                "head": word(one.head),
                "scored by": word(one.source),
                "points": word(
                    "unchanged"
                    if (one.slope, one.offset) == (1.0, 0.0)
                    else f"{one.slope:.4g} r {'-' if one.offset < 0 else '+'} {abs(one.offset):.4g}"
                ),
                "fitted": word("to the annotated answers" if one.fitted else "no"),
            }
        )
        for one in summary.rewards
    ]
    caption = (
        "Points are an affine map of the raw reward r, the same for the whole run. A fitted one maps the 5th and 95th "
        "percentile of the annotated answers to 10 and 90 points; rewards beyond them fall outside."
    )
    return table(caption, rows)


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
    "Selection needs nothing else from the reward model. With length: the correlation with the answer's length. Ridge: "
    "a regression on surface features of the answer, which a reward model must beat."
)


def quality_tables(summary: Summary) -> dict[str, Table | None]:
    """By title: heads and objectives on held-out ratings and the truth, then each system's own samples."""
    measured = summary.reward_model
    own, doubted = (
        {f"{name}, of {system}": head for system, heads in figures.items() for name, head in heads.items()}
        for figures in (measured.on_policy, measured.spread_on_policy)
    )
    parts = {
        "Objectives, on held-out ratings": measured.objectives,
        "Objectives, on the truth of held-out answers": measured.truth,
        "Heads, on held-out ratings": measured.heads,
        "Spread of the ensemble, on the size of the error on held-out ratings": measured.spread,
        "Spread of the ensemble, on the size of the true error": measured.spread_truth,
        "Objectives, on the policies' own samples": own,
        "Spread of the rewards, on the size of the error of these": doubted,
    }
    shown = {title: heads for title, heads in parts.items() if heads}

    def row(name: str, head: HeadQuality) -> Row:
        figures = {title: cell(getattr(head, key), 2) for title, key in _QUALITY.items()}
        ridge = cell(measured.baseline[name].pearson, 2) if name in measured.baseline else DASH
        return Row({"": word(name), "answers": count(head.n), **figures, "ridge, Pearson": ridge})

    return {
        title: table("" if i else _QUALITY_NOTE, [row(*item) for item in heads.items()])
        for i, (title, heads) in enumerate(shown.items())
    }


def costs_table(summary: Summary) -> Table | None:
    """What it cost to make each system, and what the system reached."""
    rows = []
    for one in in_order(summary):
        cost, sweep = one.cost, one.sweep
        if not (cost and cost.total_tokens) or one.is_copy:
            continue
        cells = {
            "system": name_of(summary, one.name, one.system.setting),
            "tokens sampled": count(cost.sampled_tokens),
            "answers scored": count(cost.scored_responses),
            "tokens trained": count(cost.trained_tokens),
            "tokens in all": count(cost.total_tokens),
            "time": Cell(spell_seconds(cost.seconds)),
            "tokens, all settings": count(sweep.total_tokens if sweep else None),
            "time, all settings": Cell(spell_seconds(sweep.seconds)) if sweep else DASH,
            "E_v J(v)": cell(one.figures.objective),
            "hypervolume": cell(one.figures.hypervolume, 0),
        }
        rows.append(Row(cells, strong=one is summary.last))
    caption = (
        "What it cost to make each system, without its evaluation. Shared stages count for each system, so the rows do "
        f"not add up. {COUNTED} All settings: with the tuning evaluations that chose among them. Choosing the "
        "recipe's own knobs, including DPA's, is not counted."
    )
    return table(caption, rows)


_UNITS: Final = {"tokens sampled": "sampled", "answers scored": "scored", "tokens trained": "trained"}


def stages_table(summary: Summary) -> Table | None:
    """The cost of each stage; the bar is its share of the whole time."""
    stages, seconds = summary.stages, sum(stage.seconds for stage in summary.stages)
    rows = []
    for stage in stages:
        time = Cell(spell_seconds(stage.seconds), bar=stage.seconds / seconds if seconds else 0.0)
        units = {title: count(getattr(stage, unit)) for title, unit in _UNITS.items()}
        kept = {"rows in": count(stage.rows_in), "rows out": count(stage.rows_out)}
        left_out = word(reasons(stage.filtered) or MISSING)
        rows.append(Row({"stage": word(stage.name), "time": time, **units, **kept, "left out": left_out}))
    if stages:
        sums = {title: count(sum(getattr(stage, unit) for stage in stages)) for title, unit in _UNITS.items()}
        empty = dict.fromkeys(("rows in", "rows out", "left out"), Cell(""))
        total = {"stage": word("total"), "time": Cell(spell_seconds(seconds)), **sums, **empty}
        rows.append(Row(total, strong=True))
    caption = (
        "Time at work, over all resumes of a stage; bars show its share. An answer counts as scored once for each "
        f"model that scores it. {COUNTED}"
    )
    return table(caption, rows)


def data_table(summary: Summary) -> Table | None:
    """What was read and kept, and why the rest was left out."""
    rows = []
    for one in summary.data_reports:
        kept_but = f"kept, but: {reasons(one.notes)}" if one.notes else ""
        cells = {
            "source": word(one.source),
            "file": word(one.file),
            "read": Cell(f"{one.read:,}"),
            "kept": Cell(f"{one.kept:,}", bar=one.kept / one.read if one.read else 0.0),
            "filtered, and why": word(reasons(one.filtered) or "none", kept_but),
        }
        rows.append(Row(cells))
    caption = "Every row that was read is counted: kept, or filtered for the reason given. Bars show the share kept."
    return table(caption, rows)


# --- over seeds of the whole pipeline ---


def seeds_tables(summary: Summary) -> list[Table]:
    """Figures, steps, pairs and comparisons over seeds; empty for a single run."""
    seeds = summary.seeds
    if seeds is None:
        return []
    rows = []
    for name, own in seeds.systems.items():
        rows.append(Row({"system": name_of(summary, name), **_figures(own.get, own.get(BY_JUDGE))}))
    caption = (
        f"Means over {len(seeds.seeds)} runs of the whole pipeline (seeds {', '.join(map(str, seeds.seeds))}), with "
        "t-intervals: what another training run would have given."
    )
    settings = [
        Row({"system": name_of(summary, name)} | {f"seed {s}": word(c) for s, c in zip(seeds.seeds, own, strict=True)})
        for name, own in seeds.settings.items()
    ]
    shown = [
        table(caption, rows),
        _seed_steps(summary, seeds),
        _seed_weights(summary, seeds),
        _seed_words(summary, seeds) if summary.measure == "judged" else None,
        _seed_pairs(summary, seeds),
        _seed_comparison(summary, seeds),
        table("The setting that each seed's tuning chose.", settings),
    ]
    return [one for one in shown if one is not None]


def _seed_steps(summary: Summary, seeds: Seeds) -> Table | None:
    rows = []
    for name, drops in seeds.drops.items():
        steps = pairwise(degrees(point.angle or 0.0) for point in summary.systems[name].points)
        cells = {f"{a} to {b}": _each(drop) for (a, b), drop in zip(steps, drops, strict=True)}
        rows.append(Row({"system": name_of(summary, name), **cells}))
    caption = (
        f"By how much {summary.objectives[-1]} {turns(summary)} at each step of the dial: means and t-intervals over "
        "seeds, each seed's own step in brackets."
    )
    return table(caption, rows)


def _seed_weights(summary: Summary, seeds: Seeds) -> Table | None:
    rows = []
    for name, taus in seeds.weight_taus.items():
        cells = {f"{k} with its weight": _each(taus[k].get(k), digits=2) for k in summary.objectives}
        rows.append(Row({"system": name_of(summary, name), **cells}))
    caption = (
        "Kendall's tau of each mean reward with its own weight: means and t-intervals over seeds, each seed's own in "
        "brackets."
    )
    return table(caption, rows)


def _seed_words(summary: Summary, seeds: Seeds) -> Table | None:
    rows = []
    for name, words in seeds.words.items():
        length = seeds.length.get(name, {})
        cells = {
            "system": name_of(summary, name),
            **{
                f"words {title}": DASH if v is None else _each(words[v])
                for title, v in _conditions_at(summary, summary.systems[name]).items()
            },
            "last over first, %": _each(length.get("last_to_first"), 100, 0),
            "Kendall tau": _each(length.get("kendall_tau"), digits=2),
        }
        rows.append(Row(cells))
    return table("Words of the answers: means and t-intervals over seeds, each seed's own in brackets.", rows)


def _seed_pairs(summary: Summary, seeds: Seeds) -> Table | None:
    leads = {(row.a, row.b): row for row in seeds.differences}
    margins = {(row.a, row.b): row for row in seeds.dominance}
    rows = []
    for a, b in dict.fromkeys([*margins, *leads]):
        row, lead = margins.get((a, b)), leads.get((a, b))
        cells = {
            "A": name_of(summary, a),
            "over B": name_of(summary, b),
            "dominates in": Cell(f"{row.dominates_in} of {len(seeds.seeds)}") if row else DASH,
            "smallest lead": _each(row.margin if row else None),
            "lead in E_v J(v)": _each(lead.objective if lead else None),
            "by the judge": _each(lead.by_judge if lead else None),
        }
        rows.append(Row(cells))
    return table("Pairs, compared within each seed; each seed's own figure in brackets.", rows)


def _seed_comparison(summary: Summary, seeds: Seeds) -> Table | None:
    rows: list[Row] = []

    def add(what: str, of: str, mean: OverSeeds | None, scale: float = 1, digits: int = 1) -> None:
        if mean is not None:
            cells = {"figure": word(what), "of": name_of(summary, of), "mean": _each(mean, scale, digits)}
            rows.append(Row(cells))

    for name, ratio in seeds.hypervolume_ratios.items():
        add("hypervolume, the last iteration's over that of", name, ratio, digits=2)
    for name, lost in seeds.family_shortfalls.items():
        add("reward points lost to the specialists of", name, lost)
    for name, leads in seeds.control_leads.items():
        add("lead in Kendall tau, over", name, leads.get("kendall_tau"), digits=2)
        add("lead in span, over", name, leads.get("span"))
    for name, groups in seeds.degenerate.items():
        for group, share in groups.items():
            add(f"degenerate answers, %, asked for: {group}", name, share, 100)
    if seeds.trust is not None:
        add("change of E_v J(v), first to last iteration", "by the reward model", seeds.trust.proxy)
        add("change of E_v J(v), first to last iteration", "by its check", seeds.trust.check)
        for step in seeds.trust.steps if len(seeds.trust.steps) > 1 else ():
            add(f"change of E_v J(v), {step.b} to {step.a}", "by the reward model", step.proxy)
            add(f"change of E_v J(v), {step.b} to {step.a}", "by its check", step.check)
    return table("Over seeds, with t-intervals; each seed's own figure in brackets.", rows)


def _each(mean: OverSeeds | None, scale: float = 1, digits: int = 1) -> Cell:
    """A mean over seeds, with each seed's own figure in brackets."""
    if mean is None:
        return DASH
    shown = cell(mean, digits, scale=scale)
    values = ", ".join(number(scale * x, digits) for x in mean.values)
    return Cell(shown.text, f"{shown.note} [{values}]".strip())
