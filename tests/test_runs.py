"""The run folder: what is skipped, what is redone and why, and that a kill changes nothing of the result."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from conftest import wait_until
from dpalign.engines.memory import in_halves
from dpalign.rows import write_table
from dpalign.runs import folder as runs
from dpalign.runs import ledger, lock, progress
from dpalign.runs.errors import naming, plain_errors
from dpalign.stages.shards import Shards

ENVIRONMENT = {"git_commit": "abc"}

SHARDED = """
import sys, time
from pathlib import Path
from dpalign.runs import folder as runs
folder, prompts, pause = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
with runs.Run.open(folder, "seed = 1") as run:
    with run.stage("sample", 1, {"prompts": prompts}, {"n": 8}) as work:
        if not work.done:
            for shard in work.shards(8, "part-{:02d}.txt"):
                time.sleep(pause)
                shard.tally.rows_in += 10
                shard.tally.rows_out += 9
                shard.tally.filtered["too long"] += 1
                shard.tally.sampled += 100 + shard.index
                runs.write_text(shard.path, f"answers of shard {shard.index}")
"""


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("tell me\n")
    return path


def pipeline(folder: Path, prompts: Path, epochs: int = 2, sft_version: int = 1) -> dict[str, str | None]:
    """sft -> sample -> report; each stage's reason to run, None where skipped. `report` reads counts only."""
    reasons = {}
    with runs.Run.open(folder, f"sft.epochs = {epochs}", ENVIRONMENT) as run:
        with run.stage("sft", sft_version, {"prompts": prompts}, {"sft.epochs": epochs}) as work:
            reasons["sft"] = work.reason
            if not work.done:
                runs.write_text(work.folder / "weights", f"trained {epochs} epochs on {prompts.read_text()}")
                runs.write_text(work.resume / "checkpoint-1" / "optimizer.pt", "scratch")
        with run.stage("sample", 1, {"policy": "sft"}, {"n": 8}) as work:
            reasons["sample"] = work.reason
            if not work.done:
                policy = (work.run.folder / "sft" / "weights").read_text()
                runs.write_text(work.folder / "d1" / "part.txt", f"answers of [{policy}]")
                runs.write_json(work.folder / "counts.json", {"rows": 8})
        with run.stage("report", 1, {"counts": "sample/counts.json"}) as work:
            reasons["report"] = work.reason
            if not work.done:
                runs.write_text(work.folder / "index.html", "8 rows")
    return reasons


def test_a_training_measured_again_redoes_only_what_reads_its_figures(tmp_path: Path) -> None:
    reasons = {}
    for measured in (0.5, 0.6):
        with runs.Run.open(tmp_path / "run", "", ENVIRONMENT) as run:
            with run.stage("reward", 1, knobs={"measured": measured}) as work:
                runs.write_text(work.folder / "model" / "weights", "the same")
                runs.write_json(work.folder / "quality.json", measured)
            for name, figures in (("score", False), ("report", True)):
                with run.stage(name, 1, {"reward": "reward"}, figures=figures) as work:
                    reasons[name] = work.reason
                    if not work.done:
                        runs.write_text(work.folder / "out", "")
    assert reasons == {"score": None, "report": "input reward changed"}
    readers = [
        ledger.Stage("score", 1, {"reward": "reward"}),
        ledger.Stage("report", 1, {"reward": "reward"}, figures=True),
    ]
    assert ledger.plan(tmp_path / "run", readers) == {"score": "done", "report": "done"}


def stages(prompts: Path, epochs: int = 2) -> list[ledger.Stage]:
    return [
        ledger.Stage("sft", 1, {"prompts": prompts}, {"sft.epochs": epochs}),
        ledger.Stage("sample", 1, {"policy": "sft"}, {"n": 8}),
        ledger.Stage("report", 1, {"counts": "sample/counts.json"}),
    ]


def files(folder: Path) -> Iterator[str]:
    return (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())


def times(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_mtime_ns for name in files(folder)}


