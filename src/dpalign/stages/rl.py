"""Online reinforcement learning of one scalar reward at one fixed direction: Table 1's row PPO."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dpalign.measure.system import System
from dpalign.paper.direction import evaluation_grid
from dpalign.rows import HALVES, PROMPTS, Message, read_rows
from dpalign.runs.environment import first_process
from dpalign.runs.folder import write_json
from dpalign.runs.tables import Table
from dpalign.stages.cost import Costs, Load, processes
from dpalign.stages.rival import Rival, at_the_edge, fixed, grid, spelled
from dpalign.stages.sample import within_limit
from dpalign.stages.score import open_scorer, scored_by
from dpalign.stages.shards import Row
from dpalign.stages.stage import Job, Step, chat_read, model_read, objectives_read, on_transformers, stage
from dpalign.stages.training import context_of, model_folder, named_checkpoint, policy_tokenizer, trained_once
from dpalign.train.knobs import Training

if TYPE_CHECKING:
    from dpalign.engines.tokens import PromptReader
    from dpalign.recipe import Recipe
    from dpalign.train.rl import Reinforcement, Reward, Scores

    Lesson = tuple[Sequence[list[Message]], Reward, Sequence[Mapping[str, Any]]]

Array = NDArray[np.float64]


class Reinforcing(Table):
    """The settings of online learning from groups of answers, at one direction or under many."""

    beta: float = Field(0.04, ge=0)
    """Weight of the KL divergence from the reference, against a reward of about unit spread."""
    betas: tuple[Annotated[float, Field(ge=0)], ...] = (0.04,)
    """The weights among which a comparison chooses; for [rl], at each of its directions."""
    samples: int = Field(8, ge=2)
    """Answers to a prompt; they are the baseline for each other."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature, without top-k or top-p."""
    training: Training = Training(learning_rate=1e-6, steps=500, batch=64, packing=False, loss_on="answer")
    """Its training: `steps` counts updates and `batch` answers. `epochs`, `packing`, `loss_on` and `context` are not
    used: [sampling] limits the lengths of prompts and answers."""


class RL(Reinforcing):
    """Online reinforcement learning of one scalar reward, for Table 1's row PPO (not run in the paper)."""

    algorithm: Literal["grpo", "rloo"] = "grpo"
    """TRL's online trainers; PPO itself left TRL after 1.12."""
    directions: int = Field(2, ge=1)
    """Even steps over P_v; a comparison trains a specialist for each."""


def online(recipe: "Recipe", stage: str) -> Reinforcing | None:
    """The settings of a stage that learns online; None for any other stage."""
    return {"rl": recipe.rl, "reinforce": recipe.policy.grpo}.get(stage)


def reinforced_cost(costs: Costs, step: Step, settings: Reinforcing) -> Load:
    """Each update draws answers, scores them and learns from them; with a beta above 0 a reference reads them too."""
    recipe = costs.of_step(step)
    prompts = settings.training.steps * settings.training.batch / settings.samples
    learned = costs.train(step, 0, costs.row, forwards=1.0 if settings.beta else 0.0)
    drawn = costs.draw(prompts, 1, settings.samples, rows=settings.training.batch / processes(recipe))
    return drawn + costs.score(prompts, settings.samples) + learned


@stage(
    reads=lambda r: (
        *(r.seed, r.rl.algorithm, r.rl.beta, r.rl.samples, r.rl.temperature, r.rl.training, r.preference),
        *(r.sampling.max_new_tokens, r.sampling.prompt_tokens, r.reward.template, r.reward.score_tokens, r.rewards),
        *(r.sft.checkpoint, r.sft.prompt, *chat_read(r), *model_read(r), *objectives_read(r)),
    ),
    inputs=("start", "data", "reward"),
    optional=("annotate",),
    several=True,
    version=2,
    trains=lambda r: r.rl.training,
    cost=lambda costs, step: reinforced_cost(costs, step, costs.of_step(step).rl),
)
def rl(job: Job) -> None:
    """Train a policy by reinforcement at one fixed direction, from SFT."""
    from dpalign.train.rl import prompts_in_order, scalar_reward

    recipe, settings = job.recipe, job.recipe.rl
    if named_checkpoint(job, settings.training):
        return
    v_K = direction(recipe)

    def lesson(prompts: Sequence[Row], groups: int, scores: "Scores", reader: "PromptReader") -> "Lesson":
        order = prompts_in_order([prompt["messages"] for prompt in prompts], groups, recipe.seed)
        return order, scalar_reward(scores, recipe.scored_heads, recipe.objective_list, v_K, reader), ()

    learn_online(job, settings, lesson, algorithm=settings.algorithm)


