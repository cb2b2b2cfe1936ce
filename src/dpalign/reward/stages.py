"""The reward stages: train, judge, annotate, score."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from dpalign.engines import on_transformers
from dpalign.objectives import head_indices
from dpalign.recipe import Recipe
from dpalign.records import CANDIDATES, RATED, SCORES, read_rows, shards, write_rows
from dpalign.reward.baseline import ridge_cross_validated, surface_features
from dpalign.reward.model import train_reward_model
from dpalign.reward.quality import quality
from dpalign.reward.score import Scorer, load_scorer
from dpalign.runs import Shard, write_json
from dpalign.scale.shards import Id, make_shards, named
from dpalign.stages import Job
from dpalign.training.common import Fitted, first_process, require_weights

Array = NDArray[np.float64]

RESAMPLES: Final = 1000
"""Of the held-out prompts, for the intervals of the reward model's quality."""


def reward(job: Job) -> None:
    """Train the reward model, or take the one that the recipe names; measure it on held-out prompts."""
    recipe = on_transformers(job.recipe)  # it trains in this process, and scores few rows
    if not recipe.reward.checkpoint:
        _train(job, "train", recipe.seed)
    elif not recipe.reward.checkpoint.startswith("python:") and Path(recipe.reward.checkpoint).exists():
        require_weights(Path(recipe.reward.checkpoint))
    if not first_process():  # those that train beside it have no part in what follows
        return
    scorer = open_scorer(recipe, job.out)
    for objective in recipe.objective_list:
        head_indices(objective, scorer.heads)
    if (job.inputs["data"] / "heldout").exists():
        write_json(job.out / "quality.json", measure(recipe, scorer, job.inputs["data"]))


def judge(job: Job) -> None:
    """Train a second reward model on prompts that the first has not seen."""
    recipe = on_transformers(job.recipe)
    _train(job, "judge", recipe.seed + 1)
    if first_process():
        write_json(job.out / "quality.json", measure(recipe, model_scorer(recipe, job.out), job.inputs["data"]))


