"""The evaluation stage: section 3.2's protocol for one system."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpalign.choosing import annotated, line
from dpalign.evaluation.best_of_n import best_answers
from dpalign.preference import evaluation_grid
from dpalign.recipe import Recipe
from dpalign.records import CANDIDATES, HEADS, PROMPTS, SCORES, read_rows, write_rows
from dpalign.reward.score import FunctionScorer, Scorer
from dpalign.reward.stages import model_scorer, open_scorer, scored_rows
from dpalign.runs import Shard
from dpalign.sampling.engine import Reader
from dpalign.sampling.stages import (
    PLAIN,
    Condition,
    draw,
    open_engine,
    reward_targets,
    target_conditions,
    within_limit,
)
from dpalign.stages import Job
from dpalign.training.stages import model_folder

Array = NDArray[np.float64]
Row = dict[str, Any]


def evaluate(job: Job) -> None:
    """Sample a system on the validation prompts; score the answers by the reward model, the judge and the truth."""
    recipe, settings = job.recipe, job.recipe.evaluation
    policy = model_folder(job.inputs["policy"]) if "policy" in job.inputs else settings.dpo
    engine = open_engine(recipe, policy)
    prompts = evaluation_prompts(job, engine)
    scorers = open_scorers(job)
    best_of_n = job.condition == "best-of-n"
    conditions = [] if best_of_n else conditions_of(job)
    for shard in job.work.shards(shards_of(recipe, prompts), "answers/part-{:05d}.parquet"):
        part = part_of(recipe, prompts, shard)
        if best_of_n:
            v_VK = evaluation_directions(recipe)
            rows, scores = best_answers(job, engine, part, v_VK, scorers["scores"], shard.tally)
            write_scored(job, shard, rows, scorers, {"scores": scores})
            continue
        rows = list(
            draw(
                engine,
                recipe,
                [(prompt, conditions) for prompt in part],
                settings.samples,
                settings.temperature,
                key=(recipe.seed, "evaluate"),
                t=job.t,
                tally=shard.tally,
            )
        )
        write_scored(job, shard, rows, scorers)


def evaluation_prompts(job: Job, reader: Reader) -> list[Row]:
    """The prompts of the recipe's split that are not too long; those that are, are counted.

    Raises:
        ValueError: there are none.
    """
    recipe, split = job.recipe, job.recipe.evaluation.split
    prompts = [p for p in read_rows(job.inputs["data"] / "prompts", PROMPTS) if p["split"] == split]
    if not prompts:
        raise ValueError(f"no {split} prompts to evaluate on; hold some out with data.tuning")
    prompts, long = within_limit(prompts, reader, recipe.sampling.prompt_tokens)
    if long:
        job.work.tally.rows_in += long
        job.work.tally.filtered["prompt too long"] += long
    return prompts


def shards_of(recipe: Recipe, prompts: Sequence[Row]) -> int:
    """In how many shards the answers to the prompts are written."""
    return -(-len(prompts) // recipe.sampling.shard)


def part_of(recipe: Recipe, prompts: Sequence[Row], shard: Shard) -> Sequence[Row]:
    """The prompts of a shard."""
    size = recipe.sampling.shard
    return prompts[shard.index * size : (shard.index + 1) * size]


def evaluation_directions(recipe: Recipe) -> Array:
    """The directions that steered systems are asked for: (V, K)."""
    return evaluation_grid(recipe.preference.population(len(recipe.objectives)), recipe.evaluation.directions)


def conditions_of(job: Job) -> list[Condition]:
    """Ten even directions; the baseline's targets, with the highest matching helpfulness; a wish in words; or none."""
    recipe = job.recipe
    match job.condition:
        case "directions":
            v_VK = evaluation_directions(recipe)
            return [Condition("direction", tuple(v_K), line(recipe, v_K)) for v_K in v_VK.tolist()]
        case "targets":
            scored = annotated(job.inputs["data"], job.inputs["annotate"], recipe, "both")
            reward_NK = np.array([reward_K for _, reward_K in scored])
            return target_conditions(
                recipe, reward_targets(reward_NK, recipe.steerlm.targets, recipe.steerlm.quantile, recipe.seed)
            )
        case "brief":
            if not recipe.evaluation.brevity:
                raise ValueError('evaluation.brevity is "": write what a model that is asked to be brief is told')
            return [Condition(PLAIN.kind, PLAIN.value, recipe.evaluation.brevity)]
        case _:
            return [PLAIN]


def open_scorers(job: Job) -> dict[str, Scorer]:
    """What scores the answers, by the folder that its scores go to: the run's reward model, and the judge if any."""
    scorers = {"scores": open_scorer(job.recipe, job.inputs["reward"])}
    if "judge" in job.inputs:
        scorers["judged"] = model_scorer(job.recipe, job.inputs["judge"])
    return scorers


def write_scored(
    job: Job,
    shard: Shard,
    rows: Sequence[Row],
    scorers: Mapping[str, Scorer],
    scored: Mapping[str, Sequence[Row]] | None = None,
) -> None:
    """Score a shard's answers by all scorers, in the world by the truth too, and write them; the answers come last.

    Args:
        scored: scores that are known already, by folder.
    """
    known = dict(scored or {})
    for name, scorer in scorers.items():
        if name not in known:
            known[name] = scored_rows(scorer, rows)
            shard.tally.scored += len(rows)
    if job.recipe.data.world:
        known["truth"] = scored_rows(FunctionScorer("python:dpalign.world.truth:score", HEADS), rows)
    for name, scores in known.items():
        write_rows(job.out / name / shard.path.name, scores, SCORES)
    write_rows(shard.path, rows, CANDIDATES)