def test_running_again_skips_everything_and_touches_no_output(tmp_path: Path, prompts: Path) -> None:
    run = tmp_path / "run"
    assert pipeline(run, prompts) == {"sft": "new", "sample": "new", "report": "new"}
    before = {name: when for name, when in times(run).items() if "/" in name}
    assert pipeline(run, prompts) == {"sft": None, "sample": None, "report": None}
    assert {name: when for name, when in times(run).items() if "/" in name} == before
    assert (run / "recipe.toml").read_text() == "sft.epochs = 2"
    assert json.loads((run / "environment.json").read_text()) == ENVIRONMENT
    assert (run / "log.txt").read_text().count("done before, nothing changed") == 3


def test_a_changed_knob_redoes_its_stage_and_those_that_read_what_came_of_it(tmp_path: Path, prompts: Path) -> None:
    run = tmp_path / "run"
    pipeline(run, prompts)
    assert pipeline(run, prompts, epochs=3) == {
        "sft": "sft.epochs 2 -> 3",
        "sample": "input policy changed",
        "report": None,  # the counts came out the same
    }
    assert (run / "sample" / "d1" / "part.txt").read_text() == "answers of [trained 3 epochs on tell me\n]"


@pytest.mark.parametrize(("old", "new"), [({}, {"a": {}}), ({"a": {}}, {})])
def test_a_knob_of_nothing_that_comes_or_goes_is_named(
    old: dict[str, Any], new: dict[str, Any], tmp_path: Path
) -> None:
    for knobs in (old, new):
        with runs.Run.open(tmp_path / "run", "", ENVIRONMENT) as run, run.stage("sft", 1, knobs=knobs) as work:
            if not work.done:
                runs.write_text(work.folder / "weights", "w")
    assert work.reason == ("a {} is new" if new else "a {} is gone")


def test_a_raised_version_redoes_a_stage_but_the_same_bytes_redo_nothing_below(tmp_path: Path, prompts: Path) -> None:
    run = tmp_path / "run"
    pipeline(run, prompts)
    assert pipeline(run, prompts, sft_version=2) == {"sft": "version 1 -> 2", "sample": None, "report": None}


def test_external_files_count_by_their_content_and_not_by_their_date(tmp_path: Path, prompts: Path) -> None:
    """A file, and a folder by all its files."""
    data, reasons = tmp_path / "data", []
    runs.write_text(data / "a" / "train.txt", "1")

    def read() -> None:
        with (
            runs.Run.open(tmp_path / "run", "", ENVIRONMENT) as run,
            run.stage("read", 1, {"data": data, "prompts": prompts}) as work,
        ):
            reasons.append(work.reason)

    read()
    os.utime(prompts, (1, 1))
    read()
    prompts.write_text("tell us\n")
    read()
    runs.write_text(data / "b" / "more.txt", "2")
    read()
    assert reasons == ["new", None, "input prompts changed", "input data changed"]


