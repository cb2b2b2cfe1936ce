"""The processes of a training: started by torchrun, by accelerate with a configuration, or by a command of your own."""

import importlib.util
import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from dpalign.runs.knobs import NAMED, Launch
from dpalign.runs.stopping import RESUME, wait_for

LAUNCHED: Final = "DPALIGN_LAUNCHED"
"""Environment variable set around accelerate, to the number of processes. A worker that finds it without a rank is the
only process that accelerate started."""


def launch(settings: Launch, launcher: str, processes: int, run_folder: str, step: str) -> int:
    """Start the workers of a step; returns the exit code of the first to fail, or 0.

    Args:
        launcher: the recipe's: "accelerate", or any other for torchrun.

    Raises:
        ValueError: no such configuration, or a package that it needs is missing.
    """
    worker = ["-m", "dpalign.pipeline.worker", run_folder, step]
    if settings.command:
        # not str.format: a command may have other braces, such as a shell's ${JOB}
        words = settings.command.replace("{run}", shlex.quote(run_folder)).replace("{step}", step)
        return run_command(words)
    if launcher == "accelerate":
        return accelerate(processes, settings.config, worker)
    return torchrun(processes, worker)


def torchrun(processes: int, worker: Sequence[str]) -> int:
    """Start workers on this machine."""
    from torch.distributed.run import main

    return _exit_code(lambda: main(["--standalone", "--nproc_per_node", str(processes), *worker]))


def accelerate(processes: int, config: str, worker: Sequence[str]) -> int:
    """Start workers by an accelerate configuration; "" is plain data parallelism on this machine's GPUs."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    options = ["--config_file", str(configuration(config))] if config else ["--multi_gpu", "--num_machines", "1"]
    arguments = launch_command_parser().parse_args([*options, "--num_processes", str(processes), *worker])
    os.environ[LAUNCHED] = str(processes)
    try:
        return _exit_code(lambda: launch_command(arguments))
    except ImportError as error:
        raise ValueError(f"launch.config {config}: {error}") from error


def configuration(config: str) -> Path:
    """The YAML file that `launch.config` names.

    Raises:
        ValueError: there is none.
    """
    if config in NAMED:
        trl = importlib.util.find_spec("trl")
        assert trl is not None, "the stages that train have imported it"
        assert trl.submodule_search_locations
        return Path(trl.submodule_search_locations[0]) / "accelerate_configs" / f"{config}.yaml"
    if not Path(config).is_file():
        raise ValueError(f"launch.config is {config!r}: neither one of {', '.join(NAMED)} nor a YAML file")
    return Path(config)


def run_command(words: str) -> int:
    """Run a command, and end it with this process; returns its exit code, `RESUME` if SIGTERM ended it."""
    code = wait_for(subprocess.Popen(shlex.split(words)))
    return RESUME if code == -signal.SIGTERM else code if code >= 0 else 128 - code


def _exit_code(start: Callable[[], object]) -> int:
    """The exit code of a launcher (torchrun's or accelerate's) that runs in this process."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        start()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException as signalled:  # its processes have ended too
        return RESUME if signalled.sigval == signal.SIGTERM else 128 + signalled.sigval
    except subprocess.CalledProcessError as error:  # accelerate's own, of one process
        return error.returncode if error.returncode > 0 else 1
    return 0
