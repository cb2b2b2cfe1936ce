"""`dpa.json` beside a policy: what its directions mean, so that it can be steered without the recipe.

A training writes the directions. An export adds the end of an answer, the measured front, and the reward model beside
the policy.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from dpalign.chat import ChatStyle, Place, Switch
from dpalign.paper.direction import (
    Arc,
    Cone,
    Fixed,
    Grid,
    Population,
    Preference,
    Simplex,
    Sphere,
    check_objective_names,
    objective_count,
)
from dpalign.paper.objectives import Objective, head_indices
from dpalign.paper.prompts import Level, PreferenceTemplate, RewardInput
from dpalign.runs.folder import write_json

if TYPE_CHECKING:
    from dpalign.recipe import Recipe

FILE: Final = "dpa.json"
DIGESTS: Final = "sha256"
"""The key under which an export has the digest of every other file. Earlier exports have only sizes (`files`)."""
FORMAT: Final = 2

Verbosity = Literal["low", "medium", "high"]
"""OpenAI's words for how long an answer is to be."""
VERBOSITIES: Final[tuple[Verbosity, ...]] = get_args(Verbosity)


@dataclass(frozen=True)
class FrontPoint:
    """The mean rewards of a policy's answers to validation prompts, at one direction."""

    direction: Preference
    rewards: Mapping[str, float]
    """The reward model's mean by objective, 0-100."""

    def to_json(self) -> dict[str, Any]:
        """{angle (degrees; null unless two objectives), direction, rewards}."""
        two = len(self.direction.v) == 2
        return {
            "angle": round(self.direction.angle, 4) + 0.0 if two else None,
            "direction": {name: round(w, 9) + 0.0 for name, w in self.direction.weights.items()},
            "rewards": dict(self.rewards),
        }


@dataclass(frozen=True)
class Length:
    """How long a policy's answers are at an angle of the dial."""

    angle: float
    """Degrees."""
    words: float
    """The mean over the policy's evaluation."""


@dataclass(frozen=True)
class RewardRecord:
    """A reward that the directions weigh: what scores an answer, and how its raw rewards become points."""

    name: str
    kind: Literal["model", "function", "trained"]
    source: str
    """A folder or hub name, or module:function; empty for the run's own model."""
    input: RewardInput | None
    """How a model reads a chat and an answer; None for a function."""
    heads: tuple[str, ...]
    """The heads' own names."""
    scale: tuple[tuple[float, float], ...]
    """(slope, offset) a head; empty before it is fitted."""
    folder: str | None = None
    """The reward's folder inside an export."""

    def to_json(self) -> dict[str, Any]:
        """The record without its unknown values."""
        content = {
            "name": self.name,
            "kind": self.kind,
            ("function" if self.kind == "function" else "model"): self.source,
            "input": self.input,
            "heads": list(self.heads),
            "scale": [list(scale) for scale in self.scale],
            "folder": self.folder,
        }
        return {key: value for key, value in content.items() if value}


