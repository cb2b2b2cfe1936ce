"""The evaluation stage: section 3.2's protocol for one system."""

from typing import Any

import numpy as np

from dpalign.choosing import annotated, line
from dpalign.preference import evaluation_grid
from dpalign.records import CANDIDATES, PROMPTS, SCORES, read_rows, write_rows
from dpalign.reward.stages import model_scorer, open_scorer, scored_rows
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


def evaluate(job: Job) -> None:
    """Sample a system on the validation prompts; score the answers by the reward model, the judge and the truth."""
    recipe = job.recipe
    policy = model_folder(job.inputs["policy"]) if "policy" in job.inputs else recipe.evaluation.dpo
    engine = open_engine(recipe, policy)
    prompts = [p for p in read_rows(job.inputs["data"] / "prompts", PROMPTS) if p["split"] == recipe.evaluation.split]
    if not prompts:
        raise ValueError(f"no {recipe.evaluation.split} prompts to evaluate on; hold some out with data.tuning")
    prompts, long = within_limit(prompts, engine, recipe.sampling.prompt_tokens)
    if long:
        job.work.tally.rows_in += long
        job.work.tally.filtered["prompt too long"] += long
    conditions = _conditions(job)
    scorers = {"scores": open_scorer(recipe, job.inputs["reward"])}
    if "judge" in job.inputs:
        scorers["judged"] = model_scorer(recipe, job.inputs["judge"])
    size = recipe.sampling.shard
    for shard in job.work.shards(-(-len(prompts) // size), "answers/part-{:05d}.parquet"):
        part = prompts[shard.index * size : (shard.index + 1) * size]
        rows: list[dict[str, Any]] = list(
            draw(
                engine,
                recipe,
                [(prompt, conditions) for prompt in part],
                recipe.evaluation.samples,
                recipe.evaluation.temperature,
                key=(recipe.seed, "evaluate"),
                t=job.t,
                tally=shard.tally,
            )
        )
        for name, scorer in scorers.items():
            write_rows(job.out / name / shard.path.name, scored_rows(scorer, rows), SCORES)
            shard.tally.scored += len(rows)
        if recipe.data.world:
            write_rows(job.out / "truth" / shard.path.name, _true_rows(rows), SCORES)
        write_rows(shard.path, rows, CANDIDATES)


def _conditions(job: Job) -> list[Condition]:
    """Ten even directions; the baseline's targets, with the highest matching helpfulness; or none."""
    recipe = job.recipe
    match job.condition:
        case "directions":
            v_VK = evaluation_grid(recipe.preference.population(len(recipe.objectives)), recipe.evaluation.directions)
            return [Condition("direction", tuple(v_K), line(recipe, v_K)) for v_K in v_VK.tolist()]
        case "targets":
            scored = annotated(job.inputs["data"], job.inputs["annotate"], recipe, "both")
            reward_NK = np.array([reward_K for _, reward_K in scored])
            return target_conditions(
                recipe, reward_targets(reward_NK, recipe.steerlm.targets, recipe.steerlm.quantile, recipe.seed)
            )
        case _:
            return [PLAIN]


def _true_rows(candidates: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from dpalign.records import HEADS
    from dpalign.reward.score import FunctionScorer

    return scored_rows(FunctionScorer("python:dpalign.world.truth:score", HEADS), candidates)
