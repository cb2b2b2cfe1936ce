"""Evaluation: section 3.2's protocol for one system."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from dpalign.engines.engine import Engine
from dpalign.rows import CANDIDATES, HEADS, PROMPTS, SCORES, read_rows
from dpalign.runs.folder import Tally
from dpalign.runs.hub import local_model
from dpalign.runs.shards import make_shards
from dpalign.runs.tables import ModelName, Table
from dpalign.stages.cost import Costs, Load
from dpalign.stages.preference import evaluation_directions, line
from dpalign.stages.sample import (
    PLAIN,
    Condition,
    asked_policy,
    draw,
    open_engine,
    open_reader,
    target_conditions,
    within_limit,
)
from dpalign.stages.score import judge_scorer, open_scorer, scored_rows, shown_as
from dpalign.stages.shards import ANSWERS, Output, Row, Shards, parts_of
from dpalign.stages.stage import Job, Step, model_read, objectives_read, sampler_read, scorer_read, stage
from dpalign.stages.training import Checkpoint

if TYPE_CHECKING:
    from dpalign.engines.tokens import PromptReader
    from dpalign.recipe import Recipe
    from dpalign.rewards.score import Scorer

    Evaluators = tuple[Engine, Mapping[str, Scorer]]

Answers = tuple[Sequence[Row], Mapping[str, Sequence[Row]]]
"""CANDIDATES rows, and the SCORES rows that are known already, by output folder."""


class Evaluation(Table):
    """The validation protocol of section 3.2, and its intervals."""

    split: Literal["validation", "tuning"] = "validation"
    """The prompts: the paper's ("validation"), or the prompts for choosing knobs ("tuning")."""
    shards: int = Field(1, ge=1)
    """At least this many shards of prompts, so that this many GPUs can share them. A shard has at most `sampling.shard`
    prompts."""
    directions: int = Field(10, ge=1, le=1000)
    """Even steps over the distribution."""
    samples: int = Field(2, ge=1)
    """Answers a prompt and direction."""
    temperature: float = Field(0.7, ge=0)
    """Sampling temperature."""
    dpo: ModelName = ""
    """A DPO checkpoint to evaluate beside the other systems: a folder or hub name."""
    brevity: str = "Answer as briefly as you can."
    """The system message of a model that is asked in words to be brief (not in the paper)."""
    best_of: int = Field(16, ge=1)
    """Answers among which the reward model chooses in best-of-n at inference (not in the paper)."""
    divergence: int = Field(0, ge=0)
    """Measure the KL divergence of every evaluated policy from SFT on this many prompts, the first by hash; 0: on none
    (paper silent)."""
    controls: bool = False
    """Also ask SFT, and a base model that is a folder, for directions, to show what an untrained dial does."""
    reference: tuple[float, ...] = ()
    """Hypervolume's reference point, by objective; the world derives its own."""
    senses: tuple[int, ...] = ()
    """Fronts: 1 for an objective of which more is better, -1 for one of which less is better. [] derives them from the
    directions, and leaves hypervolume out if these disagree."""
    bootstrap: int = Field(1000, ge=2, le=100_000)
    """Resamples of the prompts; `dpa compare` takes more if so few cannot decide its pairs."""

    @model_validator(mode="after")
    def _a_divergence_is_finite(self) -> Self:
        if self.divergence and not self.temperature:
            raise ValueError(
                f"divergence is {self.divergence} and temperature 0, where a policy has one answer and no finite KL "
                "divergence; give a temperature above 0, or divergence 0"
            )
        return self


def protocol(r: "Recipe") -> tuple[object, ...]:
    """The knobs of section 3.2's protocol, for every evaluation."""
    return (
        *(r.seed, r.evaluation.split, r.evaluation.shards, r.evaluation.directions, r.evaluation.samples),
        r.evaluation.temperature,
        *(r.preference, r.data.world, *sampler_read(r), *scorer_read(r)),
        *(*model_read(r), *objectives_read(r)),
    )


def evaluation_cost(
    costs: Costs, step: Step, conditions: float, samples: float, at_most: float = 0.0, judged: float = 0.0
) -> Load:
    """Answers to the evaluation's prompts (`at_most` of them, if above 0), scored by the reward model and the judge.

    Args:
        judged: answers to each prompt that the judge scores; 0 takes all.
    """
    tuning = costs.of_step(step).evaluation.split == "tuning"
    prompts = costs.sizes.tuning if tuning else costs.sizes.evaluated
    prompts = min(prompts, at_most or prompts)
    shard = shard_size(costs.of_step(step), math.ceil(prompts)) if prompts else 0
    answers = conditions * samples
    load = costs.draw(prompts, conditions, samples, shard) + costs.score(prompts, answers, shard)
    return load + costs.score(prompts, judged or answers, shard, models=1) if "judge" in step.inputs else load


def _cost(costs: Costs, step: Step) -> Load:
    recipe = costs.of_step(step)
    samples = float(recipe.evaluation.samples)
    match step.condition:
        case "targets":
            return evaluation_cost(costs, step, recipe.steerlm.targets, samples)
        case "plain" | "brief":
            return evaluation_cost(costs, step, 1, samples)
        case _:
            return evaluation_cost(costs, step, recipe.evaluation.directions, samples)


