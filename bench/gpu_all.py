"""All that needs a card, in at most ten minutes: `bash bench/gpu_all.sh [--small] [--out FOLDER] [PART ...]`.

It says what the machine has, then runs each part in a process of its own, with a limit of its own. A part that lacks
something, fails or takes too long says so, and the next one begins. FOLDER/gpu.json holds it all after every part;
`python bench/run.py --take FOLDER/gpu.json` puts its rows into docs/benchmarks.md. --small is for tests: every part at
a tiny size, on any device.

This file needs Python and `packaging` alone: what else is missing, it names.
"""

import argparse
import contextlib
import importlib.metadata as metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from packaging.requirements import Requirement

from dpalign.dial.doctor.machine import cores, gpus, memory

if TYPE_CHECKING:
    from harness import Row

BENCH: Final = Path(__file__).resolve().parent
ROOT: Final = BENCH.parent
SECONDS: Final = 570.0
"""For everything."""
PATIENCE: Final = 5.0
"""What the limits are multiplied with at the tiny size: a busy CPU takes a minute to load the libraries."""
MODEL: Final = ("numpy", "safetensors", "torch", "transformers")
TRAINER: Final = (*MODEL, "accelerate", "datasets", "jinja2", "peft", "pyarrow", "pydantic", "tokenizers", "trl")
PACKAGE: Final = "dpalign[train]"
"""Stands for all that pyproject.toml asks for, with the extra `train`."""

RUN: Final = "smol"
"""The recipe of the last part, recipes/smol.toml."""
RUN_SMALL: Final = "micro"
RUN_NEEDS: Final = 150.0
"""Seconds below which the run does not begin."""
SPARED: Final = 8.0
"""Seconds before the end at which the run is broken off, so that what it did can be counted."""
UNITS: Final = {"sampled": "tokens/s", "scored": "answers/s", "trained": "tokens/s"}
"""Of what a stage's ledger counts."""
LARGER: Final = (
    *("--model.dtype", "bfloat16"),
    *("--sampling.prompts", "0"),
    *("--sampling.n", "16"),
    *("--sampling.first", "80"),
    *("--sampling.max_new_tokens", "160"),
    *("--sampling.rows", "1024"),
    *("--evaluation.samples", "4"),
)
"""By what a card's run of the recipe is larger than a laptop's."""


@dataclass(frozen=True)
class Part:
    """One thing that is measured."""

    name: str
    seconds: float
    """Its limit."""
    needs: tuple[str, ...] = MODEL


PARTS: Final = (
    Part("attention", 60),
    Part("scoring", 110),
    Part("sampling", 110),
    Part("lora", 90, (*MODEL, "peft")),
    Part("full", 90),
    Part("trainer", 90, TRAINER),
    Part("vllm", 150, (*MODEL, "vllm")),
    Part(RUN, SECONDS, (PACKAGE,)),  # what is left
)


@dataclass(frozen=True)
class Result:
    """What became of a part."""

    name: str
    state: str
    """measured, missing (something that it needs), skipped, failed, or out of time."""
    reason: str = ""
    seconds: float = 0.0


# --- what the machine has ---


def found() -> dict[str, Any]:
    """The machine, its card, and the versions of what the package asks for."""
    total, _ = memory()
    asked = {one.name: one for one in requirements()} | {"vllm": Requirement("vllm")}
    return {
        "python": sys.version.split()[0],
        "cores": cores(),
        "memory": "unknown" if total is None else f"{total / 2**30:.0f} GiB",
        "cards": [finding.text for finding in gpus() if finding.check != "GPU"],
        **device(),
        "packages": {name: described(one) for name, one in sorted(asked.items())},
    }


