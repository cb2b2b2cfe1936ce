"""Take the steps of a run that are not done, here or in processes of their own, several side by side."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpalign.measure.system import System
from dpalign.pipeline.ready import require_machine, require_named, require_split
from dpalign.pipeline.steps import STAGES, knobs_of, notes, recipe_of, steps_until
from dpalign.recipe import Recipe
from dpalign.recipe.localfiles import hub_commits, local_files, require_chat
from dpalign.runs import folder as runs
from dpalign.runs import ledger
from dpalign.runs.environment import thread_variables
from dpalign.runs.errors import naming
from dpalign.runs.progress import AS_LINES
from dpalign.runs.stopping import RESUME, Stopped, stop_requested, wait_for
from dpalign.stages.preference import asked_in_words
from dpalign.stages.stage import Job, Step
from dpalign.stages.training import keep_model


def execute(recipe: Recipe, folder: Path, until: str | None = None, compared: bool = False) -> Path:
    """Take every step that is not done yet, and return the run folder.

    Args:
        until: the last step to take; None takes all.
        compared: with every other system that the recipe compares.

    Raises:
        ValueError: another process holds the folder, an unknown `until`, a machine that cannot take every step, a file
            or a model that cannot be had, or bad input on the way.
    """
    verdicts = dry_run(recipe, folder, until, compared)
    planned = [step for step, _ in verdicts]
    todo = [step for step, verdict in verdicts if verdict != "done"]
    require_machine(recipe, todo)
    require_chat(recipe, fetch=True)
    require_named(recipe, todo)
    with runs.Run.open(folder, recipe.to_toml()) as run:
        run.log(f"users ask for: {asked_in_words(recipe)}")
        for note in notes(recipe) if compared else ():
            run.log(note)
        take_all(planned, recipe.jobs, lambda step: take(recipe, run, step))
    return folder


def take_all(planned: Sequence[Step], jobs: int, take: Callable[[Step], None]) -> None:
    """Take every step once the steps that it reads are taken, up to `jobs` at once, in planned order.

    When a step fails, no other begins; those at work finish, then its error is raised. With one job the steps run in
    this thread, where an interruption reaches them.
    """
    if jobs == 1:
        for step in planned:
            take(step)
        return
    names = {step.name for step in planned}
    waiting = list(planned)
    taken: set[str] = set()
    at_work: dict[Future[None], Step] = {}
    failed: BaseException | None = None
    with ThreadPoolExecutor(jobs) as pool:
        while at_work or (waiting and failed is None):
            if failed is None:
                ready = [step for step in waiting if names & {str(value) for value in step.inputs.values()} <= taken]
                for step in ready[: jobs - len(at_work)]:
                    waiting.remove(step)
                    at_work[pool.submit(take, step)] = step
            for ended in wait(at_work, return_when=FIRST_COMPLETED).done:
                taken.add(at_work.pop(ended).name)
                failed = failed or ended.exception()
    if failed is not None:
        raise failed


def take(recipe: Recipe, run: runs.Run, step: Step) -> None:
    """Take one step unless it is done: here, or in a process (or several) of its own.

    With several jobs, heavy steps always run in a process of their own, and the others take turns here.
    """
    if stop_requested():
        raise Stopped
    knobs = knobs_of(recipe, step)
    inputs = {**local_files(knobs), **step.inputs}
    with run.stage(step.name, step.stage.version, inputs, knobs, step.stage.reads_figures) as work:
        if work.done:
            before = ledger.read_ledger(work.output).get("hub", {})
            if moved := ledger.other_versions(before, hub_commits(knobs)):
                run.log(f"{step.name}: kept, though the hub's names stood for other commits: {moved}")
            return
        source, rows = rows_to_take(recipe, run, step)
        if trains(recipe, step):
            keep_model(work, step.stage.measure_tables(recipe_of(recipe, step)))
        work.check = lambda total: step.stage.require_conserved(total, source, rows)
        if step.stage.heavy and (recipe.launcher != "inprocess" or recipe.jobs > 1):
            take_apart(recipe, work, step)
        else:
            with run.in_process:
                perform(recipe, work, step)
        work.hub = hub_commits(knobs)


def trains(recipe: Recipe, step: Step) -> bool:
    """Whether a step trains a model; a recipe may name a finished one instead."""
    return step.stage.trains is not None and not step.stage.trains(recipe_of(recipe, step)).checkpoint


def rows_to_take(recipe: Recipe, run: runs.Run, step: Step) -> tuple[Path, int | None]:
    """The folder whose rows a step takes, and their number by its ledger; None if no ledger counts them."""
    source = run.folder / step.inputs.get(step.stage.takes, "")
    named = step.stage.trains and not trains(recipe, step)  # a named model replaces the training and reads no rows
    if named or step.stage.takes not in step.inputs or not (source / ledger.LEDGER).is_file():
        return source, None
    return source, int(ledger.read_ledger(source)["counts"]["out"])


def perform(recipe: Recipe, work: runs.Work, step: Step) -> None:
    """Do a step's work in this process; if it fails, log.txt keeps the whole traceback.

    Raises:
        ValueError: bad input, or code that the step called ended Python with `sys.exit`.
    """
    inputs = {name: work.run.folder / value for name, value in step.inputs.items()}
    try:
        with naming(work.folder), _warnings_logged(work):
            step.stage.run(Job(recipe_of(recipe, step), work, inputs, step.t, step.half, step.condition, step.systems))
    except (Exception, SystemExit) as error:
        with contextlib.suppress(OSError):  # a full disk has no room for it either
            work.run.note(traceback.format_exc().rstrip())
        if isinstance(error, SystemExit):
            raise ValueError(
                f"stage {step.name}: code that it called ended Python with sys.exit({error.code!r}), before the work "
                "was done; log.txt says where"
            ) from error
        raise


class _ToLog(logging.Handler):
    """Writes warnings to the run's log."""

    def __init__(self, work: runs.Work) -> None:
        super().__init__(logging.WARNING)
        self.work = work

    def emit(self, record: logging.LogRecord) -> None:
        self.work.run.log(f"{self.work.stage.name}: {record.getMessage()}")


