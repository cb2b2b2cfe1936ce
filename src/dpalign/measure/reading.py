"""Evaluate folders as arrays: rewards by prompt, condition, sample and objective.

Shapes: P prompts, V conditions, S samples, K objectives, N answers, H heads.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpalign.measure.bootstrap import Array
from dpalign.measure.points import Rewards
from dpalign.measure.system import BESIDE_THE_LOOP, System, policy_at
from dpalign.paper.direction import Preference, arithmetic, listed
from dpalign.paper.ensemble import spread_of
from dpalign.paper.objectives import Objective, all_known, by_name, read_objectives
from dpalign.rows import CANDIDATES, HEADS, SCORES, matrix_of, read_table
from dpalign.runs.ledger import read_ledger


@dataclass(frozen=True)
class Reading:
    """How objectives are read from the heads of stored rewards."""

    heads: tuple[str, ...]
    objectives: tuple[Objective, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The objectives by name."""
        return tuple(objective.name for objective in self.objectives)


def read_rewards(folder: Path, system: System, reading: Reading, *, truth: bool = True) -> Rewards:
    """Read the rewards of an evaluate folder.

    Args:
        truth: also read the true rewards, if the folder has them.
    """
    ids, kind, conditions = asked_of(folder)
    shape = (len(ids), len(conditions), -1, len(reading.objectives))
    directions = None
    if kind == "direction":
        directions = np.array([Preference.from_vector(v_K, reading.names).v for v_K in conditions])
    reward_NH = _scores(folder / "scores")
    reward_NK = _read(reward_NH, reading, folder / "scores")
    spread_NK = spread_of(reward_NH, reading.heads, reading.objectives)
    true_NK = true_rewards(folder / "truth", reading) if truth else None
    judged = folder / "judged"
    return Rewards(
        system,
        tuple(ids),
        directions,
        reward_NK.reshape(shape),
        None if true_NK is None else true_NK.reshape(shape),
        rewards(judged, reading).reshape(shape) if judged.exists() else None,
        None if spread_NK is None else spread_NK.reshape(shape),
        folder,
    )


def asked_of(folder: Path) -> tuple[list[str], str, list[list[float]]]:
    """The prompts of a folder's answers, the kind of its conditions, and what each asks for."""
    keys = read_table(folder / "answers", CANDIDATES, ["prompt_id", "condition_index", "condition_kind", "condition"])
    ids = list(dict.fromkeys(keys["prompt_id"].to_pylist()))
    asked: dict[int, list[float]] = {}
    per_prompt = len(keys) // len(ids)
    for index, condition in zip(
        keys["condition_index"][:per_prompt].to_pylist(), keys["condition"][:per_prompt].to_pylist(), strict=True
    ):
        asked.setdefault(index, condition)
    return ids, str(keys["condition_kind"][0].as_py()), [asked[index] for index in sorted(asked)]


def asked_targets(folder: Path) -> Array | None:
    """The reward targets that a system was asked for: (V, K); None if it was not asked for targets."""
    _, kind, conditions = asked_of(folder)
    return np.array(conditions, dtype=float) if kind == "target" else None


def rewards(folder: Path, reading: Reading) -> Array:
    """Objectives of every scored answer of a folder: (N, K).

    Raises:
        ValueError: the scores have other heads or are not numbers; the message names the folder.
    """
    return _read(_scores(folder), reading, folder)


def _scores(folder: Path) -> Array:
    """The rewards of every answer of a folder by all heads: (N, H)."""
    return matrix_of(read_table(folder, SCORES, ["rewards"])["rewards"])


def true_rewards(folder: Path, reading: Reading) -> Array | None:
    """Objectives of a folder's true rewards: (N, K); None if it has none, or an objective reads a head without truth.

    The truth has the ten heads of `HEADS`. The reward model's heads are matched to them by name.
    """
    if not folder.exists() or not all_known(reading.objectives, reading.heads, HEADS):
        return None
    true_NH = by_name(_scores(folder), HEADS, reading.heads)
    return _read(true_NH, reading, folder)


def _read(reward_NH: Array, reading: Reading, folder: Path) -> Array:
    try:
        return read_objectives(reward_NH, reading.heads, reading.objectives)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def mean_answer_tokens(folder: Path) -> float:
    """The mean number of tokens of an evaluate folder's answers."""
    return float(np.mean(read_table(folder / "answers", CANDIDATES, ["tokens"])["tokens"].to_pylist()))


def answer_rows(folder: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The answers of an evaluate folder, prompt by prompt, condition by condition."""
    rows: list[dict[str, Any]] = read_table(folder / "answers", CANDIDATES, columns).to_pylist()
    return rows


def evaluations(
    inputs: Mapping[str, Path], planned: Mapping[str, System], reading: Reading, senses_K: Array
) -> tuple[list[tuple[str, Rewards]], dict[str, Rewards]]:
    """Read the evaluated systems by name, and the same systems on the tuning prompts.

    Args:
        inputs: the folders of evaluate and tune steps, among others.
        planned: the systems of the run's steps.

    Raises:
        ValueError: there is no evaluate folder.
    """
    evaluated: list[tuple[str, Rewards]] = []
    tuning: dict[str, Rewards] = {}
    for step, folder in inputs.items():
        kind, _, name = step.partition("-")
        if kind != "evaluate":
            continue
        system = system_of(planned, step, folder)
        if (folder / "soup.json").is_file():
            experts_EK = json.loads((folder / "soup.json").read_text(encoding="utf-8"))["experts"]
            experts = [arithmetic(dict(zip(reading.names, v_K, strict=True)), senses_K.tolist()) for v_K in experts_EK]
            system = replace(system, setting=listed(experts))
        evaluated.append((name, read_rewards(folder, system, reading)))
        if f"tune-{name}" in inputs:
            tuning[name] = read_rewards(inputs[f"tune-{name}"], system, reading, truth=False)
    if not evaluated:
        raise ValueError("nothing to report: give at least one evaluate- folder")
    return evaluated, tuning


def system_of(planned: Mapping[str, System], step: str, folder: Path) -> System:
    """The system of an input: as the run planned it or, if a report is made alone, from the evaluation's ledger."""
    if step in planned:
        return planned[step]
    knobs = read_ledger(folder)["knobs"]
    t = knobs.get("step.t", 0)
    name = step.partition("-")[2]
    if t and knobs.get("step.condition") == "directions":
        return policy_at(t)
    return BESIDE_THE_LOOP.get(name, System(name))
