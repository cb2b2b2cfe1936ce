"""The tables [rewards.NAME]: rewards beside the model of [reward], or in its place."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import model_validator

from dpalign.paper.ensemble import MARK
from dpalign.runs.modelfolder import CONFIG, label_names, read_object
from dpalign.runs.tables import FunctionName, ModelName, Table

ONE_HEAD: Final = ("score",)
"""The head of a reward that names none."""
IDENTITY: Final = (1.0, 0.0)
"""The scale of rewards that are points of 0-100 already."""
STATED: Final = "reward_scale"
"""The key of a model's configuration that states the maps to points by head."""
FUNCTION_NAME: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""module:function."""
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")

Scale = tuple[float, float]
"""(slope, offset): the points of a raw reward r are slope * r + offset."""


class RewardTable(Table):
    """One reward: a finished model, a Python function, or the model that the table [reward] trains."""

    model: ModelName = ""
    """A sequence classifier: a folder or hub name."""
    input: Literal["chat", "dpa-v1", "world-v1"] = "chat"
    """The text that the model reads: its own chat template's, or one of ours. `dpa-v1` is the form of the authors'
    released model (section 3.1)."""
    function: FunctionName = ""
    """A Python function, as module:function. It takes prompts and responses, two lists of text. It returns one
    number per answer, or an array with a row per answer and a column per head. The current folder is searched too."""
    trained: bool = False
    """Train this reward: [reward] has its settings, and the recipe's `heads` names its heads."""
    heads: tuple[str, ...] = ()
    """Names of its heads, in order. [] takes a local model's own names; else those of the recipe's `heads` for the
    forms dpa-v1 and world-v1, and one head, `score`, for all others."""
    scale: tuple[float, ...] | Literal["fit"] = ()
    """[slope, offset]: a raw reward r is slope * r + offset points. [] takes the scales that a converted model's folder
    states by head. It keeps a trained model's rewards and those of the forms dpa-v1 and world-v1. It fits all others
    once, as "fit" does: the 5th and 95th percentile of the annotated answers become 10 and 90 points (paper silent).
    A model trained on little data rates all answers alike: "fit" spreads them."""

    @model_validator(mode="after")
    def _is_one_thing(self) -> Self:
        given = [name for name in ("model", "function", "trained") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"gives {' and '.join(given) or 'nothing to score with'}; give exactly one of model, function and "
                "trained = true"
            )
        if self.function and not FUNCTION_NAME.fullmatch(self.function):
            raise ValueError(f"function is {self.function!r}; write it as module:function")
        if self.trained and self.heads:
            raise ValueError("has heads and trained = true; name a trained model's heads in the recipe's own `heads`")
        require_heads(self.heads)
        return self

    @model_validator(mode="after")
    def _scale_maps_points(self) -> Self:
        if self.scale not in ((), "fit") and (len(self.scale) != 2 or self.scale[0] == 0):
            raise ValueError(f"scale is {list(self.scale)}; give [slope, offset], the slope not 0")
        return self

    @property
    def source(self) -> str:
        """The model's or the function's name; empty for a trained model."""
        return self.model or self.function

    @property
    def kind(self) -> Literal["model", "function", "trained"]:
        return "model" if self.model else "function" if self.function else "trained"

    @property
    def in_points(self) -> bool:
        """Whether its raw rewards are taken as points of 0-100."""
        return self.trained or (bool(self.model) and self.input != "chat")

    def known_scales(self, trained: Sequence[str]) -> list[Scale | None]:
        """Return each head's map to points; None if it is fitted to the annotated answers.

        Args:
            trained: the heads of the model that is trained.
        """
        stated = local_scales(self.model)
        if self.scale == "fit":
            return [None for _ in self.own_heads(trained)]
        given = (self.scale[0], self.scale[1]) if self.scale else None
        otherwise = IDENTITY if self.in_points else None
        return [given or stated.get(head, otherwise) for head in self.own_heads(trained)]

    def own_heads(self, trained: Sequence[str]) -> tuple[str, ...]:
        """Return its heads by their own names.

        Args:
            trained: the heads of the model that is trained, including its ensemble's.
        """
        if self.trained:
            return tuple(trained)
        without_members = tuple(head for head in trained if MARK not in head)
        return self.heads or local_heads(self.model) or (without_members if self.in_points else ONE_HEAD)


def local_heads(model: str) -> tuple[str, ...]:
    """Return the names that a local model's configuration gives its heads; none if it only numbers them."""
    if not model or not (Path(model) / CONFIG).is_file():
        return ()
    config = read_object(Path(model) / CONFIG)
    try:
        names = label_names(config)
    except ValueError as error:
        raise ValueError(f"{model}: {error}") from None
    return () if numbered(names) else names


def local_scales(model: str) -> dict[str, Scale]:
    """Return the maps to points in a local model's configuration, by head, as `dpa convert-reward` writes them.

    Raises:
        ValueError: a map is no pair of numbers.
    """
    path = Path(model) / CONFIG
    stated = read_object(path).get(STATED, {}) if model and path.is_file() else {}
    try:
        return {head: (float(slope), float(offset)) for head, (slope, offset) in stated.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {STATED} is {stated!r}; give head: [slope, offset]") from error


def numbered(names: Sequence[str]) -> bool:
    """Whether these are transformers' names for heads without any."""
    return all(name == f"LABEL_{i}" for i, name in enumerate(names))


def require_heads(heads: Sequence[str]) -> None:
    """Check the names of one reward's heads.

    Raises:
        ValueError: a name is empty, has a '/', or occurs twice.
    """
    for i, head in enumerate(heads):
        if not head or "/" in head:
            raise ValueError(f"heads has {head!r}; a head's name is not empty and has no '/'")
        if head in heads[:i]:
            raise ValueError(f"heads names {head!r} twice; give each head its own name")


def require_names(rewards: Mapping[str, RewardTable]) -> None:
    """Check the rewards together.

    Raises:
        ValueError: a name that is no word, or several that are trained.
    """
    for name in rewards:
        if not _NAME.fullmatch(name):
            raise ValueError(f"[rewards.{name}]: a name is a letter, then letters, digits, '_' or '-'")
    trained = [name for name, reward in rewards.items() if reward.trained]
    if len(trained) > 1:
        raise ValueError(f"rewards {' and '.join(trained)} say trained = true; [reward] has the settings of one")


def heads_of(rewards: Mapping[str, RewardTable], trained: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of all scores: REWARD/HEAD, or the trained model's own names if no reward is named."""
    if not rewards:
        return tuple(trained)
    return tuple(f"{name}/{head}" for name, reward in rewards.items() for head in reward.own_heads(trained))
