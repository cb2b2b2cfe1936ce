"""The list of steps: the loop of sections 2.2 and 3.1 (`loop`, `rejection_sampling`), then the comparison.

The whole list is made before anything runs: `--dry-run` shows it, and a killed run finds its place in it.

All systems of a comparison share the run's data, SFT start, reward model and evaluation. A system with several settings
is evaluated in each on the tuning prompts; the report shows the best one there by the reward model alone.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from dpalign.measure.system import BESIDE_THE_LOOP, System, policy_at
from dpalign.paper.direction import name_hint
from dpalign.recipe import Recipe, changed
from dpalign.recipe.localfiles import require_chat, require_models
from dpalign.runs.environment import expanded
from dpalign.runs.ledger import hash_of
from dpalign.stages import best_of_n, brief, dpo, rl, rsf, soup, steerlm
from dpalign.stages.annotate import annotate
from dpalign.stages.base import base
from dpalign.stages.contrast import contrast, prefer
from dpalign.stages.cost import ORIGINALS_EACH, processes
from dpalign.stages.data import data
from dpalign.stages.divergence import divergence
from dpalign.stages.evaluate import evaluate
from dpalign.stages.feasibility import directions_beyond, feasibility
from dpalign.stages.finetune import finetune
from dpalign.stages.pairwise import pairwise
from dpalign.stages.reinforce import reinforce
from dpalign.stages.report import report
from dpalign.stages.reward import judge, reward
from dpalign.stages.rival import Rival, at_the_edge
from dpalign.stages.sample import sample
from dpalign.stages.score import score, scored_by
from dpalign.stages.select import select
from dpalign.stages.sft import sft
from dpalign.stages.stage import Stage, Step
from dpalign.stages.world import world

ANNOTATED: Final = {"data": "data", "annotate": "annotate"}


def steps(recipe: Recipe, compared: bool = False) -> list[Step]:
    """Every step of an experiment, in order.

    Args:
        compared: with every other system that the recipe compares.

    Raises:
        ValueError: an unknown system, a missing model, no ratings to train the reward model on, or a comparison that
            would fail after its trainings.
    """
    for name in recipe.compare.systems:
        if name not in RIVALS:
            raise ValueError(f"compare.systems has {name!r}; {name_hint(name, list(RIVALS))}")
    require_models(recipe)
    require_chat(recipe)
    recipe.require_evaluable()
    if not recipe.data.rated and recipe.learns_rewards:
        raise ValueError(
            "the data have no rated answers, on which [reward] could be trained; name some in [data], or give all "
            "rewards, each in a table [rewards.NAME]"
        )
    own_steps = [*preparation(recipe), *loop(recipe)]
    own_steps.append(Step("steerlm", steerlm.steerlm, {"sft": "sft"} | ANNOTATED, half="both"))
    evaluated: list[tuple[Step, System | None]] = list(evaluations(recipe, compared))
    if compared:
        rivals = rivals_of(recipe)
        require_comparable(recipe, rivals)
        own_steps += [step for rival in rivals for step in rival.steps]
        evaluated += comparison(recipe, rivals)
        for name in recipe.compare.ablations:
            steps_of_loop, last = ablation(recipe, name, ABLATIONS[name])
            own_steps += steps_of_loop
            evaluated.append(last)
        evaluated += [(step, None) for step in asked_beyond(recipe)]
    if recipe.evaluation.divergence:
        evaluated += [(step, None) for step in divergences([step for step, _ in evaluated])]
    if recipe.reward.pairwise:
        file = Path(expanded("reward.pairwise", recipe.reward.pairwise)).absolute()
        evaluated.append((Step("pairwise", pairwise, {"reward": "reward", "pairs": file, **scales(recipe)}), None))
    inputs = scored(recipe) | {step.name: step.name for step, _ in evaluated}
    systems = {step.name: system for step, system in evaluated if system is not None}
    page = Step("report", report, inputs, systems=systems)
    return without_repeats(recipe, [*own_steps, *(step for step, _ in evaluated), page])


def scored(recipe: Recipe) -> dict[str, str]:
    """What every evaluation reads beside the system itself."""
    return {"reward": "reward"} | ANNOTATED | ({"judge": "judge"} if recipe.has_judge else {})


def preparation(recipe: Recipe) -> Iterator[Step]:
    """Data, reward model and SFT: what all systems start from."""
    files = {}
    if recipe.data.world:
        files = {"world": "world"}
        yield Step("world", world)
    yield Step("data", data, files)
    start = {}
    if not recipe.model.base:
        start = {"base": "base"}
        yield Step("base", base, {"data": "data"})
    yield Step("reward", reward, {"data": "data"} | start)
    if recipe.has_judge:
        yield Step("judge", judge, {"data": "data"} | start)
    scored = Step("annotate", annotate, {"data": "data", "reward": "reward"})
    started = Step("sft", sft, {"data": "data"} | start)
    if recipe.data.answered:
        yield from (scored, started)
        return
    # There are no original answers: SFT's own take their place, plain or under hints. SteerLM learns from them, and
    # scales are fitted to them.
    own = {"sampling.n": 1 if recipe.data.hints else ORIGINALS_EACH, "sampling.prompts": 2 * recipe.sampling.prompts}
    condition = "hints" if recipe.data.hints else "plain"
    yield started
    yield Step("originals", sample, {"policy": "sft", "data": "data"}, half="both", condition=condition, knobs=own)
    yield replace(scored, inputs={**scored.inputs, "answers": "originals"})


def loop(recipe: Recipe) -> Iterator[Step]:
    """The iterations of section 2.2, from the SteerLM that samples for the first (section 3.1)."""
    policy = "sft"
    if _first(recipe) == 0:
        # SFT knows no directions, so a SteerLM on D2 alone answers for diverse rewards (section 3.1).
        policy, half = "steerlm-d2", "D2" if recipe.alternate else "D1"
        yield Step(policy, steerlm.steerlm, {"sft": "sft"} | ANNOTATED, half=half)
    for t in range(1, recipe.iterations + 1):
        half = "D2" if recipe.alternate and t % 2 == 0 else "D1"
        learner = LEARNERS[recipe.policy.at(t)]  # the paper's is rejection_sampling
        yield from learner(recipe, t, half, policy)
        policy = f"policy-{t}"


def rejection_sampling(recipe: Recipe, t: int, half: str, policy: str) -> Iterator[Step]:
    """An iteration of the paper: sample the last policy, score, select the best, and fine-tune SFT on them."""
    condition = "targets" if t == 1 else "directions"
    candidates, scores = f"sample-{t}", f"score-{t}"
    yield Step(candidates, sample, {"policy": policy} | ANNOTATED, t, half, condition)
    yield Step(scores, score, scored_by(recipe) | {"candidates": candidates}, t)
    yield Step(f"select-{t}", select, {"candidates": candidates, "scores": scores} | ANNOTATED, t, half)
    start = "sft" if recipe.restart or t == 1 else policy
    yield Step(f"policy-{t}", finetune, {"start": start, "chosen": f"select-{t}"} | scales(recipe), t)


def conditional_dpo(recipe: Recipe, t: int, half: str, policy: str) -> Iterator[Step]:
    """The last policy learns from pairs of its own answers under directions."""
    candidates, scores, pairs = f"sample-{t}", f"score-{t}", f"contrast-{t}"
    yield Step(candidates, sample, {"policy": policy} | ANNOTATED, t, half, "directions")
    yield Step(scores, score, scored_by(recipe) | {"candidates": candidates}, t)
    yield Step(pairs, contrast, {"candidates": candidates, "scores": scores, "data": "data"}, t)
    yield Step(f"policy-{t}", prefer, {"start": policy, "pairs": pairs} | scales(recipe), t)


def reinforcement(recipe: Recipe, t: int, half: str, policy: str) -> Iterator[Step]:
    """The last policy learns online, from the answers that it gives during training."""
    reference = {"sft": "sft"} if recipe.policy.grpo.reference == "sft" else {}
    inputs = {"start": policy} | scored_by(recipe) | reference
    yield Step(f"policy-{t}", reinforce, inputs, t, half)


LEARNERS: Final = {"rsf": rejection_sampling, "dpo": conditional_dpo, "grpo": reinforcement}
"""The steps of an iteration by `policy.method`."""


def _first(recipe: Recipe) -> int:
    """The t of the loop's first policy: 0 for a SteerLM that samples for rsf; 1 if the first method starts from SFT."""
    return 0 if recipe.policy.at(1) == "rsf" else 1


