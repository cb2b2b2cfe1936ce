"""The top of the page: three plain sentences and a few large figures. They claim only what the intervals support.

A claim of dominance is decided over the whole table (Holm); with several full-pipeline seeds it must
hold in every one of them, and its mean margin's t-interval must lie above zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dpalign.measure.bootstrap import Estimate
from dpalign.measure.seeds import ChangeOverSeeds
from dpalign.measure.summary import Figures, Measured, Summary, TrustChange, misunderstood, verdicts
from dpalign.page.looks import label
from dpalign.page.words import MISSING, between, degrees, number, said, turns
from dpalign.paper.direction import Preference, asks_for, listed


@dataclass(frozen=True)
class Tile:
    """One large figure below the headline."""

    label: str
    value: str
    note: str = ""


def headline(summary: Summary) -> tuple[str, ...]:
    """What the run shows, in at most three sentences."""
    last = summary.last
    if last is None:
        return (f"No policy was aligned in this run; it evaluates {listed(list(summary.systems))}.",)
    sentences = (*_against_others(summary, last), _dial(summary, last), _how_good(summary, last))
    return tuple(sentence for sentence in sentences if sentence)


def _against_others(summary: Summary, last: Measured) -> list[str]:
    """Which systems the last iteration beats at every direction, and which it does not; one sentence."""
    unheard = misunderstood(summary)
    rivals = [
        one
        for one in verdicts(summary)
        if summary.systems[one.system].system.role in ("baseline", "soup") and one.system not in unheard and one.margin
    ]

    def those(outcome: str) -> str:
        # within a sentence a comma would divide a name in two
        return listed([label(summary.systems[one.system]).replace(",", "") for one in rivals if one.outcome == outcome])

    clauses = []
    if those("ahead"):
        clauses.append(f"{last.name} gives users of every direction a higher reward than {those('ahead')}")
    if those("open"):
        clauses.append(f"a lead over {those('open')} at every direction is not established")
    if those("behind"):
        clauses.append(f"{those('behind')} is ahead of {last.name} at every direction")
    if not clauses:
        return []
    text = "; ".join(clauses)
    over = f" (over {len(summary.seeds.seeds)} seeds of the whole pipeline)" if summary.seeds else ""
    return [f"{text[0].upper()}{text[1:]}{over}."]


def _dial(summary: Summary, last: Measured) -> str:
    """How the second objective follows the angle, or how each of several follows its weight; else empty."""
    figures = last.figures
    if figures.weight_taus:
        return _weights(summary, figures)
    if not figures.drops or figures.span is None:
        return ""
    name, verb, means = summary.objectives[1], turns(summary), last.rewards(summary.objectives[1])
    ends = [degrees(last.points[i].angle or 0.0) for i in (0, -1)]
    course = f"from {number(means[0].value)} to {number(means[-1].value)} points"
    words = [last.points[i].words for i in (0, -1)]
    if words[0] and words[1]:
        course += f" and from {number(words[0].value, 0)} to {number(words[1].value, 0)} words"
    sure, steps = figures.steps_beyond_doubt, len(figures.drops)
    if sure == steps:
        return f"Along its dial from {ends[0]} to {ends[1]}, {name} {verb} at every step, {course}."
    if figures.span.above_zero:
        return (
            f"Along its dial from {ends[0]} to {ends[1]}, {name} {verb} {course}, clearly at {sure} of {steps} steps."
        )
    return f"It is not established that {name} follows its dial ({course} from {ends[0]} to {ends[1]})."


def _weights(summary: Summary, figures: Figures) -> str:
    """Whether each reward rises with its own weight."""
    own = {name: tau for name in summary.objectives if (tau := figures.weight_taus[name].get(name))}
    shown = listed([f"{number(tau.value, 2)} for {name}" for name, tau in own.items()])
    missing = [name for name, tau in own.items() if not tau.above_zero]
    if not missing:
        return f"Each reward rises with its own weight (Kendall's tau {shown})."
    return f"A rise with its own weight is not established for {listed(missing)} (Kendall's tau {shown})."


def _how_good(summary: Summary, last: Measured) -> str:
    """How near the policy is to the best possible, if that is known; else its average reward."""
    share = last.figures.true_front_share
    if share is not None:
        percent = f"{number(100 * share.value)}%"
        if share.value <= 1:
            return f"It reaches {percent} of the best trade-offs that are possible on these prompts."
        return f"Its front has {percent} of the best answers' hypervolume: it goes beyond their end of the dial."
    reached = number(last.figures.objective.value)
    return f"It earns {reached} points for what each user wants, on average over {len(summary.directions)} directions."


def tiles(summary: Summary) -> tuple[Tile, ...]:
    """The last iteration's main figures, named in plain words and in the field's terms."""
    last = summary.last
    if last is None:
        return ()
    figures, second = last.figures, summary.objectives[-1]
    shown = (
        _tile("average reward for what each user wants (E_v J; also MIP, mean inner product)", figures.objective),
        _tile("of the hypervolume of the best answers at these directions", figures.true_front_share, "%", 100),
        _tile(f"points that the dial moves {second}, end to end (span)", figures.span),
        _tile("how well one prompt's answers follow the dial; 1 is always (Kendall's tau, as in MOC)",
              figures.kendall_tau, digits=2),
        *(_tile(f"how well {name} follows its weight over the directions (Kendall's tau)", taus.get(name), digits=2)
          for name, taus in figures.weight_taus.items()),
        _tile("points lost by asking for v instead of the best other direction (regret)", figures.regret, digits=2),
    )  # fmt: skip
    return tuple(tile for tile in shown if tile is not None)


def _tile(text: str, figure: Estimate | None, unit: str = "", scale: float = 1, digits: int = 1) -> Tile | None:
    if figure is None:
        return None
    value, low, high = (None if x is None else scale * x for x in (figure.value, figure.low, figure.high))
    return Tile(text, number(value, digits) + unit, between(low, high, digits))


def users_ask_for(summary: Summary) -> str:
    """What the users' directions ask for: at both ends of a dial, or for each objective."""
    directions = [Preference.from_weights(v, summary.objectives) for v in summary.directions]
    if summary.angled and len(directions) > 1:
        ends = (f"at {degrees(v.angle)} {asks_for(v)}" for v in (directions[0], directions[-1]))
        return f"Users ask for: {'; '.join(ends)}."
    words = {1: "more", -1: "less", 0: "more or less"}
    wants = {
        sense: [n for n, s in zip(summary.objectives, summary.senses, strict=True) if s == sense] for sense in words
    }
    return f"Users ask for: {'; '.join(f'{words[sense]} {listed(names)}' for sense, names in wants.items() if names)}."


