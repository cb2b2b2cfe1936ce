"""Counts are conserved from stage to stage; what may spoil a result is said in the log, the ledger and the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import MICRO
from dpalign.measure.lineage import Made, stage_facts
from dpalign.pipeline.runner import take
from dpalign.pipeline.steps import STAGES
from dpalign.recipe import load
from dpalign.rewards.golden import (
    ONLY,
    GoldenModel,
    GoldenScore,
    golden_for,
    require_golden,
    write_golden,
    write_model_golden,
)
from dpalign.runs.folder import Run, write_json
from dpalign.runs.ledger import read_ledger
from dpalign.stages.stage import Job, Law, Stage, Step, stage
from dpalign.train.contract import Contract, require_same_dial, write_contract

RECIPE = load(MICRO)


def counting(rows_in: int, rows_out: int, takes: str = "", law: Law = "sifts", **filtered: int) -> Stage:
    """A stage that only counts."""

    @stage(reads=lambda r: (r.seed,), heavy=False, law=law, takes=takes)
    def counts(job: Job) -> None:
        (job.out / "made.txt").write_text("made")
        job.work.tally.add(rows_in, rows_out, filtered)

    return counts


def taken(run: Run, name: str, made_by: Stage, **inputs: str) -> dict[str, Any]:
    take(RECIPE, run, Step(name, made_by, inputs))
    return read_ledger(run.folder / name)["counts"]


@pytest.fixture
def run(tmp_path: Path) -> Any:
    with Run.open(tmp_path / "run", None, {"git_commit": None}) as opened:
        yield opened


def test_a_stage_that_loses_a_row_is_refused_and_leaves_no_ledger(run: Run) -> None:
    assert taken(run, "sound", counting(9, 7, empty=2)) == {"in": 9, "out": 7, "filtered": {"empty": 2}}
    for rows_out in (6, 8):
        with pytest.raises(ValueError, match=rf"stage counts: .* 9 rows in, {rows_out} out, 2 empty; delete"):
            taken(run, "lossy", counting(9, rows_out, empty=2))
    assert not (run.folder / "lossy").exists()


def test_a_stage_takes_all_rows_that_the_one_before_it_wrote(run: Run) -> None:
    taken(run, "drawn", counting(9, 9))
    assert taken(run, "scored", counting(9, 9, takes="candidates"), candidates="drawn")["in"] == 9
    with pytest.raises(ValueError, match=r"8 rows in, 8 out, and .*/drawn has 9 rows to take"):
        taken(run, "short", counting(8, 8, takes="candidates"), candidates="drawn")


def test_a_choice_may_keep_a_row_twice_but_loses_none_and_what_is_made_reads_none(run: Run) -> None:
    assert taken(run, "chosen", counting(9, 12, law="chooses", worse=4))["out"] == 12
    with pytest.raises(ValueError, match="9 rows in, 4 out, 4 worse"):
        taken(run, "lost", counting(9, 4, law="chooses", worse=4))
    assert taken(run, "made", counting(0, 5, law="makes"))["out"] == 5
    with pytest.raises(ValueError, match="1 rows in, 5 out"):
        taken(run, "read", counting(1, 5, law="makes"))


def test_the_stages_of_the_loop_hand_on_every_row() -> None:
    assert {name: one.takes for name, one in STAGES.items() if one.takes} == {
        **{"annotate": "answers", "score": "candidates", "select": "candidates", "contrast": "candidates"},
        **{"finetune": "chosen", "specialist": "chosen", "dpo": "pairs", "prefer": "pairs", "divergence": "evaluate"},
    }
    assert all(one.takes in (*one.inputs, *one.optional) for one in STAGES.values() if one.takes)


def test_a_warning_is_in_the_log_the_ledger_and_the_summary(run: Run) -> None:
    @stage(reads=lambda r: (r.seed,), heavy=False)
    def doubtful(job: Job) -> None:
        (job.out / "made.txt").write_text("made")
        for _ in range(2):
            job.warn("half of it is odd")

    taken(run, "doubtful", doubtful)
    ledger = read_ledger(run.folder / "doubtful")
    assert ledger["warnings"] == ["half of it is odd"]
    assert "half of it is odd" in (run.folder / "log.txt").read_text()
    assert stage_facts(Made(run.folder / "doubtful", ledger)).warnings == ("half of it is odd",)


# Versions of packages


def test_a_ledger_names_versions_and_other_ones_are_said_but_redo_nothing(tmp_path: Path) -> None:
    def made(version: str) -> str:
        facts = {"git_commit": None, "packages": {"torch": version, "numpy": "2.0"}}
        with Run.open(tmp_path, None, facts) as run:
            taken(run, "sound", counting(1, 1))
        log = (tmp_path / "log.txt").read_text()
        (tmp_path / "log.txt").unlink()
        return log

    assert "2.8" not in made("2.8")
    assert read_ledger(tmp_path / "sound")["packages"] == {"torch": "2.8", "numpy": "2.0"}
    log = made("2.9")
    assert 'torch "2.8" -> "2.9"' in log
    assert "numpy" not in log
    assert read_ledger(tmp_path / "sound")["packages"]["torch"] == "2.8"


def test_a_stage_finished_under_other_versions_than_it_was_begun_with_says_so(tmp_path: Path) -> None:
    with Run.open(tmp_path, None, {"git_commit": None, "packages": {"torch": "2.9"}}) as run:
        work = run.stage("slow", 1)
        state = {"identity": work.identity, "seconds": 1.0, "started": "then", "packages": {"torch": "2.8"}}
        write_json(tmp_path / "slow.partial" / ".stage" / "state.json", state)
        with work:
            (work.folder / "made.txt").write_text("made")
    assert ['torch "2.8" -> "2.9"' in warning for warning in read_ledger(tmp_path / "slow")["warnings"]] == [True]


# Rewards asked in another form


class Fixed:
    """A scorer whose rewards are given."""

    def __init__(self, heads: Sequence[str], rewards: Sequence[Sequence[float]]) -> None:
        self.heads, self.rewards = heads, rewards

    def score(self, pairs: Sequence[Any]) -> Any:
        return np.array(self.rewards, dtype=np.float32)[: len(pairs)]


CHAT = ({"role": "user", "content": "What is tea?"}, {"role": "assistant", "content": "A drink."})
GOLDEN = GoldenModel((GoldenScore(CHAT, "", {"help": 60.0, "words": 20.0}),), "float32", None)  # type: ignore[arg-type]


def test_a_reward_model_that_misses_its_golden_scores_is_refused_with_both() -> None:
    require_golden("mine", Fixed(["help", "words"], [[60.01, 20.0]]), GOLDEN, "float32")
    require_golden("mine", Fixed(["help", "words"], [[60.9, 20.0]]), GOLDEN, "bfloat16")
    require_golden("mine", Fixed(["help"], [[0.0]]), None, "float32")
    for rewards, shown in (([[60.9, 20.0]], "60.9"), ([[float("nan"), 20.0]], "nan")):
        with pytest.raises(ValueError, match=rf"mine: help of 'A drink.' is {shown}, golden 60"):
            require_golden("mine", Fixed(["help", "words"], rewards), GOLDEN, "float32")


def test_heads_in_another_order_are_noticed_by_their_golden_scores() -> None:
    require_golden("mine", Fixed(["words", "help"], [[20.0, 60.0]]), GOLDEN, "float32")
    with pytest.raises(ValueError, match=r"mine: help of .* is 20, golden 60"):
        require_golden("mine", Fixed(["words", "help"], [[60.0, 20.0]]), GOLDEN, "float32")
    with pytest.raises(ValueError, match="no head 'words'"):
        require_golden("mine", Fixed(["help", "other"], [[60.0, 20.0]]), GOLDEN, "float32")


def test_golden_scores_are_found_beside_a_model_and_in_a_reward_stage(tmp_path: Path) -> None:
    write_golden(tmp_path, {"mine": GOLDEN})
    assert golden_for(tmp_path, "mine") == GOLDEN
    assert golden_for(tmp_path, "other") is None
    assert golden_for(tmp_path / "none", "mine") is None
    write_model_golden(tmp_path / "model", GOLDEN)
    assert golden_for(tmp_path / "model", ONLY) == GOLDEN
    assert golden_for(tmp_path / "model", "mine") is None


# Policies asked in other words


@pytest.mark.parametrize(
    ("knob", "value"),
    [("preference.template", "dpa-v1"), ("model.chat", "zephyr"), ("objectives", '{b = ["a"], a = ["a"]}')],
)
def test_a_policy_that_was_trained_on_other_words_is_refused(tmp_path: Path, knob: str, value: str) -> None:
    names: dict[str, tuple[str, ...]] = dict.fromkeys(RECIPE.objectives, ())
    write_contract(tmp_path, Contract(RECIPE.preference.template, RECIPE.model.chat, names))
    require_same_dial(tmp_path, RECIPE)
    require_same_dial(tmp_path / "plain", RECIPE)
    own = ["--heads", '["a"]', "--preference.low", "-45"] if knob == "objectives" else []
    other = load(MICRO, [f"--{knob}", value, *own])
    with pytest.raises(ValueError, match=rf"dpa\.json: this policy was trained with {knob} "):
        require_same_dial(tmp_path, other)
