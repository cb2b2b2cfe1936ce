"""The model card of an export: what a stranger must know to ask the model, and to judge it."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path, PurePath
from typing import Any, Final

from jinja2 import Environment, StrictUndefined

from dpalign import __version__
from dpalign.dial.dial import Dial
from dpalign.dial.export.card_figures import data_read, measured
from dpalign.dial.export.source import Card, Source, entry_of, hub_name
from dpalign.dial.golden import Golden, shown_directions
from dpalign.page.words import arithmetic, degrees, listed, whole
from dpalign.paper.direction import Arc, Cone, Fixed, Grid, Simplex, Sphere
from dpalign.recipe import Recipe
from dpalign.recipe.config import as_mapping, changes, knobs
from dpalign.run.modelfolder import check_weights

_KNOBS: Final = (
    *("iterations", "sampling.n", "preference.directions", "sampling.temperature", "replay", "alternate", "restart"),
    *("finetune.learning_rate", "finetune.batch", "finetune.epochs", "finetune.steps", "finetune.context"),
    *("sampling.max_new_tokens", "model.dtype", "seed"),
)
"""What most readers ask first."""
_LOCAL: Final = re.compile(r'(?<=")[~./][^"]*/')
"""A folder of somebody's machine inside a written value: no business of the card's readers."""

_RELEASED: Final = {
    "RLHFlow/DPA-v1-Mistral-7B": "These are the weights that the paper's authors released; this folder adds a chat "
    "template that writes the system line they were trained on. The line states the weights as the integers "
    "round(100 cos a) and round(100 sin a), a negative one as `+ verbosity*-26`; answers were sampled at temperature "
    "0.7 with at most 2048 tokens. Helpfulness is the mean of four UltraFeedback heads and verbosity HelpSteer's, as "
    "the released reward model `RLHFlow/RewardModel-Mistral-7B-for-DPA-v1` gives them. Only weights and usage were "
    "released: how they were trained is told by the paper."
}


def card_text(folder: Path, source: Source, card: Card, prompts: Sequence[Golden], picture: str | None) -> str:
    """The whole of README.md, for an export whose other files lie in `folder` already."""
    contract, recipe = source.contract, source.recipe
    dial = Dial.of(contract)
    example = _example(dial)
    weights = check_weights(folder)
    facts: dict[str, Any] = {
        "name": card.name,
        "license": card.license,
        "base_model": card.base_model,
        "datasets": _datasets(recipe),
        "objectives": contract.names,
        "over": listed([f"**{name}**" for name in contract.names]),
        "question": prompts[0].messages[-1]["content"],
        "arithmetic": arithmetic(example, [1.0, *[-1.0] * (len(example) - 1)]),
        "made_by": f", iteration {contract.iteration}" if contract.iteration is not None else "",
        "angle": _whole_angle(dial, example),
        "place": card.name if "/" in card.name else f"./{card.name}",
        "served": card.name.rpartition("/")[2],
        "example": "{" + ", ".join(f'"{name}": {w:g}' for name, w in example.items()) + "}",
        "trained": _trained(dial),
        "reads": [(name, _mean_of(heads)) for name, heads in contract.objectives.items()],
        "how": _how(source, whole(weights.parameters), weights.types),
        "knobs": _main_knobs(recipe),
        "others": _other_knobs(recipe),
        "golden": _shown(prompts),
        "reward": contract.reward is not None,
        "picture": picture,
        "written_by": f"Card and folder written by dpalign {__version__}.",
        **measured(source),
        **data_read(source),
    }
    text: str = _template().render(facts)
    return text.rstrip() + "\n"


def _example(dial: Dial) -> dict[str, float]:
    """The direction of the usage blocks: the paper's (0.8, -0.6) where it was trained, else one in the middle."""
    if len(dial.objectives) == 2:
        paper = dial.parse(f"{dial.objectives[0]}=0.8 {dial.objectives[1]}=-0.6")
        if dial.warning(paper) is None:
            return {name: round(w, 2) for name, w in paper.weights.items()}
    directions = shown_directions(dial, 3)
    middle = directions[len(directions) // 2]
    return {name: round(w, 2) + 0.0 for name, w in middle.weights.items()}


def _whole_angle(dial: Dial, example: Mapping[str, float]) -> int | None:
    """The example's angle in whole degrees; None unless there are two objectives."""
    return (
        round(dial.parse(" ".join(f"{name}={w}" for name, w in example.items())).angle) if len(example) == 2 else None
    )


def _trained(dial: Dial) -> str:
    names = dial.objectives
    match dial.population:
        case Arc(low, high):
            ends = [
                f"{degrees(angle)} (`{arithmetic(dial.parse(str(angle)).weights, [1.0, -1.0])}`)"
                for angle in (high, low)
            ]
            return f"Angles between {ends[0]} and {ends[1]}, all as likely; v = (cos a, sin a) over {', '.join(names)}."
        case Grid(Arc(low, high), points):
            return f"{points} even angles from {degrees(high)} to {degrees(low)}; v = (cos a, sin a)."
        case Cone(center, angle):
            middle = ", ".join(f"{name} {w:g}" for name, w in zip(names, center, strict=True))
            return f"Directions within {degrees(angle)} of ({middle})."
        case Simplex():
            return "Weights of 0 and above, in any proportion."
        case Sphere():
            return "All directions, weights of either sign."
        case Fixed(directions):
            rows = "; ".join(", ".join(f"{name} {w:g}" for name, w in zip(names, v, strict=True)) for v in directions)
            return f"These directions alone: {rows}."
        case _:
            return "The trained range of directions is not on record."


def _mean_of(heads: Sequence[str]) -> str:
    listed = ", ".join(f"`{head}`" for head in heads)
    return listed if len(heads) == 1 else f"the mean of {listed}" if heads else "not on record"


def _how(source: Source, parameters: str, types: Sequence[str]) -> str:
    """Where the weights come from, in a few sentences."""
    size = f"{parameters} parameters, stored as {', '.join(types)}."
    if source.form is not None:
        return f"{_RELEASED[source.form]} {size}"
    if source.recipe is None:
        return f"How this checkpoint was trained is not on record. {size}"
    recipe, t = source.recipe, source.contract.iteration
    base = {"world": "the small base model of dpalign's embedded world", "": "a base model trained from scratch"}.get(
        recipe.model.base, f"`{hub_name(recipe.model.base) or PurePath(recipe.model.base).name}`"
    )
    text = (
        f"Iteration {t} of {recipe.iterations} of DPA from {base}: answers are sampled for directions that users may "
        "ask for, a multi-objective reward model chooses the best one for each direction, and the model after "
        f"supervised fine-tuning is trained on them, the direction stated in the system line. {size}"
    )
    entry = entry_of(source)
    cost = entry.cost if entry else None
    spent = [
        (cost.sampled_tokens, "tokens sampled"),
        (cost.scored_responses, "answers scored"),
        (cost.trained_tokens, "tokens trained on"),
    ] if cost else []  # fmt: skip
    said = ", ".join(f"{whole(n)} {what}" for n, what in spent if n)
    return f"{text} It took {said}, all stages before it included." if said else text


def _main_knobs(recipe: Recipe | None) -> list[tuple[str, str, str]]:
    if recipe is None:
        return []
    here, paper = (knobs(one, *_KNOBS) for one in (recipe, Recipe(recipe.name)))
    return [(name, f"{here[name]}", f"{paper[name]}") for name in _KNOBS]


def _other_knobs(recipe: Recipe | None) -> list[str]:
    if recipe is None:
        return []
    return [_LOCAL.sub("", line) for line in changes(as_mapping(Recipe(recipe.name)), as_mapping(recipe))]


def _datasets(recipe: Recipe | None) -> list[str]:
    """Data sets of the hub that the recipe reads."""
    if recipe is None or recipe.data.world:
        return []
    named = (recipe.data.helpsteer, recipe.data.ultrafeedback, recipe.data.pairs, recipe.data.splits, recipe.data.sft)
    return [name for name in map(hub_name, named) if name is not None]


def _shown(prompts: Sequence[Golden]) -> list[tuple[str, str]]:
    """The first chat at each direction, and plain."""
    return [(_label(one), one.text.replace("```", "'''")) for one in prompts if one.messages == prompts[0].messages]


def _label(one: Golden) -> str:
    if one.preference is None:
        return "The plain model:"
    weights = "{" + ", ".join(f'"{name}": {round(w, 4) + 0.0:g}' for name, w in one.preference.items()) + "}"
    return f"`preference={weights}`" + (f", or `angle={one.angle:g}`:" if one.angle is not None else ":")


@cache
def _template() -> Any:
    environment = Environment(  # Markdown, not HTML: nothing to escape
        autoescape=False, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(files("dpalign.dial.export").joinpath("card.md.j2").read_text(encoding="utf-8"))
