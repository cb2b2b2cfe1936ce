"""What a comparison shows, in words: what was run, what a rival wins, and what is not significant."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dpalign.measure.control import COMMON
from dpalign.page.systems import System
from dpalign.page.words import Figure, agreeing, below_zero, listed, seed_count, size

Summary = Mapping[str, Any]

SHORTFALL: Final = 3.0
"""Reward points that a steered policy may lose to a specialist at its own direction."""


@dataclass(frozen=True)
class Claim:
    """A sentence, and whether the intervals support it."""

    holds: bool
    text: str
    rival: bool = False
    """It says where another system is ahead."""


def rivals_claims(summary: Summary, systems: Sequence[System]) -> list[Claim]:
    """What else a comparison claims: of the soups, of the specialists, and of each rival that is ahead.

    With several seeds of the whole pipeline the claims rest on them, else on the intervals by prompt.
    """
    compared = summary.get("comparison")
    if not compared or compared["last"] is None:
        return []
    shown = {system.name: system for system in systems}
    seeds = summary["seeds"] if seed_count(summary) > 1 else None
    ratios = {row["b"]: row["ratio"] for row in seeds.get("hypervolume_ratios", ())} if seeds else {
        row["system"]: row["hypervolume_ratio"] for row in compared["differences"]
    }  # fmt: skip
    families = seeds.get("specialists", {}) if seeds else compared["specialists"]["families"]
    claims = [
        _soup_claim(summary, Figure.read(ratio), shown[name])
        for name, ratio in ratios.items()
        if ratio and name in shown and shown[name].role == "soup"
    ]
    claims += [_specialists_claim(compared["last"], family, Figure.read(mean)) for family, mean in families.items()]
    return claims + _wins(summary, shown)


def _soup_claim(summary: Summary, ratio: Figure, soup: System) -> Claim:
    last = summary["comparison"]["last"]
    kept = {one["system"]: one for one in summary["comparison"]["table_1"]}
    models = (
        f" with {_models(kept[last])} in place of {_models(kept[soup.name])}"
        if {last, soup.name} <= kept.keys()
        else ""
    )
    return Claim(
        ratio.low is not None and ratio.low >= 1,
        f"{last} reaches at least the hypervolume of {soup.name}{models}: {ratio.said(2)} of theirs.",
    )


def _models(row: Mapping[str, Any]) -> str:
    count = "one model" if row["models"] == 1 else f"{row['models']} models"
    return f"{count} ({size(row['bytes'])})" if row["bytes"] else count


def _specialists_claim(last: str, family: str, mean: Figure) -> Claim:
    gains = mean.value is not None and mean.value < 0
    change = f"it is {turned(mean)} ahead" if gains else f"it loses {mean}"
    return Claim(
        mean.high is not None and mean.high <= SHORTFALL,
        f"{last} stays within {SHORTFALL:g} reward points of the {family} specialists at their own directions: "
        f"{change} on average.",
    )


def turned(found: Figure) -> Figure:
    """The same difference the other way round."""
    value, high, low = (None if one is None else -one for one in found)
    return Figure(value, low, high)


def _wins(summary: Summary, shown: Mapping[str, System]) -> list[Claim]:
    """Where another system beats the last iteration, said as plainly as the reverse."""
    last, runs = summary["comparison"]["last"], seed_count(summary)
    if runs > 1:
        rows = summary["seeds"].get("dominance") or []
        beating = [row for row in rows if row["b"] == last and row["dominates_in"] == runs]
        leads = {row["b"]: row["objective"] for row in summary["seeds"].get("differences") or [] if row["a"] == last}
        ratios = {row["b"]: row["ratio"] for row in summary["seeds"].get("hypervolume_ratios") or []}
        followed = summary["seeds"].get("control_leads") or {}
    else:
        beating = [row for row in summary["dominance"] if row["b"] == last and row["dominates"]]
        leads = {row["system"]: row["objective"] for row in summary["comparison"]["differences"]}
        ratios = {row["system"]: row["hypervolume_ratio"] for row in summary["comparison"]["differences"]}
        followed = {row["system"]: row for row in summary["comparison"].get("control_leads") or []}
    claims = []
    for row in beating:
        rival, margin = shown[row["a"]], Figure.read(row["margin"])
        if rival.role != "iteration" and margin.above_zero:
            beats = agreeing([rival.said], "beats", "beat")
            claims.append(_rival(f"{rival.said} {beats} {last} at every direction: smallest lead {margin}."))
    named = {name: shown[name].said for name in shown if shown[name].role != "ablation" and not shown[name].copied}
    claims += _ahead(leads, named, "a higher E_v J(v)", last)
    for name, found in ratios.items():
        ratio = Figure.read(found)
        if name in named and ratio.high is not None and ratio.high < 1:
            has = agreeing([named[name]], "has", "have")
            claims.append(
                _rival(f"{named[name]} {has} a larger hypervolume than {last}, whose is {ratio.said(2)} of it.")
            )
    families = {
        system.family: f"{system.family} specialists" for system in shown.values() if system.role == "specialist"
    }
    spans = {name: row.get("span") for name, row in followed.items()}
    taus = {name: row.get("kendall_tau") for name, row in followed.items()}
    span = f"a wider span of {summary['objectives'][-1]}"
    tau = f"a higher Kendall tau, at {COMMON} conditions each,"
    return claims + _ahead(spans, named | families, span, last) + _ahead(taus, named | families, tau, last, digits=2)


def _ahead(leads: Mapping[str, Any], named: Mapping[str, str], what: str, last: str, digits: int = 1) -> list[Claim]:
    """Who has more of something than the last iteration, by the intervals of its leads."""
    claims = []
    for name, found in leads.items():
        if name in named and below_zero(found):
            has, lead = agreeing([named[name]], "has", "have"), turned(Figure.read(found))
            claims.append(_rival(f"{named[name]} {has} {what} than {last}: by {lead.said(digits)}."))
    return claims


def _rival(text: str) -> Claim:
    return Claim(True, text[0].upper() + text[1:], rival=True)


def recipe_note(summary: Summary) -> str:
    """Beside the recipe's text: what of it does not hold for some steps of the comparison."""
    names = (summary.get("comparison") or {}).get("knobs_set") or []
    if not names:
        return ""
    return (
        f"For some steps of its systems `dpa compare` sets {listed(names)}, whatever stands below; the tables of the "
        "comparison name each system's setting, soups by the directions of the experts that were mixed."
    )