@dataclass(frozen=True)
class Contract:
    """The content of `dpa.json`: how to steer a policy that takes directions."""

    template: PreferenceTemplate
    chat: ChatStyle
    objectives: Mapping[str, tuple[str, ...]]
    """The reward heads of each objective, in the order of the preference line; no heads if they are unknown."""
    heads: tuple[str, ...] = ()
    """All heads of the reward model, in order."""
    population: Population | None = None
    """The directions trained on; None if they are unknown."""
    iteration: int | None = None
    eos: str | None = None
    """What ends an answer, in an export."""
    front: tuple[FrontPoint, ...] = ()
    """Measured on validation prompts, in an export of a run."""
    reward: str | None = None
    """The folder of the reward model inside an export."""
    reward_template: RewardInput | None = None
    """How that model reads a chat and an answer; None if it is unknown."""
    place: Place | None = None
    """Where the model's own chat template puts the line (chat "model")."""
    chat_kwargs: Mapping[str, Switch] = field(default_factory=dict)
    """That template's own arguments, as the policy was trained with them."""
    stop: tuple[str, ...] = ()
    """The tokens that end an answer, the template's own first."""
    verbosity: Mapping[Verbosity, Length] = field(default_factory=dict)
    """The lengths that low, medium and high mean, in an export of a run; empty if not measured."""
    rewards: tuple[RewardRecord, ...] = ()
    """All rewards, if the recipe names them; their heads are called NAME/HEAD."""
    levels: tuple[Level, ...] = ()
    """What the line says in words, beside its arithmetic."""

    def __post_init__(self) -> None:
        for name, heads in self.objectives.items():
            if heads:
                head_indices(Objective(name, heads), self.heads)
        if self.population is not None and objective_count(self.population) != len(self.objectives):
            given = f"{len(self.objectives)} objectives: {', '.join(self.objectives)}"
            raise ValueError(f"directions of {objective_count(self.population)} objectives for {given}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.objectives)

    @property
    def arc(self) -> tuple[float, float] | None:
        """The ends of the trained range in degrees; None unless they lie on an arc."""
        return arc_of(self.population)

    def to_json(self) -> dict[str, Any]:
        """The content of `dpa.json`."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "template": self.template,
            "chat": self.chat,
            "objectives": {name: list(heads) for name, heads in self.objectives.items()},
            "heads": list(self.heads),
            "units": "points" if self.rewards else "0-100",
            **population_to_json(self.population),
            "iteration": self.iteration,
        }
        optional = {
            "reward_template": self.reward_template,
            "eos": self.eos,
            "place": self.place,
            "chat_kwargs": dict(self.chat_kwargs),
            "stop": list(self.stop),
            "front": [point.to_json() for point in self.front],
            "reward": self.reward,
            "verbosity": {level: vars(length) for level, length in self.verbosity.items()},
            "rewards": [reward.to_json() for reward in self.rewards],
            "levels": [list(level) for level in self.levels],
        }
        return content | {key: value for key, value in optional.items() if value}


def arc_of(population: Population | None) -> tuple[float, float] | None:
    """(low, high) in degrees of directions on an arc; None for other directions."""
    match population:
        case Arc(low, high) | Grid(low, high):
            return low, high
        case _:
            return None


def contract_of(recipe: "Recipe", iteration: int, scales: Sequence[tuple[float, float]] = ()) -> Contract:
    """The contract of the policy that an iteration of a recipe trains.

    Args:
        scales: (slope, offset) of all heads in order, if the recipe names rewards.
    """
    read = {o.name: recipe.heads_read(o) if recipe.rewards else o.heads for o in recipe.objective_list}
    return Contract(
        recipe.preference.template,
        recipe.model.chat,
        read,
        recipe.scored_heads,
        recipe.preference.population(len(recipe.objectives)),
        iteration,
        reward_template=None if recipe.rewards else recipe.reward.template,
        chat_kwargs=recipe.model.own_chat or {},
        rewards=tuple(_records(recipe, scales)),
        levels=recipe.preference.level_ends,
    )


def _records(recipe: "Recipe", scales: Sequence[tuple[float, float]]) -> Iterator[RewardRecord]:
    first = 0
    for name, reward in recipe.rewards.items():
        heads = reward.own_heads(recipe.reward_heads)
        form: RewardInput | None = reward.input if reward.model else recipe.reward.template if reward.trained else None
        own = tuple(scales[first : first + len(heads)])
        yield RewardRecord(name, reward.kind, reward.source, form, heads, own)
        first += len(heads)


def write_contract(model: Path, contract: Contract) -> None:
    """Write it beside the policy's weights."""
    write_json(model / FILE, contract.to_json())


def read_contract(model: Path) -> Contract | None:
    """The contract beside a policy's weights; None for a model without a dial.

    Raises:
        ValueError: the file is damaged, of another format, or names a template that this version does not know.
    """
    path = model / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            cure = "install a newer dpalign, or export the policy again"
            raise ValueError(f"format {content['format']!r}; this version reads {FORMAT}: {cure}")
        _check("template", content["template"], get_args(PreferenceTemplate))
        _check("chat", content["chat"], get_args(ChatStyle))
        if content.get("reward_template") is not None:
            _check("reward_template", content["reward_template"], get_args(RewardInput))
        if content["chat"] == "model":
            _check("place", content["place"], get_args(Place))
        return _from_json(content)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: not a policy's contract ({reason})") from error


def require_same_dial(model: Path, recipe: "Recipe") -> None:
    """Refuse a recipe that asks a policy for directions in another form than it was trained on.

    Args:
        model: a checkpoint's folder. Without a contract it has no dial, and any recipe may ask it.

    Raises:
        ValueError: names the file, the knob and both values.
    """
    trained = read_contract(model)
    if trained is None:
        return
    for knob, own, ours in (
        ("preference.template", trained.template, recipe.preference.template),
        ("model.chat", trained.chat, recipe.model.chat),
        ("objectives", list(trained.names), list(recipe.objectives)),
        ("preference.levels", list(trained.levels), list(recipe.preference.level_ends)),
        ("model.chat_kwargs", dict(trained.chat_kwargs), dict(recipe.model.own_chat or {})),
    ):
        if own != ours:
            raise ValueError(
                f"{model / FILE}: this policy was trained with {knob} {own!r}, and the recipe says {ours!r}; ask it as "
                "it was trained"
            )


def _check(key: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{key} {value!r}; known: {', '.join(known)}")


def _from_json(content: Mapping[str, Any]) -> Contract:
    objectives = {name: tuple(map(_text, heads)) for name, heads in content["objectives"].items()}
    names = tuple(objectives)
    check_objective_names(names)
    return Contract(
        content["template"],
        content["chat"],
        objectives,
        tuple(map(_text, content.get("heads", ()))),
        population_from_json(content, len(names)),
        content.get("iteration"),
        None if content.get("eos") is None else _text(content["eos"]),
        tuple(_front_point(point, names) for point in content.get("front", ())),
        _inside(content.get("reward")),
        content.get("reward_template"),
        content.get("place"),
        dict(content.get("chat_kwargs", {})),
        tuple(map(_text, content.get("stop", ()))),
        verbosity=lengths_from_json(content.get("verbosity"), names),
        rewards=tuple(map(_reward_record, content.get("rewards", ()))),
        levels=tuple((float(end), _text(words)) for end, words in content.get("levels", ())),
    )


def _reward_record(content: Mapping[str, Any]) -> RewardRecord:
    _check("rewards: kind", content["kind"], ("model", "function", "trained"))
    if content.get("input") is not None:
        _check("rewards: input", content["input"], get_args(RewardInput))
    scale = tuple((float(slope), float(offset)) for slope, offset in content.get("scale", ()))
    heads = tuple(map(_text, content["heads"]))
    if not all(map(math.isfinite, itertools.chain(*scale))) or len(scale) not in (0, len(heads)):
        raise ValueError(f"rewards: scale {scale} of the heads {', '.join(heads)}; a finite pair each is needed")
    folder = _inside(content.get("folder"))
    source = _text(content.get("function") or content.get("model") or "")
    return RewardRecord(_text(content["name"]), content["kind"], source, content.get("input"), heads, scale, folder)


def _front_point(content: Mapping[str, Any], names: Sequence[str]) -> FrontPoint:
    rewards = {name: float(content["rewards"][name]) for name in names}
    if not all(map(math.isfinite, rewards.values())):
        raise ValueError(f"front: rewards {rewards}; finite numbers are needed")
    return FrontPoint(Preference.from_weights(content["direction"], names), rewards)


def lengths_from_json(content: object, names: Sequence[str]) -> dict[Verbosity, Length]:
    """The lengths of low, medium and high over some objectives; empty for None.

    Raises:
        ValueError: a level is missing or unknown, a value is no number, or there are not two objectives.
    """
    if content is None:
        return {}
    form = 'give {"low", "medium", "high"}, each {"angle": degrees, "words": number above 0}'
    if len(names) != 2 or not isinstance(content, Mapping) or set(content) != set(VERBOSITIES):
        raise ValueError(f"verbosity {content!r} over {len(names)} objectives; over two, {form}")
    try:
        lengths = {
            level: Length(float(content[level]["angle"]), float(content[level]["words"])) for level in VERBOSITIES
        }
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"verbosity {content!r}; {form}") from None
    if not all(math.isfinite(one.angle) and 0 < one.words < math.inf for one in lengths.values()):
        raise ValueError(f"verbosity {content!r}; {form}")
    return lengths


def _inside(value: object) -> str | None:
    """The name of a folder inside the policy's own."""
    if value is None:
        return None
    name = PurePosixPath(_text(value))
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"{str(name)!r} leads out of the policy's folder")
    return str(name)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r}, where text is needed")
    return value


