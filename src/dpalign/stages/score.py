"""Scoring: every answer on every head, a shard of answers at a time."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dpalign.rows import CANDIDATES, SCORES, read_rows, shards
from dpalign.runs.folder import Tally
from dpalign.runs.modelfolder import require_weights
from dpalign.runs.shards import make_shards
from dpalign.stages.cost import Costs, Load
from dpalign.stages.pools import KEYS
from dpalign.stages.sample import counted, start_vllm
from dpalign.stages.shards import PART, Output, Row, Shards
from dpalign.stages.stage import Job, Step, model_read, scorer_read, stage

if TYPE_CHECKING:
    from dpalign.recipe import Recipe
    from dpalign.rewards.score import Scorer


def _cost(costs: Costs, step: Step) -> Load:
    source = costs.steps[str(step.inputs["candidates"])]
    prompts, conditions, n = counted(costs, source)
    return costs.score(prompts, conditions * n)


@stage(reads=lambda r: (r.heads, *model_read(r), *scorer_read(r)), inputs=("reward", "candidates"), cost=_cost)
def score(job: Job) -> None:
    """Score answers on every head."""
    make_shards(job, scoring)


def scoring(job: Job) -> "Shards[Scorer]":
    """The candidates in the shards that they were drawn in."""
    files = shards(job.inputs["candidates"])
    return scores_of(job, len(files), lambda index: list(read_rows(files[index], CANDIDATES)))


def scores_of(job: Job, count: int, part: Callable[[int], list[Row]]) -> "Shards[Scorer]":
    """A scoring stage as shards of answers."""

    def work(scorer: "Scorer", _: int, answers: Sequence[Row], tally: Tally) -> Iterator[Output]:
        yield "", SCORES, scored_rows(scorer, answers)
        tally.add(len(answers), len(answers), scored=len(answers))

    return Shards(job, PART, count, part, partial(open_scorer, job.recipe, job.inputs["reward"], alone=True), work)


def scored_rows(scorer: "Scorer", candidates: Sequence[Row]) -> list[Row]:
    """The SCORES rows of CANDIDATES rows."""
    reward_NH = scorer.score([(row["messages"], row["response"]) for row in candidates])
    return [
        {key: row[key] for key in KEYS} | {"rewards": reward_H}
        for row, reward_H in zip(candidates, reward_NH.tolist(), strict=True)
    ]


def open_scorer(recipe: "Recipe", reward_stage: Path, *, alone: bool = False) -> "Scorer":
    """The scorer of a run: the recipe's own choice, or the model that the reward stage trained.

    Args:
        alone: no policy stands beside it, so that vLLM may take all the GPU memory that the recipe grants.

    Raises:
        ValueError: a folder without weights; vLLM is asked for and cannot start.
    """
    if recipe.reward.checkpoint:
        return _opened(recipe, recipe.reward.checkpoint, alone, recipe.model.trust_remote_code)
    return model_scorer(recipe, reward_stage, alone=alone)


def model_scorer(recipe: "Recipe", stage: Path, *, alone: bool = False) -> "Scorer":
    """The scorer on a stage's own model, whatever the recipe names."""
    folder = stage / "model" if (stage / "model").is_dir() else stage
    require_weights(folder)
    return _opened(recipe, str(folder), alone)


def _opened(recipe: "Recipe", source: str, alone: bool, trust_remote_code: bool = False) -> "Scorer":
    """The source on the engine that the recipe scores with; a Python function is called as it is."""
    scorer = _loaded(recipe, source, alone, trust_remote_code)
    require_heads(recipe, scorer, source)
    return scorer


def require_heads(recipe: "Recipe", scorer: "Scorer", source: str) -> None:
    """Refuse a reward model of other heads than the recipe's: rewards are kept in the recipe's order, without names.

    Raises:
        ValueError: shows both.
    """
    if list(scorer.heads) != list(recipe.heads):
        raise ValueError(
            f"{source}: this reward model has the heads {list(scorer.heads)}, and the recipe says "
            f"{list(recipe.heads)}; set [heads] to the model's, in its order"
        )


def _loaded(recipe: "Recipe", source: str, alone: bool, trust_remote_code: bool) -> "Scorer":
    from dpalign.rewards.score import FunctionScorer, ModelScorer, VllmScorer

    if source.startswith("python:"):
        return FunctionScorer(source, recipe.heads)
    if recipe.engines.scoring == "transformers":
        return ModelScorer(
            source,
            recipe.heads,
            template=recipe.reward.template,
            batch_tokens=recipe.reward.score_tokens,
            dtype=recipe.model.dtype,
            share_prefix=recipe.reward.share_prefix,
            trust_remote_code=trust_remote_code,
        )
    share = 1.0 if alone else 0.25  # a policy has half, and a judge may stand beside
    vllm = start_vllm(recipe, source, share, trust_remote_code=trust_remote_code, classifies=True)
    return VllmScorer(vllm, recipe.heads, template=recipe.reward.template)