def test_a_path_in_the_run_folder_is_a_stage_where_it_has_a_ledger_and_else_plain_files(tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    reasons = []
    for rows, weights in (("1", "w"), ("1", "w"), ("2", "w")):
        with runs.Run.open(run_folder, None, ENVIRONMENT) as run:
            runs.write_text(run_folder / "my-model" / "weights", weights)
            runs.write_text(tmp_path / "rows.txt", rows)
            with run.stage("data", 1, {"rows": tmp_path / "rows.txt"}) as work:
                if not work.done:
                    runs.write_text(work.folder / "count", "1")
            inputs = {"data": run_folder / "data", "policy": run_folder / "my-model"}
            with run.stage("sample", 1, inputs) as work:
                reasons.append(work.reason)
    # the third time `data` is made again with the same bytes, and its ledger's new times do not count
    assert reasons == ["new", None, None]
    assert not (run_folder / "recipe.toml").exists()


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda sft: (sft / "weights").unlink(), "output weights is missing"),
        (lambda sft: (sft / "weights").write_text("trai"), "output weights is cut short or altered"),
        (lambda sft: (sft / "ledger.json").write_text('{"name": "sf'), "damaged ledger (Unterminated string"),
        (lambda sft: (sft / "ledger.json").write_text("[]"), "damaged ledger (it disagrees with its hashes)"),
        (lambda sft: (sft / "ledger.json").write_text("7"), "damaged ledger ('int' object is not iterable)"),
        (
            lambda sft: (sft / "ledger.json").write_text((sft / "ledger.json").read_text().replace("epochs", "epoch")),
            "damaged ledger (it disagrees with its hashes)",
        ),
        (lambda sft: (sft / "ledger.json").unlink(), "no ledger; the stage is not finished"),
    ],
)
def test_a_damaged_stage_is_redone_with_the_reason(
    harm: Callable[[Path], None], reason: str, tmp_path: Path, prompts: Path
) -> None:
    run = tmp_path / "run"
    pipeline(run, prompts)
    whole = ledger.read_ledger(run / "sft")
    harm(run / "sft")
    assert reason in ledger.plan(run, stages(prompts))["sft"]
    done = pipeline(run, prompts)
    assert reason in str(done["sft"])
    assert (done["sample"], done["report"]) == (None, None)
    assert ledger.read_ledger(run / "sft")["digest"] == whole["digest"]


def test_the_plan_says_what_a_run_would_do_and_touches_nothing(tmp_path: Path, prompts: Path) -> None:
    run = tmp_path / "run"
    fresh = {"sft": "to do: new", "sample": "to do: new", "report": "to do: new"}
    assert ledger.plan(run, stages(prompts)) == fresh
    assert not run.exists()
    pipeline(run, prompts)
    before = times(run)
    assert ledger.plan(run, stages(prompts)) == {"sft": "done", "sample": "done", "report": "done"}
    assert ledger.plan(run, stages(prompts, epochs=4)) == {
        "sft": "to do: sft.epochs 2 -> 4",
        "sample": "to do: input policy is to be made again",
        "report": "to do: input counts is to be made again",
    }
    assert times(run) == before
    prompts.unlink()
    assert ledger.plan(run, stages(prompts))["sft"] == (
        f"to do: input prompts changed; input prompts: {prompts} is missing or empty"
    )


def test_trainer_scratch_and_half_written_files_are_no_outputs_and_vanish(tmp_path: Path, prompts: Path) -> None:
    run = tmp_path / "run"
    with runs.Run.open(run, "", ENVIRONMENT) as opened, opened.stage("sft", 1) as work:
        runs.write_text(work.resume / "checkpoint-1" / "optimizer.pt", "scratch")
        runs.write_text(work.folder / "weights", "w")
        (work.folder / ".part-00001.parquet.partial").write_text("half")
        assert (run / "sft.partial" / "resume" / "checkpoint-1" / "optimizer.pt").is_file()
    assert list(files(run / "sft")) == ["ledger.json", "weights"]
    assert list(ledger.read_ledger(run / "sft")["outputs"]) == ["weights"]
    assert not (run / "sft.partial").exists()


def test_the_ledger_says_what_was_read_made_and_spent(tmp_path: Path, prompts: Path) -> None:
    with (
        runs.Run.open(tmp_path / "run", "", ENVIRONMENT) as run,
        run.stage("sft", 3, {"prompts": prompts}, {"lr": 1e-5, "heads": (6, 7)}) as work,
    ):
        work.tally.rows_in, work.tally.rows_out, work.tally.trained = 5, 4, 1000
        work.tally.filtered["empty"] = 1
        runs.write_text(work.folder / "weights", "w")
    said = ledger.read_ledger(work.output)
    assert (said["name"], said["version"], said["git_commit"]) == ("sft", 3, "abc")
    assert said["knobs"] == {"lr": 1e-5, "heads": [6, 7]}
    assert said["inputs"]["prompts"]["path"] == str(prompts)
    # sha256 of the one letter "w"
    assert said["outputs"] == {"weights": "50e721e49c013f00c62cf59f2163542a9d8df02464efeb615d31051b0fddc326"}
    assert said["sizes"] == {"weights": 1}
    assert said["counts"] == {"in": 5, "out": 4, "filtered": {"empty": 1}}
    assert said["tokens"] == {"sampled": 0, "scored": 0, "trained": 1000}
    assert "sft: finished in 0 s (5 rows in, 4 out, 1 empty)" in (tmp_path / "run" / "log.txt").read_text()


