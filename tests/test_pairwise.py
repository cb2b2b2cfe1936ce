"""The reward model on a local file of preference pairs, in RewardBench's form."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import MICRO
from dpalign.pipeline import runner
from dpalign.pipeline.steps import knobs_of, steps
from dpalign.recipe import Recipe, changed, load
from dpalign.rows import HEADS, user_prompt
from dpalign.runs.folder import Run
from dpalign.runs.ledger import read_ledger
from dpalign.stages.pairwise import accuracy, read_pairs
from dpalign.stages.reward import means_of
from dpalign.stages.score import open_scorer


def write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def pair(chosen: Any, rejected: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": "name fox.", "chosen": chosen, "rejected": rejected, **more}


class Lengths:
    """The longer an answer, the more helpful; its verbosity is the other way round."""

    heads = HEADS

    def score(self, pairs: Sequence[Any]) -> np.ndarray:
        length_N = np.array([len(answer) for _, answer in pairs], dtype=np.float32)
        reward_NH = np.repeat(length_N[:, None], len(HEADS), axis=1)
        reward_NH[:, HEADS.index("helpsteer-verbosity")] *= -1
        return reward_NH


def test_accuracy_counts_by_subset_and_a_tie_as_half(tmp_path: Path) -> None:
    rows = [
        pair("longer", "short", subset="chat"), pair("same", "size", subset="chat"),
        pair("no", "much longer", subset="code"), pair("longer", "short"),
    ]  # fmt: skip
    path = write(tmp_path / "pairs.jsonl", rows)
    found = accuracy(Recipe(name="x"), Lengths(), read_pairs(path), path)
    assert found["objective"] == "helpfulness"
    assert list(found["subsets"]) == ["all", "chat", "code"]
    shares = {name: (one["accuracy"]["value"], one["pairs"], one["ties"]) for name, one in found["subsets"].items()}
    assert shares == {"all": (0.625, 4, 1), "chat": (0.75, 2, 1), "code": (0.0, 1, 0)}
    assert found["subsets"]["all"]["accuracy"]["low"] < 0.625 < found["subsets"]["all"]["accuracy"]["high"]


def test_the_direction_is_that_of_the_first_objective(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [pair("longer", "short")])
    concise = Recipe(
        name="x", objectives={"verbosity": ("helpsteer-verbosity",), "helpfulness": ("helpsteer-helpfulness",)}
    )
    assert accuracy(concise, Lengths(), read_pairs(path), path)["subsets"]["all"]["accuracy"]["value"] == 0


def test_in_a_list_every_chosen_answer_must_beat_every_rejected_one(tmp_path: Path) -> None:
    """RewardBench 2: one against three, and in Ties several against several. Rewards are lengths."""
    rows = [
        pair("four", ["a", "bb", "ccc"], subset="best of 4"),
        pair("four", ["a", "bb", "longer"], subset="best of 4"),
        pair("four", ["a", "same", "size"], subset="best of 4"),
        pair(["long", "longer"], ["a"], subset="Ties"),
        pair(["b", "longer"], ["aa", "cc"], subset="Ties"),
    ]
    path = write(tmp_path / "pairs.jsonl", rows)
    found = accuracy(Recipe(name="x"), Lengths(), read_pairs(path), path)["subsets"]
    shares = {name: (one["accuracy"]["value"], one["pairs"], one["ties"]) for name, one in found.items()}
    assert shares["best of 4"] == (pytest.approx((1 + 0 + 1 / 3) / 3), 3, 1)
    assert shares["Ties"] == (0.5, 2, 0)
    assert shares["all"][1:] == (5, 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, "line 2: no column 'rejected'"),
        (pair("a", 3), "line 2: rejected is 3, expected text"),
        (pair("a", "a"), "line 2: rejected is 'a', expected another answer than the chosen one"),
        (pair("a", []), r"line 2: rejected is \[\], expected at least one answer"),
        (pair("a", ["b", 3]), r"line 2: rejected\[1\] is 3, expected text"),
        (pair("a", ["b", "a"]), "line 2: rejected is 'a', expected another answer than the chosen one"),
        (pair("a", "b") | {"prompt": " "}, "line 2: prompt is ' ', expected a prompt with words"),
        (pair("a", "b", subset=4), "line 2: subset is 4, expected text"),
        ("cut", "line 2: 'cut' is not an object"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, row: object, message: str) -> None:
    path = write(tmp_path / "pairs.jsonl", [pair("a", "b", subset=None), row])
    with pytest.raises(ValueError, match=message):
        read_pairs(path)


def test_a_missing_or_an_empty_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such file; reward\.pairwise names a local file"):
        read_pairs(tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match="no pairs in it"):
        read_pairs(write(tmp_path / "empty.jsonl", []))


def test_the_knob_adds_a_step_that_the_report_reads_and_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAIRS", str(tmp_path))
    recipe = changed(load(MICRO), {"reward.pairwise": "$PAIRS/pairs.jsonl"})
    named = {step.name: step for step in steps(recipe)}
    assert named["pairwise"].inputs == {"reward": "reward", "pairs": tmp_path / "pairs.jsonl"}
    assert named["report"].inputs["pairwise"] == "pairwise"
    plain = {step.name: step for step in steps(load(MICRO))}
    assert "pairwise" not in plain
    assert knobs_of(recipe, named["reward"]) == knobs_of(load(MICRO), plain["reward"])
    monkeypatch.delenv("PAIRS")
    with pytest.raises(ValueError, match=r"reward\.pairwise is '\$PAIRS/pairs.jsonl', and the environment has no"):
        steps(recipe)


def test_the_stage_scores_a_file_with_the_runs_reward_model(micro_run: Path, tmp_path: Path) -> None:
    said = ["fox is red and hunts mice.", "iron is hard.", "a", "fox is", "fox is red.", "tea is hot. tea is hot."]
    path = write(tmp_path / "pairs.jsonl", [pair(*two) for two in itertools.pairwise(said)])
    recipe = changed(load(MICRO), {"reward.pairwise": str(path)})
    step = next(step for step in steps(recipe) if step.name == "pairwise")
    inputs = {"reward": micro_run / "reward", "pairs": path}
    with Run.open(tmp_path / "run", None) as run:
        runner.take(recipe, run, replace(step, inputs=inputs))
    found = json.loads((tmp_path / "run" / "pairwise" / "accuracy.json").read_text())
    scorer = open_scorer(recipe, micro_run / "reward", alone=True)
    first_N = means_of(
        scorer.score([(user_prompt("name fox."), answer) for answer in said]), scorer.heads, recipe.objective_list
    )[:, 0]
    right = sum(chosen > rejected for chosen, rejected in itertools.pairwise(first_N))
    assert 0 < right < 5
    assert found["subsets"]["all"]["accuracy"]["value"] == right / 5
    assert read_ledger(tmp_path / "run" / "pairwise")["tokens"]["scored"] == 10
