"""Evaluation: section 3.2's protocol for one system."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import Field

from dpalign.rows import CANDIDATES, HEADS, PROMPTS, SCORES, read_rows, write_rows
from dpalign.run.folder import Shard, Tally
from dpalign.run.shards import Id, make_shards, named
from dpalign.run.tables import ModelName, Table
from dpalign.stages.cost import Costs, Load
from dpalign.stages.preference import evaluation_directions, line
from dpalign.stages.sample import PLAIN, Condition, draw, open_engine, open_reader, target_conditions, within_limit
from dpalign.stages.score import model_scorer, open_scorer, scored_rows
from dpalign.stages.stage import Job, Step, model_read, objectives_read, sampler_read, scorer_read, stage
from dpalign.stages.training import model_folder

if TYPE_CHECKING:
    from dpalign.engines.transformers_engine import PromptReader
    from dpalign.recipe import Recipe
    from dpalign.rewards.score import Scorer

Row = dict[str, Any]

ANSWERS: Final = "answers/part-{:05d}.parquet"
"""The shards of an evaluation's answers, in the stage's folder."""


class Evaluation(Table):
    """Section 3.2's validation protocol, and its intervals."""

    split: Literal["validation", "tuning"] = "validation"
    """The prompts: the paper's, or those that knobs may be chosen on."""
    directions: int = Field(10, ge=1)
    """Even steps over the distribution."""
    samples: int = Field(2, ge=1)
    """Answers a prompt and direction."""
    temperature: float = Field(0.7, ge=0)
    """Sampling temperature."""
    dpo: ModelName = ""
    """A DPO checkpoint to stand beside the others, a folder or hub name."""
    brevity: str = "Answer as briefly as you can."
    """What a model is told, in its system message, when it is merely asked for brevity (not in the paper)."""
    best_of: int = Field(16, ge=1)
    """Answers that the reward model chooses among in best-of-n at inference (not in the paper)."""
    controls: bool = False
    """Also ask SFT, and a base model that is a folder, for directions: what an untrained dial does."""
    reference: tuple[float, ...] = ()
    """Hypervolume's reference point, by objective; the world derives its own."""
    senses: tuple[int, ...] = ()
    """Fronts: 1 for an objective of which more is better, -1 for one of which less is. [] reads them off the
    directions, and leaves hypervolume out where these disagree."""
    bootstrap: int = Field(1000, ge=1)
    """Resamples of the prompts; `dpa compare` takes more where its pairs cannot be decided with so few."""


def protocol(r: "Recipe") -> tuple[object, ...]:
    """The knobs of section 3.2's protocol, whatever is evaluated."""
    return (
        *(r.seed, r.evaluation.split, r.evaluation.directions, r.evaluation.samples, r.evaluation.temperature),
        *(r.preference, r.data.world, *sampler_read(r), *scorer_read(r)),
        *(*model_read(r), *objectives_read(r)),
    )


def evaluation_cost(costs: Costs, step: Step, conditions: float, samples: float, at_most: float = 0.0) -> Load:
    """Answers to the evaluation's prompts (`at_most` of them, if above 0), scored by the reward model and the judge."""
    tuning = costs.of_step(step).evaluation.split == "tuning"
    prompts = costs.sizes.tuning if tuning else costs.sizes.evaluated
    prompts = min(prompts, at_most or prompts)
    scorers = 2 if "judge" in step.inputs else 1
    return sum([costs.score(prompts, conditions * samples)] * scorers, costs.draw(prompts, conditions, samples))


def _cost(costs: Costs, step: Step) -> Load:
    recipe = costs.of_step(step)
    samples = float(recipe.evaluation.samples)
    match step.condition:
        case "targets":
            return evaluation_cost(costs, step, recipe.steerlm.targets, samples)
        case "plain" | "brief":
            return evaluation_cost(costs, step, 1, samples)
        case "best-of-n":
            return evaluation_cost(costs, step, 1, samples * recipe.evaluation.best_of)
        case _:
            return evaluation_cost(costs, step, recipe.evaluation.directions, samples)


@stage(
    reads=lambda r: (
        *(*protocol(r), r.model.chat, r.evaluation.dpo, r.evaluation.brevity, r.evaluation.best_of),
        *(r.steerlm.template, r.steerlm.targets, r.steerlm.quantile),
    ),
    inputs=("policy", "data", "reward"),
    optional=("judge", "annotate"),
    asks={"t": (), "condition": ("directions", "targets", "plain", "brief", "best-of-n")},
    cost=_cost,
)
def evaluate(job: Job) -> None:
    """Sample a system on the validation prompts and score its answers: reward model, judge, and truth where known."""
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
            from dpalign.stages.best_of_n import best_answers

            rows, scores = best_answers(job, self.engine, prompts, v_VK, self.scorers["scores"], tally)
            return rows, {"scores": scores}
        asked = [(prompt, self.conditions) for prompt in prompts]
        key, temperature = (recipe.seed, self.purpose), recipe.evaluation.temperature
        drawn = draw(self.engine, recipe, asked, self.samples, temperature, key=key, t=job.t, tally=tally)
        return list(drawn), {}


def evaluation_prompts(job: Job, reader: "PromptReader") -> list[Row]:
    """The prompts of the recipe's split that are not too long; those that are, are counted.

    Raises:
        ValueError: there are none.
    """
    split = job.recipe.evaluation.split
    prompts = [p for p in read_rows(job.inputs["data"] / "prompts", PROMPTS) if p["split"] == split]
    if not prompts:
        raise ValueError(f"no {split} prompts to evaluate on; hold some out with data.tuning")
    return within_limit(job, prompts, reader.prompt_tokens)


def shards_of(recipe: "Recipe", prompts: Sequence[Row]) -> int:
    """In how many shards the answers to the prompts are written."""
    return -(-len(prompts) // recipe.sampling.shard)


def part_of(recipe: "Recipe", prompts: Sequence[Row], index: int) -> Sequence[Row]:
    """The prompts of a shard."""
    size = recipe.sampling.shard
    return prompts[index * size : (index + 1) * size]


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


def open_scorers(job: Job) -> "dict[str, Scorer]":
    """What scores the answers, by the folder that its scores go to: the run's reward model, and the judge if any."""
    scorers = {"scores": open_scorer(job.recipe, job.inputs["reward"])}
    if "judge" in job.inputs:
        scorers["judged"] = model_scorer(job.recipe, job.inputs["judge"])
    return scorers


def write_scored(
    job: Job,
    shard: Shard,
    rows: Sequence[Row],
    scorers: "Mapping[str, Scorer]",
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
        from dpalign.rewards.score import FunctionScorer

        known["truth"] = scored_rows(FunctionScorer("python:dpalign.world.truth:score", HEADS), rows)
    for name, scores in known.items():
        write_rows(job.out / name / shard.path.name, scores, SCORES)
    write_rows(shard.path, rows, CANDIDATES)