def test_a_stage_killed_amid_its_shards_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, prompts: Path) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    arguments = [sys.executable, "-c", SHARDED]
    subprocess.run([*arguments, whole, prompts, "0"], check=True, capture_output=True)
    process = subprocess.Popen([*arguments, broken, prompts, "0.1"], stderr=subprocess.DEVNULL)
    partial = broken / "sample.partial"
    wait_until((partial / "part-02.txt").is_file)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (broken / "sample").exists()
    made = times(partial)
    again = subprocess.run([*arguments, broken, prompts, "0"], check=True, capture_output=True, text=True)
    assert "sample: new; goes on from where it was stopped" in again.stderr
    first, second = ledger.read_ledger(whole / "sample"), ledger.read_ledger(broken / "sample")
    assert second["digest"] == first["digest"]
    assert second["counts"] == first["counts"] == {"in": 80, "out": 72, "filtered": {"too long": 8}}
    assert second["tokens"] == first["tokens"] == {"sampled": 828, "scored": 0, "trained": 0}
    assert times(broken / "sample")["part-00.txt"] == made["part-00.txt"]


def scored_shards(folder: Path, made: list[int], count: int = 4) -> None:
    """A stage of shards with a file of scores beside each."""
    with runs.Run.open(folder, "", ENVIRONMENT) as run, run.stage("evaluate", 1, {}, {"n": count}) as work:
        for shard in work.shards(count, "answers/part-{}.txt"):
            made.append(shard.index)
            runs.write_text(work.folder / "scores" / shard.path.name, f"scores {shard.index}")
            shard.tally.add(rows_in=10, rows_out=10)
            runs.write_text(shard.path, f"answers {shard.index}")
        if made[-1] == count - 1 and len(made) <= count:
            raise RuntimeError("power loss")


@pytest.mark.parametrize(
    ("harm", "again"),
    [
        (lambda folder: (folder / "answers" / "part-1.txt").write_text("answ"), [1]),
        (lambda folder: (folder / "scores" / "part-2.txt").write_text(""), [2]),
        (lambda folder: (folder / "scores" / "part-2.txt").write_text("scores 9"), [2]),
        (lambda folder: (folder / "scores" / "part-0.txt").unlink(), [0]),
        (lambda folder: (folder / ".stage" / "tallies" / "answers" / "part-3.txt.json").write_text('{"rows'), [3]),
    ],
)
def test_a_shard_that_a_power_loss_cut_after_its_tally_is_made_again_and_the_others_are_kept(
    tmp_path: Path, harm: Callable[[Path], None], again: list[int]
) -> None:
    made: list[int] = []
    with pytest.raises(RuntimeError, match="power loss"):
        scored_shards(tmp_path / "run", made)
    partial = tmp_path / "run" / "evaluate.partial"
    kept = times(partial)
    harm(partial)
    scored_shards(tmp_path / "run", made)
    assert made == [0, 1, 2, 3, *again]
    finished = tmp_path / "run" / "evaluate"
    unharmed = [name for name in kept if name[-5] not in map(str, again) and name.endswith(".txt")]
    assert len(unharmed) == 6
    assert {name: kept[name] for name in unharmed} == {name: times(finished)[name] for name in unharmed}
    assert ledger.read_ledger(finished)["counts"] == {"in": 40, "out": 40, "filtered": {}}
    assert [(finished / name).read_text() for name in ("answers/part-1.txt", "scores/part-2.txt")] == [
        "answers 1",
        "scores 2",
    ]


