"""The Summary: all figures of a run as one typed value, and so all that the page shows.

RUN/report/summary.json is the Summary as JSON; `Summary.model_validate_json` returns an equal one.

Where the truth is known (the world), `figures` are by the true rewards, and `judged` has the same ones by the reward
model. Elsewhere `figures` are by the reward model. `by_judge` has those of a judge, which never selected. Words and
degenerate answers are counted in the texts. Intervals are by prompt; only `seeds` covers other training runs.
Angles are in degrees, rewards in points: 0-100 for the package's own reward model.
"""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Literal, Self

from pydantic import Field

from dpalign.measure.bootstrap import Bootstrap, Estimate
from dpalign.measure.control import FollowingLead, Length
from dpalign.measure.feasibility import Feasibility, Rule
from dpalign.measure.front import Coverage
from dpalign.measure.hypervolume import AtReference
from dpalign.measure.quality import HeadQuality
from dpalign.measure.record import Record
from dpalign.measure.seeds import Seeds
from dpalign.measure.system import System

Weights = dict[str, float]
"""One number an objective: a direction's weights, or rewards."""
WeightTaus = dict[str, dict[str, Estimate]]
"""Kendall's tau of an objective's mean reward with the weight of each objective, over directions (`weight_taus`)."""


class Point(Record):
    """The mean rewards of one condition."""

    direction: Weights | None = None
    """None where the system was not asked for a direction."""
    angle: float | None = None
    """The angle of a direction of two objectives."""
    rewards: dict[str, Estimate]
    true_rewards: dict[str, Estimate] | None = None
    words: Estimate | None = None
    """Mean words of the answers. None, here and below, if the texts were not read; a report reads them all."""
    degenerate: Estimate | None = None
    """The share of degenerate answers, by `Summary.degenerate_rule`."""

    def by(self, objective: str, judged: bool = False) -> Estimate:
        """The reward of an objective: the true one where it is known, unless `judged` asks for the reward model's."""
        return (self.rewards if judged or self.true_rewards is None else self.true_rewards)[objective]


class Figures(Record):
    """The figures of a system. None: the system or the directions do not allow the figure."""

    objective: Estimate
    """E_v J(v), Eq. 4: the mean over directions of the reward for each direction's user."""
    objective_by_direction: tuple[Estimate, ...] = ()
    hypervolume: Estimate | None = None
    true_front_share: Estimate | None = None
    """Its hypervolume over the true front's."""
    kendall_tau: Estimate | None = None
    """How the second objective follows the angle within a prompt."""
    constant_prompts: int | None = None
    slope: Estimate | None = None
    span: Estimate | None = None
    span_share: Estimate | None = None
    spearman: float | None = None
    drops: tuple[Estimate, ...] = ()
    """Reward points from each direction to the next, positive when the second objective obeys."""
    steps_beyond_doubt: int | None = None
    regret: Estimate | None = None
    weight_taus: WeightTaus = {}
    """Only with three objectives or more."""


class Cost(Record):
    """The cost to make a system, as the stages' ledgers count it."""

    sampled_tokens: int = 0
    scored_responses: int = 0
    scored_tokens: int = 0
    trained_tokens: int = 0
    total_tokens: int = 0
    seconds: float = 0.0


class Measured(Record):
    """A system and its figures."""

    system: System
    points: tuple[Point, ...]
    figures: Figures
    judged: Figures | None = None
    """The same figures by the reward model, where `figures` are by the truth."""
    by_judge: Figures | None = None
    """The same figures by the judge, where there is one. Without hypervolume: its reference is on another scale."""
    opinion_gap: dict[str, Estimate] | None = None
    """By how much the reward model's opinion exceeds the truth, by objective."""
    length: Length | None = None
    """How the words of its answers follow the dial."""
    divergence: Estimate | None = None
    """KL divergence from SFT in nats an answer, over the answers to some of the prompts."""
    cost: Cost | None = None
    sweep: Cost | None = None
    """The cost to make all its settings and to choose among them."""
    same_as: str | None = None
    """The system that it is a copy of: its tuning chose a setting that another system already has."""

    @property
    def name(self) -> str:
        """The system's name."""
        return self.system.name

    @property
    def is_copy(self) -> bool:
        """Whether it is a copy of another system, which the page shows in its place."""
        return self.same_as is not None

    @property
    def steered(self) -> bool:
        """Whether it was asked for directions."""
        return self.points[0].direction is not None

    def rewards(self, objective: str, judged: bool = False) -> list[Estimate]:
        """Its points in one objective."""
        return [point.by(objective, judged) for point in self.points]


