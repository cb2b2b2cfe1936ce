"""Drawing that can be watched and made to fail, for the actors of tests/test_ray.py to import."""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from dpalign import recipe
from dpalign.engines.engine import Engine
from dpalign.pipeline import runner
from dpalign.pipeline.steps import STAGES
from dpalign.runs import folder as runs
from dpalign.runs.folder import Shard, Tally
from dpalign.runs.ledger import write_text
from dpalign.runs.shards import make_shards
from dpalign.stages.sample import drawing
from dpalign.stages.shards import Output, Row, Shards
from dpalign.stages.stage import Job, Step

POISON = "poison"
STEP = Step("sample-2", STAGES["sample"], {}, t=2, half="D1", condition="directions")


class Watched(Shards[Engine]):
    """Drawing at leisure; the folder WATCH says which process made each shard."""

    def make(self, shard: Shard) -> None:
        write_text(Path(os.environ["WATCH"]) / f"{shard.index}", str(os.getpid()))
        time.sleep(0.5)
        super().make(shard)


def watching(job: Job) -> Shards[Engine]:
    return Watched(**vars(drawing(job)))


def stumbling(job: Job, end: Callable[[], None]) -> Shards[Engine]:
    """Shards in which one prompt ends the work."""
    shards = drawing(job)

    def work(engine: Engine, index: int, prompts: Sequence[Row], tally: Tally) -> Iterator[Output]:
        if any(POISON in prompt["messages"][-1]["content"] for prompt in prompts):
            end()
        return shards.work(engine, index, prompts, tally)

    return replace(shards, work=work)


def dying(job: Job) -> Shards[Engine]:
    """A prompt that kills the process that reads it."""
    return stumbling(job, lambda: os.kill(os.getpid(), signal.SIGKILL))


def failing(job: Job) -> Shards[Engine]:
    """A prompt that an engine stumbles over, which warns when it opens."""

    def end() -> None:
        raise RuntimeError("index out of range")

    shards = stumbling(job, end)

    def models() -> Engine:
        logging.getLogger("dpalign.ray_work").warning("each prompt is read anew")
        return shards.models()

    return replace(shards, models=models)


def closed(job: Job) -> Shards[Engine]:
    """An engine that does not come up."""

    def models() -> Engine:
        raise OSError("no weights here")

    return replace(drawing(job), models=models)


def watched(job: Job) -> None:
    make_shards(job, watching)


def deadly(job: Job) -> None:
    make_shards(job, dying)


def raising(job: Job) -> None:
    make_shards(job, failing)


def unopened(job: Job) -> None:
    make_shards(job, closed)


def planned(read: recipe.Recipe, folder: Path, inputs: dict[str, Path]) -> Shards[Engine]:
    """The step's shards as the stage lays them out, for a folder that it does not write to."""
    work = runs.Run(folder, -1, None).stage_at_work(STEP.name)
    return drawing(Job(read, work, inputs, STEP.t, STEP.half, STEP.condition))


def take(run_folder: Path, read: recipe.Recipe, function: str, inputs: dict[str, Path]) -> Path:
    """The sampling step with one of these in place of the stage's own function."""
    here = import_module("ray_work")  # not __main__: the actors import it by this name
    stage = STAGES["sample"] if function == "sample" else replace(STAGES["sample"], function=getattr(here, function))
    step = replace(STEP, inputs=inputs, stage=stage)
    with runs.Run.open(run_folder, None, {}) as run:
        runner.take(read, run, step)
    return run_folder / step.name


if __name__ == "__main__":  # RUN RECIPE POLICY DATA FUNCTION [overrides]: a driver that can be killed
    folder, file, policy, data, name, *overrides = sys.argv[1:]
    take(Path(folder), recipe.load(Path(file), overrides), name, {"policy": Path(policy), "data": Path(data)})