def misunderstood(summary: Summary) -> dict[str, Mapping[str, Any]]:
    """The systems that a wish in words is not shown to have made briefer, with its figures; in each seed's run."""
    found, runs = (summary.get("comparison") or {}).get("wishes") or [], seed_count(summary)
    if runs > 1:
        understood = {name: n == runs for name, n in (summary["seeds"].get("understood_in") or {}).items()}
    else:
        understood = {row["system"]: below_zero(row["change"]) for row in found}
    return {row["system"]: row for row in found if not understood.get(row["system"], True)}


def _wishes_said(summary: Summary, shown: Mapping[str, System]) -> str:
    rows = [row for name, row in misunderstood(summary).items() if name in shown and not shown[name].copied]
    if not rows:
        return ""
    figures = [
        f"{shown[row['system']].said} has {row['objective']} {Figure.read(row['asked'])}, and unasked "
        f"{Figure.read(row['unasked'])}, a change of {Figure.read(row['change']).said(sign=True)}"
        for row in rows
    ]
    told = (
        "was not understood" if any(Figure.read(row["change"]).above_zero for row in rows) else "is not shown to work"
    )
    return (
        f"The wish to be brief, in words, {told}: {'; '.join(figures)}. A model that does not follow the words is no "
        "rival at being brief, so no victory over it is claimed."
    )