def learn_online(
    job: Job,
    settings: Reinforcing,
    lesson: "Callable[[Sequence[Row], int, Scores, PromptReader], Lesson]",
    *,
    algorithm: Literal["grpo", "rloo"] = "grpo",
    steered: bool = False,
    reference: str = "",
    knob: str = "rl",
) -> None:
    """Train the start model on its own answers to the prompts of the job's half, or of both without one.

    Args:
        lesson: from the prompts, the number of groups, a scorer's function and the reader of answers: the chat of each
            group, the reward, and further columns for the reward.
        steered: chats state directions.
        reference, knob: see `train.rl.reinforce`.
    """
    from dpalign.engines.tokens import PromptReader, end_ids, generation_config
    from dpalign.train.rl import Reinforcement, configuration, reinforce

    recipe, training = job.recipe, settings.training
    start = model_folder(job.inputs["start"])
    tokenizer = policy_tokenizer(start, recipe, steered, "own" if steered else recipe.sft.prompt)
    context = context_of(job, start, training, tokenizer)
    halves = (job.half,) if job.half else HALVES
    prompts = [p for p in read_rows(job.inputs["data"] / "prompts", PROMPTS) if p["split"] in halves]
    reader = PromptReader(tokenizer, end_ids(tokenizer, generation_config(start)))
    fitting = within_limit(job, prompts, reader)

    def train() -> Reinforcement:
        config = configuration(
            context,
            samples=settings.samples,
            max_new_tokens=recipe.sampling.max_new_tokens,
            beta=settings.beta,
            algorithm=algorithm,
            temperature=settings.temperature,
            knob=knob,
        )
        # From here on this process's GPU is known. The scorer shares it with the training.
        scorer = open_scorer(on_transformers(recipe), job.inputs["reward"], job.inputs.get("annotate"))
        groups = training.steps * training.batch // settings.samples
        chats, reward, columns = lesson(fitting, groups, scorer.score, reader)
        return reinforce(context, chats, config, reward, columns, reference, knob)

    outcome = trained_once(job, Reinforcement, train)
    if first_process():
        count_answers(job, len(fitting), outcome, settings.samples)


def direction(recipe: "Recipe") -> Array:
    """The one direction of the recipe's population: (K,).

    Raises:
        ValueError: the population is not one fixed direction over the recipe's objectives.
    """
    steering = recipe.preference
    if steering.distribution != "fixed" or len(steering.listed) != 1:
        raise ValueError(
            f"reinforcement has one direction, and preference.distribution is {steering.distribution!r} of "
            f"{list(steering.listed)}; give 'fixed', and one direction in preference.listed"
        )
    v_K: Array = evaluation_grid(steering.population(len(recipe.objectives)), 1)[0]
    if len(v_K) != len(recipe.objectives):
        raise ValueError(f"preference.listed weighs {len(v_K)} objectives of {len(recipe.objectives)}; weigh each")
    return v_K


def count_answers(job: Job, prompts: int, outcome: "Reinforcement", samples: int) -> None:
    """Enter a training on its own answers in the stage's ledger, write its curve, and log the number of cut answers."""
    reached = min(prompts, outcome.scored // samples)
    missed = {"not reached": prompts - reached} if reached < prompts else {}
    tally = job.work.tally
    tally.add(prompts, reached, missed, scored=outcome.scored, trained=outcome.trained)
    tally.sampled += outcome.sampled
    write_json(job.out / "curve.json", outcome.curve)
    if outcome.cut:
        job.work.run.log(
            f"{outcome.cut} of {outcome.scored} answers were cut at sampling.max_new_tokens; they got the least reward"
        )


def rivals(recipe: "Recipe") -> Iterator[Rival]:
    """A specialist for each direction and each weight of the divergence."""
    family = recipe.rl.algorithm.upper()
    for i, v_K in enumerate(grid(recipe, recipe.rl.directions), start=1):
        for j, beta in enumerate(recipe.rl.betas, start=1):
            name = f"rl-{i}-{j}"
            knobs = fixed(v_K) | {"rl.beta": beta}
            system = System(
                f"{family} at {spelled(recipe, v_K)}", "specialist", f"beta {beta:g}",
                at_edge=at_the_edge(beta, recipe.rl.betas), direction=v_K, family=family,
            )  # fmt: skip
            step = Step(name, rl, {"start": "sft"} | scored_by(recipe), knobs=knobs)
            yield Rival(name, system, {"policy": name}, "plain", steps=(step,))
