"""Annotation: score every original training answer with all rewards (section 3.1), and fix their scales for the run.

If the data have no answers, the originals are plain answers of the model that the loop starts from.
"""

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa

from dpalign.rewards.knobs import IDENTITY
from dpalign.rewards.scale import fitted_scales, known_scales, to_points, write_scales
from dpalign.rows import (
    CANDIDATES,
    RATED,
    SCORES,
    UNFINISHED,
    matrix_of,
    read_rows,
    read_table,
    shards,
    write_rows,
    write_table,
)
from dpalign.runs.shards import make_shards
from dpalign.stages.pools import ORIGINALS
from dpalign.stages.score import Asked, open_scorer, scores_of
from dpalign.stages.shards import PART, Shards, parts_of
from dpalign.stages.stage import Job, model_read, scorer_read, stage

if TYPE_CHECKING:
    from dpalign.rewards.score import Scorer

ANNOTATED_SHARD: Final = 4096
"""Original answers a shard."""
RAW: Final = "raw-{:05d}.parquet"
"""Raw rewards of a shard, in the stage's scratch until the scales are known."""


@stage(
    reads=lambda r: (r.heads, r.reward.ensemble, *model_read(r), *scorer_read(r)),
    inputs=("data", "reward"),
    optional=("answers",),
    takes="answers",
    cost=lambda costs, step: costs.score(*costs.originals, ANNOTATED_SHARD / costs.originals[1]),
)
def annotate(job: Job) -> None:
    """Score all training answers with all rewards, with or without labels, and fix the rewards' scales."""
    if "answers" in job.inputs:
        rows = originals(job)
        write_rows(job.out / ORIGINALS / "rated-00000.parquet", rows, RATED)
        cut = read_table(job.inputs["answers"], CANDIDATES, ["finished"]).num_rows - len(rows)
        job.work.tally.add(cut, filtered={UNFINISHED: cut} if cut else {})
    make_shards(job, annotating)
    if job.recipe.rewards:
        settle_scales(job)


def originals(job: Job) -> list[dict[str, Any]]:
    """The rated answers; if the data have none, the finished plain answers, without labels and without their hints.

    Raises:
        ValueError: no plain answer is finished, or the data have no answers and none are given.
    """
    if "answers" not in job.inputs:
        rated = job.inputs["data"] / "train"
        if not rated.is_dir():
            raise ValueError(f"{job.inputs['data']}: has prompts without answers; give plain ones with --answers DIR")
        return list(read_rows(rated, RATED))
    drawn = Asked(job.inputs["data"]).shown(list(read_rows(job.inputs["answers"], CANDIDATES)))
    rows = [
        {key: row[key] for key in ("prompt_id", "messages", "response")} | {"source": "sampled", "labels": {}}
        for row in drawn
        if row["finished"]
    ]
    if not rows:
        raise ValueError(
            f"{job.inputs['answers']}: none of {len(drawn)} answers is finished; raise sampling.max_new_tokens, or "
            "start from a model that answers"
        )
    return rows


def annotating(job: Job) -> "Shards[Scorer]":
    """The original answers in shards, without HelpSteer's; `sample` numbers the answers to a prompt."""
    earlier: Counter[str] = Counter()
    rows = []
    for row in originals(job):
        if row["source"] != "helpsteer":
            rows.append(row | {"t": 0, "condition_index": 0, "sample": earlier[row["prompt_id"]]})
            earlier[row["prompt_id"]] += 1
    parts = parts_of(rows, ANNOTATED_SHARD)
    open_models = partial(open_scorer, job.recipe, job.inputs["reward"], alone=True, raw=True)
    place = ("resume", f"resume/{RAW}") if job.recipe.fits_scales else ("", PART)
    return scores_of(job, len(parts), lambda index: list(parts[index]), open_models, *place)


def settle_scales(job: Job) -> None:
    """Fit the unknown scales, write the raw shards in points, and record all scales."""
    recipe, fits = job.recipe, job.recipe.fits_scales
    paths = sorted(job.work.resume.glob("raw-*.parquet")) if fits else shards(job.out)
    tables = [read_table(path, SCORES) for path in paths]
    scored_NH = np.concatenate([matrix_of(table["rewards"]) for table in tables])
    scales = fitted_scales(recipe.rewards, recipe.reward_heads, scored_NH)
    write_scales(job.out, recipe.scored_heads, scales)
    if not fits:
        return
    known = known_scales(recipe.rewards, recipe.reward_heads)  # heads with a known scale were scored in points
    missing = [IDENTITY if own is not None else scale for own, scale in zip(known, scales, strict=True)]
    field = SCORES.field("rewards")
    for index, table in enumerate(tables):
        points_NH = to_points(matrix_of(table["rewards"]), missing).astype(np.float32)
        column = pa.array(points_NH.tolist(), field.type)
        write_table(job.out / PART.format(index), table.set_column(SCORES.get_field_index("rewards"), field, column))
    for head, own, (slope, offset) in zip(recipe.scored_heads, known, scales, strict=True):
        if own is None:
            job.work.run.log(f"{job.out.stem}: {head}: points are {slope:.4g} x reward {offset:+.4g}, fitted")
