"""`dpa.json` beside a policy: what its directions mean, so that it can be steered without the recipe."""

from pathlib import Path

from dpalign.recipe import Recipe
from dpalign.runs import write_json


def write_contract(model: Path, recipe: Recipe, iteration: int) -> None:
    """Template, objectives with the heads they read, units and the range of directions trained on."""
    steering = recipe.preference
    write_json(
        model / "dpa.json",
        {
            "format": 1,
            "template": steering.template,
            "chat": recipe.model.chat,
            "objectives": {name: list(heads) for name, heads in recipe.objectives.items()},
            "heads": list(recipe.heads),
            "units": "0-100",
            "distribution": steering.distribution,
            "range": [steering.low, steering.high] if steering.distribution == "arc" else None,
            "iteration": iteration,
        },
    )
