"""The machine: Python, cores, memory, disk and GPUs, without importing torch."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dpalign.dial.doctor.findings import Finding

OLDEST: Final = (3, 11)
"""Python, as pyproject.toml has it."""
CGROUP: Final = Path("/sys/fs/cgroup")
SMI: Final = ("nvidia-smi", "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits")


def machine() -> Iterator[Finding]:
    """What the machine is, and what it leaves to this process."""
    yield _python()
    yield _threads()
    yield _memory()
    yield _disk(Path.cwd())
    yield from gpus()


def _python() -> Finding:
    said = f"{platform.python_version()} on {platform.platform()}"
    if sys.version_info < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        return Finding("bad", "Python", f"{said}; {wanted} or later is needed", f"install Python {wanted} or later")
    if os.name != "posix":
        return Finding(
            "bad", "Python", f"{said}; run folders are locked in a way that only POSIX systems have", "use Linux"
        )
    return Finding("ok", "Python", said)


def cores() -> float:
    """Cores that this process may use: those it is bound to, or the share that its container is given."""
    bound = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return min(bound, int(quota) / int(period))
    except (OSError, ValueError):  # no such file, or "max"
        return bound


def _threads() -> Finding:
    usable = cores()
    said = f"{usable:g} of {os.cpu_count()} cores"
    told = os.environ.get("OMP_NUM_THREADS")
    if told is not None and told.isdecimal() and int(told) > usable:
        return Finding(
            "note",
            "threads",
            f"{said}; OMP_NUM_THREADS={told} asks for more",
            f"export OMP_NUM_THREADS={max(1, int(usable))}",
        )
    return Finding("ok", "threads", said + (f", OMP_NUM_THREADS={told}" if told else ""))


def _memory() -> Finding:
    total, free = memory()
    if total is None or free is None:
        return Finding("note", "memory", "this system does not say how much there is")
    said = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if free < 2e9:
        return Finding("note", "memory", f"{said}: enough for the demo alone; a model needs its size and as much again")
    return Finding("ok", "memory", said)


def memory() -> tuple[float | None, float | None]:
    """(total, free) in bytes, within what the container is given."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None, None
    kept = {line.partition(":")[0]: line.split() for line in lines}
    total, free = (float(kept[name][1]) * 1024 for name in ("MemTotal", "MemAvailable"))
    try:
        most = float((CGROUP / "memory.max").read_text())
        used = float((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return total, free
    return min(total, most), min(free, max(0.0, most - used))


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    said = f"{free / 1e9:.1f} GB free where you stand"
    return Finding(
        "ok" if free > 5e9 else "note", "disk", said if free > 5e9 else f"{said}: a run of the paper needs more"
    )


def gpus() -> Iterator[Finding]:
    """The GPUs that the driver shows."""
    try:
        asked = subprocess.run(SMI, capture_output=True, text=True, timeout=20, check=True)
    except FileNotFoundError:
        yield Finding("note", "GPU", "none seen (no nvidia-smi): everything runs on the CPU, small models only")
        return
    except (subprocess.SubprocessError, OSError) as error:
        yield Finding(
            "bad", "GPU", f"nvidia-smi does not answer ({type(error).__name__})", "reinstall the NVIDIA driver"
        )
        return
    rows = [line.split(", ") for line in asked.stdout.strip().splitlines()]
    if not rows:
        yield Finding("note", "GPU", "the driver shows none: everything runs on the CPU, small models only")
    for i, row in enumerate(rows):
        name, total, free, driver = (*row, "?", "?", "?", "?")[:4]
        yield Finding("ok", f"GPU {i}", f"{name}, {free} of {total} MiB free, driver {driver}")
