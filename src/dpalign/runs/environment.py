"""The machine: what it is, for the record, and how its threads wait."""

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from string import Template
from typing import Any, Final

PACKAGES: Final = (
    *("dpalign", "torch", "transformers", "trl", "accelerate", "peft", "datasets", "tokenizers", "safetensors"),
    *("pyarrow", "numpy", "scipy", "moocore", "vllm", "ray"),
)
"""The packages whose versions environment.json records, where installed."""

RECIPES: Final = Path(__file__).parents[1] / "recipe" / "shipped"
"""The recipes that are installed with the package, and the files that they read."""

GPU_DEVICES: Final = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""What a machine with GPUs of NVIDIA or AMD has, or a Windows machine under its Linux."""

WAITING: Final = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
"""Threads that wait asleep: on a busy machine spinning ones sample several times slower. And no bars of the libraries:
the stages say themselves how far they are."""

MALLOPT: Final = {-1: 2_000_000_000, -3: 1_000_000_000}
"""glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, in bytes."""


def thread_variables(threads: int) -> dict[str, str]:
    """The environment of a process that is to work with so many threads (0: as many as its libraries like)."""
    variables = {name: os.environ.get(name, value) for name, value in WAITING.items()}
    return variables | ({"OMP_NUM_THREADS": str(threads)} if threads else {})


def settle_threads(threads: int, for_torch: bool) -> None:
    """Do the same for this process, before anything imports torch: the environment is read once."""
    os.environ.update(thread_variables(threads))
    if threads and for_torch:  # told outright: by the environment alone it takes no more threads than cores
        import torch

        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """On a machine without a GPU, have glibc keep what tensors free, for the next ones.

    By default it gives large blocks back, and the next are faulted in page by page: a fifth of a training's time.
    """
    if platform.libc_ver()[0] == "glibc" and not any(map(os.path.exists, GPU_DEVICES)):
        for option, size in MALLOPT.items():
            ctypes.CDLL(None).mallopt(option, size)


def take_secret(name: str) -> str | None:
    """The value of an environment variable, which is gone afterwards: from this process, its children and /proc."""
    value = os.environ.get(name)
    if value is None:
        return None
    if os.name == "posix":
        # /proc/PID/environ shows the memory that the process was started with: a deleted variable is still in it
        getenv = ctypes.CDLL(None).getenv
        getenv.restype, getenv.argtypes = ctypes.c_void_p, (ctypes.c_char_p,)
        if place := getenv(os.fsencode(name)):
            ctypes.memset(place, 0, len(os.fsencode(value)))
    del os.environ[name]
    return value


def filled(path: str) -> str:
    """A path with its environment variables filled in; `$DPA_RECIPES` is the folder of the installed recipes."""
    return Template(path).safe_substitute({"DPA_RECIPES": str(RECIPES)} | os.environ)


def expanded(knob: str, path: str) -> str:
    """The same, with every variable known.

    Raises:
        ValueError: the environment has no such variable; the message names the recipe's knob.
    """
    name = filled(path)
    if "$" in name:
        raise ValueError(f"{knob} is {path!r}, and the environment has no such variable; set it, or the path")
    return name


def visible_gpus() -> int:
    """GPUs that torch may use here. Where there are devices, a process of its own counts them: this one opens none."""
    if not any(map(os.path.exists, GPU_DEVICES)):
        return 0
    count = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    done = subprocess.run(count, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else 0


def describe_environment() -> dict[str, Any]:
    """Python, platform, package versions and the git commit of this code: recorded, never fingerprinted."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": versions,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of the checkout that this file belongs to, "-dirty" if it differs; None if it is installed."""
    here = Path(__file__)
    git = ["git", "--no-optional-locks", "-C", str(here.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        description = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return description.stdout.strip()