def scales(recipe: Recipe) -> dict[str, str]:
    """The input from which a policy's contract reads fitted scales: the annotation, if any scale is fitted."""
    return {"annotate": "annotate"} if recipe.fits_scales else {}


def evaluations(recipe: Recipe, compared: bool = False) -> Iterator[tuple[Step, System]]:
    """The evaluations that every run has: the policies of all iterations, SteerLM, SFT and what [evaluation] adds."""
    shared = scored(recipe)

    def evaluated(name: str, policy: str | Path, condition: str, system: System) -> tuple[Step, System]:
        inputs = {"policy": policy} | shared
        return Step(f"evaluate-{name}", evaluate, inputs, system.iteration or 0, condition=condition), system

    for t in range(_first(recipe), recipe.iterations + 1):
        policy, condition = (f"policy-{t}", "directions") if t else ("steerlm-d2", "targets")
        yield evaluated(policy, policy, condition, policy_at(t))
    yield evaluated("steerlm", "steerlm", "targets", BESIDE_THE_LOOP["steerlm"])
    yield evaluated("sft", "sft", "plain", BESIDE_THE_LOOP["sft"])
    if recipe.evaluation.dpo:
        # If this run trains DPO too, the given checkpoint needs a name of its own.
        own = compared and "dpo" in recipe.compare.systems
        system = System(f"DPO, {Path(recipe.evaluation.dpo).name}" if own else "DPO")
        yield Step("evaluate-dpo", evaluate, shared, condition="plain"), system
    if recipe.evaluation.controls:
        yield evaluated("sft-asked", "sft", "directions", BESIDE_THE_LOOP["sft-asked"])
        start = Path(recipe.model.source).absolute() if recipe.model.base else "base"
        same = recipe.sft.checkpoint and recipe.sft.checkpoint == recipe.model.source  # SFT is the base model itself
        if not same and (start == "base" or Path(start).is_dir()):  # a name on the hub is no folder to read from
            yield evaluated("base-asked", start, "directions", BESIDE_THE_LOOP["base-asked"])


