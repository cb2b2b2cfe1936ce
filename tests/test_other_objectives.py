"""The world under other objectives than the paper's two: the true front is theirs, or there is none."""

from pathlib import Path

import numpy as np
import pytest

from conftest import MICRO
from dpalign.measure.bootstrap import Array
from dpalign.measure.points import Rewards
from dpalign.measure.reading import Reading
from dpalign.measure.setting import true_front
from dpalign.recipe import Recipe, load
from dpalign.rows import CANDIDATES, prompt_id, user_prompt, write_rows
from dpalign.stages.preference import evaluation_directions

DETAIL = (
    *("--objectives", '{complexity = ["helpsteer-complexity"], verbosity = ["helpsteer-verbosity"]}'),
    *("--preference.low", "-45"),
)
THREE = (
    "--objectives",
    '{helpful = ["ultrafeedback-helpfulness"], detail = ["helpsteer-complexity"], right = ["helpsteer-correctness"]}',
    *("--preference.distribution", "simplex"),
)


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """An evaluation of one question: two things in detail take 12 words of the 28 of full verbosity."""
    messages = user_prompt("explain fox and rope.")
    answer = {
        "prompt_id": prompt_id(messages), "t": 1, "condition_index": 0, "sample": 0, "condition_kind": "plain",
        "condition": [], "messages": messages, "response": "", "tokens": 1, "finished": True,
    }  # fmt: skip
    write_rows(tmp_path / "answers" / "part-00000.parquet", [answer], CANDIDATES)
    return tmp_path


def front_of(recipe: Recipe, folder: Path, grid_UK: Array) -> Rewards | None:
    """The true front by a recipe's objectives."""
    return true_front(folder, Reading(tuple(recipe.heads), tuple(recipe.objective_list)), grid_UK)


def test_the_front_is_of_the_recipes_objectives(asked: Path) -> None:
    """Detail of both things in 12 words; the last direction gives each point of both the same weight."""
    recipe = load(MICRO, DETAIL)
    front = front_of(recipe, asked, evaluation_directions(recipe))
    assert front is not None
    assert front.point_VK[0].tolist() == pytest.approx([100.0, 100 * 12 / 28])
    assert front.point_VK[-1].tolist() == pytest.approx([100.0, 100 * 12 / 28])  # 50 for 21.4, and again: both pay
    three = load(MICRO, THREE)
    best = front_of(three, asked, evaluation_directions(three))
    assert best is not None
    assert best.point_VK[:, 2].tolist() == pytest.approx([100.0] * 4)


def test_there_is_no_front_where_a_fault_may_pay_or_an_objective_has_no_truth(asked: Path) -> None:
    wordy = load(MICRO, ["--preference.low", "0", "--preference.high", "90"])
    assert front_of(wordy, asked, evaluation_directions(wordy)) is None
    objectives = ("--objectives", '{kind = ["kind"], short = ["short"]}', "--preference.low", "-45")
    own = load(MICRO, ["--heads", '["kind", "short"]', *objectives])
    assert front_of(own, asked, np.array([[1.0, 0.0]])) is None
