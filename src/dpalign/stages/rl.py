"""The RL stage: a policy reinforced at one fixed direction.

Shapes: K objectives.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dpalign.data.splits import HALVES
from dpalign.engines.knobs import on_transformers
from dpalign.paper.direction import evaluation_grid
from dpalign.recipe import Recipe
from dpalign.rows import PROMPTS, read_rows
from dpalign.run.folder import write_json
from dpalign.stages.stage import Job
from dpalign.stages.training import context_of, model_folder, named_checkpoint, policy_tokenizer

if TYPE_CHECKING:
    from dpalign.train.rl import Reinforcement

Array = NDArray[np.float64]


def rl(job: Job) -> None:
    """Reinforce answers to the prompts of both halves at the recipe's one direction, from SFT."""
    from dpalign.engines.transformers_engine import prompt_ids
    from dpalign.stages.reward import open_scorer
    from dpalign.stages.sample import within_limit
    from dpalign.train.rl import configuration, prompts_in_order, reinforce, scalar_reward
    from dpalign.train.trainer import first_process

    recipe, settings, training = job.recipe, job.recipe.rl, job.recipe.rl.training
    if named_checkpoint(job, training):
        return
    v_K = direction(recipe)
    start = model_folder(job.inputs["start"])
    tokenizer, context = policy_tokenizer(start, recipe), context_of(job)
    prompts = [p for p in read_rows(job.inputs["data"] / "prompts", PROMPTS) if p["split"] in HALVES]
    fitting = within_limit(job, prompts, lambda messages: len(prompt_ids(tokenizer, messages)))
    config = configuration(
        training,
        context,
        samples=settings.samples,
        max_new_tokens=recipe.sampling.max_new_tokens,
        beta=settings.beta,
        algorithm=settings.algorithm,
        temperature=settings.temperature,
    )
    # A scorer goes to this process's own GPU, which is known from here on, beside the training.
    scorer = open_scorer(on_transformers(recipe), job.inputs["reward"])
    reward = scalar_reward(scorer.score, recipe.heads, recipe.objective_list, v_K, tokenizer)
    groups = training.steps * training.batch // settings.samples
    order = prompts_in_order([prompt["messages"] for prompt in fitting], groups, recipe.seed)
    outcome = reinforce(start, order, job.out / "model", training, config, reward, tokenizer, context)
    if first_process():
        write_json(job.out / "curve.json", outcome.curve)
        _count(job, len(fitting), outcome)


def direction(recipe: Recipe) -> Array:
    """The one direction of the recipe's population: (K,).

    Raises:
        ValueError: the population is another than one fixed direction over the recipe's objectives.
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


def _count(job: Job, prompts: int, outcome: "Reinforcement") -> None:
    reached = min(prompts, outcome.scored // job.recipe.rl.samples)
    missed = {"not reached": prompts - reached} if reached < prompts else {}
    tally = job.work.tally
    tally.add(prompts, reached, missed, scored=outcome.scored, trained=outcome.trained)
    tally.sampled += outcome.sampled
    if outcome.cut:
        job.work.run.log(
            f"{outcome.cut} of {outcome.scored} answers were cut at sampling.max_new_tokens; they got the least reward"
        )
