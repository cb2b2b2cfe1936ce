"""What power cuts, kills and full disks leave behind: the fault tier, `make test ARGS="-m faults"`.

Kept apart: a killed Ray actor and driver are in `test_ray.py`, killed vLLM engines in `test_vllm.py` and
`test_serve_vllm.py`, more killed trainings in `test_launch.py`, a shard that a power cut left empty in `test_runs.py`.
"""

import contextlib
import itertools
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
from dpalign.runs.ledger import LEDGER, read_ledger
from test_loop import SAVE_OFTEN, outputs, summary

KILLS = 20
"""Of each of five runs: a hundred in all."""
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
@pytest.mark.parametrize("seed", range(5))
def test_random_kills_lose_nothing_and_change_no_byte(micro_run: Path, tmp_path: Path, seed: int) -> None:
    """kill -9 at random moments, of the run or of a worker of it; checkpoints are written every other update."""
    rng, kills = random.Random(seed), 0
    for number in itertools.count(seed):
        folder = tmp_path / f"run-{number}"
        log = tmp_path / f"log-{number}.txt"
        kills += killed_until_finished(folder, MODES[number % len(MODES)], rng, KILLS - kills, log)
        assert outputs(folder, load(MICRO)) == outputs(micro_run, load(MICRO)), f"{folder}: other bytes"
        assert summary(folder) == summary(micro_run)
        assert not list(folder.rglob("*.partial"))
        shutil.rmtree(folder)
        if kills == KILLS:
            return


# --- a rank of a training ---

IN_TWO = [
    *("--launcher", "torchrun", "--processes", "2", "--until", "sample-2"),
    *("--finetune.steps", "120", "--finetune.save_every", "8", "--finetune.micro_batch", "4"),
]


def rank_of(pid: int, rank: int) -> int | None:
    """The process of a training's rank, of those that a process has started."""
    for child in children(pid):
        with contextlib.suppress(OSError):
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return child
    return None


def updates(folder: Path) -> int:
    """Of the newest checkpoint of policy-1."""
    names = [path.name for path in folder.glob("policy-1.partial/resume/checkpoint-*")]
    return max((int(name.removeprefix("checkpoint-")) for name in names if name[-1].isdecimal()), default=0)


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
def test_ranks_of_a_training_that_are_killed_change_no_byte_of_it_or_of_what_follows(
    micro_run: Path, tmp_path: Path
) -> None:
    """Of two processes the second is killed, then the first. The policy, and the answers of it, are those of peace."""

    def command(folder: Path) -> list[str]:
        return [sys.executable, "-m", "dpalign", "run", str(MICRO), "--out", str(folder), *IN_TWO]

    peace, war = (Path(shutil.copytree(micro_run, tmp_path / name)) for name in ("peace", "war"))
    assert run(command(peace)).returncode == 0
    log = tmp_path / "log.txt"
    for rank in (1, 0):
        before = updates(war)
        with log.open("a") as screen, subprocess.Popen(command(war), stdout=screen, stderr=screen) as process:
            while updates(war) <= before:
                assert process.poll() is None, log.read_text()
                time.sleep(0.002)
            victim = rank_of(process.pid, rank)
            assert victim is not None
            os.kill(victim, signal.SIGKILL)
        assert process.returncode == 2, log.read_text()
    assert 16 <= updates(war) < 120
    ended = run(command(war))
    assert ended.returncode == 0, ended.stderr
    for step in ("policy-1", "sample-2"):
        one, two = read_ledger(peace / step), read_ledger(war / step)
        assert two["outputs"] == one["outputs"] != read_ledger(micro_run / step)["outputs"]
        assert two["counts"] == one["counts"]


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
