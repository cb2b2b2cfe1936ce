"""Evaluate folders as arrays: rewards by prompt, condition, sample and objective.

Shapes: P prompts, V conditions, S samples, K objectives, N answers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpalign.measure.bootstrap import Array
from dpalign.measure.points import SystemRewards
from dpalign.paper.direction import Preference
from dpalign.paper.objectives import all_known
from dpalign.rows import CANDIDATES, HEADS, SCORES, read_table
from dpalign.stages.pools import objective_rewards, true_objectives

if TYPE_CHECKING:
    from dpalign.recipe import Recipe


def read_system(
    recipe: "Recipe", title: str, iteration: int | None, folder: Path, *, truth: bool = True
) -> SystemRewards:
    """The rewards of an evaluate folder.

    Args:
        truth: with the true rewards, where the folder holds them.
    """
    keys = read_table(folder / "answers", CANDIDATES, ["prompt_id", "condition_index", "condition_kind", "condition"])
    ids = list(dict.fromkeys(keys["prompt_id"].to_pylist()))
    conditions = max(keys["condition_index"].to_pylist()) + 1
    shape = (len(ids), conditions, recipe.evaluation.samples, len(recipe.objectives))
    directions = None
    if keys["condition_kind"][0].as_py() == "direction":
        directions = np.array([_unit(v_K, recipe) for v_K in _conditions(keys, shape)])
    true_NK = true_objectives(folder / "truth", recipe) if truth else None
    return SystemRewards(
        title,
        iteration,
        tuple(ids),
        directions,
        rewards(folder / "scores", recipe).reshape(shape),
        None if true_NK is None else true_NK.reshape(shape),
    )


def asked_targets(recipe: "Recipe", folder: Path) -> Array | None:
    """The reward targets that a system was asked for, a row a condition: (V, K); None of one asked otherwise."""
    keys = read_table(folder / "answers", CANDIDATES, ["prompt_id", "condition_index", "condition_kind", "condition"])
    if keys["condition_kind"][0].as_py() != "target":
        return None
    conditions = max(keys["condition_index"].to_pylist()) + 1
    return np.array(_conditions(keys, (0, conditions, recipe.evaluation.samples, 0)), dtype=float)


def _conditions(keys: object, shape: Sequence[int]) -> list[list[float]]:
    """The condition of each index, read off the first prompt's answers."""
    listed: list[list[float]] = keys["condition"].to_pylist()[: shape[1] * shape[2] : shape[2]]  # type: ignore[index]
    return listed


def _unit(v_K: Sequence[float], recipe: "Recipe") -> tuple[float, ...]:
    return Preference.from_vector(v_K, tuple(recipe.objectives)).v


def judge_rewards(recipe: "Recipe", folder: Path, system: SystemRewards) -> Array | None:
    """The judge's opinion of a system's answers, where the run has a judge: (P, V, S, K)."""
    judged = folder / "judged"
    return rewards(judged, recipe).reshape(system.reward_PVSK.shape) if judged.exists() else None


def rewards(folder: Path, recipe: "Recipe") -> Array:
    """Objectives of every scored answer of a folder: (N, K)."""
    scored = read_table(folder, SCORES, ["rewards"])["rewards"].to_pylist()
    return objective_rewards(scored, recipe.heads, recipe.objective_list, folder)


def mean_answer_tokens(folder: Path) -> float:
    """The tokens of an evaluate folder's mean answer."""
    return float(np.mean(read_table(folder / "answers", CANDIDATES, ["tokens"])["tokens"].to_pylist()))


def true_front(recipe: "Recipe", folder: Path, grid_UK: Array) -> SystemRewards | None:
    """The best answers of the world to the same prompts.

    None where nobody can say which they are: an objective reads a head without a truth, or a fault may pay.
    """
    from dpalign.world.language import read_prompt
    from dpalign.world.optimum import faultless_is_best, optimal_rewards

    objectives, heads = recipe.objective_list, recipe.heads
    if not all_known(objectives, heads, HEADS) or not faultless_is_best(grid_UK, objectives, heads):
        return None

    rows = read_table(folder / "answers", CANDIDATES, ["prompt_id", "messages"])
    prompts = dict(zip(rows["prompt_id"].to_pylist(), rows["messages"].to_pylist(), strict=True))
    tasks = [read_prompt(messages[-1]["content"]) for messages in prompts.values()]
    reward_PVK = optimal_rewards(tasks, grid_UK, objectives, heads)
    return SystemRewards(
        "true front", None, tuple(prompts), grid_UK, reward_PVK[:, :, None, :], reward_PVK[:, :, None, :]
    )
