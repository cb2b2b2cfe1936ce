"""Local files that a recipe names: data files, model folders, Python functions of the user's own.

A stage that reads one runs again when the file changes, as it does when an earlier stage's outputs change. A name on
the hub is assumed to keep its content: NAME@REVISION pins it, and the ledger names its commit.
"""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from dpalign.data.sources import parted
from dpalign.recipe import Recipe
from dpalign.rewards.functions import load_function, local_modules, module_file, probe
from dpalign.rewards.knobs import local_heads
from dpalign.runs.environment import filled
from dpalign.runs.hub import commit_of, may_be_named, revised
from dpalign.runs.modelfolder import (
    CONFIG,
    TOKENIZER_SETTINGS,
    Kind,
    read_marks,
    read_object,
    require_fit,
    require_kind,
    template_of,
)
from dpalign.runs.tables import knobs_naming, leaves

SOURCES: Final = tuple(knobs_naming(Recipe, "data"))
MODELS: Final = tuple(knobs_naming(Recipe, "model"))
FUNCTIONS: Final = tuple(knobs_naming(Recipe, "function"))
TOKENIZER_FILES: Final = ["tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json"]
INSTALLED: Final = {"model.base": "world"}
"""Values of model knobs that mean a part of this package."""


def local_files(knobs: Mapping[str, Any]) -> dict[str, Path]:
    """The existing files and folders that some knobs name, by knob.

    Args:
        knobs: values by dotted name, as `Stage.knobs` returns them.
    """
    paths: dict[str, Path] = {}
    for knob, value in knobs.items():
        if knob in SOURCES and not knobs.get("data.world"):
            paths |= {key: Path(source) for key, source in _sources(knob, value)}
        elif _names(knob, FUNCTIONS):
            paths[knob] = module_file(value)
            others = local_modules(value) if value else {}
            paths |= {f"{knob}:{name}": path for name, path in others.items() if path != paths[knob]}
        elif _names(knob, MODELS) and value != INSTALLED.get(knob):
            paths[knob] = Path(value)
    return {knob: path.absolute() for knob, path in paths.items() if path != Path() and path.exists()}


def hub_commits(knobs: Mapping[str, Any]) -> dict[str, str]:
    """The commits of the hub names in some knobs, read in the hub's cache, by knob."""
    commits: dict[str, str | None] = {}
    for knob, value in knobs.items():
        if knob in SOURCES and not knobs.get("data.world"):
            commits |= {key: commit_of(source, "dataset") for key, source in _sources(knob, value)}
        elif _names(knob, MODELS):
            commits[knob] = commit_of(value, "model")
    return {knob: commit for knob, commit in commits.items() if commit is not None}


def _sources(knob: str, value: str | Sequence[str]) -> Iterator[tuple[str, str]]:
    """The data sources that a knob names, each under a key of its own."""
    named = {knob: value} if isinstance(value, str) else {f"{knob}[{i}]": one for i, one in enumerate(value)}
    yield from ((key, parted(filled(source))[0]) for key, source in named.items())


def _names(knob: str, patterns: Sequence[str]) -> bool:
    """Whether a knob matches one of the patterns; `*` matches any key."""
    return any(fnmatchcase(knob, pattern) for pattern in patterns)


def require_models(recipe: Recipe) -> None:
    """Check that the model folders that a recipe names hold weights of the right kind.

    A folder may be missing only if its name can be one on the hub. Reward functions are imported, and tried on two tiny
    questions.

    Raises:
        ValueError: naming the knob.
    """
    for knob, value in leaves(recipe.as_mapping()):
        if not _names(knob, MODELS) or not value or value == INSTALLED.get(knob):
            continue
        folder = Path(value)
        if not folder.exists() and not may_be_named(value):
            raise ValueError(f"{knob} is {value!r}: there is no such folder")
        if folder.exists():
            try:
                require_fit(folder)
                kind: Kind = "reward model" if knob.startswith("rewards.") else "policy"
                require_kind(read_object(folder / CONFIG), kind, folder)
            except ValueError as error:
                raise ValueError(f"{knob} is {value!r}: {error}") from error
    for name, reward in recipe.rewards.items():
        if reward.function:
            named = f"[rewards.{name}] function {reward.function}"
            function, heads = load_function(reward.function, named), len(reward.own_heads(()))
            probe(function, heads, named, world=recipe.model.chat == "world-v1")
        elif reward.heads and (own := local_heads(reward.model)) and own != reward.heads:
            raise ValueError(
                f"rewards.{name}.heads is {list(reward.heads)}, and {reward.model} calls its heads {list(own)}; leave "
                "heads out, or give these"
            )


def require_chat(recipe: Recipe, fetch: bool = False) -> None:
    """Check that the model's own chat template can carry a dial, if the recipe keeps it.

    Args:
        fetch: also check a model of the hub, by its tokenizer's files. If the hub cannot be reached, the training
            reports what is wrong.

    Raises:
        ValueError: it cannot, or there is no template.
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
        find_own_chat(template_of(folder), read_marks(folder), switches, start, recipe.model.dial_place)


def _tokenizer_of(name: str) -> Path | None:
    """The folder of a hub model's tokenizer files; None if they cannot be had."""
    try:
        from huggingface_hub import snapshot_download

        plain, revision = revised(name)
        folder = Path(snapshot_download(plain, revision=revision, allow_patterns=TOKENIZER_FILES))
    except (ImportError, OSError, ValueError):
        return None
    return folder if (folder / TOKENIZER_SETTINGS).is_file() else None