def requirements() -> list[Requirement]:
    """What the package and its trainings need, by pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["train"])]


def described(one: Requirement) -> str:
    """Its version here; whether it is another than the package asks for."""
    if not importable(one.name):
        return "missing"
    try:
        version = metadata.version(one.name)
    except metadata.PackageNotFoundError:
        return "of no known version"
    return (
        version if one.specifier.contains(version, prereleases=True) else f"{version}, where {one.specifier} is asked"
    )


def importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


PROBE: Final = """
import json, torch
cuda = torch.cuda.is_available()
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"cuda": cuda, "devices": names, "build": torch.version.cuda or "cpu"}))
"""


def device() -> dict[str, Any]:
    """What torch sees; tried in a process of its own, since a broken torch may end it."""
    try:
        tried = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=90)
    except subprocess.TimeoutExpired:
        return {"cuda": False, "torch": "does not load within 90 s"}
    if tried.returncode:
        return {"cuda": False, "torch": (tried.stderr.strip().splitlines() or ["does not load"])[-1]}
    reply: dict[str, Any] = json.loads(tried.stdout.splitlines()[-1])
    return reply


def missing(part: Part) -> list[str]:
    """The packages that a part needs and that are not here."""
    names = [one.name for need in part.needs for one in (requirements() if need == PACKAGE else [Requirement(need)])]
    return [name for name in names if not importable(name)]


# --- one part, in its own process ---


def rows_of(name: str, small: bool, out: Path, end: float) -> "Iterator[Row]":
    """The rows of a part."""
    if name == RUN:
        return run(small, out, end)
    import torch

    import gpu
    import gpu_training as training
    from harness import THREADS

    size = gpu.tiny() if small else gpu.Size(gpu.seven_billion())
    torch.set_num_threads(THREADS)
    match name:
        case "attention":
            return gpu.kernel(size)
        case "scoring":
            return gpu.scoring(size)
        case "sampling":
            return gpu.sampling(size)
        case "lora":
            return training.update(training.LORA, size)
        case "full":
            return training.update(training.FULL, size)
        case "trainer":
            return training.trainer(size)
        case "vllm" if size.cuda:
            return gpu.beside_vllm(size)
        case _:
            from harness import Unable

            raise Unable(f"{name} needs a CUDA device")


def run(small: bool, out: Path, end: float) -> "Iterator[Row]":
    """The recipe's run, larger: tokens a second of its stages. Its figures and its page are copied to the folder.

    SMOL_BASE names the model in place of the recipe's.

    Args:
        end: when its time is over, by `time.monotonic`.
    """
    from dpalign.recipe import load
    from harness import Unable

    name = RUN_SMALL if small else RUN
    recipe, folder = ROOT / "recipes" / f"{name}.toml", out / "run" if small else ROOT / "runs" / f"gpu-{name}"
    if not recipe.is_file():
        raise Unable(f"recipes/{name}.toml is not in this checkout")
    base = os.environ.get("SMOL_BASE", "")
    changes = () if small else (*LARGER, *(("--model.base", base, "--sft.checkpoint", base) if base else ()))
    require_weights(load(recipe, changes).model.base)
    command = [sys.executable, "-m", "dpalign", "run", str(recipe), "--out", str(folder), *changes]
    began = time.monotonic()
    try:
        subprocess.run(command, check=True, timeout=end - SPARED - began, cwd=ROOT)
        for file in ("summary.json", "index.html"):
            shutil.copyfile(folder / "report" / file, out / f"{name}-{file}")
        yield _figure(f"{name}: the whole run", time.monotonic() - began, "s", " ".join(changes))
    except subprocess.TimeoutExpired:
        done = ", ".join(sorted(path.parent.name for path in folder.glob("*/ledger.json"))) or "none"
        raise TimeoutError(f"its run is not at its end; finished: {done}; {folder} goes on from there") from None
    finally:
        ledgers = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/ledger.json")]
        for kind, unit in UNITS.items():
            did = [one for one in ledgers if one["tokens"][kind] and sum(map(bool, one["tokens"].values())) == 1]
            if took := sum(ledger["seconds"] for ledger in did):
                rate = sum(ledger["tokens"][kind] for ledger in did) / took
                yield _figure(f"{name}: {kind} in stages that do nothing else", rate, unit, f"{len(did)} stages")


def _figure(name: str, figure: float, unit: str, note: str) -> "Row":
    from gpu import COMMAND
    from harness import Row

    return Row(name, figure, figure, figure, None, "no peer", COMMAND, note, unit)


def require_weights(base: str) -> None:
    """Unable where a model of the hub is in no cache: nothing is fetched here."""
    from harness import Unable

    if base in ("", "world") or Path(os.path.expandvars(base)).exists():
        return
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(base, "config.json"), str):
        raise Unable(f"the weights of {base} are not here; SMOL_BASE=FOLDER names a copy")


def child(name: str, small: bool, out: Path, end: float, to: Path) -> None:
    """Measure one part, and leave each row as it comes: what ends this process leaves those before it."""
    from harness import Unable, machine

    with to.open("a", encoding="utf-8") as file:

        def leave(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        try:
            for row in rows_of(name, small, out, end):
                leave({"row": asdict(row) | {"script": "gpu", "machine": machine()}})
            leave({"state": "measured"})
        except Unable as lacking:
            leave({"state": "missing", "reason": str(lacking)})
        except TimeoutError as late:
            leave({"state": "out of time", "reason": str(late)})
        except Exception as error:  # of any kind: the other parts go on
            traceback.print_exc()
            leave({"state": "failed", "reason": f"{type(error).__name__}: {error}"})


# --- all parts ---


def take(part: Part, small: bool, out: Path, seconds: float) -> tuple[Result, list[dict[str, Any]]]:
    """One part, ended where its time is over; what became of it, and its rows."""
    if lacking := missing(part):
        return Result(part.name, "missing", ", ".join(lacking)), []
    if part.name == RUN and seconds < RUN_NEEDS:
        alone = f"bash bench/gpu_all.sh {RUN}"
        return Result(part.name, "skipped", f"{seconds:.0f} s are left, fewer than {RUN_NEEDS:.0f}; alone: {alone}"), []
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "lines"
        began = time.monotonic()
        end = f"{began + seconds}"  # one clock for all processes of a machine
        command = [sys.executable, __file__, "--out", str(out), "--part", part.name, end, str(to)]
        process = subprocess.Popen([*command, *(["--small"] if small else [])], process_group=0)
        ended = "failed", "its process ended without a word"
        try:
            code = process.wait(seconds)
            ended = "failed", f"its process ended with {code}"
        except subprocess.TimeoutExpired:
            ended = "out of time", f"after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it started ends with it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        lines = [json.loads(line) for line in to.read_text(encoding="utf-8").splitlines()] if to.exists() else []
    state = next((line for line in lines if "state" in line), dict(zip(("state", "reason"), ended, strict=True)))
    rows = [line["row"] for line in lines if "row" in line]
    return Result(part.name, state["state"], state.get("reason", ""), round(time.monotonic() - began, 1)), rows


def measure(parts: Sequence[Part], small: bool, out: Path) -> list[Result]:
    """All parts, one after the other; gpu.json is written anew after each."""
    began, results, rows = time.monotonic(), list[Result](), list[dict[str, Any]]()
    machine, times = found(), PATIENCE if small else 1.0
    say(json.dumps(machine, indent=1))
    for part in parts:
        left = times * SECONDS - (time.monotonic() - began)
        say(f"== {part.name}")
        if machine["cuda"] or small:
            result, measured = take(part, small, out, min(times * part.seconds, left))
        else:
            result, measured = Result(part.name, "missing", "a CUDA device; --small runs without one"), []
        results.append(result)
        rows += measured
        say(f"{part.name}: {result.state} {result.reason} ({result.seconds:.0f} s)")
        content = {"small": small, "machine": machine, "parts": [asdict(one) for one in results], "rows": rows}
        (out / "gpu.json.partial").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (out / "gpu.json.partial").replace(out / "gpu.json")
    return results


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(names)}; all without any")
    parser.add_argument("--small", action="store_true", help="tiny, on any device; its rows are never recorded")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "runs" / "gpu"))
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := set(given.parts) - set(names):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if given.part:
        name, end, to = given.part
        child(name, given.small, out, float(end), Path(to))
        return 0
    results = measure([part for part in PARTS if not given.parts or part.name in given.parts], given.small, out)
    say(f"{out / 'gpu.json'}")
    return 1 if any(result.state in ("failed", "out of time") for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