def population_to_json(population: Population | None) -> dict[str, Any]:
    """P_v by its name and its parameters."""
    match population:
        case None:
            return {"distribution": None, "range": None}
        case Arc(low, high):
            return {"distribution": "arc", "range": [low, high]}
        case Grid(low, high, points):
            return {"distribution": "grid", "range": [low, high], "points": points}
        case Cone(center, angle):
            return {"distribution": "cone", "range": None, "center": list(center), "angle": angle}
        case Fixed(directions):
            return {"distribution": "fixed", "range": None, "listed": [list(v_K) for v_K in directions]}
        case Sphere():
            return {"distribution": "sphere", "range": None}
        case Simplex():
            return {"distribution": "simplex", "range": None}


def population_from_json(content: Mapping[str, Any], k: int) -> Population | None:
    """P_v over k objectives, from its name and its parameters.

    Raises:
        ValueError: an unknown distribution, or one without its parameters.
    """
    match content:
        case {"distribution": None}:
            return None
        case {"distribution": "arc", "range": [low, high]}:
            return Arc(float(low), float(high))
        case {"distribution": "grid", "range": [low, high], "points": points}:
            return Grid(float(low), float(high), int(points))
        case {"distribution": "cone", "center": [*center], "angle": angle}:
            return Cone(tuple(map(float, center)), float(angle))
        case {"distribution": "fixed", "listed": [*directions]}:
            return Fixed(tuple(tuple(map(float, v_K)) for v_K in directions))
        case {"distribution": "sphere"}:
            return Sphere(k)
        case {"distribution": "simplex"}:
            return Simplex(k)
        case _:
            known = "arc, grid, cone, fixed, sphere, simplex, each with its parameters"
            raise ValueError(f"distribution {content.get('distribution')!r}; known: {known}")