def divergences(evaluated: Iterable[Step]) -> Iterator[Step]:
    """Steps that measure each evaluated policy's divergence from SFT; soups and best of n are no policies."""
    for step in evaluated:
        kind, _, name = step.name.partition("-")
        if kind == "evaluate" and step.stage is evaluate and "policy" in step.inputs:
            inputs = {"policy": step.inputs["policy"], "sft": "sft", "evaluate": step.name, "data": "data"}
            yield Step(f"divergence-{name}", divergence, inputs)


@dataclass(frozen=True)
class OtherLoop:
    """A published rival that is DPA's loop with another learner, in each of its settings."""

    title: str
    learner: Literal["dpo", "grpo"]
    knobs: Mapping[str, Any] = field(default_factory=dict)

    def rivals(self, recipe: Recipe) -> Iterator[Rival]:
        """A loop of its own for each beta, the strength of the pull towards its start."""
        name, betas = self.title.lower(), getattr(recipe.policy, self.learner).betas
        for i, beta in enumerate(betas, start=1):
            knobs = {"policy.method": (self.learner,), f"policy.{self.learner}.beta": beta, **self.knobs}
            made = loop_under(recipe, f"{name}-{i}", knobs)
            system = System(self.title, setting=f"beta {beta:g}", at_edge=at_the_edge(beta, betas))
            policy = {"policy": f"{name}-{i}-policy-{recipe.iterations}"}
            yield Rival(f"{name}-{i}", system, policy, "directions", steps=tuple(made))


RIVALS: Final[Mapping[str, Any]] = {
    "dpo": dpo,
    "brief": brief,
    "steerlm": steerlm,
    "rsf": rsf,
    "rl": rl,
    "soups": soup,
    "best-of-n": best_of_n,
    "mo-odpo": OtherLoop("MO-ODPO", "dpo", {"policy.dpo.turned": False, "selection.reach": 0.0}),
    "moc": OtherLoop("MOC", "grpo", {"policy.grpo.stretch": 1.0}),
}
"""What `compare.systems` may name, in the order of the page. A new system is a line here and a file in stages/."""

