"""The machine: its description for the record, its threads and memory, its environment variables."""

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

API_KEY: Final = "DPA_API_KEY"
"""The environment variable with a server's key."""

GPU_DEVICES: Final = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Device files of a machine with NVIDIA or AMD GPUs, or of a Windows machine under its Linux."""

WAITING: Final = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
"""Waiting threads sleep: with spinning ones a busy machine samples several times slower. The libraries show no bars,
since the stages report their own progress."""

MALLOPT: Final = {-1: 2_000_000_000, -3: 1_000_000_000}
"""glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, in bytes."""


def shipped() -> list[str]:
    """The names of the recipes that are installed."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def thread_variables(threads: int) -> dict[str, str]:
    """The environment of a process with this many threads (0: its libraries decide)."""
    variables = {name: os.environ.get(name, value) for name, value in WAITING.items()}
    return variables | ({"OMP_NUM_THREADS": str(threads)} if threads else {})


def settle_threads(threads: int, for_torch: bool) -> None:
    """Set the threads of this process, before anything imports torch: it reads the environment once."""
    os.environ.update(thread_variables(threads))
    if threads and for_torch:  # set directly: from the environment alone torch takes no more threads than cores
        import torch

        torch.set_num_threads(threads)


def first_process() -> bool:
    """Whether this is the first of a training's processes, the only one that writes."""
    return os.environ.get("RANK", "0") == "0"


def keep_freed_memory() -> None:
    """On a machine without a GPU, let glibc keep the memory that tensors free, for the next ones.

    By default it returns large blocks, and the next are faulted in page by page: a fifth of a training's time.
    """
    if platform.libc_ver()[0] == "glibc" and not any(map(os.path.exists, GPU_DEVICES)):
        for option, size in MALLOPT.items():
            ctypes.CDLL(None).mallopt(option, size)


def take_secret(name: str) -> str | None:
    """Read an environment variable and remove it from this process, its later children and /proc; None if unset."""
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
    """A path filled in like `filled`, but every variable must be set.

    Raises:
        ValueError: the environment has no such variable; the message names the recipe's knob.
    """
    name = filled(path)
    if "$" in name:
        raise ValueError(f"{knob} is {path!r}, and the environment has no such variable; set it, or the path")
    return name


def visible_gpus() -> int:
    """The number of GPUs that torch may use here. If there are any, a separate process counts: this one opens none."""
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
    """The commit of the checkout that has this file, "-dirty" if it differs; None for an installed package."""
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
