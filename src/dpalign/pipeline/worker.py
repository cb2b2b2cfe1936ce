"""One stage in a process of its own: `python -m dpalign.pipeline.worker RUN STEP`; a run starts it.

The run holds the lock, keeps the clock and writes the ledger. The worker reads its order (the recipe and the step)
in RUN/STEP.partial/.stage, does the work in RUN/STEP.partial, and leaves its counts beside the order. It ends when the
run ends, for any reason; a training that SIGTERM reaches writes a checkpoint first. If the recipe wants several
processes, the worker starts them (`runs/launch.py`): they are workers too.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from dpalign.pipeline.runner import order_of, perform, step_of
from dpalign.pipeline.steps import processes_of
from dpalign.recipe import Recipe, from_mapping
from dpalign.runs.environment import first_process
from dpalign.runs.errors import plain_errors
from dpalign.runs.folder import Run
from dpalign.runs.launch import LAUNCHED, launch
from dpalign.runs.lock import holder
from dpalign.runs.stopping import RESUME, Stopped, stoppable

WATCH_SECONDS = 0.5
"""How long a worker may outlive its run. Meanwhile the lock, which it inherits, keeps the next run out."""


def main(run_folder: str, name: str) -> None:
    """Do one step of a run; the process does nothing else."""
    folder = Path(run_folder)
    with plain_errors(name), stoppable():
        parent = os.getppid()
        rank = os.environ.get("LOCAL_RANK")  # torchrun's
        if rank is None and LAUNCHED in os.environ:
            raise ValueError(
                f"{os.environ[LAUNCHED]} processes were asked for, and accelerate started one: its configuration is "
                "for one GPU or for a CPU; give one for several GPUs, or use torchrun"
            )
        if rank is None and holder(folder) != parent:
            raise ValueError(f"{folder}: no run that waits for this worker; `dpa run` starts its own")
        work = Run(folder, lock=-1, git_commit=None).stage_at_work(name)
        order = json.loads(order_of(work).read_text(encoding="utf-8"))
        recipe, step = from_mapping(Recipe, order["recipe"]), step_of(order["step"])
        processes = processes_of(recipe, step)
        launches = rank is None and processes > 1
        end_with(parent, signal.SIGTERM if launches else signal.SIGKILL)
        if launches:
            sys.exit(launch(recipe.launch, recipe.launcher, processes, run_folder, name))
        if os.environ.get("WORLD_SIZE", "1") != str(processes):
            raise ValueError(
                f"{processes} processes were asked for, and WORLD_SIZE is {os.environ.get('WORLD_SIZE', 1)}"
            )
        try:
            perform(recipe, work, step)
        except Stopped:
            if processes > 1:  # at once: the others stop too, and nothing may wait for them here
                os._exit(RESUME)
            raise
        if first_process():
            work.leave_tally()
        if processes > 1:
            from dpalign.train.trainer import leave_processes

            leave_processes()


def end_with(parent: int, number: signal.Signals) -> None:
    """End this process soon after its parent: by SIGKILL, or by SIGTERM if it launches others, which get it too."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main(*sys.argv[1:])
