"""The whole loop on a tiny model in the embedded world: once through, again, with changes, and killed."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import MICRO
from dpalign.pipeline import align
from dpalign.recipe import load
from dpalign.rows import CANDIDATES, CONVERSATIONS, SCORES, read_rows, read_table
from dpalign.run.folder import output_files
from dpalign.run.ledger import read_ledger

STEPS = [step.name for step in align.steps(load(MICRO))]
EVALUATED = [name for name in STEPS if name.startswith("evaluate-")]


@pytest.fixture
def copy(micro_run: Path, tmp_path: Path) -> Path:
    """The finished run, to change."""
    return Path(shutil.copytree(micro_run, tmp_path / "micro"))


def digests(run: Path) -> dict[str, str]:
    """Of every output but the report, which tells seconds, and the data's own, which names files by full paths."""
    outputs = {
        f"{name}/{file}": sha256 for name in STEPS for file, sha256 in read_ledger(run / name)["outputs"].items()
    }
    return {
        file: sha256
        for file, sha256 in outputs.items()
        if not file.startswith("report/") and file != "data/reports.json"
    }


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_seconds(inner) for key, inner in value.items() if key != "seconds"}
    return [without_seconds(inner) for inner in value] if isinstance(value, list) else value


def summary(run: Path) -> dict[str, Any]:
    return without_seconds(json.loads((run / "report" / "summary.json").read_text()))


def test_the_loop_ends_in_a_report(micro_run: Path) -> None:
    page = (micro_run / "report" / "index.html").read_text()
    assert page.lower().lstrip().startswith("<!doctype html>")
    told = json.loads((micro_run / "report" / "summary.json").read_text())
    assert {"SFT", "SteerLM", "DPA t=0", "DPA t=1", "DPA t=2", "SFT, asked", "base, asked"} == told["systems"].keys()
    for name, system in told["systems"].items():
        assert system["figures"]["hypervolume"]["value"] is not None
        assert len(system["points"]) == {"SFT": 1, "SteerLM": 3, "DPA t=0": 3}.get(name, 4)
        assert system["cost"]["trained_tokens"] > 0
    sampled = {name: system["cost"]["sampled_tokens"] for name, system in told["systems"].items()}
    assert sampled["DPA t=2"] > sampled["DPA t=1"] > sampled["SFT"] == 0
    assert len(told["reward_model"]["heads"]) == 10
    (stage,) = (stage for stage in told["stages"] if stage["name"] == "sample-1")
    assert (stage["rows_in"], stage["rows_out"], stage["filtered"]) == (96, 96, {})


def test_every_stage_counts_what_it_read_and_wrote(micro_run: Path) -> None:
    """8 prompts with 12 answers each are sampled and scored, and 24 of them chosen at most; 15% are replayed."""
    for t in (1, 2):
        answers = list(read_rows(micro_run / f"sample-{t}", CANDIDATES))
        assert len(answers) == 96
        assert len({row["prompt_id"] for row in answers}) == 8
        keys = ["prompt_id", "condition_index", "sample"]
        scored = read_table(micro_run / f"score-{t}", SCORES)
        assert [[row[k] for k in keys] for row in answers] == [[row[k] for k in keys] for row in scored.to_pylist()]
        cut = sum(not row["finished"] for row in answers)
        counts = read_ledger(micro_run / f"select-{t}")["counts"]
        assert counts["filtered"].get("cut at max_new_tokens, or empty", 0) == cut < 96
        rows = list(read_rows(micro_run / f"select-{t}", CONVERSATIONS))
        selected = [row for row in rows if row["origin"] == "selected"]
        assert 12 < len(selected) <= 24
        assert len(rows) - len(selected) == round(len(selected) * 0.15 / 0.85)
        assert read_ledger(micro_run / f"policy-{t}")["counts"]["out"] == len(rows)
        assert read_ledger(micro_run / f"sample-{t}")["tokens"]["sampled"] == sum(row["tokens"] for row in answers)
    assert {row["condition_kind"] for row in read_rows(micro_run / "sample-1", CANDIDATES)} == {"target"}
    assert {row["condition_kind"] for row in read_rows(micro_run / "sample-2", CANDIDATES)} == {"direction"}


