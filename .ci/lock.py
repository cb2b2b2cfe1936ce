"""Write requirements.lock: the pins of constraints.txt, each with the sha256 of the wheel that pip takes here.

    .venv/bin/python .ci/lock.py

Nothing is installed. torch is left out: its build (CPU, CUDA, ROCm) comes from the index that pip is set up for.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAD = """\
# The pins of constraints.txt but torch's, with hashes: the wheels for Python 3.11 on Linux x86-64 (glibc).
# CONTRIBUTING.md says how to install from it. Anew, after a change of the pins: .venv/bin/python .ci/lock.py
"""
ASK = ("--dry-run", "--ignore-installed", "--no-deps", "--only-binary", ":all:", "--quiet")


def main() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().split() if "==" in line]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        wanted = [pin for pin in pins if not pin.startswith("torch==")]
        subprocess.run([sys.executable, "-m", "pip", "install", *ASK, "--report", str(report), *wanted], check=True)
        entries = json.loads(report.read_text())["install"]
    found = {}
    for entry in entries:
        made, file = entry["metadata"], entry["download_info"]["archive_info"]
        found[f"{made['name']}=={made['version']}"] = file["hashes"]["sha256"]
    lines = [f"{pin} --hash=sha256:{found[pin]}\n" for pin in sorted(found, key=str.lower)]
    (ROOT / "requirements.lock").write_text(HEAD + "".join(lines))


if __name__ == "__main__":
    main()
