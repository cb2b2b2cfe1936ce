"""The order of things: sections 2.2 and 3.1 as a list of steps, and the run that takes them.

The loop is written out for every iteration before anything runs, so that `--dry-run` can show it and a
run that was killed finds its place in it.
"""

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from dpalign.pipeline import compare
from dpalign.pipeline.schedule import take_all
from dpalign.recipe import Recipe, config
from dpalign.recipe.consistency import require_consistent, require_evaluable
from dpalign.recipe.localfiles import local_files
from dpalign.run import folder as runs
from dpalign.run import ledger
from dpalign.run.environment import expanded, thread_variables
from dpalign.run.ledger import hash_of
from dpalign.run.progress import AS_LINES
from dpalign.stages.stage import Job, Step, knobs_read


def steps(recipe: Recipe, compared: bool = False) -> list[Step]:
    """Every step of an experiment, in order.

    Args:
        compared: with every other system that the recipe compares (`compare.py`).

    Raises:
        ValueError: the recipe contradicts itself, which would stop the run after its trainings.
    """
    require_consistent(recipe)
    require_evaluable(recipe)
    made = [*preparation(recipe), *loop(recipe)]
    steerlm = Step("steerlm", "steerlm", {"sft": "sft"} | ANNOTATED, half="both")
    evaluated = list(evaluations(recipe))
    if compared:
        compare.require_plan(recipe)
        contenders = compare.contenders(recipe)
        tuned = compare.tuned_systems(contenders)
        given = scored(recipe)
        for contender in contenders:
            made += contender.made_by
            evaluated += compare.evaluations(contender, given, contender.system in tuned)
        for name, changed, knobs in compare.ablated(recipe):
            made += ablation(changed, name, knobs)
            evaluated.append(_last_evaluated(changed, name, knobs))
        evaluated += compare.feasibility(recipe, given)
    if recipe.reward.pairwise:
        evaluated.append(pairwise(recipe))
    systems = {step.name: step.name for step in evaluated}
    report = Step("report", "report", scored(recipe) | systems)
    return without_repeats(recipe, [*made, steerlm, *evaluated, report])


ANNOTATED: Final = {"data": "data", "annotate": "annotate"}


def scored(recipe: Recipe) -> dict[str, str]:
    """What every evaluation reads beside the system itself."""
    return {"reward": "reward"} | ANNOTATED | ({"judge": "judge"} if recipe.data.judge else {})


def preparation(recipe: Recipe) -> Iterator[Step]:
    """Data, reward model and SFT: what all systems start from."""
    world = {}
    if recipe.data.world:
        world = {"world": "world"}
        yield Step("world", "world")
    yield Step("data", "data", world)
    base = {}
    if not recipe.model.base:
        base = {"base": "base"}
        yield Step("base", "base", {"data": "data"})
    yield Step("reward", "reward", {"data": "data"} | base)
    if recipe.data.judge:
        yield Step("judge", "judge", {"data": "data"} | base)
    yield Step("annotate", "annotate", {"data": "data", "reward": "reward"})
    yield Step("sft", "sft", {"data": "data"} | base)


def loop(recipe: Recipe) -> Iterator[Step]:
    """The iterations of section 2.2, from the SteerLM that samples for the first (section 3.1)."""
    # t = 0: SFT knows no directions, so a SteerLM on D2 alone answers for diverse rewards (section 3.1).
    yield Step("steerlm-d2", "steerlm", {"sft": "sft"} | ANNOTATED, half="D2" if recipe.alternate else "D1")
    policy = "steerlm-d2"
    for t in range(1, recipe.iterations + 1):
        half = "D2" if recipe.alternate and t % 2 == 0 else "D1"
        condition = "targets" if t == 1 else "directions"
        candidates, scores = f"sample-{t}", f"score-{t}"
        yield Step(candidates, "sample", {"policy": policy} | ANNOTATED, t, half, condition)
        yield Step(scores, "score", {"reward": "reward", "candidates": candidates}, t)
        yield Step(f"select-{t}", "select", {"candidates": candidates, "scores": scores} | ANNOTATED, t, half)
        start = "sft" if recipe.restart or t == 1 else policy
        policy = f"policy-{t}"
        yield Step(policy, "finetune", {"start": start, "chosen": f"select-{t}"}, t)