STAGES: Final[Mapping[str, Stage]] = {
    stage.name: stage
    for stage in (
        *(world, data, base, reward, judge, annotate, sft, sample, score, select, finetune),
        *(contrast, prefer, reinforce, evaluate),
        *(made for rival in RIVALS.values() for made in vars(rival).values() if isinstance(made, Stage)),
        *(divergence, feasibility, pairwise, report),
    )
}
"""Every stage by its name, including those in the rivals' files. Each is a verb of `dpa`."""

ABLATIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "no replay": {"replay": 0.0},
    "no restart": {"restart": False},
    "one half": {"alternate": False},
    "no LM loss": {"reward.lm_loss": 0.0},
}
"""The knobs of each ablation of the loop."""


def rivals_of(recipe: Recipe) -> list[Rival]:
    """All systems that the recipe compares with DPA, each in all of its settings."""
    rivals = [rival for name in RIVALS if name in recipe.compare.systems for rival in RIVALS[name].rivals(recipe)]
    return [replace(rival, system=replace(rival.system, compared=True)) for rival in rivals]


def tuned(rivals: Sequence[Rival]) -> set[str]:
    """The names of the systems with more than one setting."""
    names = [rival.system.name for rival in rivals]
    return {name for name in names if names.count(name) > 1}


def comparison(recipe: Recipe, rivals: Sequence[Rival]) -> Iterator[tuple[Step, System]]:
    """Each rival's evaluation. If its system has several settings, one on the tuning prompts comes first."""
    several = tuned(rivals)
    for rival in rivals:
        stage, system = rival.evaluation or evaluate, rival.system
        inputs = {name: path for name, path in scored(recipe).items() if name in (*stage.inputs, *stage.optional)}
        step = Step(
            f"evaluate-{rival.name}", stage, inputs | dict(rival.inputs), condition=rival.condition, knobs=rival.knobs
        )
        if system.name in several:
            knobs = {**rival.knobs, "evaluation.split": "tuning"}
            own = {name: path for name, path in step.inputs.items() if name != "judge"}  # it never chooses
            yield replace(step, name=f"tune-{rival.name}", inputs=own, knobs=knobs), system
        elif system.role != "soup":  # nothing was chosen; a soup's setting names its experts
            system = replace(system, setting="")
        yield step, system


def asked_beyond(recipe: Recipe) -> Iterator[Step]:
    """Steps that ask the last policy, and SteerLM if it is compared, for more than they can give.

    A policy is asked beyond the ends of its arc; other populations have no ends.
    """
    shared = {name: scored(recipe)[name] for name in ("data", "reward", "annotate")}
    if recipe.preference.distribution == "arc":
        policy = f"policy-{recipe.iterations}"
        inputs = {"policy": policy} | shared
        yield Step(f"feasible-{policy}", feasibility, inputs, recipe.iterations, condition="directions")
    if "steerlm" in recipe.compare.systems:
        yield Step("feasible-steerlm", feasibility, {"policy": "steerlm"} | shared, condition="targets")


def loop_under(recipe: Recipe, prefix: str, knobs: Mapping[str, Any]) -> list[Step]:
    """The loop of a changed recipe and its preparation, under names with a prefix."""
    changed_recipe = changed(recipe, knobs)
    own = [*preparation(changed_recipe), *loop(changed_recipe)]
    under = {step.name: f"{prefix}-{step.name}" for step in own}
    return [
        replace(
            step,
            name=under[step.name],
            inputs={key: under.get(str(value), value) for key, value in step.inputs.items()},
            knobs={**knobs, **step.knobs},
        )
        for step in own
    ]


def ablation(recipe: Recipe, name: str, knobs: Mapping[str, Any]) -> tuple[list[Step], tuple[Step, System]]:
    """The loop of a changed recipe, and its last policy's evaluation by the unchanged reward."""
    prefix, last = name.lower().replace(" ", "-"), recipe.iterations
    system = System(f"DPA t={last}, {name}", "ablation", compared=True)
    policy = {"policy": f"{prefix}-policy-{last}"} | scored(changed(recipe, knobs))
    own_steps = loop_under(recipe, prefix, knobs)
    return own_steps, (Step(f"evaluate-{prefix}-policy", evaluate, policy, last, condition="directions"), system)