class DominanceRow(Record):
    """Whether `a` dominates `b`: at every direction, the best of its points beats the best of the other's."""

    a: str
    b: str
    margin: Estimate
    """The smallest lead over the directions."""
    leads: tuple[Estimate, ...] = ()
    objective_lead: Estimate
    """E_v J(v) of a minus that of b, paired."""
    lead_p_holm: float | None = None
    """The two-sided p-value of that lead, adjusted over all pairs of the table (Holm)."""
    p_value: float
    """The p-value of dominance for this pair; `p_holm` is adjusted."""
    p_holm: float
    dominates: bool
    """Decided over all pairs of the table (Holm)."""
    coverage: Coverage | None = None
    """None if the directions disagree about what is better."""


class Intervals(Record):
    """How intervals were made: resampled prompts."""

    bootstrap: Bootstrap
    prompts: int


class RewardQuality(Record):
    """How well the reward model predicts held-out ratings, and the truth of the systems' own answers."""

    heads: dict[str, HeadQuality] = {}
    objectives: dict[str, HeadQuality] = {}
    baseline: dict[str, HeadQuality] = {}
    """Ridge regression on what an answer looks like: length, punctuation, counts."""
    truth: dict[str, HeadQuality] = {}
    spread: dict[str, HeadQuality] = {}
    """How well the spread of the reward model's ensemble predicts the size of its error."""
    spread_truth: dict[str, HeadQuality] = {}
    """The same, with the error against the truth."""
    on_policy: dict[str, dict[str, HeadQuality]] = {}
    """System -> objective."""
    spread_on_policy: dict[str, dict[str, HeadQuality]] = {}
    """How well the spread of the ensemble, or of several reward models, predicts the size of the error on these."""


class PairShare(Record):
    """The share of a subset's pairs whose chosen answer earns more; ties count half."""

    accuracy: Estimate
    pairs: int
    ties: int


class Pairwise(Record):
    """The reward model on a file of preference pairs."""

    objective: str
    subsets: dict[str, PairShare]


class TrustPoint(Record):
    """E_v J(v) of an iteration by the reward model that selects, and by the check."""

    system: str
    iteration: int
    proxy: Estimate
    check: Estimate
    judge: Estimate | None = None
    """The judge's figure if the truth is the check: what a run without a truth would have seen."""


class TrustChange(Record):
    """How E_v J(v) changed from `b` to `a`."""

    a: str
    b: str
    proxy: Estimate
    check: Estimate

    @property
    def over_optimised(self) -> bool:
        """The proxy rose and the check fell, beyond their intervals."""
        return self.proxy.above_zero and self.check.below_zero


class Trust(Record):
    """Whether the reward model's opinion of the iterations agrees with a check that never selected."""

    check: Literal["truth", "judge"]
    curve: tuple[TrustPoint, ...]
    steps: tuple[TrustChange, ...]
    """From each selected iteration to the next."""
    change: TrustChange | None
    """From the first selected iteration to the last."""
    warning: bool
    """`change.over_optimised`."""


class Difference(Record):
    """The last iteration against another system, on the same prompts."""

    objective: Estimate
    """E_v J(v) of the last iteration minus the system's."""
    hypervolume_ratio: Estimate | None
    """The last iteration's hypervolume over the system's; None if the system has none."""


class Shortfall(Record):
    """The last iteration at a specialist's own direction, in reward points."""

    system: str
    specialist: Estimate
    steered: Estimate
    shortfall: Estimate
    """Negative where the steered policy is better."""


class TableRow(Record):
    """A row of the paper's Table 1, measured: a system, or the specialists of one method together."""

    name: str
    members: tuple[str, ...]
    objectives_read: tuple[str, ...]
    told_by: str
    conditions: int
    kendall_tau: Estimate | None = None
    kendall_tau_common: Estimate | None = None
    spearman: float | None = None
    span: Estimate | None = None
    models: int
    """Models needed to serve all directions."""
    bytes: int | None
    switch_seconds: float | None
    answers_a_reply: int


class BriefWish(Record):
    """The effect of a wish in words to be brief on a system."""

    objective: str
    unasked: Estimate
    asked: Estimate
    change: Estimate


