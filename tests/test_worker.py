"""A stage in a process of its own: what it leaves, how it fails, and that it does not outlive its run."""

import contextlib
import logging
import mmap
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import running, wait_until
from dpalign.pipeline import runner
from dpalign.pipeline.shipped import recipe_file
from dpalign.pipeline.steps import knobs_of, processes_of, steps
from dpalign.recipe import Recipe, changed, load
from dpalign.runs import environment
from dpalign.runs import folder as runs
from dpalign.runs.ledger import read_ledger
from dpalign.runs.stopping import Stopped, deferred, stop_requested, stoppable
from dpalign.stages.data import data
from dpalign.stages.stage import Job, Step
from dpalign.stages.world import world as world_stage

FEW = [
    *("--world.helpsteer_prompts", "5", "--world.ultrafeedback_prompts", "7", "--world.sft_prompts", "3"),
    *("--world.tuning_prompts", "2", "--world.test_prompts", "4", "--launcher", "process"),
]
WORLD = Step("world", world_stage)

WAITS = """
import sys, time
from dpalign.pipeline import steps, worker
from dpalign.stages.stage import stage

@stage(reads=lambda r: (), heavy=False)
def world(job):
    for shard in job.work.shards(600, "part-{}.txt"):
        shard.path.write_text("x")
        time.sleep(0.05)

steps.STAGES["world"] = world
worker.main(*sys.argv[1:])
"""

RUNS = """
import sys
from pathlib import Path
from dpalign.pipeline.shipped import recipe_file
from dpalign.pipeline.runner import take_apart
from dpalign.recipe import load
from dpalign.runs.errors import plain_errors
from dpalign.runs.folder import Run
from dpalign.runs.stopping import stoppable
from dpalign.stages.stage import Step
from dpalign.stages.world import world
recipe = load(recipe_file("world"), ["--launcher", "process"])
with plain_errors("dpa"), stoppable(), Run.open(Path(sys.argv[1]), None, {}) as run, run.stage("world", 1) as work:
    sys.executable = sys.argv[2]
    take_apart(recipe, work, Step("world", world))
"""


@pytest.fixture
def world() -> Recipe:
    return load(recipe_file("world"), [*FEW, "--jobs=1"])


def launch(folder: Path, read: Recipe, step: Step = WORLD) -> None:
    """Take a step in a process of its own, even a light one."""
    with (
        runs.Run.open(folder, None, {}) as run,
        run.stage(step.name, step.stage.version, step.inputs, knobs_of(read, step)) as work,
    ):
        runner.take_apart(read, work, step)


def test_a_worker_leaves_the_same_bytes_and_counts_as_the_run_itself(tmp_path: Path, world: Recipe) -> None:
    launch(tmp_path / "apart", world)
    runner.execute(world, tmp_path / "here", until="world")
    apart, here = read_ledger(tmp_path / "apart" / "world"), read_ledger(tmp_path / "here" / "world")
    assert apart["digest"] == here["digest"]
    # 4 rows for each HelpSteer prompt, one for each of the others
    assert apart["counts"] == here["counts"] == {"in": 0, "out": 4 * 5 + 7 + 3 + 2 + 4, "filtered": {}}
    assert not list((tmp_path / "apart").glob("world/.*"))


