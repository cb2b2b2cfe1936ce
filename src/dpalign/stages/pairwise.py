"""Does the reward model prefer what people prefer? RewardBench's question, on a file of pairs.

A row is {prompt, chosen, rejected} and may name its subset. Both answers are scored; the pair is right where the
chosen one earns more at the direction of the first objective, and half right where both earn the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dpalign.data.sources import read_source
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
"""Of the pairs, for the intervals."""


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the better one first."""

    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    subset: str


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
    job.work.tally.add(rows_in=len(pairs), rows_out=len(pairs), scored=2 * len(pairs))


def read_pairs(path: Path) -> list[Pair]:
    """Every row of a local file (.jsonl, .jsonl.gz, .json, .parquet).

    Raises:
        ValueError: no such file, no rows, or a row that is cut, lacks a column, or whose prompt is empty or whose two
            answers are the same; the message names the file and the line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; reward.pairwise names a local file of pairs")
    pairs = []
    for row in read_source(str(path)):
        prompt, chosen, rejected = (row.text(column) for column in ("prompt", "chosen", "rejected"))
        if not prompt.strip():
            raise row.wrong("prompt", prompt, "a prompt with words")
        if chosen == rejected:
            raise row.wrong("rejected", rejected, "another answer than the chosen one")
        subset = row.text("subset") if row.values.get("subset") is not None else ""
        pairs.append(Pair(tuple(user_prompt(prompt)), chosen, rejected, subset))
    if not pairs:
        raise ValueError(f"{path}: no pairs in it; give rows of prompt, chosen and rejected")
    return pairs


def accuracy(recipe: "Recipe", scorer: "Scorer", pairs: Sequence[Pair], source: Path) -> dict[str, Any]:
    """How often the chosen answer earns more, by subset and over all, with intervals over the pairs.

    Returns:
        objective; subsets: name -> {accuracy: Estimate, pairs, ties}, the first of them over all pairs.
    """
    answers = [(pair.messages, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    reward_NK = objective_rewards(scorer.score(answers).tolist(), scorer.heads, recipe.objective_list, source)
    lead_N = reward_NK[::2, 0] - reward_NK[1::2, 0]
    subsets: dict[str, Array] = {ALL: lead_N}
    for name in sorted({pair.subset for pair in pairs} - {""}):
        subsets[name] = lead_N[[pair.subset == name for pair in pairs]]
    outcome: dict[str, Any] = jsonable(
        {
            "objective": next(iter(recipe.objectives)),
            "subsets": {name: _share(own_N, recipe.seed) for name, own_N in subsets.items()},
        }
    )
    return outcome


def _share(lead_N: Array, seed: int) -> Mapping[str, Any]:
    right_N = np.where(lead_N > 0, 1.0, np.where(lead_N < 0, 0.0, 0.5))
    bootstrap = Bootstrap(seed=seed, replicates=RESAMPLES)
    interval = bootstrap.interval(right_N.mean(), bootstrap.weights(len(right_N), "pairs") @ right_N)
    return {"accuracy": interval, "pairs": len(right_N), "ties": int((lead_N == 0).sum())}
