"""What a recipe names that lies on this machine: data files, model folders, a function of one's own.

A stage that reads any of it is done again when it changes, as when an earlier stage's outputs do. What the hub holds
under a name is taken to stay as it is.
"""

import importlib.util
import os
from collections.abc import Mapping
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

from dpalign.data.sources import parted
from dpalign.recipe import Recipe
from dpalign.runs.modelfolder import TOKENIZER_SETTINGS, read_marks, template_of, weights_files
from dpalign.runs.tables import knobs_naming

SOURCES: Final = tuple(knobs_naming(Recipe, "data"))
MODELS: Final = tuple(knobs_naming(Recipe, "model"))
FUNCTION: Final = "python:"
"""How a reward of one's own begins: `python:module:function`."""
TOKENIZER_FILES: Final = ["tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json"]
INSTALLED: Final = {"model.base": "world"}
"""What a model knob may say that means a part of this package."""


def local_files(knobs: Mapping[str, Any]) -> dict[str, Path]:
    """The files and folders that some knobs name and that are there, by knob.

    Args:
        knobs: values by dotted name, such as a stage reads them (`Stage.knobs`).
    """
    paths: dict[str, Path] = {}
    for knob, value in knobs.items():
        if knob in SOURCES and not knobs.get("data.world"):
            named = {knob: value} if isinstance(value, str) else {f"{knob}[{i}]": one for i, one in enumerate(value)}
            paths |= {key: Path(parted(os.path.expandvars(source))[0]) for key, source in named.items()}
        elif knob in MODELS and value.startswith(FUNCTION):
            paths[knob] = _module_file(value)
        elif knob in MODELS and value != INSTALLED.get(knob):
            paths[knob] = Path(value)
    return {knob: path.absolute() for knob, path in paths.items() if path != Path() and path.exists()}


def require_models(recipe: Recipe) -> None:
    """Check that what a recipe names as models, and looks like a path, is there and holds weights.

    Raises:
        ValueError: naming the knob.
    """
    for knob in MODELS:
        value = attrgetter(knob)(recipe)
        if not value or value == INSTALLED.get(knob) or value.startswith(FUNCTION):
            continue
        folder = Path(value)
        if not folder.exists() and (folder.is_absolute() or value.startswith((".", "~")) or value.endswith("/")):
            raise ValueError(f"{knob} is {value!r}: there is no such folder")
        if folder.exists():
            try:
                weights_files(folder)
            except ValueError as error:
                raise ValueError(f"{knob} is {value!r}: {error}") from error


def require_chat(recipe: Recipe, fetch: bool = False) -> None:
    """Check that the model's own chat template, where the recipe keeps it, can carry a dial.

    Args:
        fetch: read a model of the hub too, its tokenizer's files alone; where it cannot be reached, its training says
            what is wrong.

    Raises:
        ValueError: it cannot, or there is no such template.
    """
    from dpalign.engines.templates import find_own_chat

    switches = recipe.model.own_chat
    if switches is None:
        return
    start = recipe.sft.checkpoint or recipe.model.source
    if not start:
        raise ValueError(
            'model.chat is "model", and model.base is "": one that is trained from scratch has no template'
        )
    folder = Path(start) if Path(start).is_dir() else _tokenizer_of(start) if fetch else None
    if folder is not None:
        find_own_chat(template_of(folder), read_marks(folder), switches, start)


def _tokenizer_of(name: str) -> Path | None:
    """The files of a tokenizer on the hub; None where it cannot be reached."""
    try:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, allow_patterns=TOKENIZER_FILES))
    except (ImportError, OSError, ValueError):
        return None
    return folder if (folder / TOKENIZER_SETTINGS).is_file() else None


def _module_file(function: str) -> Path:
    """The file of `python:module:function`; none where it cannot be told without importing it."""
    module = function.removeprefix(FUNCTION).rpartition(":")[0]
    with suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin is not None:
            return Path(spec.origin)
    return Path()
