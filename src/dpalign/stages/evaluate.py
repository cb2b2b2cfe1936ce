"""The evaluation stage: section 3.2's protocol for one system."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dpalign.engines.engine import Reader
from dpalign.paper.direction import evaluation_grid
from dpalign.recipe import Recipe
from dpalign.rewards.score import FunctionScorer, Scorer
from dpalign.rows import CANDIDATES, HEADS, PROMPTS, SCORES, read_rows, write_rows
from dpalign.run.folder import Shard, Tally
from dpalign.run.shards import Id, make_shards, named
from dpalign.stages.best_of_n import best_answers
from dpalign.stages.choose import line
from dpalign.stages.reward import model_scorer, open_scorer, scored_rows
from dpalign.stages.sample import PLAIN, Condition, draw, open_engine, open_reader, target_conditions, within_limit
from dpalign.stages.stage import Job
from dpalign.stages.training import model_folder

Array = NDArray[np.float64]
Row = dict[str, Any]


ANSWERS: Final = "answers/part-{:05d}.parquet"
"""The shards of an evaluation's answers, in the stage's folder."""


def evaluate(job: Job) -> None:
    """Sample a system on the validation prompts; score the answers by the reward model, the judge and the truth."""
    make_shards(job, evaluating)


def evaluating(job: Job) -> "Asking":
    """The evaluation of a system."""
    policy = model_folder(job.inputs["policy"]) if "policy" in job.inputs else job.recipe.evaluation.dpo
    prompts = evaluation_prompts(job, open_reader(job.recipe, policy))
    conditions = None if job.condition == "best-of-n" else conditions_of(job)
    return Asking(job, policy, prompts, conditions, job.recipe.evaluation.samples, "evaluate")


class Asking:
    """A system asked for something, and its answers scored, as shards of prompts.

    Args:
        conditions: what each prompt is asked under; None for the best of n plain answers in each direction.
        samples: answers to each prompt under each of them.
        purpose: the draws' own, by which their randomness is keyed.
    """

    name = ANSWERS

    def __init__(
        self,
        job: Job,
        policy: str,
        prompts: Sequence[Row],
        conditions: Sequence[Condition] | None,
        samples: int,
        purpose: str,
    ) -> None:
        self.job, self.policy, self.prompts = job, policy, prompts
        self.conditions, self.samples, self.purpose = conditions, samples, purpose
        self.count = shards_of(job.recipe, prompts)

    def open(self) -> None:
        self.engine = open_engine(self.job.recipe, self.policy)
        self.scorers = open_scorers(self.job)

    def make(self, shard: Shard) -> None:
        rows, scored = self._rows(part_of(self.job.recipe, self.prompts, shard.index), shard.tally)
        write_scored(self.job, shard, rows, self.scorers, scored)

    def one_by_one(self, index: int) -> Iterator[str]:
        for prompt in part_of(self.job.recipe, self.prompts, index):
            yield named(prompt)
            rows, _ = self._rows([prompt], Tally())
            for scorer in self.scorers.values():
                scored_rows(scorer, rows)

    def ids(self, index: int) -> list[Id]:
        recipe = self.job.recipe
        asked = len(evaluation_directions(recipe)) if self.conditions is None else len(self.conditions)
        return [
            (prompt["prompt_id"], condition, sample)
            for prompt in part_of(recipe, self.prompts, index)
            for condition in range(asked)
            for sample in range(self.samples)
        ]

    def _rows(self, prompts: Sequence[Row], tally: Tally) -> tuple[list[Row], dict[str, list[Row]]]:
        """CANDIDATES rows, and those SCORES rows that come with them."""
        job, recipe = self.job, self.job.recipe
        if self.conditions is None:
            v_VK = evaluation_directions(recipe)
            rows, scores = best_answers(job, self.engine, prompts, v_VK, self.scorers["scores"], tally)
            return rows, {"scores": scores}
        asked = [(prompt, self.conditions) for prompt in prompts]
        key, temperature = (recipe.seed, self.purpose), recipe.evaluation.temperature
        drawn = draw(self.engine, recipe, asked, self.samples, temperature, key=key, t=job.t, tally=tally)
        return list(drawn), {}


def evaluation_prompts(job: Job, reader: Reader) -> list[Row]:
    """The prompts of the recipe's split that are not too long; those that are, are counted.

    Raises:
        ValueError: there are none.
    """
    split = job.recipe.evaluation.split
    prompts = [p for p in read_rows(job.inputs["data"] / "prompts", PROMPTS) if p["split"] == split]
    if not prompts:
        raise ValueError(f"no {split} prompts to evaluate on; hold some out with data.tuning")
    return within_limit(job, prompts, reader.prompt_tokens)


def shards_of(recipe: Recipe, prompts: Sequence[Row]) -> int:
    """In how many shards the answers to the prompts are written."""
    return -(-len(prompts) // recipe.sampling.shard)


def part_of(recipe: Recipe, prompts: Sequence[Row], index: int) -> Sequence[Row]:
    """The prompts of a shard."""
    size = recipe.sampling.shard
    return prompts[index * size : (index + 1) * size]


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
            return target_conditions(job, recipe.steerlm.targets, recipe.steerlm.quantile)
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