def test_a_heavy_stage_runs_apart_unless_the_recipe_wants_it_here(
    tmp_path: Path, world: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart: list[str] = []
    monkeypatch.setattr(runner, "take_apart", lambda recipe, work, step: apart.append(recipe.launcher))
    heavy = Step("world", replace(world_stage, heavy=True))
    for name, knobs in (
        ("process", {}),
        ("inprocess", {"launcher": "inprocess"}),
        ("side-by-side", {"launcher": "inprocess", "jobs": 2}),
    ):
        with runs.Run.open(tmp_path / name, None, {}) as run:
            runner.take(changed(world, knobs), run, heavy)
    assert apart == ["process", "inprocess"]
    assert (tmp_path / "inprocess" / "world" / "helpsteer.jsonl").is_file()


def test_a_workers_error_is_one_line_and_the_runs_error_names_the_stage(
    tmp_path: Path, world: Recipe, capfd: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "helpsteer.jsonl").write_text('{"prompt": \n')
    for name in ("ultrafeedback", "sft", "tuning", "test"):
        (empty / f"{name}.jsonl").write_text("")
    step = Step("data", data, {"world": empty})
    with pytest.raises(ValueError, match="stage data: its process ended with code 2; its own message stands above"):
        launch(tmp_path / "run", world, step)
    screen = capfd.readouterr().err
    assert f"\ndata: {empty}/helpsteer.jsonl" in screen
    assert "Traceback" not in screen
    assert "Traceback" in (tmp_path / "run" / "log.txt").read_text()
    assert not (tmp_path / "run" / "data").exists()


def test_a_worker_ended_from_outside_is_said_to_be(
    tmp_path: Path, world: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ValueError, match="stage world: its process was ended by SIGKILL; out of memory"):
        launch(tmp_path / "run", world)


@pytest.mark.parametrize("leaves_file", [False, True])
def test_a_worker_that_ends_well_before_its_work_is_done_fails_the_stage_which_then_goes_on(
    tmp_path: Path, world: Recipe, monkeypatch: pytest.MonkeyPatch, leaves_file: bool
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{'echo x > $3/$4.partial/helpsteer.jsonl' if leaves_file else ''}\nexit 0\n")
    python.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(python))
        with pytest.raises(ValueError, match="stage world: its process ended with code 0 before its work was done"):
            launch(tmp_path / "run", world)
    assert not (tmp_path / "run" / "world").exists()
    launch(tmp_path / "run", world)
    assert read_ledger(tmp_path / "run" / "world")["counts"]["out"] == 36


def test_a_worker_without_any_output_fails_the_stage(tmp_path: Path) -> None:
    with runs.Run.open(tmp_path / "run", None, {}) as run, run.stage("sft", 1) as work:
        work.leave_tally()
        with pytest.raises(ValueError, match="stage sft: its process left no file"):
            work.require_left()


def test_a_stage_in_which_something_exits_python_fails_with_the_place_in_the_log(tmp_path: Path, world: Recipe) -> None:
    def leaves(_: Job) -> None:
        sys.exit(0)

    with (
        runs.Run.open(tmp_path / "run", None, {}) as run,
        pytest.raises(ValueError, match=r"stage world: code that it called ended Python with sys\.exit\(0\)"),
    ):
        runner.take(world, run, Step("world", replace(world_stage, function=leaves)))
    assert "in leaves" in (tmp_path / "run" / "log.txt").read_text()
    assert not (tmp_path / "run" / "world").exists()


def test_a_warning_of_an_engine_is_kept_in_the_log(tmp_path: Path, world: Recipe) -> None:
    def warns(job: Job) -> None:
        logging.getLogger("dpalign.engines.memory").warning("out of memory, %d answers", 8)
        (job.out / "x").write_text("x")

    with runs.Run.open(tmp_path / "run", None, {}) as run:
        runner.take(world, run, Step("world", replace(world_stage, function=warns)))
    assert "world: out of memory, 8 answers" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
def test_a_run_that_sigterm_ends_says_resume_ends_its_worker_and_keeps_the_shards(tmp_path: Path) -> None:
    """75 is EX_TEMPFAIL of sysexits.h."""
    folder = tmp_path / "run"
    run = subprocess.Popen([sys.executable, "-c", RUNS, folder, waiting(tmp_path)], stderr=subprocess.PIPE, text=True)
    wait_until((folder / "world.partial" / "part-5.txt").is_file)
    worker = int(Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()[0])
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=20)[1]
    assert run.returncode == 75
    assert not running(worker)
    assert "Traceback" not in said
    assert "world: stopped after" in (folder / "log.txt").read_text()
    with runs.Run.open(folder, None, {}) as again, again.stage("world", 1) as work:
        assert next(work.shards(600, "part-{}.txt")).index >= 5
        for index in range(600):
            (work.folder / f"part-{index}.txt").write_text("x")