def require_comparable(recipe: Recipe, rivals: Sequence[Rival]) -> None:
    """Refuse a comparison that would fail after all trainings.

    Raises:
        ValueError: experts that cannot be mixed for every evaluation direction; DPO on ratings without rated answers;
            no angle to ask for on the trained arc; settings to choose among without tuning prompts.
    """
    for choice in recipe.soups.choices if "soups" in recipe.compare.systems else ():
        if why := soup.unserved(recipe, choice):
            raise ValueError(f'soups.choices has "{choice}", which cannot serve every direction: {why}')
    if "dpo" in recipe.compare.systems and recipe.dpo.pairs == "ratings" and not recipe.data.answered:
        raise ValueError('dpo.pairs is "ratings", and the data have no rated answers; set it to "candidates"')
    if recipe.preference.distribution == "arc":
        directions_beyond(recipe)  # raises if the angles are wrong
    several = sorted(tuned(rivals))
    held_out = recipe.world.tuning_prompts if recipe.data.world else recipe.data.tuning_prompts or recipe.data.tuning
    if several and not held_out:
        cure = (
            "world.tuning_prompts is 0; give 150"
            if recipe.data.world
            else "data.tuning is 0; give a share such as 0.02, or name a file in data.tuning_prompts"
        )
        raise ValueError(f"no tuning prompts to choose the settings of {'; '.join(several)} on: {cure}")


def notes(recipe: Recipe) -> list[str]:
    """The soups that a comparison leaves out by itself, and why."""
    if recipe.soups.choices or "soups" not in recipe.compare.systems:
        return []
    missing = [(choice, why) for choice in soup.CHOICES if (why := soup.unserved(recipe, choice))]
    return [f'soups.choices: "{choice}" is left out: {why}' for choice, why in missing]


def without_repeats(recipe: Recipe, planned: Sequence[Step]) -> list[Step]:
    """The steps without those that repeat an earlier one. A step that read a dropped one reads the earlier one."""
    kept: list[Step] = []
    first: dict[str, str] = {}
    same: dict[str, str] = {}
    for step in planned:
        inputs = {name: same.get(str(value), value) for name, value in step.inputs.items()}
        plain = {name: str(value) for name, value in inputs.items()}
        work = hash_of([step.stage.name, plain, knobs_of(recipe, step)])
        if work in first:
            same[step.name] = first[work]
        else:
            first[work] = step.name
            kept.append(replace(step, inputs=inputs))
    return kept


def recipe_of(recipe: Recipe, step: Step) -> Recipe:
    """The recipe as a step reads it: with the knobs that the step sets for itself."""
    return changed(recipe, step.knobs) if step.knobs else recipe


def knobs_of(recipe: Recipe, step: Step) -> dict[str, Any]:
    """The knobs that a step reads, for its ledger."""
    return step.stage.knobs(recipe_of(recipe, step), step.condition) | step.particulars


def processes_of(recipe: Recipe, step: Step) -> int:
    """The number of processes that a step runs in."""
    return processes(recipe) if step.stage.several else 1


def steps_until(recipe: Recipe, until: str | None, compared: bool = False) -> list[Step]:
    """The steps up to `until`; None takes all.

    Raises:
        ValueError: no step has that name, there are no chats for SFT, or the recipe contradicts itself.
    """
    planned = steps(recipe, compared)
    names = [step.name for step in planned]
    if until is not None and until not in names:
        raise ValueError(f"no step is called {until!r}; this recipe has {', '.join(names)}")
    taken = planned if until is None else planned[: names.index(until) + 1]
    chats = recipe.world.sft_prompts if recipe.data.world else recipe.data.sft
    if any(step.stage is sft for step in taken) and not (chats or recipe.sft.checkpoint):
        raise ValueError(
            f"no chats for SFT: {'world.sft_prompts is 0; give 4000' if recipe.data.world else 'name some in data.sft'}"
            ", or name in sft.checkpoint a model that needs none, such as an instruct model"
        )
    return taken
