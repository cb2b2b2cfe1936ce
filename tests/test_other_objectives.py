"""The world under other objectives than the paper's two: the true front is theirs, or there is none."""

import json
from pathlib import Path

import numpy as np
import pytest

from conftest import MICRO, RECIPES
from dpalign.measure.bootstrap import Array
from dpalign.measure.points import Rewards
from dpalign.measure.reading import Reading
from dpalign.measure.setting import reference_point, true_front
from dpalign.measure.summary import Summary
from dpalign.measure.system import System
from dpalign.paper.direction import draw_directions, rng_for
from dpalign.pipeline.runner import execute
from dpalign.recipe import Recipe, load
from dpalign.rows import CANDIDATES, prompt_id, user_prompt, write_rows
from dpalign.stages.preference import evaluation_directions
from dpalign.world import optimum
from dpalign.world.people import draw_tasks

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


def test_hypervolumes_reference_has_the_most_words_of_the_best_answers() -> None:
    """A cone starts in its middle, where the best answers have fewer: the longer ones would then count nothing."""
    best_PVSK = np.array([[[[87.0, 52.0, 72.0]], [[100.0, 74.0, 100.0]], [[36.0, 13.0, 14.0]]]])
    front = Rewards(System("true front"), ("a",), np.eye(3), best_PVSK, best_PVSK)
    plain_PVSK = np.full((1, 1, 1, 3), 40.0)
    sft = Rewards(System("SFT"), ("a",), None, plain_PVSK, plain_PVSK)
    reference_K = reference_point([sft], front, np.array([1.0, -1.0, 1.0]), lambda: pytest.fail("there is a truth"))
    assert reference_K is not None
    assert reference_K.tolist() == [40.0, 74.0, 40.0]


def test_the_shipped_recipes_cone_keeps_every_sign_and_has_a_best_answer_almost_everywhere(tmp_path: Path) -> None:
    """Its thirteen directions are about evenly spread, reach near each weight's extremes, and seldom share answers."""
    recipe = load(RECIPES / "three.toml")
    grid_UK = evaluation_directions(recipe)
    assert (np.sign(grid_UK) == [1, -1, 1]).all()
    cosine_UU = grid_UK @ grid_UK.T - 2 * np.eye(len(grid_UK))
    nearest_U = np.degrees(np.arccos(cosine_UU.max(axis=1)))
    assert nearest_U.min() > 7.8
    assert nearest_U.max() < 8.6
    population = recipe.preference.population(3)
    drawn_NK = np.abs(draw_directions(population, 5000, rng_for("test")))
    for reach in (np.min, np.max):
        assert reach(np.abs(grid_UK), axis=0) == pytest.approx(reach(drawn_NK, axis=0), abs=0.04)
    tasks = draw_tasks("test", 60, rng_for(1, "tasks", "test"))
    front_UK = optimum.optimal_rewards(tasks, grid_UK, recipe.objective_list, recipe.heads).mean(axis=0)
    assert len(np.unique(front_UK.round(3), axis=0)) >= 11


@pytest.mark.slow
def test_three_objectives_go_through_every_stage_to_the_page(tmp_path: Path) -> None:
    """The shipped recipe at the size of micro.toml, with fewer directions, specialists and updates."""
    text = (RECIPES / "three.toml").read_text(encoding="utf-8")
    (tmp_path / "three.toml").write_text(text.replace('extends = "demo"', 'extends = "micro"'), encoding="utf-8")
    fewer = ["--evaluation.directions=5", "--rsf.directions=2", "--finetune.steps=10"]
    recipe = load(tmp_path / "three.toml", fewer)
    run = execute(recipe, tmp_path / "run", compared=True)
    soup = json.loads((run / "evaluate-soup-1" / "soup.json").read_text(encoding="utf-8"))
    assert soup["experts"] == [[1, 0, 0], [0, -1, 0], [0, 0, 1]]
    summary = Summary.model_validate_json((run / "report" / "summary.json").read_text(encoding="utf-8"))
    assert len(summary.of_role("specialist")) == 2
    assert summary.dominance_of("DPA t=2", "rewarded soups") is not None
    assert {one.figures.true_front_share is None for one in summary.systems.values()} == {False}
    for system in ("DPA t=2", "rewarded soups"):
        taus = summary.systems[system].figures.weight_taus
        assert list(taus) == list(recipe.objectives)
        assert all(list(of) == list(recipe.objectives) for of in taus.values())
    best = summary.true_front_weight_taus
    assert all(best[name][name].above_zero for name in recipe.objectives)
    assert {"pairs.svg", "across.svg", "control.svg"} <= {path.name for path in (run / "report" / "figures").iterdir()}
