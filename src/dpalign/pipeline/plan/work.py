"""How many rows a recipe has and how long they are, and what its steps cost together."""

from collections.abc import Sequence
from dataclasses import replace

from dpalign.engines.architecture import Architecture
from dpalign.pipeline.steps import recipe_of
from dpalign.recipe import Recipe
from dpalign.stages.cost import Costs, Load, Sizes
from dpalign.stages.stage import Step


def sizes_of(recipe: Recipe) -> Sizes:
    """What is assumed of a recipe's data before it is read."""
    sizes = Sizes(evaluated=float(recipe.data.validation_prompts))
    if recipe.data.world:
        world, kept = recipe.world, 1 - recipe.data.heldout - recipe.data.judge
        return Sizes(
            prompt=20.0,
            answer=22.0,
            prompts=world.ultrafeedback_prompts * kept / 2,
            others=4.0 * world.helpsteer_prompts,
            chats=float(world.sft_prompts),
            chat=42.0,
            evaluated=float(world.test_prompts),
            tuning=float(world.tuning_prompts),
        )
    return replace(sizes, tuning=2 * sizes.prompts * recipe.data.tuning)


def loads(
    recipe: Recipe, model: Architecture, sizes: Sizes, steps: Sequence[Step], shared: bool = True
) -> dict[str, Load]:
    """What each step computes, by step, in order.

    Args:
        shared: a prompt is read once for all that follows it, not once an answer.
    """
    by_name = {step.name: step for step in steps}
    costs = Costs(recipe, model, sizes, by_name, lambda step: recipe_of(recipe, step), shared)
    return {step.name: costs.load(step) for step in steps}
