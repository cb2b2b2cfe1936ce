"""Several seeds of the whole pipeline: intervals that cover another training run.

An interval by prompt (`bootstrap.py`) holds the checkpoints fixed. Headline claims rest on runs that
differ in every draw, from the first to the last stage. Each run gives one figure. The figures are few,
so their interval is Student's t.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np

from dpalign.measure.bootstrap import Estimate
from dpalign.measure.record import Record

if TYPE_CHECKING:
    from dpalign.measure.summary import Figures, Measured, Summary, TrustChange

K = TypeVar("K")

FIGURES: Final = (
    *("objective", "true_front_share", "hypervolume", "kendall_tau", "regret", "span", "span_share", "slope"),
    "spearman",
)
"""The figures of a system that are combined over seeds, beside the four below."""
BY_JUDGE: Final = "objective_by_judge"
"""E_v J(v) by the judge, where there is one."""
BY_REWARD: Final = "objective_by_reward"
"""E_v J(v) by the reward model that selects, where "objective" is by the truth."""
DIVERGENCE: Final = "divergence"
"""KL divergence from SFT, where it was measured."""
SCORED: Final = "scored"
"""Answers that were scored to make the system."""


@dataclass(frozen=True)
class OverSeeds(Estimate):
    """A figure's mean over seeds, its t-interval (None with one seed), and the figures themselves."""

    values: tuple[float, ...] = ()


class PairOverSeeds(Record):
    """E_v J(v) of a minus that of b, paired by seed."""

    a: str
    b: str
    objective: OverSeeds
    by_judge: OverSeeds | None = None


class DominanceOverSeeds(Record):
    """The smallest lead of a over b, and the number of runs in which a dominates b."""

    a: str
    b: str
    margin: OverSeeds
    dominates_in: int


class ChangeOverSeeds(Record):
    """How E_v J(v) changed from `b` to `a`, and in how many runs the proxy rose and the check fell."""

    a: str
    b: str
    proxy: OverSeeds
    check: OverSeeds
    warned_in: int


class TrustOverSeeds(Record):
    """How E_v J(v) changed from the first selected iteration to the last, and how many runs warned."""

    proxy: OverSeeds
    check: OverSeeds
    warned_in: int
    steps: tuple[ChangeOverSeeds, ...] = ()
    """From each selected iteration to the next."""


class Seeds(Record):
    """The figures that all runs have, over their seeds. Fields of comparisons are filled if every run is one."""

    seeds: tuple[int, ...]
    level: float = 0.95
    systems: dict[str, dict[str, OverSeeds]] = {}
    """System -> figure."""
    drops: dict[str, tuple[OverSeeds, ...]] = {}
    """System -> reward points from each direction to the next (`Figures.drops`)."""
    weight_taus: dict[str, dict[str, dict[str, OverSeeds]]] = {}
    """System -> objective -> how its reward follows the weight of each; only with three objectives or more."""
    words: dict[str, tuple[OverSeeds, ...]] = {}
    """System -> mean words at each of its conditions."""
    length: dict[str, dict[str, OverSeeds]] = {}
    """System -> kendall_tau and last_to_first of its words (`Length`)."""
    differences: tuple[PairOverSeeds, ...] = ()
    dominance: tuple[DominanceOverSeeds, ...] = ()
    trust: TrustOverSeeds | None = None
    hypervolume_ratios: dict[str, OverSeeds] = {}
    """The last iteration's hypervolume over each system's."""
    control_leads: dict[str, dict[str, OverSeeds]] = {}
    """Row of Table 1 -> kendall_tau, span."""
    family_shortfalls: dict[str, OverSeeds] = {}
    understood_in: dict[str, int] = {}
    """System -> number of runs in which a wish in words made it briefer."""
    settings: dict[str, tuple[str, ...]] = {}
    """Tuned system -> the setting that each run chose."""
    degenerate: dict[str, dict[str, OverSeeds]] = {}
    """System -> group of requests -> share of degenerate answers."""

    def dominance_of(self, a: str, b: str) -> DominanceOverSeeds | None:
        """The row of a pair."""
        return next((row for row in self.dominance if (row.a, row.b) == (a, b)), None)