def test_no_pickle_and_no_scratch_is_left(micro_run: Path) -> None:
    left = {path.name for path in micro_run.rglob("*") if path.is_file()}
    assert not [name for name in left if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert not [path for path in micro_run.rglob("*") if path.name == "resume" or path.suffix == ".partial"]
    assert json.loads((micro_run / "policy-2" / "model" / "dpa.json").read_text())["iteration"] == 2


def test_running_again_does_nothing(copy: Path) -> None:
    before = {str(path): path.stat().st_mtime_ns for name in STEPS for path in (copy / name).rglob("*")}
    align.execute(load(MICRO), copy)
    assert {str(path): path.stat().st_mtime_ns for name in STEPS for path in (copy / name).rglob("*")} == before


LATER = ["sample-2", "score-2", "select-2", "policy-2", "evaluate-policy-1", "evaluate-policy-2", "report"]


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        (["--sampling.temperature", "0.9"], ["sample-1", "score-1", "select-1", "policy-1", *LATER]),
        (["--replay", "0.3"], ["select-1", "policy-1", *LATER]),
        (["--finetune.learning_rate", "1e-4"], ["policy-1", *LATER]),
        (["--evaluation.samples", "3"], [*EVALUATED, "report"]),
        (["--sampling.rows", "32"], ["sample-1", "score-1", "select-1", "policy-1", *LATER, *EVALUATED]),
        (["--threads", "1", "--name", "other", "--launcher", "process"], []),
        (["--iterations", "3"], ["sample-3", "score-3", "select-3", "policy-3", "evaluate-policy-3", "report"]),
    ],
)
def test_a_changed_knob_redoes_what_reads_it_and_what_follows(
    micro_run: Path, change: list[str], redone: list[str]
) -> None:
    plan = {step.name: said for step, said in align.dry_run(load(MICRO, change), micro_run)}
    todo = {name for name, said in plan.items() if said != "done"}
    assert todo == set(redone)
    first = next((name for name in plan if name in todo), None)
    if first is not None and first != "sample-3":
        assert change[0].removeprefix("--") in plan[first]  # the reason


def test_a_redone_stage_differs_and_those_before_it_stay(copy: Path, micro_run: Path) -> None:
    align.execute(load(MICRO, ["--replay", "0.5"]), copy, until="policy-1")
    before, after = digests(micro_run), digests(copy)
    changed = {file for file in before if before[file] != after[file]}
    assert changed == {"select-1/part-00000.parquet", "policy-1/model/model.safetensors"}  # sample-2 was not reached


RUN = """
import sys
from pathlib import Path
from dpalign import align
from dpalign.recipe import load
align.execute(load(Path(sys.argv[1]), sys.argv[3:]), Path(sys.argv[2]))
"""
SAVE_OFTEN = [
    word
    for section in ("sft", "finetune", "steerlm.training", "reward.training")
    for word in (f"--{section}.save_every", "2")
]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "seconds"), [("inprocess", 1.0), ("process", 6.0)])
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(
    micro_run: Path, tmp_path: Path, launcher: str, seconds: float
) -> None:
    """kill -9 at ten random moments, each after a stage has begun; checkpoints are written every other update."""
    folder, rng = tmp_path / "killed", random.Random(launcher)
    command = [sys.executable, "-c", RUN, str(MICRO), str(folder), "--launcher", launcher, *SAVE_OFTEN]
    kills = 0
    with (tmp_path / "said.txt").open("w") as said:
        for name in [step for step in STEPS if step not in ("world", "data", "report")]:
            process = subprocess.Popen(command, stderr=said)
            while process.poll() is None and not (folder / f"{name}.partial").exists() and not (folder / name).exists():
                time.sleep(0.01)
            time.sleep(rng.uniform(0, seconds))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
            process.wait()
            if kills == 10:
                break
        subprocess.run(command, stderr=said, check=True)
    assert kills == 10, f"ended before it was killed, see {tmp_path}"
    assert digests(folder) == digests(micro_run)
    assert output_files(folder / "report") == output_files(micro_run / "report")
    assert summary(folder) == summary(micro_run)