def evaluations(recipe: Recipe) -> Iterator[Step]:
    """The policies of all iterations, and what stands beside them in any case."""
    given = scored(recipe)
    policies = ["steerlm-d2", *(f"policy-{t}" for t in range(1, recipe.iterations + 1))]
    for t, policy in enumerate(policies):
        condition = "directions" if t else "targets"
        yield Step(f"evaluate-{policy}", "evaluate", {"policy": policy} | given, t, condition=condition)
    yield Step("evaluate-steerlm", "evaluate", {"policy": "steerlm"} | given, condition="targets")
    yield Step("evaluate-sft", "evaluate", {"policy": "sft"} | given, condition="plain")
    if recipe.evaluation.dpo:
        yield Step("evaluate-dpo", "evaluate", given, condition="plain")
    if recipe.evaluation.controls:
        yield Step("evaluate-sft-asked", "evaluate", {"policy": "sft"} | given, condition="directions")
        base = Path(recipe.model.source).absolute() if recipe.model.base else "base"
        if base == "base" or Path(base).is_dir():  # a name on the hub is no folder to read from
            yield Step("evaluate-base-asked", "evaluate", {"policy": base} | given, condition="directions")


def pairwise(recipe: Recipe) -> Step:
    """The reward model on a file of pairs."""
    file = Path(expanded("reward.pairwise", recipe.reward.pairwise)).absolute()
    return Step("pairwise", "pairwise", {"reward": "reward", "pairs": file})


def ablation(changed: Recipe, name: str, knobs: Mapping[str, Any]) -> Iterator[Step]:
    """The loop of a changed recipe beside the recipe's own: its steps under names of their own."""
    own = [*preparation(changed), *loop(changed)]
    under = {step.name: compare.ablation_step(name, step.name) for step in own}
    for step in own:
        inputs = {key: under.get(str(value), value) for key, value in step.inputs.items()}
        yield replace(step, name=under[step.name], inputs=inputs, knobs=knobs)


def _last_evaluated(changed: Recipe, name: str, knobs: Mapping[str, Any]) -> Step:
    """The last policy of an ablation, scored by the unchanged reward model."""
    inputs = {"policy": compare.ablation_step(name, f"policy-{changed.iterations}")} | scored(changed)
    evaluated = f"evaluate-{compare.ablation_step(name, 'policy')}"
    return Step(evaluated, "evaluate", inputs, changed.iterations, condition="directions")


def without_repeats(recipe: Recipe, planned: Sequence[Step]) -> list[Step]:
    """The steps, without those that would do again what an earlier one does: what reads them reads that one."""
    kept: list[Step] = []
    first: dict[str, str] = {}
    same: dict[str, str] = {}
    for step in planned:
        inputs = {name: same.get(str(value), value) for name, value in step.inputs.items()}
        what = hash_of([step.kind, {name: str(value) for name, value in inputs.items()}, knobs_of(recipe, step)])
        if what in first:
            same[step.name] = first[what]
        else:
            first[what] = step.name
            kept.append(replace(step, inputs=inputs))
    return kept


def recipe_of(recipe: Recipe, step: Step) -> Recipe:
    """The recipe as a step reads it: with the knobs that the step sets for itself."""
    return config.changed(recipe, step.knobs) if step.knobs else recipe


def steps_until(recipe: Recipe, until: str | None, compared: bool = False) -> list[Step]:
    """The steps up to one of them; None takes all.

    Raises:
        ValueError: no step has that name, or the recipe contradicts itself.
    """
    planned = steps(recipe, compared)
    if until is None:
        return planned
    names = [step.name for step in planned]
    if until not in names:
        raise ValueError(f"no step is called {until!r}; this recipe has {', '.join(names)}")
    return planned[: names.index(until) + 1]