def over_seeds(values: Sequence[float], level: float = 0.95) -> OverSeeds:
    """Mean and t-interval of one figure over seeds."""
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"figures over seeds are {list(values)}: at least one is needed, and all must be numbers")
    figures = np.array(values, dtype=float)
    mean = float(figures.mean())
    if len(figures) == 1:
        return OverSeeds(mean, None, None, tuple(figures.tolist()))
    from scipy import stats  # type: ignore[import-untyped]  # slow to import, and `dpa --help` comes through here

    half = float(stats.t.ppf((1 + level) / 2, len(figures) - 1)) * figures.std(ddof=1) / math.sqrt(len(figures))
    return OverSeeds(mean, float(mean - half), float(mean + half), tuple(figures.tolist()))


def paired_over_seeds(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> OverSeeds:
    """Mean and t-interval of a - b. Each has one figure a seed, in the same order."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} figures against {len(b)}: a paired difference needs both of every seed")
    return over_seeds([x - y for x, y in zip(a, b, strict=True)], level)


def combine_seeds(
    summaries: "Mapping[int, Summary]", pairs: Sequence[tuple[str, str]] = (), level: float = 0.95
) -> Seeds:
    """Combine the summaries of several seeds' runs. A system or a figure that some run lacks is left out.

    Args:
        pairs: systems whose E_v J(v) is compared, paired by seed.

    Raises:
        ValueError: no summaries, or a pair names a system that not all runs have.
    """
    if not summaries:
        raise ValueError("no summaries to combine; finish at least one run's evaluation first")
    runs = [summaries[seed] for seed in sorted(summaries)]
    names = [name for name in runs[0].systems if all(name in run.systems for run in runs)]
    unknown = [name for pair in pairs for name in pair if name not in names]
    if unknown:
        raise ValueError(f"no system {unknown[0]!r} in every seed's run; they share {', '.join(names)}")
    figures = {name: [run.systems[name].figures for run in runs] for name in names}
    reached = {name: [one.objective.value for one in own] for name, own in figures.items()}
    # steps of the dial are comparable only if all runs' dials have equally many
    alike = {name: own for name, own in figures.items() if own[0].drops and len({len(one.drops) for one in own}) == 1}
    by_judge = {name: [_by_judge(run.systems[name]) for run in runs] for name in names}
    seeds = Seeds(
        seeds=tuple(sorted(summaries)),
        level=level,
        systems={name: _shared([_values(run.systems[name]) for run in runs], level) for name in names},
        drops={name: _drops(own, level) for name, own in alike.items()},
        weight_taus={name: taus for name, own in figures.items() if (taus := _weight_taus(own, level))},
        words=_words(runs, names, level),
        length={name: own for name in names if (own := _length([run.systems[name] for run in runs], level))},
        differences=tuple(
            PairOverSeeds(
                a=a,
                b=b,
                objective=paired_over_seeds(reached[a], reached[b], level),
                by_judge=_paired_where_known(by_judge[a], by_judge[b], level),
            )
            for a, b in pairs
        ),
        dominance=tuple(_dominance(runs, level)),
        trust=_trust(runs, level),
    )
    return seeds.model_copy(update=_compared(runs, level))


def _drops(runs: "Sequence[Figures]", level: float) -> tuple[OverSeeds, ...]:
    """Reward points from each direction to the next."""
    steps = zip(*(one.drops for one in runs), strict=True)
    return tuple(over_seeds([drop.value for drop in step], level) for step in steps)


def _weight_taus(runs: "Sequence[Figures]", level: float) -> dict[str, dict[str, OverSeeds]]:
    """How each reward follows the weight of each objective, if all runs have the figure."""
    return {
        name: _shared([{of: tau.value for of, tau in run.weight_taus.get(name, {}).items()} for run in runs], level)
        for name in runs[0].weight_taus
    }


def _words(runs: "Sequence[Summary]", names: Sequence[str], level: float) -> dict[str, tuple[OverSeeds, ...]]:
    """Mean words at each condition, for systems with the same number of conditions in all runs."""
    found = {}
    for name in names:
        words = [[point.words.value for point in run.systems[name].points if point.words] for run in runs]
        if words[0] and len({len(own) for own in words}) == 1:
            found[name] = tuple(over_seeds(at_one, level) for at_one in zip(*words, strict=True))
    return found


def _length(runs: "Sequence[Measured]", level: float) -> dict[str, OverSeeds]:
    """How a system's words follow the dial."""
    parts = ("kendall_tau", "last_to_first")
    return _shared(
        [{part: one.value for part in parts if run.length and (one := getattr(run.length, part))} for run in runs],
        level,
    )


def _by_judge(measured: "Measured") -> float | None:
    return measured.by_judge.objective.value if measured.by_judge else None


def _paired_where_known(a: Sequence[float | None], b: Sequence[float | None], level: float) -> OverSeeds | None:
    known_a, known_b = ([value for value in values if value is not None] for values in (a, b))
    return paired_over_seeds(known_a, known_b, level) if len(known_a) == len(known_b) == len(a) else None


def _values(measured: "Measured") -> dict[str, float | None]:
    """The figures that are combined, as bare numbers."""
    values = {name: getattr(measured.figures, name) for name in FIGURES} | {
        BY_JUDGE: _by_judge(measured),
        BY_REWARD: measured.judged.objective if measured.judged else None,
        DIVERGENCE: measured.divergence,
        SCORED: float(measured.cost.scored_responses) if measured.cost else None,
    }
    return {name: one.value if isinstance(one, Estimate) else one for name, one in values.items()}


def _dominance(runs: "Sequence[Summary]", level: float) -> list[DominanceOverSeeds]:
    tables = [{(row.a, row.b): row for row in run.dominance} for run in runs]
    return [
        DominanceOverSeeds(
            a=pair[0],
            b=pair[1],
            margin=over_seeds([table[pair].margin.value for table in tables], level),
            dominates_in=sum(table[pair].dominates for table in tables),
        )
        for pair in tables[0]
        if all(pair in table for table in tables)
    ]


def _trust(runs: "Sequence[Summary]", level: float) -> TrustOverSeeds | None:
    changes = [run.trust.change for run in runs if run.trust and run.trust.change]
    if len(changes) < len(runs):
        return None
    own = [run.trust.steps for run in runs if run.trust]
    alike = len({tuple((step.a, step.b) for step in steps) for steps in own}) == 1
    return TrustOverSeeds(
        proxy=over_seeds([change.proxy.value for change in changes], level),
        check=over_seeds([change.check.value for change in changes], level),
        warned_in=sum(run.trust.warning for run in runs if run.trust),
        steps=tuple(_change(steps, level) for steps in zip(*own, strict=True)) if alike else (),
    )


def _change(runs: "Sequence[TrustChange]", level: float) -> ChangeOverSeeds:
    """The same step of all runs."""
    return ChangeOverSeeds(
        a=runs[0].a,
        b=runs[0].b,
        proxy=over_seeds([run.proxy.value for run in runs], level),
        check=over_seeds([run.check.value for run in runs], level),
        warned_in=sum(run.over_optimised for run in runs),
    )


def _compared(runs: "Sequence[Summary]", level: float) -> dict[str, object]:
    """The fields that comparisons add; empty unless every run is a comparison."""
    each = [run.comparison for run in runs if run.comparison]
    if len(each) < len(runs):
        return {}

    def shared(table: Callable[..., Mapping[K, Estimate | None]]) -> dict[K, OverSeeds]:
        values = [{key: one.value if one else None for key, one in table(run).items()} for run in each]
        return _shared(values, level)

    degenerate = shared(
        lambda run: {
            (name, group.name): group.degenerate.share for name, one in run.feasibility.items() for group in one.groups
        }
    )
    leads = shared(
        lambda run: {(name, key): one for name, lead in run.control_leads.items() for key, one in vars(lead).items()}
    )
    return {
        "hypervolume_ratios": shared(lambda run: {n: row.hypervolume_ratio for n, row in run.differences.items()}),
        "control_leads": _nested(leads),
        "family_shortfalls": shared(lambda run: run.family_shortfalls),
        "understood_in": {
            name: sum(name in run.wishes and run.wishes[name].change.below_zero for run in each)
            for name in each[0].wishes
        },
        "settings": {
            name: tuple(next(row.setting for row in run.tuning[name] if row.chosen) for run in each)
            for name in each[0].tuning
            if all(name in run.tuning for run in each)
        },
        "degenerate": _nested(degenerate),
    }


def _shared(tables: Sequence[Mapping[K, float | None]], level: float) -> dict[K, OverSeeds]:
    """Combine the figures that every run has."""
    found: dict[K, OverSeeds] = {}
    for key in tables[0]:
        values = [value for table in tables if (value := table.get(key)) is not None]
        if len(values) == len(tables):
            found[key] = over_seeds(values, level)
    return found


def _nested(table: Mapping[tuple[str, str], OverSeeds]) -> dict[str, dict[str, OverSeeds]]:
    found: dict[str, dict[str, OverSeeds]] = {}
    for (outer, inner), value in table.items():
        found.setdefault(outer, {})[inner] = value
    return found
