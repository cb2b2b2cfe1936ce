"""The whole loop on a tiny model in the embedded world: once through, again, with changes, and killed."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from conftest import MICRO
from dpalign.pipeline.runner import dry_run, execute
from dpalign.pipeline.steps import steps
from dpalign.recipe import Recipe, load
from dpalign.rows import CANDIDATES, CONVERSATIONS, PROMPTS, RATED, SCORES, read_rows, read_table
from dpalign.runs.folder import output_files
from dpalign.runs.ledger import read_ledger
from recorded import Reads, reads_recorded, undeclared

STEPS = [step.name for step in steps(load(MICRO))]
EVALUATED = [name for name in STEPS if name.startswith("evaluate-")]
THREE = (
    "--objectives",
    '{helpful = ["ultrafeedback-helpfulness"], detail = ["helpsteer-complexity"], right = ["helpsteer-correctness"]}',
    *("--preference.distribution", "simplex", "--evaluation.controls", "false"),
)


@pytest.fixture
def copy(micro_run: Path, tmp_path: Path) -> Path:
    """The finished run, to change."""
    return Path(shutil.copytree(micro_run, tmp_path / "micro"))


def outputs(run: Path, recipe: Recipe, compared: bool = False) -> dict[str, str]:
    """Digests of all outputs but the report, which tells seconds, and one file that names others by full paths."""
    return {
        f"{step.name}/{file}": sha256
        for step in steps(recipe, compared)
        for file, sha256 in read_ledger(run / step.name)["outputs"].items()
        if step.name != "report" and file != "reports.json"
    }


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_seconds(inner) for key, inner in value.items() if key != "seconds"}
    return [without_seconds(inner) for inner in value] if isinstance(value, list) else value


def summary(run: Path) -> dict[str, Any]:
    """All figures of a report; not its recipe, which may differ in knobs that change no result."""
    figures: dict[str, Any] = without_seconds(json.loads((run / "report" / "summary.json").read_text()))
    del figures["recipe_text"]
    return figures


def test_the_loop_ends_in_a_report(micro_run: Path) -> None:
    page = (micro_run / "report" / "index.html").read_text()
    assert page.lower().lstrip().startswith("<!doctype html>")
    systems = summary(micro_run)["systems"]
    assert {name: len(system["points"]) for name, system in systems.items()} == {
        **{"SFT": 1, "SteerLM": 3, "DPA t=0": 3},
        **{"DPA t=1": 4, "DPA t=2": 4, "SFT, asked": 4, "base, asked": 4},
    }


def test_every_stage_counts_what_it_read_and_wrote(micro_run: Path) -> None:
    """8 prompts with 12 answers each are sampled and scored, and 24 of them chosen at most; 15% are replayed."""
    for t in (1, 2):
        answers = list(read_rows(micro_run / f"sample-{t}", CANDIDATES))
        sampled = read_ledger(micro_run / f"sample-{t}")
        assert sampled["counts"] == {"in": 96, "out": 96, "filtered": {}}
        assert sampled["tokens"]["sampled"] == sum(row["tokens"] for row in answers)
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
        assert read_ledger(micro_run / f"policy-{t}")["tokens"]["trained"] > 0
    assert {row["condition_kind"] for row in read_rows(micro_run / "sample-1", CANDIDATES)} == {"target"}
    assert {row["condition_kind"] for row in read_rows(micro_run / "sample-2", CANDIDATES)} == {"direction"}


def test_a_stage_reads_no_knob_that_it_does_not_declare(micro_run: Path, micro_reads: Reads) -> None:
    """What it declares is what redoes it: a knob read besides would change results that are taken for done."""
    assert "sft.learning_rate" in micro_reads["sft", ""]
    assert undeclared(micro_reads) == {}


WATCHED = ("sample-1", "score-1", "select-1", "sample-2", "score-2", "evaluate-policy-2")


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--preference.directions", "4"], {"sample-1", "score-1"}),
        (["--sampling.n", "5"], {"sample-1", "score-1", "select-1"}),
        (["--sampling.first", "20"], set()),
        (["--steerlm.quantiles", "[0.5]"], set(WATCHED)),
    ],
)
def test_a_knob_redoes_only_what_reads_it(micro_run: Path, words: list[str], kept: set[str]) -> None:
    """The first iteration's answers are drawn under reward targets, not under directions."""
    verdicts = {step.name: verdict for step, verdict in dry_run(load(MICRO, words), micro_run)}
    assert {name for name in WATCHED if verdicts[name] == "done"} == kept