def execute(recipe: Recipe, folder: Path, until: str | None = None, compared: bool = False) -> Path:
    """Take every step that is not done yet, and return the run folder.

    Args:
        until: the last step to take; None takes all.
        compared: with every other system that the recipe compares.

    Raises:
        ValueError: another process holds the folder, an unknown `until`, or bad input on the way.
    """
    planned = steps_until(recipe, until, compared)
    with runs.Run.open(folder, config.to_toml(recipe)) as run:
        for note in compare.notes(recipe) if compared else ():
            run.log(note)
        take_all(planned, recipe.jobs, lambda step: take(recipe, run, step))
    return folder


def take(recipe: Recipe, run: runs.Run, step: Step) -> None:
    """Take one step unless it is done: here, or in a process (or several) of its own.

    Of steps side by side the heavy ones are always in a process of their own, and the others here take turns.
    """
    knobs = knobs_of(recipe, step)
    with run.stage(step.name, step.stage.version, {**local_files(knobs), **step.inputs}, knobs) as work:
        if work.done:
            return
        if step.stage.heavy and (recipe.launcher != "inprocess" or recipe.jobs > 1):
            _launch(recipe, work, step)
        else:
            with run.here:
                perform(recipe, work, step)


def perform(recipe: Recipe, work: runs.Work, step: Step) -> None:
    """Do a step's work in this process; where it fails, log.txt keeps the whole traceback."""
    inputs = {name: work.run.folder / value for name, value in step.inputs.items()}
    try:
        step.stage.run(Job(recipe_of(recipe, step), work, inputs, step.t, step.half, step.condition))
    except Exception:
        work.run.note(traceback.format_exc().rstrip())
        raise


def knobs_of(recipe: Recipe, step: Step) -> dict[str, object]:
    """The knobs a step read, for its ledger."""
    return knobs_read(recipe_of(recipe, step), step.stage.knobs) | step.particulars


def processes_of(recipe: Recipe, step: Step) -> int:
    """In how many processes a step runs at once."""
    return recipe.processes if recipe.launcher in ("torchrun", "accelerate") and step.stage.several else 1


def order_of(work: runs.Work) -> Path:
    """Where a stage's own process reads what it is to do."""
    return work.folder / ".stage" / "order.json"


def _launch(recipe: Recipe, work: runs.Work, step: Step) -> None:
    """Run a stage in its own process, so that its memory is given back and a crash is contained."""
    inputs = {name: str(value) for name, value in step.inputs.items()}
    runs.write_json(order_of(work), {"recipe": config.as_mapping(recipe), "step": asdict(step) | {"inputs": inputs}})
    command = [sys.executable, "-m", "dpalign.pipeline.worker", str(work.run.folder), step.name]
    env = os.environ | thread_variables(recipe.threads) | (AS_LINES if recipe.jobs > 1 else {})
    code = subprocess.run(command, pass_fds=(work.run.lock,), env=env, check=False).returncode
    if code < 0:
        signal_name = signal.Signals(-code).name
        raise ValueError(
            f"stage {step.name}: its process was ended by {signal_name}; out of memory? Run again to go on"
        )
    if code:
        raise ValueError(f"stage {step.name}: its process ended with code {code}; its own message stands above")


def dry_run(
    recipe: Recipe, folder: Path, until: str | None = None, compared: bool = False
) -> Sequence[tuple[Step, str]]:
    """The steps, and for each "done" or why it is to do; touches nothing."""
    planned = steps_until(recipe, until, compared)
    read = [knobs_of(recipe, step) for step in planned]
    stages = [
        ledger.Stage(step.name, step.stage.version, {**local_files(knobs), **step.inputs}, knobs)
        for step, knobs in zip(planned, read, strict=True)
    ]
    said = ledger.plan(folder, stages)
    return [(step, said[step.name]) for step in planned]