@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
def test_a_run_whose_worker_alone_is_ended_by_sigterm_says_resume_too(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = subprocess.Popen([sys.executable, "-c", RUNS, folder, waiting(tmp_path)], stderr=subprocess.DEVNULL)
    wait_until((folder / "world.partial" / "part-5.txt").is_file)
    os.kill(int(Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()[0]), signal.SIGTERM)
    assert run.wait(timeout=20) == 75


def test_work_that_defers_sigterm_ends_itself_and_at_its_end_at_the_latest() -> None:
    seen = list[bool]()

    def work() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # said twice, it counts once
        seen.append(stop_requested())

    with pytest.raises(Stopped), stoppable(), deferred():
        work()
    assert (seen, stop_requested()) == ([True], False)
    with pytest.raises(Stopped), stoppable():
        work()
    assert seen == [True]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_worker_is_refused_where_no_run_waits_for_it(tmp_path: Path) -> None:
    runs.Run.open(tmp_path, "", {}).close()
    command = [sys.executable, "-m", "dpalign.pipeline.worker", tmp_path, "world"]
    # Its parent must hold the folder; here that is this shell, which does not.
    done = subprocess.run(["sh", "-c", '"$@"; exit $?', "sh", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"world: {tmp_path}: no run that waits for this worker; `dpa run` starts its own\n"


def test_a_worker_refuses_another_number_of_processes_than_was_asked_for(
    tmp_path: Path, world: Recipe, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="stage world: its process ended with code 2"):
        launch(tmp_path / "run", world)
    assert "world: 1 processes were asked for, and WORLD_SIZE is 4\n" in capfd.readouterr().err


def test_only_what_trains_runs_in_several_processes(world: Recipe) -> None:
    several = changed(world, {"launcher": "torchrun", "processes": 8})
    processes = {step.stage.name: processes_of(several, step) for step in steps(several)}
    assert processes["finetune"] == processes["reward"] == 8
    assert processes["sample"] == processes["report"] == processes["data"] == 1
    alone = changed(several, {"launcher": "process"})
    assert {processes_of(alone, step) for step in steps(alone)} == {1}


def waiting(tmp_path: Path) -> Path:
    """What stands for Python in `python -m dpalign.pipeline.worker RUN world`: a stage that takes 30 s."""
    python = tmp_path / "python"
    (tmp_path / "waits.py").write_text(WAITS)
    python.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {tmp_path}/waits.py "$@"\n')
    python.chmod(0o755)
    return python


@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
def test_a_worker_does_not_outlive_a_killed_run_and_the_next_one_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = subprocess.Popen([sys.executable, "-c", RUNS, folder, waiting(tmp_path)], stderr=subprocess.DEVNULL)
    try:
        wait_until((folder / "world.partial" / "part-5.txt").is_file)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        worker = int(children[0])
        assert running(worker)
        held = {os.path.realpath(descriptor) for descriptor in Path(f"/proc/{worker}/fd").iterdir()}
        assert str(folder / ".lock") in held  # so that no other run begins before it has ended
        with pytest.raises(ValueError, match="two runs into one folder"):
            runs.Run.open(folder, None, {})
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    wait_until(lambda: not running(worker), seconds=5.0)
    began = time.monotonic()
    with runs.Run.open(folder, None, {}) as again, again.stage("world", 1) as work:
        assert work.reason == "new; goes on from where it was stopped"
        assert next(work.shards(600, "part-{}.txt")).index >= 5
        for index in range(600):  # the rest at once
            (work.folder / f"part-{index}.txt").write_text("x")
    assert time.monotonic() - began < 8.0


def test_what_a_worker_counted_is_not_counted_twice_when_its_run_was_killed_before_the_end(tmp_path: Path) -> None:
    for killed in (True, False):
        with (
            contextlib.suppress(RuntimeError),
            runs.Run.open(tmp_path / "run", None, {}) as run,
            run.stage("sft", 1) as work,
        ):
            inside = runs.Run(run.folder, -1, None).stage_at_work("sft") if killed else work
            assert inside.folder == work.folder
            inside.tally.add(rows_in=5, rows_out=4, filtered={"too long": 1}, trained=100)
            if killed:
                inside.leave_tally()
                raise RuntimeError("killed")
    ledger = read_ledger(tmp_path / "run" / "sft")
    assert ledger["counts"] == {"in": 5, "out": 4, "filtered": {"too long": 1}}
    assert ledger["tokens"]["trained"] == 100


def test_threads_are_settled_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import os; from dpalign.runs.environment import settle_threads\n"
        "settle_threads(1, for_torch=True)\n"
        "import torch; print(torch.get_num_threads(), *(os.environ[n] for n in ('OMP_NUM_THREADS', 'GOMP_SPINCOUNT')))"
    )
    clean = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS" and k not in environment.WAITING}
    done = subprocess.run([sys.executable, "-c", code], env=clean, check=True, capture_output=True, text=True)
    assert done.stdout == "1 1 0\n"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
@pytest.mark.parametrize(("gpus", "kept"), [((), True), (("/",), False)])
def test_without_a_gpu_freed_memory_is_kept(gpus: tuple[str, ...], kept: bool) -> None:
    """Measured by page faults: what was given back is faulted in again."""
    size, faults = 1 << 26, "resource.getrusage(resource.RUSAGE_SELF).ru_minflt"
    code = (
        f"import resource; from dpalign.runs import environment; environment.GPU_DEVICES = {gpus}\n"
        f"environment.keep_freed_memory(); bytes([7]) * {size}\n"
        f"before = {faults}; bytes([8]) * {size}; print({faults} - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert (int(done.stdout) < size // mmap.PAGESIZE // 10) == kept
