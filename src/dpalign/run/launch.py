"""The processes of a training: started by torchrun, by accelerate with a configuration, or by one's own command."""

import importlib.util
import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dpalign.run.knobs import NAMED

if TYPE_CHECKING:
    from dpalign.recipe import Recipe

LAUNCHED: Final = "DPALIGN_LAUNCHED"
"""Set around accelerate to the number of processes: a worker that finds it, and no rank, is the only one it started."""


def launch(recipe: "Recipe", processes: int, run_folder: str, step: str) -> int:
    """Start so many workers, and return the exit code of the first to fail, or 0 when all have ended well.

    Raises:
        ValueError: no such configuration, or a package that it needs is missing.
    """
    worker = ["-m", "dpalign.pipeline.worker", run_folder, step]
    if recipe.launch.command:
        words = recipe.launch.command.replace("{run}", shlex.quote(run_folder)).replace("{step}", step)
        return command(words)  # which may have other braces, such as a shell's ${JOB}
    if recipe.launcher == "accelerate":
        return accelerate(processes, recipe.launch.config, worker)
    return torchrun(processes, worker)


def torchrun(processes: int, worker: Sequence[str]) -> int:
    """So many workers on this machine."""
    from torch.distributed.run import main

    return _code(lambda: main(["--standalone", "--nproc_per_node", str(processes), *worker]))


def accelerate(processes: int, config: str, worker: Sequence[str]) -> int:
    """So many workers as an accelerate configuration says; "" is plain data parallelism on this machine's GPUs."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    chosen = ["--config_file", str(configuration(config))] if config else ["--multi_gpu", "--num_machines", "1"]
    given = launch_command_parser().parse_args([*chosen, "--num_processes", str(processes), *worker])
    os.environ[LAUNCHED] = str(processes)
    try:
        return _code(lambda: launch_command(given))
    except ImportError as error:
        raise ValueError(f"launch.config {config}: {error}") from error


def configuration(config: str) -> Path:
    """The YAML file that `launch.config` names.

    Raises:
        ValueError: there is none.
    """
    if config in NAMED:
        found = importlib.util.find_spec("trl")
        assert found is not None, "the stages that train have imported it"
        assert found.submodule_search_locations
        return Path(found.submodule_search_locations[0]) / "accelerate_configs" / f"{config}.yaml"
    if not Path(config).is_file():
        raise ValueError(f"launch.config is {config!r}: neither one of {', '.join(NAMED)} nor a YAML file")
    return Path(config)


def command(words: str) -> int:
    """The exit code of a command; it is told to end when this process is."""
    child = subprocess.Popen(shlex.split(words))
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    code = child.wait()
    return code if code >= 0 else 128 - code


def _code(start: Callable[[], object]) -> int:
    """The exit code of a launcher that runs in this process, torchrun's or accelerate's."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        start()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException as ended:  # its processes have ended too
        return 128 + ended.sigval
    except subprocess.CalledProcessError as error:  # accelerate's own one process
        return error.returncode if error.returncode > 0 else 1
    return 0
