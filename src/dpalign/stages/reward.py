"""The reward stages: train, judge, annotate, score."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from dpalign.data.labels import labels_for, require_labels
from dpalign.engines.knobs import on_transformers
from dpalign.measure.quality import quality
from dpalign.paper.objectives import all_known, by_name, head_indices
from dpalign.recipe import Recipe
from dpalign.rewards.baseline import ridge_cross_validated, surface_features
from dpalign.rewards.model import train_reward_model
from dpalign.rewards.score import Scorer, load_scorer
from dpalign.rows import CANDIDATES, HEADS, RATED, SCORES, read_rows, shards, write_rows
from dpalign.run.folder import Shard, write_json
from dpalign.run.modelfolder import require_weights
from dpalign.run.shards import Id, make_shards, named
from dpalign.stages.stage import Job
from dpalign.stages.training import context_of, count
from dpalign.train.trainer import first_process

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
    rows = list(read_rows(job.inputs["data"] / part, RATED))
    require_labels(recipe, rows, part)
    start = str(job.inputs["base"] / "model") if "base" in job.inputs else recipe.model.source
    tokenizer = AutoTokenizer.from_pretrained(start, trust_remote_code=recipe.model.trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token
    outcome = train_reward_model(
        start,
        [row | {"labels": labels_for(row["labels"], recipe.heads)} for row in rows],
        recipe.heads,
        job.out / "model",
        recipe.reward.training,
        tokenizer,
        context_of(job, seed),
        template=recipe.reward.template,
        lm_loss=recipe.reward.lm_loss,
        normalize=recipe.reward.normalize,
    )
    count(job, outcome)


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
    scorer = _loaded(recipe, source, alone, trust_remote_code)
    require_heads(recipe, scorer, source)
    return scorer


def require_heads(recipe: Recipe, scorer: Scorer, source: str) -> None:
    """Refuse a reward model of other heads than the recipe's: rewards are kept in the recipe's order, without names.

    Raises:
        ValueError: shows both.
    """
    if list(scorer.heads) != list(recipe.heads):
        raise ValueError(
            f"{source}: this reward model has the heads {list(scorer.heads)}, and the recipe says "
            f"{list(recipe.heads)}; set [heads] to the model's, in its order"
        )


def _loaded(recipe: Recipe, source: str, alone: bool, trust_remote_code: bool) -> Scorer:
    loading: dict[str, Any] = {
        "template": recipe.reward.template,
        "dtype": recipe.model.dtype,
        "trust_remote_code": trust_remote_code,
    }
    if recipe.engines.scoring == "transformers" or source.startswith("python:"):
        loading |= {"batch_tokens": recipe.reward.score_tokens, "share_prefix": recipe.reward.share_prefix}
        return load_scorer(source, recipe.heads, **loading)
    from dpalign.rewards.vllm_scorer import VllmScorer

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
    """Quality on held-out prompts: by head against ratings, by objective too, and in the world against the truth.

    Labels meet rewards by the names of their heads; what nobody labels is left out.
    """
    rows = list(read_rows(data / "heldout", RATED))
    answers = [(row["messages"], row["response"]) for row in rows]
    heads, names = scorer.heads, list(recipe.objectives)
    predicted_NH = scorer.score(answers).astype(np.float64)
    label_NH = np.array([labels_for(row["labels"], heads) for row in rows], dtype=np.float64).reshape(-1, len(heads))
    figures: dict[str, Any] = _quality(recipe, rows, predicted_NH, label_NH, heads)
    read_NK, rated_NK = means_of(predicted_NH, heads, recipe), means_of(label_NH, heads, recipe)
    figures["objectives"] = _quality(recipe, rows, read_NK, rated_NK, names)["heads"]
    figures["baseline"] = surface_baseline(recipe, rows, rated_NK)
    if recipe.data.world and all_known(recipe.objective_list, heads, HEADS):
        from dpalign.world.truth import score as true_score

        true_NH = by_name(
            true_score([asked[-1]["content"] for asked, _ in answers], [a for _, a in answers]), HEADS, heads
        )
        figures["truth"] = _quality(recipe, rows, read_NK, means_of(true_NH, heads, recipe), names)["heads"]
    return figures


def _quality(
    recipe: Recipe, rows: Sequence[dict[str, Any]], predicted_NH: Array, label_NH: Array, names: Sequence[str]
) -> dict[str, Any]:
    """`Quality.to_json` of the columns that have a label."""
    labelled: list[int] = np.flatnonzero(~np.isnan(label_NH).all(axis=0)).tolist()
    return quality(
        predicted_NH[:, labelled],
        label_NH[:, labelled],
        [names[column] for column in labelled],
        [row["prompt_id"] for row in rows],
        [len(row["response"]) for row in rows],
        seed=recipe.seed,
        resamples=RESAMPLES,
    ).to_json()


def means_of(reward_NH: Array, heads: Sequence[str], recipe: Recipe) -> Array:
    """Objectives read from heads, NaN where a label is missing: (N, K)."""
    columns = [reward_NH[:, list(head_indices(o, heads))].mean(axis=1) for o in recipe.objective_list]
    return np.stack(columns, axis=1)


def surface_baseline(recipe: Recipe, rows: Sequence[dict[str, Any]], label_NK: Array) -> dict[str, Any]:
    """What ridge regression on length and punctuation reaches on the same rows, cross-validated by prompt.

    Nothing where fewer than five prompts are held out; an objective with too few labels in a fold is left out.
    """
    groups = [row["prompt_id"] for row in rows]
    if len(set(groups)) < 5:
        return {}
    feature_NF = np.stack([surface_features(row["messages"][-1]["content"], row["response"]) for row in rows])
    predicted_NK = ridge_cross_validated(feature_NF, label_NK, groups)
    names = list(recipe.objectives)
    usable = [k for k in range(len(names)) if not np.isnan(predicted_NK[~np.isnan(label_NK[:, k]), k]).any()]
    found: dict[str, Any] = _quality(
        recipe, rows, predicted_NK[:, usable], label_NK[:, usable], [names[k] for k in usable]
    )["heads"]
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
