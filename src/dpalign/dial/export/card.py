"""The model card of an export: how to ask the model, and how to judge it. Its text is card.md.j2."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path, PurePath
from typing import Any, Final

from jinja2 import Environment, StrictUndefined

from dpalign import __version__
from dpalign.data.sources import parted
from dpalign.dial.dial import Dial
from dpalign.dial.export.card_figures import figures
from dpalign.dial.export.source import Card, Source, hub_name
from dpalign.dial.golden import Golden, shown_directions
from dpalign.page.words import whole
from dpalign.paper.direction import Preference, ends_in_words
from dpalign.recipe import Recipe
from dpalign.rewards.golden import read_model_golden
from dpalign.runs.modelfolder import check_weights
from dpalign.runs.tables import changes
from dpalign.train.contract import Contract

_LOCAL: Final = re.compile(r'(?<=")[~./][^"]*/')
"""A local folder inside a written value; the card leaves it out."""


def card_text(folder: Path, source: Source, card: Card, prompts: Sequence[Golden], picture: str | None) -> str:
    """Return the text of README.md; the export's other files must be in `folder` already."""
    contract, recipe = source.contract, source.recipe
    dial = Dial.of(contract)
    example = _example(dial)
    weights = check_weights(folder)
    facts: dict[str, Any] = {
        "card": card,
        "contract": contract,
        "form": source.form,
        "recipe": recipe,
        "base": None if recipe is None else hub_name(recipe.model.base) or PurePath(recipe.model.base).name,
        "datasets": _datasets(recipe),
        "place": card.name if "/" in card.name else f"./{card.name}",
        "note": dial.note,
        "question": source.examples[0].question if source.examples else prompts[0].messages[-1]["content"],
        "examples": [
            (one.question, [(dial.label(preference), answer) for preference, answer in one.answers])
            for one in source.examples
        ],
        "weights": {name: round(w, 2) + 0.0 for name, w in example.weights.items()},
        "arithmetic": dial.formula(example),
        "angle": round(example.angle) if len(example.v) == 2 else None,
        "trained": dial.trained,
        "lengths": dial.lengths,
        "ends": [] if contract.population is None else ends_in_words(contract.population, contract.names),
        "rewards": _rewards(contract),
        "scored": _scored(folder, contract),
        "parameters": whole(weights.parameters),
        "types": weights.types,
        "changes": [] if recipe is None else changed_knobs(recipe),
        "data": [_data_row(report) for report in source.data],
        "golden": [one for one in prompts if one.messages == prompts[0].messages],
        "picture": picture,
        "version": __version__,
        **figures(source),
    }
    text: str = _template().render(facts)
    return re.sub(r"\n{3,}", "\n\n", text.rstrip()) + "\n"


def _rewards(contract: Contract) -> list[tuple[str, ...]]:
    """Return a row per named reward: its name, what scores, what it reads, and how raw rewards become points."""
    rows: list[tuple[str, ...]] = []
    for record in contract.rewards:
        source = record.source or "trained with this policy"
        reads = "prompt and answer" if record.input is None else f"`{record.input}`"
        maps = [f"{head}: {_map(scale)}" for head, scale in zip(record.heads, record.scale, strict=False)]
        rows.append((record.name, f"{record.kind}: {source}", reads, "; ".join(maps)))
    return rows


def _map(scale: tuple[float, float]) -> str:
    slope, offset = scale
    return "as it is" if scale == (1.0, 0.0) else f"{slope:.4g} r {'-' if offset < 0 else '+'} {abs(offset):.4g}"


def _scored(folder: Path, contract: Contract) -> dict[str, Any] | None:
    """Return the values of the card's scoring snippet: the folder's first reward model and one of its golden scores."""
    records = [record for record in contract.rewards if record.folder]
    place = records[0].folder if records else contract.reward
    measured = None if place is None else read_model_golden(folder / place)
    if measured is None:
        return None
    one = measured.scores[0]
    scales = records[0].scale if records else ()
    return {
        "place": place,
        "messages": one.messages,
        "scores": {head: f"{score:.5g}" for head, score in one.scores.items()},
        "scales": [list(scale) for scale in scales] if any(scale != (1.0, 0.0) for scale in scales) else [],
    }


def _example(dial: Dial) -> Preference:
    """Return the direction of the usage blocks: the paper's (0.8, -0.6) if trained, else one in the middle."""
    if len(dial.objectives) == 2:
        paper = dial.parse(f"{dial.objectives[0]}=0.8 {dial.objectives[1]}=-0.6")
        if dial.warning(paper) is None:
            return paper
    directions = shown_directions(dial, 3)
    return directions[len(directions) // 2]


def changed_knobs(recipe: Recipe) -> list[str]:
    """List the knobs that differ from the paper's, without local folders: `seed 42 -> 1`."""
    return [_LOCAL.sub("", line) for line in changes(Recipe(name=recipe.name).as_mapping(), recipe.as_mapping())]


def _datasets(recipe: Recipe | None) -> list[str]:
    """List the hub data sets that the recipe reads."""
    if recipe is None or recipe.data.world:
        return []
    data = recipe.data
    sources = (data.helpsteer, *data.rows, data.validation, data.tuning_prompts, data.sft)
    names = (hub_name(parted(source)[0]) for source in sources)
    return list(dict.fromkeys(name for name in names if name is not None))


def _data_row(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the source, the file, rows read, rows kept, and the reasons for the difference."""
    reasons = [f"{n:,} {reason}" for reason, n in (report.get("filtered") or {}).items() if n]
    repairs = [f"{n:,} {reason}" for reason, n in (report.get("notes") or {}).items() if n]
    return (
        str(report.get("source", "")),
        PurePath(str(report.get("file", ""))).name,
        f"{report.get('read', report.get('in', 0)):,}",
        f"{report.get('kept', report.get('out', 0)):,}",
        ", ".join(reasons) + (f" (kept, but: {', '.join(repairs)})" if repairs else ""),
    )


@cache
def _template() -> Any:
    environment = Environment(  # Markdown, not HTML
        autoescape=False, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "&#124;").replace("\n", " ")
    environment.filters["number"] = whole
    return environment.from_string(files("dpalign.dial.export").joinpath("card.md.j2").read_text(encoding="utf-8"))
