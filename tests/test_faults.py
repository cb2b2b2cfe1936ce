"""What power cuts, kills and full disks leave behind: the fault tier, `make test ARGS="-m faults"`.

Kept apart: a killed Ray actor and driver are in `test_ray.py`, a killed training rank in `test_launch.py`, a shard that
a power cut left empty in `test_runs.py`.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from conftest import MICRO
from dpalign.pipeline.steps import steps
from dpalign.recipe import load
from dpalign.runs.ledger import LEDGER
from test_loop import SAVE_OFTEN, outputs, summary

KILLS = 100
MODES = ("inprocess", "process")
BALLAST = "ballast"
SPARE = 48 * 1024
"""Bytes that are left on the full disk."""


def dpa(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "dpalign", "run", str(MICRO), "--out", str(folder), *SAVE_OFTEN, *words]


def children(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    try:
        own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return own + [grandchild for child in own for grandchild in children(child)]


def killed_until_finished(folder: Path, mode: str, rng: random.Random, most: int, log: Path) -> int:
    """Start a run again and again; each time a random process of it is killed. Returns how often.

    After `most` kills it is left alone.
    """
    kills = 0
    while True:
        with log.open("a") as screen:
            process = subprocess.Popen(dpa(folder, "--launcher", mode), stdout=screen, stderr=screen)
            if kills < most:
                patience = time.monotonic() + rng.uniform(1.0, 9.0)
                while process.poll() is None and time.monotonic() < patience:
                    time.sleep(0.02)
                if process.poll() is None:
                    victims = [process.pid, *children(process.pid)]
                    os.kill(rng.choice(victims), signal.SIGKILL)
                    kills += 1
            code = process.wait()
        if code == 0:
            return kills
        assert code in (2, -signal.SIGKILL), f"code {code}, see {log}"
        assert kills <= most


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
def test_a_hundred_random_kills_lose_nothing_and_change_no_byte(micro_run: Path, tmp_path: Path) -> None:
    """kill -9 at random moments, of the run or of a worker of it; checkpoints are written every other update."""
    rng, kills, number = random.Random(0), 0, 0
    while kills < KILLS:
        mode, number = MODES[number % len(MODES)], number + 1
        folder = tmp_path / f"run-{number}"
        kills += killed_until_finished(folder, mode, rng, KILLS - kills, tmp_path / f"log-{number}.txt")
        assert outputs(folder, load(MICRO)) == outputs(micro_run, load(MICRO)), f"{folder}: other bytes"
        assert summary(folder) == summary(micro_run)
        assert not list(folder.rglob("*.partial"))
        shutil.rmtree(folder)
    assert kills == KILLS


# --- a full disk ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 512 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512m", "tmpfs", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> None:
    """Leave no more than `SPARE` bytes."""
    with (disk / BALLAST).open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - SPARE)


def run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="needs a tmpfs")
def test_a_full_disk_stops_each_stage_with_the_files_name_and_costs_no_byte(micro_run: Path, small_disk: Path) -> None:
    """At every stage that writes more than what is left; with room again the same command goes on to the same bytes."""
    folder, stopped = small_disk / "run", []
    for step in steps(load(MICRO)):
        words = dpa(folder, "--until", step.name)
        if sum(file.stat().st_size for file in (micro_run / step.name).rglob("*") if file.is_file()) > SPARE:
            fill(small_disk)
            ended = run(words)
            assert ended.returncode == 2, (step.name, ended.stderr[-2000:])
            assert "no space left" in ended.stderr, (step.name, ended.stderr[-2000:])
            assert str(folder) in ended.stderr
            assert not (folder / step.name / LEDGER).exists()
            stopped.append(step.name)
            (small_disk / BALLAST).unlink()
        ended = run(words)
        assert ended.returncode == 0, (step.name, ended.stderr[-2000:])
    assert len(stopped) > 5, stopped
    assert outputs(folder, load(MICRO)) == outputs(micro_run, load(MICRO))
