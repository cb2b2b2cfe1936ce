"""`dpa.json` beside a policy: what its directions mean, so that it can be steered without the recipe.

Format 1 told the trained range of an arc alone; format 2 tells that of every distribution, and what an export adds:
the end of an answer, the measured front, the reward model beside the policy. Both are read; 2 is written.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast, get_args

from dpalign.chat import ChatStyle
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
from dpalign.paper.prompts import PreferenceTemplate, RewardTemplate
from dpalign.run.folder import write_json

if TYPE_CHECKING:
    from dpalign.recipe import Recipe

FILE: Final = "dpa.json"
FORMAT: Final = 2


@dataclass(frozen=True)
class FrontPoint:
    """What a policy's answers earned on validation prompts, at one direction."""

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
class Contract:
    """What `dpa.json` says of a policy that takes directions."""

    template: PreferenceTemplate
    chat: ChatStyle
    objectives: Mapping[str, tuple[str, ...]]
    """The reward heads that each reads, in the order of the preference line; empty where nobody said."""
    heads: tuple[str, ...] = ()
    """The reward model's, in order."""
    population: Population | None = None
    """The directions trained on; None where nobody said."""
    iteration: int | None = None
    eos: str | None = None
    """What ends an answer, in an export."""
    front: tuple[FrontPoint, ...] = ()
    """Measured on validation prompts, in an export of a run."""
    reward: str | None = None
    """The folder of the reward model inside an export."""
    reward_template: RewardTemplate | None = None
    """How that model reads a chat and an answer; None where nobody said."""

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
        """Degrees of the ends of the trained range, where it is one of angles."""
        match self.population:
            case Arc(low, high) | Grid(of=Arc(low, high)):
                return low, high
            case _:
                return None

    def to_json(self) -> dict[str, Any]:
        """As `dpa.json` says it."""
        said: dict[str, Any] = {
            "format": FORMAT,
            "template": self.template,
            "chat": self.chat,
            "objectives": {name: list(heads) for name, heads in self.objectives.items()},
            "heads": list(self.heads),
            "units": "0-100",
            **_said_of(self.population),
            "iteration": self.iteration,
        }
        if self.reward_template is not None:
            said["reward_template"] = self.reward_template
        if self.eos is not None:
            said |= {"eos": self.eos, "stop": [self.eos]}
        if self.front:
            said["front"] = [point.to_json() for point in self.front]
        if self.reward is not None:
            said["reward"] = self.reward
        return said


def contract_of(recipe: "Recipe", iteration: int) -> Contract:
    """What a recipe says of the policy that its iteration trains."""
    return Contract(
        recipe.preference.template,
        recipe.model.chat,
        recipe.objectives,
        recipe.heads,
        recipe.preference.population(len(recipe.objectives)),
        iteration,
        reward_template=recipe.reward.template,
    )


def write_contract(model: Path, contract: Contract) -> None:
    """Write it beside the policy's weights."""
    write_json(model / FILE, contract.to_json())


def read_contract(model: Path) -> Contract | None:
    """The contract beside a policy's weights; None for a model without a dial.

    Raises:
        ValueError: it is damaged, of a later format, or names a template that this version does not know.
    """
    path = model / FILE
    if not path.is_file():
        return None
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        version, template, chat = said["format"], said["template"], said["chat"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    if version not in range(1, FORMAT + 1):
        raise ValueError(f"{path}: format {version!r}; this version reads 1 to {FORMAT}: install a newer dpalign")
    closed = {
        "template": (template, PreferenceTemplate),
        "chat": (chat, ChatStyle),
        "reward_template": (said.get("reward_template"), RewardTemplate),
    }
    for what, (word, known) in closed.items():
        if word not in get_args(known) and (word is not None or what != "reward_template"):
            raise ValueError(f"{path}: {what} {word!r}; known: {', '.join(get_args(known))}")
    try:
        return _read(said)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: not a policy's contract ({type(error).__name__}: {error})")


def _read(said: Mapping[str, Any]) -> Contract:
    objectives = {name: tuple(map(_text, heads)) for name, heads in said["objectives"].items()}
    names = tuple(objectives)
    check_objective_names(names)
    return Contract(
        said["template"],
        said["chat"],
        objectives,
        tuple(map(_text, said.get("heads", ()))),
        _population_of(said, len(names)),
        said.get("iteration"),
        None if said.get("eos") is None else _text(said["eos"]),
        tuple(_front_point(point, names) for point in said.get("front", ())),
        None if said.get("reward") is None else _text(said["reward"]),
        said.get("reward_template"),
    )


def _front_point(said: Mapping[str, Any], names: Sequence[str]) -> FrontPoint:
    rewards = {name: float(said["rewards"][name]) for name in names}
    if not all(map(math.isfinite, rewards.values())):
        raise ValueError(f"front: rewards {rewards}; finite numbers are needed")
    return FrontPoint(Preference.from_weights(said["direction"], names), rewards)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r}, where text is needed")
    return value


def _said_of(population: Population | None) -> dict[str, Any]:
    """The trained directions as `dpa.json` has them: the name of P_v, and what it takes."""
    match population:
        case None:
            return {"distribution": None, "range": None}
        case Arc(low, high):
            return {"distribution": "arc", "range": [low, high]}
        case Grid(Arc(low, high), points):
            return {"distribution": "grid", "range": [low, high], "points": points}
        case Grid(_, points):
            raise ValueError(f"a contract tells a grid of {points} directions on an arc, and of nothing else")
        case Cone(center, angle):
            return {"distribution": "cone", "range": None, "center": list(center), "angle": angle}
        case Fixed(directions):
            return {"distribution": "fixed", "range": None, "listed": [list(v_K) for v_K in directions]}
        case Sphere():
            return {"distribution": "sphere", "range": None}
        case Simplex():
            return {"distribution": "simplex", "range": None}


def _population_of(said: Mapping[str, Any], k: int) -> Population | None:
    """The trained directions; None where the file does not tell them whole, as format 1 did of some."""
    match said:
        case {"distribution": "arc", "range": [low, high]}:
            return Arc(float(low), float(high))
        case {"distribution": "grid", "range": [low, high], "points": points}:
            return Grid(Arc(float(low), float(high)), int(points))
        case {"distribution": "cone", "center": center, "angle": angle}:
            return Cone(_row(center), float(angle))
        case {"distribution": "fixed", "listed": listed}:
            return Fixed(tuple(_row(v_K) for v_K in listed))
        case {"distribution": "sphere"}:
            return Sphere(k)
        case {"distribution": "simplex"}:
            return Simplex(k)
        case {"distribution": None | "arc" | "grid" | "cone" | "fixed"}:
            return None
        case _:
            raise ValueError(
                f"distribution {said.get('distribution')!r}; known: arc, grid, cone, fixed, sphere, simplex"
            )


def _row(v_K: object) -> tuple[float, ...]:
    return tuple(float(w) for w in cast(Sequence[float], v_K))