@contextlib.contextmanager
def _warnings_logged(work: runs.Work) -> Iterator[None]:
    """Write the warnings of engines, scorers and trainings to the run's log."""
    logger, handler = logging.getLogger("dpalign"), _ToLog(work)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def order_of(work: runs.Work) -> Path:
    """The file in which a stage's own process reads its order."""
    return work.folder / ".stage" / "order.json"


def take_apart(recipe: Recipe, work: runs.Work, step: Step) -> None:
    """Run a stage in its own process, so that its memory is given back and a crash is contained.

    Raises:
        ValueError: the process failed, or ended before its work was done.
        Stopped: SIGTERM ended it.
    """
    plain = {
        "stage": step.stage.name,
        "inputs": {name: str(value) for name, value in step.inputs.items()},
        "systems": {name: asdict(system) for name, system in step.systems.items()},
    }
    runs.write_json(order_of(work), {"recipe": recipe.as_mapping(), "step": vars(step) | plain})
    command = [sys.executable, "-m", "dpalign.pipeline.worker", str(work.run.folder), step.name]
    env = (AS_LINES if recipe.jobs > 1 else {}) | os.environ | thread_variables(recipe.threads)
    code = wait_for(subprocess.Popen(command, pass_fds=(work.run.lock,), env=env))
    if code == RESUME:
        raise Stopped
    if code < 0:
        signal_name = signal.Signals(-code).name
        raise ValueError(
            f"stage {step.name}: its process was ended by {signal_name}; out of memory? Run again to go on"
        )
    if code:
        raise ValueError(f"stage {step.name}: its process ended with code {code}; its own message stands above")
    work.require_left()


def step_of(order: Mapping[str, Any]) -> Step:
    """The step of an order, as `take_apart` writes it."""
    systems = {name: System(**system) for name, system in order["systems"].items()}
    return Step(**{**order, "stage": STAGES[order["stage"]], "systems": systems})


def dry_run(
    recipe: Recipe, folder: Path, until: str | None = None, compared: bool = False
) -> Sequence[tuple[Step, str]]:
    """The steps, each with "done" or why it must run; changes no file.

    Raises:
        ValueError: an unknown `until`, or a recipe that contradicts itself.
    """
    planned = steps_until(recipe, until, compared)
    read = [knobs_of(recipe, step) for step in planned]
    stages = [
        ledger.Stage(
            step.name, step.stage.version, {**local_files(knobs), **step.inputs}, knobs, step.stage.reads_figures
        )
        for step, knobs in zip(planned, read, strict=True)
    ]
    verdicts = ledger.plan(folder, stages)
    require_split(recipe, [step for step in planned if verdicts[step.name] != "done"])
    return [(step, verdicts[step.name]) for step in planned]