def test_where_a_reward_model_is_measured_again_its_scores_stand(copy: Path) -> None:
    scored = read_ledger(copy / "annotate")["finished"]
    measured = (copy / "reward" / "quality.json").read_text()
    heads = '{helpfulness = ["helpsteer-helpfulness"], verbosity = ["helpsteer-verbosity"]}'
    execute(load(MICRO, ["--objectives", heads]), copy, until="annotate")
    assert (copy / "reward" / "quality.json").read_text() != measured
    assert read_ledger(copy / "annotate")["finished"] == scored


def test_no_pickle_and_no_scratch_is_left(micro_run: Path) -> None:
    left = [path for path in micro_run.rglob("*") if path.name == "resume" or path.suffix == ".partial"]
    assert left + [path for path in micro_run.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")] == []
    assert json.loads((micro_run / "policy-2" / "model" / "dpa.json").read_text())["iteration"] == 2


# No prompt is seen by two who must not share it


def ids(folder: Path, *files: str) -> set[str]:
    schemas = {"sample": CANDIDATES, "select": CONVERSATIONS, "train": RATED, "heldout": RATED, "judge": RATED}
    return {
        row["prompt_id"] for file in files for row in read_rows(folder / file, schemas[Path(file).name.split("-")[0]])
    }


def splits(run: Path) -> dict[str, set[str]]:
    prompts: dict[str, set[str]] = defaultdict(set)
    for row in read_rows(run / "data" / "prompts", PROMPTS):
        prompts[row["split"]].add(row["prompt_id"])
    return prompts


def test_no_prompt_is_sampled_from_a_policy_that_has_seen_it(micro_run: Path) -> None:
    """Neither selected nor replayed for theta_t is what theta_t samples at t + 1; pi_0 learned D2 and samples D1."""
    split = splits(micro_run)
    seen = {0: ids(micro_run, "data/train") & split["D2"], 1: ids(micro_run, "select-1"), 2: ids(micro_run, "select-2")}
    asked = {t: ids(micro_run, f"sample-{t}") for t in (1, 2)}
    assert all(seen.values())
    assert all(asked.values())
    assert not asked[1] & seen[0]
    assert not asked[2] & seen[1]
    assert (asked[1] | seen[1]) <= split["D1"]
    assert (asked[2] | seen[2]) <= split["D2"]
    chosen = list(read_rows(micro_run / "select-1", CONVERSATIONS))
    replayed = {row["prompt_id"] for row in chosen if row["origin"] == "replay"}
    assert replayed
    assert replayed <= split["D1"]


def test_the_splits_share_no_text(micro_run: Path) -> None:
    texts: dict[str, set[str]] = defaultdict(set)
    for row in read_rows(micro_run / "data" / "prompts", PROMPTS):
        texts[" ".join(message["content"] for message in row["messages"])].add(row["split"])
    assert set.union(*texts.values()) == {"D1", "D2", "validation", "tuning", "heldout", "judge"}
    assert all(len(of_text) == 1 for of_text in texts.values())


def test_no_rating_that_tests_the_reward_model_trained_it(micro_run: Path) -> None:
    """Training, held-out and judge's answers share no prompt, whatever data set they are of; nor with validation."""
    parts = {name: ids(micro_run, f"data/{name}") for name in ("train", "heldout", "judge")}
    assert all(parts.values())
    assert not parts["train"] & parts["heldout"]
    assert not parts["train"] & parts["judge"]
    assert not parts["heldout"] & parts["judge"]
    chats = {row["prompt_id"] for row in read_rows(micro_run / "data" / "chats", CONVERSATIONS)}
    trained = parts["train"] | parts["heldout"] | parts["judge"] | chats
    assert not (splits(micro_run)["validation"] | splits(micro_run)["tuning"]) & trained
    validated = {row["prompt_id"] for row in read_rows(micro_run / "evaluate-policy-2" / "answers", CANDIDATES)}
    assert validated == splits(micro_run)["validation"]


# Again


def test_running_again_does_nothing(copy: Path) -> None:
    before = {str(path): path.stat().st_mtime_ns for name in STEPS for path in (copy / name).rglob("*")}
    execute(load(MICRO), copy)
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
    plan = {step.name: verdict for step, verdict in dry_run(load(MICRO, change), micro_run)}
    todo = {name for name, verdict in plan.items() if verdict != "done"}
    assert todo == set(redone)
    first = next((name for name in plan if name in todo), None)
    if first is not None and first != "sample-3":
        assert change[0].removeprefix("--") in plan[first]  # the reason


def test_a_redone_stage_differs_and_those_before_it_stay(copy: Path, micro_run: Path) -> None:
    execute(load(MICRO, ["--replay", "0.5"]), copy, until="policy-1")
    before, after = outputs(micro_run, load(MICRO)), outputs(copy, load(MICRO))
    changed = {file for file in before if before[file] != after[file]}
    assert changed == {"select-1/part-00000.parquet", "policy-1/model/model.safetensors", "policy-1/curve.json"}


# Killed, and with all that a comparison adds


def killed(words: Sequence[str], folder: Path, waits: Iterable[tuple[str, float]], log: Path) -> Iterator[str]:
    """Start `dpa` again and again, each time killed some seconds after a step has begun: yields the steps killed."""
    command = [sys.executable, "-m", "dpalign", words[0], str(MICRO), "--out", str(folder), *words[1:]]
    with log.open("w") as stream:
        for name, seconds in waits:
            process = subprocess.Popen(command, stdout=stream, stderr=stream)
            while process.poll() is None and not (folder / f"{name}.partial").exists() and not (folder / name).exists():
                time.sleep(0.01)
            time.sleep(seconds)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                yield name
            process.wait()
        subprocess.run(command, stdout=stream, stderr=stream, check=True)


SAVE_OFTEN = [
    word
    for section in ("sft", "finetune", "steerlm.training", "reward.training")
    for word in (f"--{section}.save_every", "2")
]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "most"), [("inprocess", 1.0), ("process", 6.0)])
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(
    micro_run: Path, tmp_path: Path, launcher: str, most: float
) -> None:
    """kill -9 at ten random moments, each after a stage has begun; checkpoints are written every other update."""
    folder, rng = tmp_path / "killed", random.Random(launcher)
    waits = [(step, rng.uniform(0, most)) for step in STEPS if step not in ("world", "data", "report")][:12]
    kills = list(killed(["run", "--launcher", launcher, *SAVE_OFTEN], folder, waits, tmp_path / "log.txt"))
    assert len(kills) >= 10, f"ended before it was killed, see {tmp_path}"
    assert outputs(folder, load(MICRO)) == outputs(micro_run, load(MICRO))
    assert output_files(folder / "report") == output_files(micro_run / "report")
    assert summary(folder) == summary(micro_run)


