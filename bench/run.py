"""Run the benchmarks that this machine can run, each in a process of its own: `python bench/run.py [NAME ...]`.

Rows go to bench/results.json and the table to docs/benchmarks.md as they are measured. A script that lacks something
(a GPU, vLLM) says so and leaves its earlier rows as they are.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from harness import BENCH, THREADS, say, take

ENVIRONMENT = {
    "OMP_NUM_THREADS": str(THREADS),
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


def scripts() -> list[str]:
    """Every module here that defines rows."""
    own = ("run", "harness")  # this file speaks of rows too: run as a benchmark it would start itself without end
    found = [path for path in BENCH.glob("*.py") if path.stem not in own]
    return sorted(path.stem for path in found if "\ndef rows(" in path.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="scripts to run; all without any")
    parser.add_argument("--quick", action="store_true", help="run small, in seconds, and record nothing")
    parser.add_argument("--take", type=Path, metavar="FILE", help="record the rows of bench/gpu_all.sh's gpu.json")
    given = parser.parse_args()
    if given.take:
        say("\n".join(take(given.take)))
        return
    if unknown := set(given.names) - set(scripts()):
        raise SystemExit(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(scripts())}")
    failed = []
    for name in given.names or scripts():
        say(f"== {name}")
        command = [sys.executable, str(BENCH / f"{name}.py"), *(["--quick"] if given.quick else [])]
        if subprocess.run(command, env=os.environ | ENVIRONMENT, check=False).returncode:
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