def _train(job: Job, part: str, seed: int) -> None:
    recipe = job.recipe
    start = str(job.inputs["base"] / "model") if "base" in job.inputs else recipe.model.source
    tokenizer = AutoTokenizer.from_pretrained(start, trust_remote_code=recipe.model.trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token
    fitted: Fitted = train_reward_model(
        start,
        list(read_rows(job.inputs["data"] / part, RATED)),
        recipe.heads,
        job.out / "model",
        recipe.reward,
        tokenizer=tokenizer,
        dtype=recipe.model.dtype,
        seed=seed,
        resume=job.work.resume,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    filtered = {"too long for the context": fitted.too_long} if fitted.too_long else {}
    job.work.tally.add(fitted.rows + fitted.too_long, fitted.rows, filtered, trained=fitted.tokens)


def open_scorer(recipe: Recipe, reward_stage: Path, *, alone: bool = False) -> Scorer:
    """The scorer of a run: the recipe's own choice, or the model that the reward stage trained.

    Args:
        alone: no policy stands beside it, so that vLLM may take all the GPU memory that the recipe grants.

    Raises:
        ValueError: a folder without weights; vLLM is asked for and cannot start.
    """
    if recipe.reward.checkpoint:
        return _opened(recipe, recipe.reward.checkpoint, alone, recipe.model.trust_remote_code)
    return model_scorer(recipe, reward_stage, alone=alone)


def model_scorer(recipe: Recipe, stage: Path, *, alone: bool = False) -> Scorer:
    """The scorer on a stage's own model, whatever the recipe names."""
    folder = stage / "model" if (stage / "model").is_dir() else stage
    require_weights(folder)
    return _opened(recipe, str(folder), alone)


def _opened(recipe: Recipe, source: str, alone: bool, trust_remote_code: bool = False) -> Scorer:
    """The source on the engine that the recipe scores with; a Python function is called as it is."""
    loading: dict[str, Any] = {
        "template": recipe.reward.template,
        "dtype": recipe.model.dtype,
        "trust_remote_code": trust_remote_code,
    }
    if recipe.engines.scoring == "transformers" or source.startswith("python:"):
        loading |= {"batch_tokens": recipe.reward.score_tokens, "share_prefix": recipe.reward.share_prefix}
        return load_scorer(source, recipe.heads, **loading)
    from dpalign.reward.vllm_scorer import VllmScorer

    return VllmScorer(
        source,
        recipe.heads,
        rows=recipe.sampling.rows,
        settings=recipe.engines,
        prompt_tokens=recipe.sampling.prompt_tokens,
        max_new_tokens=recipe.sampling.max_new_tokens,
        share=1.0 if alone else 0.25,  # a policy has half, and a judge may stand beside
        **loading,
    )


def measure(recipe: Recipe, scorer: Scorer, data: Path) -> dict[str, Any]:
    """Quality on held-out prompts: by head against ratings, by objective too, and in the world against the truth."""
    rows = list(read_rows(data / "heldout", RATED))
    predicted_NH = scorer.score([(row["messages"], row["response"]) for row in rows]).astype(np.float64)
    label_NH = np.array([[np.nan if x is None else x for x in row["labels"]] for row in rows], dtype=np.float64)
    ids = [row["prompt_id"] for row in rows]
    lengths = [len(row["response"]) for row in rows]
    options = {"seed": recipe.seed, "resamples": RESAMPLES}
    figures: dict[str, Any] = quality(predicted_NH, label_NH, recipe.heads, ids, lengths, **options).to_json()
    names = list(recipe.objectives)
    read_NK = means_of(predicted_NH, recipe)
    rated_NK = means_of(label_NH, recipe)
    figures["objectives"] = quality(read_NK, rated_NK, names, ids, lengths, **options).to_json()["heads"]
    figures["baseline"] = surface_baseline(rows, rated_NK, names, options)
    if recipe.data.world:
        from dpalign.world.truth import score as true_score

        true_NH = true_score([row["messages"][-1]["content"] for row in rows], [row["response"] for row in rows])
        true_NK = means_of(true_NH.astype(np.float64), recipe)
        figures["truth"] = quality(read_NK, true_NK, names, ids, lengths, **options).to_json()["heads"]
    return figures


def means_of(reward_NH: Array, recipe: Recipe) -> Array:
    """Objectives read from heads, NaN where a label is missing: (N, K)."""
    columns = [reward_NH[:, list(head_indices(o, recipe.heads))].mean(axis=1) for o in recipe.objective_list]
    return np.stack(columns, axis=1)


def surface_baseline(
    rows: Sequence[dict[str, Any]], label_NK: Array, names: Sequence[str], options: dict[str, int]
) -> dict[str, Any]:
    """What ridge regression on length and punctuation reaches on the same rows, cross-validated by prompt.

    Nothing where fewer than five prompts are held out; an objective with too few labels in a fold is left out.
    """
    if len({row["prompt_id"] for row in rows}) < 5:
        return {}
    feature_NF = np.stack([surface_features(row["messages"][-1]["content"], row["response"]) for row in rows])
    groups = [row["prompt_id"] for row in rows]
    predicted_NK = ridge_cross_validated(feature_NF, label_NK, groups)
    usable = [k for k in range(len(names)) if not np.isnan(predicted_NK[~np.isnan(label_NK[:, k]), k]).any()]
    predicted_NK, label_NK, names = predicted_NK[:, usable], label_NK[:, usable], [names[k] for k in usable]
    lengths = [len(row["response"]) for row in rows]
    found: dict[str, Any] = quality(predicted_NK, label_NK, names, groups, lengths, **options).to_json()["heads"]
    return found


def annotate(job: Job) -> None:
    """Score every original training answer, whatever labels it has (section 3.1): UltraFeedback has no verbosity."""
    make_shards(job, annotating)


def score(job: Job) -> None:
    """Score every candidate on every head, a shard of answers at a time."""
    make_shards(job, scoring)


ANNOTATED_SHARD: Final = 4096
"""Original answers a shard."""


def annotating(job: Job) -> "Scoring":
    """The original answers in shards; an answer's `sample` counts those to its prompt."""
    earlier: Counter[str] = Counter()
    rows = []
    for row in read_rows(job.inputs["data"] / "train", RATED):
        if row["source"] != "helpsteer":
            rows.append(row | {"t": 0, "condition_index": 0, "sample": earlier[row["prompt_id"]]})
            earlier[row["prompt_id"]] += 1
    starts = range(0, len(rows), ANNOTATED_SHARD)
    return Scoring(job, len(starts), lambda index: rows[starts[index] : starts[index] + ANNOTATED_SHARD])


def scoring(job: Job) -> "Scoring":
    """The candidates in the shards that they were drawn in."""
    files = shards(job.inputs["candidates"])
    return Scoring(job, len(files), lambda index: list(read_rows(files[index], CANDIDATES)))


class Scoring:
    """A scoring stage as shards of answers.

    Args:
        part: the answers of a shard, with their prompts and the keys of their SCORES rows.
    """

    name = "part-{:05d}.parquet"

    def __init__(self, job: Job, count: int, part: Callable[[int], list[dict[str, Any]]]) -> None:
        self.job, self.count, self.part = job, count, part

    def open(self) -> None:
        self.scorer = open_scorer(self.job.recipe, self.job.inputs["reward"], alone=True)

    def make(self, shard: Shard) -> None:
        rows = self.part(shard.index)
        write_rows(shard.path, scored_rows(self.scorer, rows), SCORES)
        shard.tally.add(len(rows), len(rows), scored=len(rows))

    def one_by_one(self, index: int) -> Iterator[str]:
        for _, answers in groupby(self.part(index), key=lambda row: row["prompt_id"]):
            rows = list(answers)
            yield named(rows[0])
            scored_rows(self.scorer, rows)

    def ids(self, index: int) -> list[Id]:
        return [(row["prompt_id"], row["condition_index"], row["sample"]) for row in self.part(index)]


def scored_rows(scorer: Scorer, candidates: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The SCORES rows of CANDIDATES rows."""
    pairs = [(row["messages"], row["response"]) for row in candidates]
    reward_NH = scorer.score(pairs)
    keys = ("prompt_id", "t", "condition_index", "sample")
    return [
        {key: row[key] for key in keys} | {"rewards": reward_H}
        for row, reward_H in zip(candidates, reward_NH.tolist(), strict=True)
    ]