def what_was_run(summary: Summary, systems: Sequence[System]) -> list[str]:
    """The paragraphs that open the section: systems, choices, prompts, seeds and intervals."""
    compared, tried = summary["comparison"], summary.get("tuning") or {}
    by_role: dict[str, list[str]] = {}
    for system in systems:
        if not system.copied:
            by_role.setdefault(system.role, []).append(system.family.replace(",", ""))
    named = {role: listed(list(dict.fromkeys(names))) for role, names in by_role.items()}
    parts = [
        f"{compared['last'] or 'No policy'} beside {named['baseline']}" if "baseline" in named else "",
        f"soups of specialists' weights ({named['soup']})" if "soup" in named else "",
        f"{_counted(len(by_role['specialist']), 'specialist')} for one direction each ({named['specialist']})"
        if "specialist" in named
        else "",
        f"{_counted(len(by_role['ablation']), 'ablation')} of the loop" if "ablation" in named else "",
    ]
    ran = "; ".join(part for part in parts if part)
    ran += ". All share the run's data, SFT start, reward model and evaluation."
    settings = sum(len(found) for found in tried.values())
    tuned = listed([system.said for system in systems if system.name in tried])
    chosen = (
        f"{_counted(len(tried), 'system')} {'was' if len(tried) == 1 else 'were'} tuned over {settings} settings "
        f"({tuned}): the best by the reward model's E_v J(v) on the tuning prompts is shown, and the sweep's cost is "
        "counted beside its own. "
        if tried
        else ""
    )
    copies = [f"{system.said} is {system.entry['same_as']}" for system in systems if system.copied]
    if copies:
        chosen += f"The tuning chose the setting that had been there before: {listed(copies)}. "
    boot = summary["intervals"]["bootstrap"]
    seeds = (summary.get("seeds") or {}).get("seeds") or []
    chance = (
        f"Intervals are {100 * boot['level']:.0f}% by {boot['replicates']:,} bootstrap replicates over "
        f"{summary['intervals']['prompts']:,} validation prompts with the checkpoints held fixed; "
        f"{len(summary['dominance'])} pairs are decided at once (Holm). "
    )
    chance += (
        f"Seed {seeds[0]}: one training of each system, so another seed may differ by more than any interval here."
        if len(seeds) == 1
        else f"Seeds {listed([str(seed) for seed in seeds])}; this section shows the first, the section on seeds all."
        if seeds
        else ""
    )
    wished = _wishes_said(summary, {system.name: system for system in systems})
    return [part for part in (ran, chosen.strip(), wished, chance.strip()) if part]


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def undecided(summary: Summary, systems: Sequence[System]) -> list[str]:
    """What the intervals do not decide, one sentence a kind."""
    compared = summary["comparison"]
    last, shown = compared["last"], {system.name: system for system in systems}
    found = []
    level = [
        f"{shown[row['system']].said}: {Figure.read(row['objective'])}"
        for row in compared["differences"]
        if shown[row["system"]].role != "iteration"
        and not shown[row["system"]].copied
        and _holds_zero(row["objective"])
    ]
    if level:
        found.append(f"The lead of {last} in E_v J(v) is not significant over {'; '.join(level)}.")
    decided = {(row["a"], row["b"]): row["dominates"] for row in summary["dominance"]}
    neither = [b for (a, b), holds in decided.items() if a == last and not holds and not decided.get((b, a), False)]
    neither = [shown[name].said for name in neither if shown[name].role != "iteration" and not shown[name].copied]
    if neither:
        found.append(f"Dominance is not shown over {listed(neither)}, nor theirs over {last} where it was asked.")
    ratios = [
        f"{shown[row['system']].said}: {ratio.said(2)}"
        for row in compared["differences"]
        if (ratio := Figure.read(row["hypervolume_ratio"])).low is not None
        and ratio.low <= 1 <= (ratio.high or 0)
        and not shown[row["system"]].copied
    ]
    if ratios:
        found.append(
            f"The ratio of {last}'s hypervolume to that of another does not differ from 1: {'; '.join(ratios)}."
        )
    return found


def _holds_zero(found: Mapping[str, Any]) -> bool:
    lead = Figure.read(found)
    return lead.low is not None and lead.high is not None and lead.low <= 0 <= lead.high


def trust_warning(summary: Summary) -> str | None:
    """Said where the proxy rose and the check fell; over several seeds, in how many of them."""
    trust, runs = summary.get("trust"), seed_count(summary)
    over_seeds = summary["seeds"].get("trust") if runs > 1 else None
    if not trust or not (over_seeds["warned_in"] if over_seeds else trust["warning"]):
        return None
    change = trust["change"]
    check = "the truth" if trust["check"] == "truth" else "the judge"
    if over_seeds:
        return (
            f"In {over_seeds['warned_in']} of {runs} seeds the reward model's E_v J(v) rose from {change['b']} to "
            f"{change['a']} while by {check} it fell: there the policy pleases the reward model at the expense of what "
            f"it stands for. In the mean of all seeds it changed by {Figure.read(over_seeds['proxy'])}, and by {check} "
            f"by {Figure.read(over_seeds['check'])}. Trust an earlier iteration, or a better reward model, more than "
            "the last one."
        )
    return (
        f"From {change['b']} to {change['a']} the reward model's E_v J(v) rose by {Figure.read(change['proxy'])} while "
        f"by {check} it changed by {Figure.read(change['check'])}: the policy pleases the reward model at the expense "
        "of what it stands for. Trust an earlier iteration, or a better reward model, more than the last one."
    )