def scope(summary: Summary) -> str:
    """Who scores the rewards, and what the intervals are over."""
    whose = (
        "Rewards are the true ones, computed by rule."
        if summary.measure == "true"
        else "Rewards are a reward model's opinion: the truth is not known here."
    )
    level = f"{100 * summary.intervals.bootstrap.level:.0f}%"
    over = f"{level} intervals resample the {summary.intervals.prompts:,} evaluation prompts"
    if summary.seeds and len(summary.seeds.seeds) > 1:
        return f"{whose} {over}; where noted, they are over {len(summary.seeds.seeds)} seeds of the whole pipeline."
    return f"{whose} {over} of one training run (seed {summary.seed}). Another seed may differ by more."


def left_out(summary: Summary) -> str:
    """Which figures these directions rule out, and why; empty if none."""
    parts = []
    if summary.disputed:
        parts.append(
            f"Some directions want more {listed(summary.disputed)} and others less, so neither side of a "
            "front is better. Hypervolume, the share of the true front and the points under a front are left out "
            "(evaluation.senses can state a sense)."
        )
    if summary.angled and len(summary.directions) > 1 and not summary.is_dial:
        parts.append(
            f"The weight of {summary.objectives[1]} rises and falls from direction to direction, so control "
            "by an angle is left out."
        )
    return " ".join(parts)


def warning(summary: Summary) -> str:
    """Where the proxy rose and the check fell; over several seeds, in how many of them. Else empty.

    From the first selected iteration to the last; if not there, the first step between iterations that shows it.
    """
    trust, seeds = summary.trust, summary.seeds
    if trust is None or trust.change is None:
        return ""
    check = "the truth" if trust.check == "truth" else "the judge"
    changes: list[TrustChange | ChangeOverSeeds]
    if seeds is not None and seeds.trust is not None and len(seeds.seeds) > 1:
        over = seeds.trust
        whole = ChangeOverSeeds(
            a=trust.change.a, b=trust.change.b, proxy=over.proxy, check=over.check, warned_in=over.warned_in
        )
        changes = [change for change in (whole, *over.steps) if change.warned_in]
    else:
        changes = [change for change in (trust.change, *trust.steps) if change.over_optimised]
    if not changes:
        return ""
    found = changes[0]
    where, mean = "From", ""
    if isinstance(found, ChangeOverSeeds):
        where = f"In {found.warned_in} of {len(found.proxy.values)} seeds, from"
        mean = ", in the mean of all seeds"
    return (
        f"{where} {found.b} to {found.a} E_v J(v) rose for the reward model and fell for {check} (by "
        f"{said(found.proxy, sign=True)} and {said(found.check, sign=True)}{mean}). The policy pleases the reward "
        "model at the expense of what it stands for. Trust an earlier iteration, or a better reward model, more than "
        "the last one."
    )


def recipe_note(summary: Summary) -> str:
    """A note for the recipe's text: the knobs that some steps of the comparison set differently."""
    names: Sequence[str] = summary.comparison.knobs_set if summary.comparison else ()
    return f"Some steps of the compared systems set these knobs differently: {listed(names)}." if names else ""


def machine_words(summary: Summary) -> str:
    """The machine and the commit of the run."""
    machine = summary.machine
    hardware = [
        *([machine.gpu] if machine.gpu else []),
        *([f"{machine.cpus} CPU cores"] if machine.cpus else []),
        *([machine.platform] if machine.platform else []),
    ]
    commit = f"commit {machine.git_commit[:12]}" if machine.git_commit else "commit not on record"
    return f"{', '.join(hardware) or MISSING}; {commit}"
