"""Does the reward model prefer what people prefer? RewardBench's question, on a file of preferences.

A row is {prompt, chosen, rejected} and may name its subset. Each side is one answer, or a list of them: RewardBench 2
has one chosen answer against three, and in its subset Ties several chosen ones. All answers are scored on the first
objective. A row is right if every chosen answer earns more than every rejected one. If the lowest chosen answer and
m rejected ones earn the same, the row counts 1/(1 + m): one half in a pair.

RewardBench 2 scores Ties by right prompts and by margins. The margins are left out here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise as neighbours
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dpalign.data.sources import Row, read_source
from dpalign.measure.bootstrap import Array, Bootstrap
from dpalign.measure.record import jsonable
from dpalign.rows import Message, user_prompt
from dpalign.runs.folder import write_json
from dpalign.stages.pools import objective_rewards
from dpalign.stages.score import open_scorer
from dpalign.stages.stage import Job, model_read, objectives_read, scorer_read, stage

if TYPE_CHECKING:
    from dpalign.recipe import Recipe
    from dpalign.rewards.score import Scorer

ALL: Final = "all"
RESAMPLES: Final = 1000
"""Resamples of the rows, for the intervals."""


@dataclass(frozen=True)
class Pair:
    """Better and worse answers to one prompt: one of each, or several."""

    messages: tuple[Message, ...]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    subset: str

    @property
    def answers(self) -> tuple[str, ...]:
        return self.chosen + self.rejected


@stage(
    reads=lambda r: (r.seed, *scorer_read(r), *model_read(r), *objectives_read(r)),
    inputs=("reward", "pairs"),
    optional=("annotate",),
)
def pairwise(job: Job) -> None:
    """Count how often the reward model rates the chosen answer of a pair higher (RewardBench's form)."""
    pairs = read_pairs(job.inputs["pairs"])
    scorer = open_scorer(job.recipe, job.inputs["reward"], job.inputs.get("annotate"), alone=True)
    write_json(job.out / "accuracy.json", accuracy(job.recipe, scorer, pairs, job.inputs["pairs"]))
    scored = sum(len(pair.answers) for pair in pairs)
    job.work.tally.add(rows_in=len(pairs), rows_out=len(pairs), scored=scored)


def read_pairs(path: Path) -> list[Pair]:
    """Every row of a local file (.jsonl, .jsonl.gz, .json, .parquet).

    Raises:
        ValueError: no such file, or no rows; or a row that is cut, lacks a column, has an empty prompt or side, or has
            one answer on both sides. The message names the file and the line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; reward.pairwise names a local file of pairs")
    pairs = []
    for row in read_source(str(path)):
        prompt, chosen, rejected = row.text("prompt"), _answers(row, "chosen"), _answers(row, "rejected")
        if not prompt.strip():
            raise row.wrong("prompt", prompt, "a prompt with words")
        if both := set(chosen) & set(rejected):
            raise row.wrong("rejected", min(both), "another answer than the chosen one")
        subset = row.text("subset") if row.values.get("subset") is not None else ""
        pairs.append(Pair(tuple(user_prompt(prompt)), chosen, rejected, subset))
    if not pairs:
        raise ValueError(f"{path}: no pairs in it; give rows of prompt, chosen and rejected")
    return pairs


def _answers(row: Row, column: str) -> tuple[str, ...]:
    """A column that holds one answer, or a list of them."""
    value = row.get(column)
    if not isinstance(value, list):
        return (row.text(column),)
    if not value:
        raise row.wrong(column, value, "at least one answer")
    of_place = {f"{column}[{i}]": answer for i, answer in enumerate(value)}
    return tuple(Row(row.where, of_place).text(place) for place in of_place)


def accuracy(recipe: "Recipe", scorer: "Scorer", pairs: Sequence[Pair], source: Path) -> dict[str, Any]:
    """How often the chosen answer earns more, by subset and over all, with intervals over the rows.

    Returns:
        objective; subsets: name -> {accuracy: Estimate, pairs, ties}. The first subset has all rows.
    """
    answers = [(pair.messages, answer) for pair in pairs for answer in pair.answers]
    reward_NK = objective_rewards(scorer.score(answers).tolist(), scorer.heads, recipe.objective_list, source)
    ends = np.cumsum([0, *(len(pair.answers) for pair in pairs)]).tolist()
    right_N = np.array(
        [
            _right(reward_NK[start:end, 0], len(pair.chosen))
            for pair, (start, end) in zip(pairs, neighbours(ends), strict=True)
        ]
    )
    subsets: dict[str, Array] = {ALL: right_N}
    for name in sorted({pair.subset for pair in pairs} - {""}):
        subsets[name] = right_N[[pair.subset == name for pair in pairs]]
    outcome: dict[str, Any] = jsonable(
        {
            "objective": next(iter(recipe.objectives)),
            "subsets": {name: _share(own_N, recipe.seed) for name, own_N in subsets.items()},
        }
    )
    return outcome


def _right(reward_N: Array, chosen: int) -> float:
    """1 if right, 0 if wrong, a share if the lowest chosen answer ties with rejected ones."""
    least, rejected_N = reward_N[:chosen].min(), reward_N[chosen:]
    return 0.0 if (rejected_N > least).any() else 1 / (1 + int((rejected_N == least).sum()))


def _share(right_N: Array, seed: int) -> Mapping[str, Any]:
    bootstrap = Bootstrap(seed=seed, replicates=RESAMPLES)
    interval = bootstrap.interval(right_N.mean(), bootstrap.weights(len(right_N), "pairs") @ right_N)
    return {"accuracy": interval, "pairs": len(right_N), "ties": int(((right_N > 0) & (right_N < 1)).sum())}
