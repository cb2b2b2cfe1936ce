"""User preferences as directions in reward space (section 2.2), and distributions over them.

A direction is a unit vector v over named objectives. Over two objectives it is an angle in degrees:
v = (cos a, sin a). At -45 both weights have the same size, and the second is negative. All randomness of the package
comes from `rng_for`, keyed by the meaning of the draw.

Shapes: N draws, V evaluation directions, K objectives.
"""

import difflib
import hashlib
import json
import math
import numbers
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

NAME: Final = r"[A-Za-z][A-Za-z0-9_-]*"
"""An objective's name, as a regular expression."""
_POOL = 4096
"""Size of the pool from which evenly spread directions of three or more objectives are chosen."""


def rng_for(*meaning: int | str) -> np.random.Generator:
    """The generator of one draw, named by what it is for: `rng_for(seed, "directions", t, prompt_id)`.

    Equal meanings give equal draws on every machine. Batch, worker and resume do not matter. 1 and "1" differ.
    """
    words: list[int | str] = []
    for word in meaning:
        if not isinstance(word, str | int | np.integer) or isinstance(word, bool):
            raise ValueError(f"randomness is named by integers and strings, not {word!r}; name a number by its index")
        words.append(word if isinstance(word, str) else operator.index(word))
    digest = hashlib.sha256(json.dumps(words).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def name_hint(name: object, known: Sequence[str]) -> str:
    """The end of an error about an unknown name: the nearest known name, then all of them."""
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
    return (f"nearest: {nearest[0]!r}; " if nearest else "") + f"known: {', '.join(known) or 'none'}"


def check_objective_names(names: Sequence[str]) -> None:
    """Raise ValueError unless the names are distinct words that a prompt can carry."""
    if not names:
        raise ValueError("no objectives are named; name at least one")
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(NAME, name):
            raise ValueError(f"objective {name!r}: a name is a letter, then letters, digits, '_' or '-'")
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(f"objective {name!r} is named twice among {', '.join(names)}; give each its own name")


@dataclass(frozen=True)
class Preference:
    """A direction v, ||v||_2 = 1, over named objectives (section 2.2)."""

    objectives: tuple[str, ...]
    v: tuple[float, ...]

    def __post_init__(self) -> None:
        check_objective_names(self.objectives)
        if len(self.v) != len(self.objectives):
            raise ValueError(f"{len(self.v)} weights {self.v} for {len(self.objectives)} objectives {self.objectives}")
        if not abs(sum(w * w for w in self.v) - 1.0) < 1e-9:
            raise ValueError(f"v = {self.v} is no unit vector; build it with Preference.from_weights or from_vector")

    @classmethod
    def from_angle(cls, degrees: float, objectives: Sequence[str]) -> Self:
        """v = (cos a, sin a) over two objectives; the paper's users lie between -45 and 0 degrees."""
        if len(objectives) != 2:
            raise ValueError(f"an angle names a direction of two objectives, not of {len(objectives)}; give weights")
        angle = math.radians(_number("angle", degrees))
        return cls(tuple(objectives), (math.cos(angle), math.sin(angle)))

    @classmethod
    def from_weights(cls, weights: Mapping[str, float], objectives: Sequence[str]) -> Self:
        """Normalise weights by name, in the order of `objectives`; a missing name weighs 0.

        Raises:
            ValueError: an unknown name; a weight that is NaN, infinite or no number; all weights zero.
        """
        for name in weights:
            if name not in objectives:
                raise ValueError(f"preference names an unknown objective {name!r} ({name_hint(name, objectives)})")
        return cls.from_vector([weights.get(name, 0.0) for name in objectives], objectives)

    @classmethod
    def from_vector(cls, v_K: Sequence[float] | Array, objectives: Sequence[str]) -> Self:
        """Normalise a vector in the order of `objectives`."""
        check_objective_names(objectives)
        if len(v_K) != len(objectives):
            raise ValueError(f"{len(v_K)} weights for {len(objectives)} objectives ({', '.join(objectives)})")
        weights = [_number(f"weight of {name!r}", w) for name, w in zip(objectives, v_K, strict=True)]
        largest = max(abs(w) for w in weights)
        if largest == 0.0:
            raise ValueError(
                f"all weights of ({', '.join(objectives)}) are zero: that is no direction; weigh at least one"
            )
        # Divided by the largest first, as the chat template does it: the squares neither overflow nor vanish.
        scaled = [w / largest for w in weights]
        norm = sum(w * w for w in scaled) ** 0.5
        return cls(tuple(objectives), tuple(w / norm for w in scaled))

    @property
    def angle(self) -> float:
        """Degrees from the first objective towards the second, in (-180, 180]; two objectives only."""
        if len(self.v) != 2:
            raise ValueError(f"a direction of {len(self.v)} objectives has no single angle; read its weights")
        return angle_of(self.v)

    @property
    def weights(self) -> dict[str, float]:
        return dict(zip(self.objectives, self.v, strict=True))

    @property
    def v_K(self) -> Array:
        return np.array(self.v)


def angle_of(v: Sequence[float]) -> float:
    """Degrees of a direction of two objectives, from the first towards the second, in (-180, 180]."""
    return math.degrees(math.atan2(v[1], v[0]))


def asks_for(preference: Preference) -> str:
    """What a direction asks for, in words: `more coverage, less brevity`."""
    weights = [(name, round(w, 6)) for name, w in preference.weights.items()]
    parts = [("more", [name for name, w in weights if w > 0]), ("less", [name for name, w in weights if w < 0])]
    return ", ".join(f"{word} {listed(names)}" for word, names in parts if names)


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _number(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{what} is {value!r}, a {type(value).__name__}; give a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{what} is {number}; give a finite number")
    return number


@dataclass(frozen=True)
class Arc:
    """Angles uniform between two ends, over two objectives; the defaults are the paper's (section 3.1)."""

    low: float = -45.0
    """Degrees of one end."""
    high: float = 0.0
    """Degrees of the other end; the evaluation grid starts here."""
    stratified: bool = False
    """One angle from each of n equal slices, from high to low. The paper draws all n independently."""

    def __post_init__(self) -> None:
        low, high = _number("arc.low", self.low), _number("arc.high", self.high)
        if not low < high <= low + 360:
            raise ValueError(f"an arc from {low} to {high} degrees: it needs low < high, at most 360 apart")


@dataclass(frozen=True)
class Cone:
    """Directions uniform within an angle of a centre."""

    center: tuple[float, ...]
    """The direction in the middle, of any length, in the order of the objectives."""
    angle: float
    """Degrees from the centre to the rim."""

    def __post_init__(self) -> None:
        _unit_rows([self.center], "cone.center")
        _at_least_two(len(self.center), "cone")
        if not 0 < _number("cone.angle", self.angle) <= 180:
            raise ValueError(f"cone.angle is {self.angle} degrees; give one above 0 and at most 180")


@dataclass(frozen=True)
class Sphere:
    """Directions uniform on the whole unit sphere of k objectives."""

    k: int

    def __post_init__(self) -> None:
        _at_least_two(self.k, "sphere")


@dataclass(frozen=True)
class Simplex:
    """No weight is negative: weights uniform on the simplex (Dirichlet of ones), scaled to unit length."""

    k: int

    def __post_init__(self) -> None:
        _at_least_two(self.k, "simplex")


@dataclass(frozen=True)
class Grid:
    """The evenly spread directions of an arc with both ends, all equally likely."""

    low: float
    high: float
    points: int

    def __post_init__(self) -> None:
        Arc(self.low, self.high)  # refuses ends that bound no arc
        if self.points < 1:
            raise ValueError(f"grid.points is {self.points}; give at least 1")


@dataclass(frozen=True)
class Fixed:
    """Directions from a list, all equally likely; rows of any length, normalised when drawn."""

    directions: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        _unit_rows(self.directions, "fixed.directions")


Population = Arc | Cone | Sphere | Simplex | Grid | Fixed
"""P_v, the population of users, as a distribution of directions (Eq. 4)."""


def objective_count(population: Population) -> int:
    """K, the number of objectives that the population's directions weigh."""
    match population:
        case Arc() | Grid():
            return 2
        case Cone(center=center):
            return len(center)
        case Sphere(k=k) | Simplex(k=k):
            return k
        case Fixed(directions=directions):
            return len(directions[0])


def draw_directions(population: Population, n: int, rng: np.random.Generator) -> Array:
    """v_NK: n directions drawn from P_v for one prompt (section 3.1 draws 5).

    A grid or a list is drawn without repetition until it is used up: the directions of a prompt then differ.
    """
    match population:
        case Arc(low, high, stratified):
            u_N = rng.random(n)
            part_N = (np.arange(n) + u_N) / n if stratified else u_N
            return _on_circle(high - part_N * (high - low))
        case Cone(center, angle):
            return _in_cone(_unit_rows([center], "cone.center")[0], angle, n, rng)
        case Sphere(k):
            return _normalised(rng.standard_normal((n, k)))
        case Simplex(k):
            return _normalised(rng.standard_exponential((n, k)))
        case Grid() | Fixed():
            v_VK = _listed(population)
            rounds = math.ceil(n / len(v_VK))
            order = [rng.permutation(len(v_VK)) for _ in range(rounds)]
            return v_VK[np.concatenate(order)[:n] if order else []]


def middle_of(population: Population) -> Array | None:
    """The direction in the middle of an arc or a cone, (K,); None for a population without a middle."""
    match population:
        case Arc(low, high) | Grid(low, high):
            middle_1K = _on_circle(np.array([(low + high) / 2]))
        case Cone(center):
            middle_1K = _unit_rows([center], "cone.center")
        case _:
            return None
    return middle_1K.reshape(-1)


def stretched(v_NK: Array, middle_K: Array, factor: float) -> Array:
    """v_NK: each direction turned away from the middle, to `factor` times its angle there; a half turn at most."""
    cos_N = np.clip(v_NK @ middle_K, -1.0, 1.0)
    away_NK = v_NK - cos_N[:, None] * middle_K
    away_NK /= np.maximum(np.linalg.norm(away_NK, axis=1, keepdims=True), 1e-12)  # the middle itself stays
    angle_N = np.minimum(factor * np.arccos(cos_N), np.pi)
    return np.cos(angle_N)[:, None] * middle_K + np.sin(angle_N)[:, None] * away_NK


def ends_in_words(population: Population, objectives: Sequence[str]) -> tuple[str, ...]:
    """What a population asks for, such as `at -45 degrees: more coverage, less brevity`.

    One phrase for each end of an arc, for each listed direction, or for a cone's centre; else one for the whole.
    """
    match population:
        case Arc(low, high) | Grid(low, high):
            ends = [(f"at {angle:g} degrees", Preference.from_angle(angle, objectives)) for angle in (low, high)]
        case Fixed(directions):
            ends = [(_weights(v_K), Preference.from_vector(v_K, objectives)) for v_K in directions]
        case Cone(center, angle):
            ends = [(f"within {angle:g} degrees of {_weights(center)}", Preference.from_vector(center, objectives))]
        case Simplex():
            return (f"any mix of more {listed(objectives)}",)
        case _:
            return (f"any mix of more or less {listed(objectives)}",)
    return tuple(f"{place}: {asks_for(preference)}" for place, preference in ends)


def _weights(v_K: Sequence[float]) -> str:
    return f"({', '.join(f'{w:g}' for w in v_K)})"


def evaluation_grid(population: Population, n: int) -> Array:
    """v_VK: n evenly spread directions of P_v, the same at every call.

    - An arc, or a cone of two objectives: even angles from the high end to the low end. Ten on the paper's arc are
      section 3.2's directions, from (1, 0) to (sqrt(2)/2, -sqrt(2)/2). The paper prints a plus there, which
      contradicts section 3.1. One direction is an arc's high end, or a cone's centre.
    - A sphere of two objectives: even angles from 0 degrees; a simplex of two: even angles from 0 to 90.
    - Three or more objectives: the first axis, or a cone's centre. Each next one is the pool's direction farthest from
      those chosen so far. A simplex therefore starts with its axes.
    - A grid or a list: all its directions; n must be their number.
    """
    if n < 1:
        raise ValueError(f"an evaluation needs at least one direction, not {n}")
    match population:
        case Arc(low, high):
            return _on_circle(np.linspace(high, low, n))
        case Cone((x, y), angle) if n > 1:
            middle = math.degrees(math.atan2(y, x))
            return _on_circle(np.linspace(middle + angle, middle - angle, n))
        case Sphere(2):
            return _on_circle(-360.0 * np.arange(n) / n)
        case Simplex(2):
            return _on_circle(np.linspace(0.0, 90.0, n))
        case Cone(center):
            return _farthest(population, _unit_rows([center], "cone.center"), n)
        case Sphere(k) | Simplex(k):
            return _farthest(population, np.eye(k), n)
        case Grid() | Fixed():
            v_VK = _listed(population)
            if n != len(v_VK):
                raise ValueError(f"{n} evaluation directions of a list of {len(v_VK)}; ask for all {len(v_VK)}")
            return v_VK


def even_or_all(population: Population, n: int) -> Array:
    """`evaluation_grid` of n directions, but all directions of a grid or a list, however many."""
    return evaluation_grid(population, len(_listed(population)) if isinstance(population, Grid | Fixed) else n)


def _listed(population: Grid | Fixed) -> Array:
    match population:
        case Grid(low, high, points):
            return evaluation_grid(Arc(low, high), points)
        case Fixed(directions):
            return _unit_rows(directions, "fixed.directions")


def _on_circle(degrees_N: Array) -> Array:
    angle_N = np.radians(degrees_N)
    return np.stack([np.cos(angle_N), np.sin(angle_N)], axis=1)


def _in_cone(center_K: Array, degrees: float, n: int, rng: np.random.Generator) -> Array:
    """Uniform on a spherical cap: the angle from the centre has density sin^(K-2), the side is uniform."""
    angle_G = np.linspace(0.0, math.radians(degrees), 4097)
    density_G = np.sin(angle_G) ** (len(center_K) - 2)
    mass_G = np.concatenate([[0.0], np.cumsum((density_G[1:] + density_G[:-1]) / 2)])
    angle_N1 = np.interp(rng.random(n), mass_G / mass_G[-1], angle_G)[:, None]
    side_NK = rng.standard_normal((n, len(center_K)))
    side_NK = _normalised(side_NK - (side_NK @ center_K)[:, None] * center_K)
    return np.cos(angle_N1) * center_K + np.sin(angle_N1) * side_NK


def _farthest(population: Cone | Sphere | Simplex, first_FK: Array, n: int) -> Array:
    """Farthest-point choice from a fixed pool, for any number of directions and objectives."""
    pool_PK = np.concatenate([first_FK, draw_directions(population, _POOL, rng_for("evaluation grid"))])
    picks = [0]
    nearest_P = pool_PK @ pool_PK[0]
    while len(picks) < n:
        picks.append(int(np.argmin(nearest_P)))
        nearest_P = np.maximum(nearest_P, pool_PK @ pool_PK[picks[-1]])
    return pool_PK[picks]


def _normalised(v_NK: Array) -> Array:
    return np.asarray(v_NK / np.linalg.norm(v_NK, axis=1, keepdims=True))


def _at_least_two(k: int, what: str) -> None:
    if k < 2:
        raise ValueError(f"a {what} over {k} objectives has no directions to choose from; give at least 2")


def _unit_rows(rows: ArrayLike | Sequence[Sequence[float]], what: str) -> Array:
    try:
        v_NK = np.array(rows, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {rows!r} is not a table of numbers with rows of one length") from error
    if v_NK.ndim != 2 or v_NK.size == 0:
        raise ValueError(f"{what}: {rows!r} lists no directions; give at least one")
    for i, v_K in enumerate(v_NK):
        if not np.isfinite(v_K).all() or not v_K.any():
            raise ValueError(f"{what}: direction {i} is {v_K.tolist()}; give finite weights, not all zero")
    return _normalised(v_NK / np.abs(v_NK).max(axis=1, keepdims=True))


def arithmetic(weights: Mapping[str, float], senses: Sequence[float]) -> str:
    """The direction as the paper writes it (Fig. 1), two decimals throughout: `helpfulness*0.97 - verbosity*0.26`.

    A weight of 0 takes the sign of its objective's sense, so that the sign does not flip along the arc.
    """
    text = ""
    for (name, weight), sense in zip(weights.items(), senses, strict=True):
        shown = abs(round(weight, 2))
        negative = sense < 0 if shown == 0 else weight < 0
        joint = (" - " if negative else " + ") if text else ("-" if negative else "")
        text += f"{joint}{name}*{shown:.2f}"
    return text