class TunedSetting(Record):
    """A setting of a tuned system."""

    setting: str
    at_edge: bool
    tuning_objective: Estimate
    """E_v J(v) by the reward model on the tuning prompts; it decides."""
    objective: Estimate
    """E_v J(v) on the validation prompts; it shows what another choice would have given."""
    chosen: bool


class Comparison(Record):
    """The last iteration against every other system."""

    differences: dict[str, Difference] = {}
    shortfalls: tuple[Shortfall, ...] = ()
    family_shortfalls: dict[str, Estimate] = {}
    table_1: tuple[TableRow, ...] = ()
    control_leads: dict[str, FollowingLead] = {}
    """By row of Table 1: the last iteration's control minus the row's."""
    wishes: dict[str, BriefWish] = {}
    knobs_set: tuple[str, ...] = ()
    """Knobs for which some step of its systems used another value than the recipe's."""
    paper_curves: bool = False
    """The paper's Fig. 4 is drawn beside the run's."""
    tuning: dict[str, tuple[TunedSetting, ...]] = {}
    feasibility: dict[str, Feasibility] = {}


class StageFacts(Record):
    """The counts of a stage's ledger."""

    name: str
    seconds: float
    sampled: int
    """Tokens."""
    scored: int
    """Answers."""
    trained: int
    """Tokens."""
    rows_in: int
    rows_out: int
    filtered: dict[str, int]
    """Rows left out, by reason."""
    warnings: tuple[str, ...] = ()
    """What may spoil its result."""


class DataReport(Record):
    """Rows read from a data file, and rows kept."""

    source: str
    file: str
    read: int
    kept: int
    filtered: dict[str, int]
    notes: dict[str, int]

    @classmethod
    def of(cls, counts: Mapping[str, Any]) -> Self:
        """From an entry of the data stage's reports.json."""
        return cls(
            source=counts["source"],
            file=PurePath(counts["file"]).name,
            read=counts["in"],
            kept=counts["out"],
            filtered=counts["filtered"],
            notes=counts["notes"],
        )


class Curve(Record):
    """The loss of a training."""

    stage: str
    step: tuple[int, ...]
    loss: tuple[float, ...]
    learning_rate: tuple[float, ...] = ()


class Answer(Record):
    """A real answer to a validation prompt."""

    prompt: str
    system: str
    direction: Weights | None
    """None if no direction steers the system."""
    response: str
    rewards: Weights
    true_rewards: Weights | None = None


class Machine(Record):
    """Where the run was made, and by which code."""

    platform: str = ""
    cpus: int | None = None
    gpu: str = ""
    python: str = ""
    packages: dict[str, str] = {}
    git_commit: str | None = None


class RewardFacts(Record):
    """A head of a named reward: what scores it, and the map from its raw rewards to points."""

    head: str
    source: str
    slope: float
    offset: float
    fitted: bool = False
    """The map was fitted to the annotated answers of this run."""