@stage(
    reads=lambda r: (
        *(*protocol(r), r.evaluation.dpo, r.dpo.prompt, r.evaluation.brevity),
        *(r.steerlm.template, r.steerlm.targets, r.steerlm.quantile),
    ),
    inputs=("policy", "data", "reward"),
    optional=("judge", "annotate"),
    asks={"t": (), "condition": ("directions", "targets", "plain", "brief")},
    cost=_cost,
)
def evaluate(job: Job) -> None:
    """Sample a system on the validation prompts and score its answers: reward model, judge, and truth where known."""
    make_shards(job, evaluating)


def evaluating(job: Job) -> "Shards[Evaluators]":
    """The evaluation of a system."""
    if "policy" in job.inputs:
        policy = asked_policy(job)
    else:
        policy = Checkpoint(local_model(job.recipe.evaluation.dpo), job.recipe.dpo.prompt)
    prompts = evaluation_prompts(job, open_reader(job.recipe, policy))
    return asking(job, policy, prompts, conditions_of(job), job.recipe.evaluation.samples, "evaluate")


def asking(
    job: Job, policy: Checkpoint, prompts: Sequence[Row], conditions: Sequence[Condition], samples: int, purpose: str
) -> "Shards[Evaluators]":
    """The answers of a system under some conditions, scored by all scorers, as shards of prompts.

    Args:
        conditions: the conditions of each prompt.
        samples: answers to each prompt under each condition.
        purpose: keys the randomness of the draws.
    """
    recipe = job.recipe
    key, temperature = (recipe.seed, purpose), recipe.evaluation.temperature

    def answers(evaluators: "Evaluators", prompts: Sequence[Row], tally: Tally) -> Answers:
        every = [(prompt, conditions) for prompt in prompts]
        return list(draw(evaluators[0], recipe, every, samples, temperature, key=key, t=job.t, tally=tally)), {}

    return evaluated_shards(job, policy, prompts, dict.fromkeys(range(len(conditions)), samples), answers)


def evaluated_shards(
    job: Job,
    policy: Checkpoint,
    prompts: Sequence[Row],
    asked: Mapping[int, int],
    answers: "Callable[[Evaluators, Sequence[Row], Tally], Answers]",
) -> "Shards[Evaluators]":
    """A system's answers, scored by all scorers, as shards of prompts.

    Args:
        asked: the number of answers a prompt, by condition index.
        answers: returns the answers to some prompts, with the scores that it computed itself.
    """
    parts = parts_of(prompts, shard_size(job.recipe, len(prompts)))

    def models() -> "Evaluators":
        return open_engine(job.recipe, policy), open_scorers(job)

    def work(evaluators: "Evaluators", _: int, prompts: Sequence[Row], tally: Tally) -> Iterator[Output]:
        rows, scores = answers(evaluators, prompts, tally)
        asked = {prompt["prompt_id"]: prompt["messages"] for prompt in prompts}
        yield from with_scores(job, rows, shown_as(asked, rows), evaluators[1], tally, scores)

    return Shards(job, ANSWERS, len(parts), parts.__getitem__, models, work, lambda _: asked)


def shard_size(recipe: "Recipe", prompts: int) -> int:
    """Prompts in a shard of an evaluation: `sampling.shard`, or fewer if that gives too few shards."""
    return min(recipe.sampling.shard, -(-prompts // recipe.evaluation.shards))


def evaluation_prompts(job: Job, reader: "PromptReader") -> list[Row]:
    """The prompts of the recipe's split, without those that are too long; the tally counts these.

    Raises:
        ValueError: no prompt is left.
    """
    split = job.recipe.evaluation.split
    prompts = [p for p in read_rows(job.inputs["data"] / "prompts", PROMPTS) if p["split"] == split]
    if not prompts:
        raise ValueError(f"no {split} prompts to evaluate on; hold some out with data.tuning")
    return within_limit(job, prompts, reader)


def conditions_of(job: Job) -> list[Condition]:
    """The conditions of the job: even directions, SteerLM's reward targets, a wish in words, or plain."""
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


def open_scorers(job: Job) -> "dict[str, Scorer]":
    """The scorers by output folder: "scores" for the run's rewards, "judged" for the judge if there is one."""
    scorers = {"scores": open_scorer(job.recipe, job.inputs["reward"], job.inputs.get("annotate"))}
    if "judge" in job.inputs:
        scorers["judged"] = judge_scorer(job.recipe, job.inputs["judge"], job.inputs.get("annotate"))
    return scorers


def with_scores(
    job: Job,
    rows: Sequence[Row],
    shown: Sequence[Row],
    scorers: "Mapping[str, Scorer]",
    tally: Tally,
    known: Mapping[str, Sequence[Row]] | None = None,
) -> Iterator[Output]:
    """The scores of a shard's answers by all scorers, and in the world by the truth; then the answers.

    Args:
        shown: the same answers with the chats as users wrote them, without a condition line.
        known: scores that are known already, by folder.
    """
    scores = dict(known or {})
    for name, scorer in scorers.items():
        if name not in scores:
            scores[name] = scored_rows(scorer, shown)
            tally.scored += len(rows)
    if job.recipe.data.world:
        from dpalign.rewards.score import FunctionScorer

        scores["truth"] = scored_rows(FunctionScorer("dpalign.world.truth:score", HEADS), shown)
    yield from ((name, SCORES, of_name) for name, of_name in scores.items())
    yield "answers", CANDIDATES, rows
