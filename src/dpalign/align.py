"""The order of things: sections 2.2 and 3.1 as a list of steps, and the run that takes them.

The loop is written out for every iteration before anything runs, so that `--dry-run` can show it and a
run that was killed finds its place in it.
"""

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from dpalign import config, ledger, runs
from dpalign.environment import thread_variables
from dpalign.recipe import Recipe
from dpalign.stages import Job, Step


def steps(recipe: Recipe) -> list[Step]:
    """Every step of an experiment, in order."""
    return list(_steps(recipe))


def _steps(recipe: Recipe) -> Iterator[Step]:
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
    judged = {}
    if recipe.data.judge:
        judged = {"judge": "judge"}
        yield Step("judge", "judge", {"data": "data"} | base)
    annotated = {"data": "data", "annotate": "annotate"}
    yield Step("annotate", "annotate", {"data": "data", "reward": "reward"})
    yield Step("sft", "sft", {"data": "data"} | base)

    # t = 0: SFT knows no directions, so a SteerLM on D2 alone answers for diverse rewards (section 3.1).
    yield Step("steerlm-d2", "steerlm", {"sft": "sft"} | annotated, half="D2" if recipe.alternate else "D1")
    policies = ["steerlm-d2"]
    for t in range(1, recipe.iterations + 1):
        half = "D2" if recipe.alternate and t % 2 == 0 else "D1"
        condition = "targets" if t == 1 else "directions"
        candidates, scores = f"sample-{t}", f"score-{t}"
        yield Step(candidates, "sample", {"policy": policies[-1]} | annotated, t, half, condition)
        yield Step(scores, "score", {"reward": "reward", "candidates": candidates}, t)
        yield Step(f"select-{t}", "select", {"candidates": candidates, "scores": scores} | annotated, t, half)
        start = "sft" if recipe.restart or t == 1 else policies[-1]
        yield Step(f"policy-{t}", "finetune", {"start": start, "chosen": f"select-{t}"}, t)
        policies.append(f"policy-{t}")

    yield Step("steerlm", "steerlm", {"sft": "sft"} | annotated, half="both")
    scored = {"reward": "reward"} | annotated | judged
    evaluated = []
    for t, policy in enumerate(policies):
        condition = "directions" if t else "targets"
        evaluated.append(Step(f"evaluate-{policy}", "evaluate", {"policy": policy} | scored, t, condition=condition))
    evaluated.append(Step("evaluate-steerlm", "evaluate", {"policy": "steerlm"} | scored, condition="targets"))
    evaluated.append(Step("evaluate-sft", "evaluate", {"policy": "sft"} | scored, condition="plain"))
    if recipe.evaluation.dpo:
        evaluated.append(Step("evaluate-dpo", "evaluate", scored, condition="plain"))
    if recipe.evaluation.controls:
        evaluated.append(Step("evaluate-sft-asked", "evaluate", {"policy": "sft"} | scored, condition="directions"))
        if base:
            asked = Step("evaluate-base-asked", "evaluate", {"policy": "base"} | scored, condition="directions")
            evaluated.append(asked)
    yield from evaluated
    systems = {step.name: step.name for step in evaluated}
    yield Step("report", "report", {"reward": "reward"} | annotated | judged | systems)


def steps_until(recipe: Recipe, until: str | None) -> list[Step]:
    """The steps up to one of them; None takes all."""
    planned = steps(recipe)
    if until is None:
        return planned
    names = [step.name for step in planned]
    if until not in names:
        raise ValueError(f"no step is called {until!r}; this recipe has {', '.join(names)}")
    return planned[: names.index(until) + 1]


def execute(recipe: Recipe, folder: Path, until: str | None = None) -> Path:
    """Take every step that is not done yet, and return the run folder.

    Args:
        until: the last step to take; None takes all.

    Raises:
        ValueError: another process holds the folder, an unknown `until`, or bad input on the way.
    """
    planned = steps_until(recipe, until)
    with runs.Run.open(folder, config.to_toml(recipe)) as run:
        for step in planned:
            take(recipe, run, step)
    return folder


def take(recipe: Recipe, run: runs.Run, step: Step) -> None:
    """Take one step unless it is done: here, or in a process (or several) of its own."""
    with run.stage(step.name, step.stage.version, step.inputs, knobs_of(recipe, step)) as work:
        if work.done:
            return
        if step.stage.heavy and recipe.launcher != "inprocess":
            _launch(recipe, work, step)
        else:
            perform(recipe, work, step)


def perform(recipe: Recipe, work: runs.Work, step: Step) -> None:
    """Do a step's work in this process; where it fails, log.txt keeps the whole traceback."""
    inputs = {name: work.run.folder / value for name, value in step.inputs.items()}
    try:
        step.stage.run(Job(recipe, work, inputs, step.t, step.half, step.condition))
    except Exception:
        work.run.note(traceback.format_exc().rstrip())
        raise


def knobs_of(recipe: Recipe, step: Step) -> dict[str, object]:
    """The knobs a step read, for its ledger."""
    return config.knobs(recipe, *step.stage.knobs) | step.particulars


def processes_of(recipe: Recipe, step: Step) -> int:
    """In how many processes a step runs at once."""
    return recipe.processes if recipe.launcher == "torchrun" and step.stage.several else 1


def order_of(work: runs.Work) -> Path:
    """Where a stage's own process reads what it is to do."""
    return work.folder / ".stage" / "order.json"


def _launch(recipe: Recipe, work: runs.Work, step: Step) -> None:
    """Run a stage in its own process, so that its memory is given back and a crash is contained."""
    inputs = {name: str(value) for name, value in step.inputs.items()}
    runs.write_json(order_of(work), {"recipe": config.as_mapping(recipe), "step": asdict(step) | {"inputs": inputs}})
    command = [sys.executable, "-m", "dpalign.worker", str(work.run.folder), step.name]
    env = os.environ | thread_variables(recipe.threads)
    code = subprocess.run(command, pass_fds=(work.run.lock,), env=env, check=False).returncode
    if code < 0:
        signal_name = signal.Signals(-code).name
        raise ValueError(
            f"stage {step.name}: its process was ended by {signal_name}; out of memory? Run again to go on"
        )
    if code:
        raise ValueError(f"stage {step.name}: its process ended with code {code}; its own message stands above")


def dry_run(recipe: Recipe, folder: Path, until: str | None = None) -> Sequence[tuple[Step, str]]:
    """The steps, and for each "done" or why it is to do; touches nothing."""
    planned = steps_until(recipe, until)
    stages = [ledger.Stage(s.name, s.stage.version, s.inputs, knobs_of(recipe, s)) for s in planned]
    said = ledger.plan(folder, stages)
    return [(step, said[step.name]) for step in planned]