@pytest.mark.slow
def test_side_by_side_the_loop_ends_with_the_same_bytes(micro_run: Path, tmp_path: Path) -> None:
    execute(load(MICRO, ["--jobs", "2"]), tmp_path / "run")
    assert outputs(tmp_path / "run", load(MICRO)) == outputs(micro_run, load(MICRO))


COMPARED = ["--dpo.betas", "[0.1, 0.5]", "--rsf.directions", "2", "--compare.ablations", '["no replay"]']


@pytest.mark.slow
def test_a_comparison_ends_in_a_report_of_every_system_and_a_killed_one_with_the_same_bytes(
    micro_run: Path, tmp_path: Path
) -> None:
    whole, broken = (Path(shutil.copytree(micro_run, tmp_path / name)) for name in ("whole", "killed"))
    recipe = load(MICRO, COMPARED)
    reads: Reads = {}
    with reads_recorded(reads):
        execute(recipe, whole, compared=True)
    assert {"specialist", "pairs", "dpo", "rl", "soup", "feasibility"} <= {name for name, _ in reads}
    assert undeclared(reads) == {}
    systems = summary(whole)["systems"]
    assert {
        *("SFT", "SteerLM", "DPO", "SFT, asked to be brief", "DPO, asked to be brief", "SteerLM, tuned"),
        *("RSF at helpfulness*1.00 - verbosity*0.00", "RSF at helpfulness*0.71 - verbosity*0.71"),
        *("GRPO at helpfulness*1.00 - verbosity*0.00", "GRPO at helpfulness*0.71 - verbosity*0.71"),
        *("rewarded soups", "SFT, best of 16", "DPA t=2", "DPA t=2, no replay"),
    } <= systems.keys()
    assert len(systems["rewarded soups"]["points"]) == len(systems["SFT, best of 16"]["points"]) == 4
    waits = [(name, 0.3) for name in ("dpo-2", "rl-2-1", "evaluate-soup-1")]
    assert list(killed(["compare", *COMPARED], broken, waits, tmp_path / "log.txt"))
    assert outputs(broken, recipe, compared=True) == outputs(whole, recipe, compared=True)


@pytest.mark.slow
def test_three_objectives_go_the_whole_way(tmp_path: Path) -> None:
    run = execute(load(MICRO, THREE), tmp_path / "three")
    assert (run / "report" / "index.html").is_file()
    for system in summary(run)["systems"].values():
        assert system["points"][0]["true_rewards"].keys() == {"helpful", "detail", "right"}
