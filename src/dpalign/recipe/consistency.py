"""What a recipe must not say, told before anything runs: values out of range, and values that contradict each other."""

from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Final

from dpalign.paper.direction import evaluation_grid, objective_count
from dpalign.paper.objectives import head_indices
from dpalign.recipe import Recipe
from dpalign.recipe.localfiles import require_models
from dpalign.train.knobs import Training

LEAST: Final[Mapping[str, float]] = {
    "iterations": 1,
    "jobs": 1,
    "processes": 1,
    "preference.directions": 1,
    "sampling.n": 1,
    "sampling.first": 1,
    "sampling.first_targets": 1,
    "sampling.temperature": 0,
    "sampling.prompt_tokens": 1,
    "sampling.max_new_tokens": 1,
    "sampling.prompts": 0,
    "sampling.rows": 1,
    "sampling.shard": 1,
    "steerlm.targets": 1,
    "evaluation.directions": 1,
    "evaluation.samples": 1,
    "evaluation.temperature": 0,
    "evaluation.best_of": 1,
    "evaluation.bootstrap": 1,
    "rl.samples": 2,
    "rsf.n": 1,
    "rsf.prompts": 0,
    "reward.lm_loss": 0,
}
"""The least that a knob may be, by its dotted name."""

TRAININGS: Final = ("sft", "finetune", "steerlm.training", "reward.training", "dpo.training", "rl.training")


def require_consistent(recipe: Recipe) -> None:
    """Check a recipe as a whole, whatever of it is run.

    Raises:
        ValueError: naming the knob, its value, and what it may be.
    """
    for name, least in LEAST.items():
        if (value := attrgetter(name)(recipe)) < least:
            raise ValueError(f"{name} is {value:g}; give at least {least:g}")
    if not 0 <= recipe.replay < 1:
        raise ValueError(f"replay is {recipe.replay:g}; give a share of all rows, from 0 to below 1")
    sampling = recipe.sampling
    if sampling.first < sampling.first_targets:
        raise ValueError(
            f"sampling.first is {sampling.first} answers, too few for sampling.first_targets "
            f"{sampling.first_targets}; give at least one a target"
        )
    if recipe.jobs > 1 and recipe.processes > 1:
        raise ValueError(
            f"jobs is {recipe.jobs}, and processes {recipe.processes}: a training in several processes runs alone; "
            "leave jobs at 1"
        )
    if recipe.reward.training.checkpoint:
        raise ValueError(
            f"reward.training.checkpoint is {recipe.reward.training.checkpoint!r}: a finished reward model is named "
            "in reward.checkpoint"
        )
    for name in TRAININGS:
        _require_updates(name, attrgetter(name)(recipe))
    for objective in recipe.objective_list:
        head_indices(objective, recipe.heads)
    require_models(recipe)
    _require_directions(recipe)


def _require_updates(name: str, training: Training) -> None:
    if training.batch < 1 or training.micro_batch < 1 or training.batch % training.micro_batch:
        raise ValueError(
            f"{name}.batch is {training.batch}, and {name}.micro_batch {training.micro_batch}; "
            "give a batch that is a multiple of its micro-batch"
        )
    if training.steps < 0 or (not training.steps and training.epochs <= 0):
        raise ValueError(f"{name} has {training.steps} steps and {training.epochs:g} epochs; give either above 0")
    if training.learning_rate <= 0:
        raise ValueError(f"{name}.learning_rate is {training.learning_rate:g}; give one above 0")
    if training.save_every < 1:
        raise ValueError(f"{name}.save_every is {training.save_every}; give at least 1")


def _require_directions(recipe: Recipe) -> None:
    """P_v weighs the recipe's objectives, and so do the evaluation's directions."""
    k, steering = len(recipe.objectives), recipe.preference
    named = f"[objectives] names {k} ({', '.join(recipe.objectives)})"
    if k < 2:
        raise ValueError(f"{named}; a direction weighs at least two")
    try:
        population = steering.population(k)
        steering.trained(k)
    except ValueError as error:
        raise ValueError(f"[preference] {error}") from error
    if (weighed := objective_count(population)) != k:
        raise ValueError(
            f"preference.distribution is {steering.distribution!r} over {weighed} objectives, and {named}; "
            f"{' or '.join(_spanning(k))} fits"
        )
    if len(recipe.evaluation.reference) not in (0, k):
        raise ValueError(f"evaluation.reference has {len(recipe.evaluation.reference)} numbers, and {named}")


def require_evaluable(recipe: Recipe) -> None:
    """Check that P_v has the directions to evaluate at: of a list, or a grid, all are taken.

    Raises:
        ValueError: naming `evaluation.directions`, P_v, and how many there are.
    """
    try:
        evaluation_grid(recipe.preference.population(len(recipe.objectives)), recipe.evaluation.directions)
    except ValueError as error:
        raise ValueError(
            f"evaluation.directions {recipe.evaluation.directions} of a preference.distribution of "
            f'"{recipe.preference.distribution}": {error}'
        ) from None


def _spanning(k: int) -> Iterator[str]:
    """The distributions over any number of objectives, the arc where there are two."""
    if k == 2:
        yield "arc"
    yield from ("simplex", "sphere", "a cone or a list over as many")