class Summary(Record):
    """All that a report shows."""

    title: str = ""
    world: bool = False
    """The run is of the embedded world: its model is a toy that knows one small language."""
    objectives: tuple[str, ...]
    senses: tuple[float, ...]
    """+1 for an objective to maximise, -1 for one to minimise, 0 where the directions disagree."""
    directions: tuple[Weights, ...]
    """The evaluation directions, in the order of the dial."""
    is_dial: bool = True
    """Two objectives, and directions that turn the second one way: control by an angle can be measured."""
    reference: Weights | None
    """Hypervolume's reference."""
    measure: Literal["true", "judged"]
    intervals: Intervals
    systems: dict[str, Measured]
    true_front: tuple[Weights, ...] | None = None
    true_front_weight_taus: WeightTaus = {}
    """The taus of the best answers: about the ceiling, since several directions may share their best answers."""
    dominance: tuple[DominanceRow, ...] = ()
    dominance_judged: tuple[DominanceRow, ...] | None = None
    """By the reward model, where `dominance` is by the truth."""
    dominance_by_judge: tuple[DominanceRow, ...] | None = None
    """By the judge, if it rated every system."""
    degenerate_rule: Rule | None = None
    sensitivity: tuple[AtReference, ...] = ()
    rewards: tuple[RewardFacts, ...] = ()
    """Only for a recipe that names its rewards."""
    reward_model: RewardQuality = Field(default_factory=RewardQuality)
    pairwise: Pairwise | None = None
    trust: Trust | None = None
    comparison: Comparison | None = None
    seed: int = 0
    seeds: Seeds | None = None
    """Several seeds of the whole pipeline together (`dpa combine`)."""
    stages: tuple[StageFacts, ...] = ()
    data_reports: tuple[DataReport, ...] = ()
    answers: tuple[Answer, ...] = ()
    curves: tuple[Curve, ...] = ()
    recipe_text: str = ""
    machine: Machine = Field(default_factory=Machine)

    @property
    def angled(self) -> bool:
        """Whether directions have an angle: those of two objectives do."""
        return len(self.objectives) == 2

    @property
    def disputed(self) -> tuple[str, ...]:
        """The objectives that some directions want more of and others less."""
        return tuple(name for name, sense in zip(self.objectives, self.senses, strict=True) if not sense)

    def of_role(self, *roles: str) -> list[Measured]:
        """The systems of some roles; iterations in their order."""
        found = [one for one in self.systems.values() if one.system.role in roles]
        return sorted(found, key=lambda one: one.system.iteration or 0)

    @property
    def last(self) -> Measured | None:
        """The policy that the run ends with; None if no iteration was evaluated."""
        return next(reversed(self.of_role("iteration")), None)

    def dominance_of(self, a: str, b: str, by_judge: bool = False) -> DominanceRow | None:
        """The row of a pair."""
        rows = (self.dominance_by_judge or ()) if by_judge else self.dominance
        return next((row for row in rows if (row.a, row.b) == (a, b)), None)

    @property
    def best_objective(self) -> float | None:
        """E_v J(v) of the true front: the best of its mean points at each direction; None if it is unknown."""
        if not self.true_front:
            return None
        best = [max(sum(v[name] * point[name] for name in v) for point in self.true_front) for v in self.directions]
        return sum(best) / len(best)


class Verdict(Record):
    """Whether the last iteration beats another system, over all seeds where there are several."""

    system: str
    margin: Estimate | None
    """The smallest lead over the directions."""
    lead: Estimate | None
    """The lead in E_v J(v)."""
    lead_by_judge: Estimate | None = None
    outcome: Literal["ahead", "behind", "open"]
    """ahead: it dominates the other; behind: the other dominates it; open: neither is established."""
    decided_in: int | None = None
    """The number of seeds in which the last iteration dominates."""


def verdicts(summary: Summary) -> list[Verdict]:
    """The last iteration against each system that is no copy and no ablation, and against the earlier iterations."""
    last = summary.last
    if last is None:
        return []
    shown = [one for one in summary.systems.values() if one is not last and not one.is_copy]
    return [_verdict(summary, last.name, one.name) for one in shown if one.system.role != "ablation"]


def _verdict(summary: Summary, last: str, other: str) -> Verdict:
    seeds = summary.seeds
    if seeds is not None and len(seeds.seeds) > 1:
        own, back = seeds.dominance_of(last, other), seeds.dominance_of(other, last)
        runs = len(seeds.seeds)
        ahead = own is not None and own.dominates_in == runs and own.margin.above_zero
        behind = back is not None and back.dominates_in == runs and back.margin.above_zero
        pair = next((row for row in seeds.differences if (row.a, row.b) == (last, other)), None)
        return Verdict(
            system=other,
            margin=own.margin if own else None,
            lead=pair.objective if pair else None,
            lead_by_judge=pair.by_judge if pair else None,
            outcome="ahead" if ahead else "behind" if behind else "open",
            decided_in=own.dominates_in if own else None,
        )
    row, reverse = summary.dominance_of(last, other), summary.dominance_of(other, last)
    judged = summary.dominance_of(last, other, by_judge=True)
    behind = reverse is not None and reverse.dominates
    return Verdict(
        system=other,
        margin=row.margin if row else None,
        lead=row.objective_lead if row else None,
        lead_by_judge=judged.objective_lead if judged else None,
        outcome="ahead" if row is not None and row.dominates else "behind" if behind else "open",
    )


def misunderstood(summary: Summary) -> dict[str, BriefWish]:
    """The systems that a wish in words did not clearly make briefer, in this run or in some seed's."""
    wishes = summary.comparison.wishes if summary.comparison else {}
    seeds = summary.seeds
    if seeds is not None and len(seeds.seeds) > 1:
        return {name: wish for name, wish in wishes.items() if seeds.understood_in.get(name, 0) < len(seeds.seeds)}
    return {name: wish for name, wish in wishes.items() if not wish.change.below_zero}