def test_a_damaged_shard_is_logged_by_name(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        scored_shards(tmp_path / "run", [])
    (tmp_path / "run" / "evaluate.partial" / "scores" / "part-2.txt").write_text("scores 9")
    scored_shards(tmp_path / "run", [0] * 9)
    assert "scores/part-2.txt" in (tmp_path / "run" / "log.txt").read_text()


def test_a_shard_damaged_before_its_stage_is_finished_never_becomes_an_output(tmp_path: Path) -> None:
    def attempt(harm: bool) -> None:
        with runs.Run.open(tmp_path / "run", "", ENVIRONMENT) as run, run.stage("sample", 1) as work:
            for shard in work.shards(3, "part-{}.txt"):
                shard.path.write_text(f"answers {shard.index}")
            if harm:
                (work.folder / "part-1.txt").write_text("answers 7")

    with pytest.raises(ValueError, match=r"sample\.partial/part-1\.txt: lost or damaged"):
        attempt(harm=True)
    assert not (tmp_path / "run" / "sample").exists()
    attempt(harm=False)
    assert (tmp_path / "run" / "sample" / "part-1.txt").read_text() == "answers 1"


def test_batches_that_were_halved_are_counted_in_the_ledger(tmp_path: Path) -> None:
    """Where 2 answers fit, 8 are halved twice; in each of three shards."""

    def two_fit(size: int) -> int:
        if size > 2:
            raise MemoryError
        return size

    def draw(*_: Any) -> Iterator[Any]:
        assert in_halves(two_fit, 8, "policy: {} answers") == (2, 2)
        yield "", pa.schema([("n", pa.int32())]), [{"n": 1}]

    with runs.Run.open(tmp_path / "run", "", ENVIRONMENT) as run, run.stage("sample", 1) as work:
        job: Any = SimpleNamespace(out=work.folder)
        drawing = Shards(job, "part-{}.parquet", 3, lambda _: [], lambda: None, draw)
        drawing.open()
        for shard in work.shards(3, "part-{}.parquet"):
            drawing.make(shard)
    assert ledger.read_ledger(work.output)["counts"] == {"in": 0, "out": 0, "filtered": {}, "halved": 6}


def test_a_shard_and_its_folder_are_on_the_disk_before_its_tally(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.path.relpath(os.path.realpath(f"/proc/self/fd/{descriptor}"), work.folder))
        fsync(descriptor)

    with runs.Run.open(tmp_path / "run", "", ENVIRONMENT) as run, run.stage("best", 1) as work:
        monkeypatch.setattr(os, "fsync", noted)
        for shard in work.shards(1, "answers/part-{}.txt"):
            for name in ("answers", "scores"):
                (work.folder / name).mkdir(exist_ok=True)
                (work.folder / name / shard.path.name).write_text("x")
        monkeypatch.undo()
    *before, tally = synced
    assert set(before) == {"answers", "answers/part-0.txt", "scores", "scores/part-0.txt"}
    assert max(map(before.index, ("answers/part-0.txt", "scores/part-0.txt"))) < before.index("answers")
    assert "tallies" in tally


def test_a_file_that_no_ledger_names_is_refused_by_the_stage_that_would_read_it(tmp_path: Path, prompts: Path) -> None:
    run = tmp_path / "run"
    pipeline(run, prompts)
    (run / "sft" / ".DS_Store").write_text("of a file manager")
    assert pipeline(run, prompts) == {"sft": None, "sample": None, "report": None}
    (run / "sft" / "more-weights").write_text("w")
    with pytest.raises(
        ValueError, match=r"^stage sample, input policy: .*/sft/more-weights: ledger\.json does not name"
    ):
        pipeline(run, prompts)
    assert "more-weights" in ledger.plan(run, stages(prompts))["sample"]
    elsewhere = tmp_path / "elsewhere"
    (run / "sft").rename(elsewhere)
    with runs.Run.open(tmp_path / "other", None, ENVIRONMENT) as other, pytest.raises(ValueError, match="more-weights"):
        other.stage("sample", 1, {"policy": elsewhere})


def test_folders_of_a_user_that_are_called_like_our_scratch_are_neither_deleted_nor_written_into(
    tmp_path: Path, prompts: Path
) -> None:
    run = tmp_path / "run"
    pipeline(run, prompts)
    mine = {run / "sample.old" / "notes.txt": "keep", run / "sft.partial" / "notes.txt": "me"}
    for path, text in mine.items():
        path.parent.mkdir()
        path.write_text(text)
    with pytest.raises(ValueError, match=r"sft\.partial: no stage made it, and sft needs its name; move it away"):
        pipeline(run, prompts, epochs=3)
    assert {path: path.read_text() for path in mine} == mine
    shutil.rmtree(run / "sft.partial")
    assert pipeline(run, prompts, epochs=3)["sample"] == "input policy changed"
    assert (run / "sample.old" / "notes.txt").read_text() == "keep"
    assert sorted(path.name for path in run.glob("s*")) == ["sample", "sample.old", "sft"]


def test_what_a_kill_left_of_an_outdated_stage_is_cleared_away(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    pipeline(run, prompts)
    rename = os.rename

    def killed(source: Path, target: Path) -> None:
        rename(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ledger.os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            pipeline(run, prompts, epochs=3)
    left = {path.name for path in run.iterdir()}
    assert "sft" not in left
    assert any("sft" in name and name.startswith(".") for name in left)
    assert pipeline(run, prompts, epochs=3)["sft"] is None
    assert {path.name for path in run.iterdir()} == {
        *(".digests.json", ".lock", "environment.json", "log.txt", "recipe.toml", "sft", "sample", "report")
    }


@pytest.mark.parametrize("text", ["", "locked by me", "1234 my-host"])
def test_a_folder_with_a_lock_of_somebody_else_is_no_run(tmp_path: Path, prompts: Path, text: str) -> None:
    folder = tmp_path / "mine"
    (folder / "sft").mkdir(parents=True)
    (folder / "sft" / "thesis.txt").write_text("years of work")
    (folder / ".lock").write_text(text)
    with pytest.raises(ValueError, match="mine: holds other things than a run"):
        pipeline(folder, prompts)
    assert (folder / "sft" / "thesis.txt").read_text() == "years of work"
    assert (folder / ".lock").read_text() == text


def test_a_folder_in_which_a_stage_was_taken_alone_becomes_a_run_only_where_nothing_else_lies(
    tmp_path: Path, prompts: Path
) -> None:
    with runs.Run.open(tmp_path / "home", None, ENVIRONMENT) as run, run.stage("sft", 1) as work:
        runs.write_text(work.folder / "weights", "w")
    (tmp_path / "home" / "sample").mkdir()
    (tmp_path / "home" / "sample" / "thesis.txt").write_text("years of work")
    (tmp_path / "home" / "recipe.toml").write_text("my own")
    with pytest.raises(ValueError, match="home: holds other things than a run"):
        pipeline(tmp_path / "home", prompts)
    assert (tmp_path / "home" / "recipe.toml").read_text() == "my own"
    shutil.rmtree(tmp_path / "home" / "sample")
    (tmp_path / "home" / "recipe.toml").unlink()
    assert pipeline(tmp_path / "home", prompts)["sample"] == "new"
    runs.Run.open(tmp_path / "home", None, ENVIRONMENT).close()
    assert lock.kind_of(tmp_path / "home") == "run"  # and stays one when a stage is taken alone in it


@pytest.mark.parametrize("name", ["environment.json", "log.txt", ".lock", ".digests.json"])
def test_a_stage_alone_writes_over_no_file_of_a_user(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"{name}: no run wrote it, and it would be overwritten"):
        runs.Run.open(tmp_path, None, ENVIRONMENT)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_stage_alone_in_a_run_leaves_the_record_of_where_it_was_made(tmp_path: Path) -> None:
    runs.Run.open(tmp_path / "run", "", ENVIRONMENT).close()
    runs.Run.open(tmp_path / "run", None, {"git_commit": "of another machine"}).close()
    assert json.loads((tmp_path / "run" / "environment.json").read_text()) == ENVIRONMENT


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pa.table({"text": ["x" * 100]})
    for name, write in (
        ("figures.json", lambda path: runs.write_json(path, {"n": 1})),
        ("part-00000.parquet", lambda path: write_table(path, table)),
    ):
        (tmp_path / f".{name}.partial").symlink_to("/dev/full")
        with pytest.raises(SystemExit) as ended, plain_errors("dpa"):
            write(tmp_path / name)
        assert ended.value.code == 2
        assert f"dpa: {tmp_path / name}: no space left on the disk" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0"),
        ValueError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_the_errors_of_libraries_at_a_full_disk_become_one_that_names_the_folder(error: Exception) -> None:
    with pytest.raises(OSError, match="run/sft/model") as caught, naming(Path("run/sft/model")):
        raise error
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(KeyError), naming(Path("run")):
        raise KeyError("no such key")


def test_a_kill_between_the_ledger_and_the_renaming_loses_nothing(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    pipeline(run, prompts)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "into_place", lambda output: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pipeline(run, prompts, epochs=3)
    assert (run / "sft.partial" / "ledger.json").is_file()
    assert pipeline(run, prompts, epochs=3) == {"sft": None, "sample": "input policy changed", "report": None}
    assert not list(run.glob("*.partial")) + list(run.glob("*.old"))


def test_unfinished_work_of_other_knobs_or_without_a_note_is_dropped(tmp_path: Path) -> None:
    def attempt(n: int, fail: bool) -> list[str]:
        with runs.Run.open(tmp_path / "run", "", ENVIRONMENT) as run, run.stage("sample", 1, {}, {"n": n}) as work:
            found = list(files(work.folder))
            runs.write_text(work.folder / f"n{n}", "x")
            if fail:
                raise RuntimeError("out of memory")
            return found

    for n in (1, 1, 2):
        with pytest.raises(RuntimeError, match="out of memory"):
            attempt(n, fail=True)
    assert list(files(tmp_path / "run" / "sample.partial")) == [".stage/state.json", "n2"]
    (tmp_path / "run" / "sample.partial" / ".stage" / "state.json").write_text("{")
    assert attempt(3, fail=False) == [".stage/state.json"]
    assert list(ledger.read_ledger(tmp_path / "run" / "sample")["outputs"]) == ["n3"]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "sample: stopped after 0 s (RuntimeError)" in log
    assert log.count("unfinished work of other knobs or inputs is dropped") == 2


def test_a_second_run_into_the_same_folder_is_refused_by_process_and_remedy(tmp_path: Path, prompts: Path) -> None:
    folder = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", SHARDED, folder, prompts, "30"], stderr=subprocess.DEVNULL)
    try:
        wait_until((folder / "sample.partial").is_dir)
        with pytest.raises(ValueError, match="two runs into one folder") as caught:
            runs.Run.open(folder, "", ENVIRONMENT)
    finally:
        process.kill()
        process.wait()
    assert str(caught.value).startswith(f"{folder}: two runs into one folder: process {process.pid} on ")
    assert str(caught.value).endswith(" is at work in it; wait for it, end it, or name another folder")
    assert (folder / "recipe.toml").read_text() == "seed = 1"
    runs.Run.open(folder, "", ENVIRONMENT).close()  # the killed run holds nothing back


def test_a_worker_left_by_a_killed_run_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import subprocess, sys; from pathlib import Path; from dpalign.runs import folder as runs\n"
        "run = runs.Run.open(Path(sys.argv[1]), '', {})\n"
        "subprocess.Popen(['sleep', sys.argv[2]], pass_fds=(run.lock,))\n"
    )
    folder = tmp_path / "run"
    subprocess.run([sys.executable, "-c", code, folder, "1"], check=True)
    began = time.monotonic()
    runs.Run.open(folder, "", ENVIRONMENT).close()
    assert 0.3 < time.monotonic() - began < 8.0
    monkeypatch.setattr(lock, "ORPHAN_SECONDS", 0.2)
    subprocess.run([sys.executable, "-c", code, folder, "2"], check=True)
    with pytest.raises(ValueError, match=r"a process left by the ended run \d+ is at work in it"):
        runs.Run.open(folder, "", ENVIRONMENT)


def test_an_input_that_is_not_there_is_named(tmp_path: Path, prompts: Path) -> None:
    with runs.Run.open(tmp_path / "run", "", ENVIRONMENT) as run:
        with pytest.raises(ValueError, match=r"^stage sample, input policy: .*/sft/ledger.json: no ledger; the stage"):
            run.stage("sample", 1, {"policy": "sft"})
        with pytest.raises(ValueError, match=r"^stage sft, input data: /no/such/file is missing or empty"):
            run.stage("sft", 1, {"data": Path("/no/such/file")})
        with run.stage("sft", 1, {"data": prompts}) as work:
            runs.write_text(work.folder / "weights", "w")
        with pytest.raises(ValueError, match=r"^stage sample, input policy: .*/sft/biases is missing or empty"):
            run.stage("sample", 1, {"policy": "sft/biases"})
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "sft").mkdir()
    with pytest.raises(ValueError, match="photos: holds other things than a run, which could be overwritten"):
        runs.Run.open(tmp_path / "photos", "", ENVIRONMENT)
    prompts.write_text("a file")
    with pytest.raises(ValueError, match="a file, where a run folder was asked for; name another place"):
        runs.Run.open(prompts, "", ENVIRONMENT)


def test_progress_in_a_pipe_is_a_line_every_ten_seconds_with_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shards in 40 s leave six: 120 s. What is done before the next ten seconds are over shows nothing."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress.Progress("sample-1: shard", total=10, done=2) as shown:
        for done, at in ((3, 5.0), (4, 40.0), (5, 49.0), (10, 61.0)):
            now[0] = at
            shown.update(done)
    assert capsys.readouterr().err == "sample-1: shard 4 of 10, 2 min left\nsample-1: shard 10 of 10\n"
    assert [progress.spell_seconds(s) for s in (4.4, 200, 7500)] == ["4 s", "3 min", "2 h 05 min"]


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_a_bar_that_goes_when_the_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once are two bars; processes side by side write lines instead."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress.Progress("sft: update", total=300) as outer:
        outer.update(264)
        with progress.Progress("sample: shard", total=7) as inner:
            inner.advance(3)
    assert "sft: update 264 of 300" in terminal.getvalue()
    assert "sample: shard 3 of 7" in terminal.getvalue()
    cleared, shown_cursor = "\r\x1b[2K", "\x1b[?25h"
    assert terminal.getvalue().rstrip("\r").removesuffix(shown_cursor).endswith(cleared)
    monkeypatch.setattr(sys, "stderr", lines := Terminal())
    for name, value in progress.AS_LINES.items():
        monkeypatch.setenv(name, value)
    with progress.Progress("sft: update", total=300) as alone:
        alone.update(264)
    assert lines.getvalue() == ""


def test_json_is_written_whole_and_refuses_what_json_cannot_say(tmp_path: Path) -> None:
    path = tmp_path / "a" / "figures.json"
    runs.write_json(path, {"é": [1, None]})
    with pytest.raises(ValueError, match=r"figures\.json: .*; write null where there is no number"):
        runs.write_json(path, {"tau": float("nan")})
    assert json.loads(path.read_text()) == {"é": [1, None]}
    assert list(files(tmp_path)) == ["a/figures.json"]


def test_the_environment_names_versions_and_nothing_private(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    facts = runs.describe_environment()
    assert set(facts) == {"python", "platform", "cpus", "packages", "git_commit"}
    assert "pyarrow" in facts["packages"]
    assert "hf_secret" not in json.dumps(facts)
