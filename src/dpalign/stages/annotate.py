"""Annotation: the reward model scores every original training answer (section 3.1)."""

from collections import Counter
from typing import TYPE_CHECKING, Final

from dpalign.rows import RATED, read_rows
from dpalign.runs.shards import make_shards
from dpalign.stages.score import scores_of
from dpalign.stages.shards import Shards, parts_of
from dpalign.stages.stage import Job, model_read, scorer_read, stage

if TYPE_CHECKING:
    from dpalign.rewards.score import Scorer

ANNOTATED_SHARD: Final = 4096
"""Original answers a shard."""


@stage(
    reads=lambda r: (r.heads, *model_read(r), *scorer_read(r)),
    inputs=("data", "reward"),
    cost=lambda costs, step: costs.score(2 * costs.sizes.prompts, costs.sizes.rated),
)
def annotate(job: Job) -> None:
    """Score all training answers with the reward model, whatever labels they have: UltraFeedback has no verbosity."""
    make_shards(job, annotating)


def annotating(job: Job) -> "Shards[Scorer]":
    """The original answers in shards; an answer's `sample` counts those to its prompt."""
    earlier: Counter[str] = Counter()
    rows = []
    for row in read_rows(job.inputs["data"] / "train", RATED):
        if row["source"] != "helpsteer":
            rows.append(row | {"t": 0, "condition_index": 0, "sample": earlier[row["prompt_id"]]})
            earlier[row["prompt_id"]] += 1
    parts = parts_of(rows, ANNOTATED_SHARD)
    return scores_of(job, len(parts), lambda index: list(parts[index]))
