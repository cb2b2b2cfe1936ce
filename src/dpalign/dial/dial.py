"""The dial: it reads and checks a user's direction before the chat template sees it.

A policy's own template normalises, rounds and refuses. It cannot warn, and with a misspelt argument it silently gives
the plain model. So all our code reads directions with the dial. `tokenizer.apply_chat_template(messages,
preference=...)` then renders the prompt as everywhere else, with the same text.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from dpalign.chat import ChatStyle, with_system_line
from dpalign.page.words import degrees
from dpalign.paper.direction import Arc, Cone, Fixed, Grid, Population, Preference, Simplex, arithmetic
from dpalign.paper.prompts import Level, PreferenceTemplate, render_preference
from dpalign.rows import Message
from dpalign.train.contract import (
    FILE,
    Contract,
    FrontPoint,
    Length,
    Verbosity,
    arc_of,
    population_to_json,
    read_contract,
)
from dpalign.world.language import DEPTHS, THINGS

_NUMBER: Final = r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_NAME: Final = r"[A-Za-z][A-Za-z0-9_-]*"
_ANGLE: Final = re.compile(rf"([+-]?{_NUMBER})\s*(?:°|deg|degrees?)?")
_TERM: Final = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<name>{_NAME})\s*[=*:]\s*(?P<weight>(?:[+-]\s*)?{_NUMBER})"
    rf"|(?P<first>{_NUMBER})\s*\*\s*(?P<last>{_NAME}))(?:[\s,;]+|(?=[+-])|$)"
)
QUESTIONS: Final = ("explain fox, tea and iron.", "describe owl and moon.", "name bell, salt, wolf and gold.")
"""Questions in the language of the small world."""

_LONGEST: Final = 1000
"""Most characters of a typed direction or of a name: they may come from a network."""
_CLOSE: Final = 1e-6
"""Degrees, or units of weight, by which a direction may leave the trained range without a warning."""


@dataclass(frozen=True)
class Dial:
    """The directions that a policy takes."""

    objectives: tuple[str, ...]
    """In the order of the preference line."""
    template: PreferenceTemplate
    chat: ChatStyle
    population: Population | None = None
    """The trained directions; None if unknown."""
    front: tuple[FrontPoint, ...] = ()
    """The measured front, if the contract has one."""
    verbosity: Mapping[Verbosity, Length] = field(default_factory=dict)
    """The lengths that OpenAI's words stand for, if the contract has them."""
    levels: tuple[Level, ...] = ()
    """The words that the line adds to its arithmetic."""

    @classmethod
    def load(cls, model: Path) -> Self:
        """Load the dial of a policy folder from its `dpa.json`.

        Raises:
            ValueError: the file is missing or damaged; names it.
        """
        contract = read_contract(model)
        if contract is None:
            raise ValueError(
                f"{model / FILE}: no such file: this model takes no directions; "
                "`dpa export` writes one beside a checkpoint whose form is known"
            )
        return cls.of(contract)

    @classmethod
    def of(cls, contract: Contract) -> Self:
        told = contract.population, contract.front, contract.verbosity, contract.levels
        return cls(contract.names, contract.template, contract.chat, *told)

    @property
    def arc(self) -> tuple[float, float] | None:
        """The trained range (low, high) in degrees; None unless it is an arc."""
        return arc_of(self.population)

    def read(self, preference: object = None, angle: object = None, verbosity: str | None = None) -> Preference | None:
        """Read a request's direction: weights by objective, degrees, or OpenAI's word for a length; None without any.

        Raises:
            ValueError: two of these; an unknown objective; a zero direction, NaN, infinity or text; no lengths on
                record. The message names the known objectives.
        """
        asked = {"preference": preference, "angle": angle, "verbosity": verbosity}
        with self._naming_what_is_known():
            if len(names := [name for name, value in asked.items() if value is not None]) > 1:
                raise ValueError(f"{' and '.join(names)} each name a direction; give one")
            if verbosity is not None:
                return self._of_length(verbosity)
            if angle is not None:
                return self._at(angle)
            if preference is None:
                return None
            if not isinstance(preference, Mapping):
                raise ValueError(f"preference is {_shown(preference)}; give weights by name")
            for name in preference:
                if not isinstance(name, str) or len(name) > _LONGEST:
                    raise ValueError(f"preference names an unknown objective {_shown(name)}")
            return Preference.from_weights(preference, self.objectives)

    def parse(self, words: str) -> Preference:
        """Parse a direction as people type it.

        Degrees (`-30`), weights (`helpfulness=0.8 verbosity=-0.6`, commas allowed), or the arithmetic of the paper
        (`helpfulness*0.8 - verbosity*0.6`). An omitted name weighs 0.

        Raises:
            ValueError: another form, or a direction that `read` refuses.
        """
        text = words.replace("\u2212", "-").strip()
        with self._naming_what_is_known():
            if len(text) > _LONGEST:
                raise ValueError(f"{_shown(words)} is no direction; give {self.example()}")
            if angle := _ANGLE.fullmatch(text):
                return self._at(float(angle[1]))
            return Preference.from_weights(self._weights(text, words), self.objectives)

    def angle_of(self, preference: Preference) -> float | None:
        """Degrees in (-180, 180]; None unless there are two objectives."""
        return round(preference.angle, 4) + 0.0 if len(preference.v) == 2 else None

    def label(self, preference: Preference) -> str:
        """Return a direction in a few characters: an angle, or weights if there is none."""
        angle = self.angle_of(preference)
        return _weights_of(preference) if angle is None else degrees(angle)

    @staticmethod
    def formula(preference: Preference) -> str:
        """Write a direction as the paper does: helpfulness*0.97 - verbosity*0.26."""
        return arithmetic(preference.weights, [1.0, *[-1.0] * (len(preference.v) - 1)])

    def warning(self, preference: Preference) -> str | None:
        """A warning for a direction outside the trained range; None inside, or if the range is unknown."""
        self._own(preference)
        if _holds(self.population, preference):
            return None
        angle, weights = self.angle_of(preference), _weights_of(preference)
        direction = weights if angle is None else f"{angle:g} degrees ({weights})"
        return f"{direction}: outside the directions that this model was trained on ({self.trained}); it may not follow"

    @property
    def trained(self) -> str:
        """The trained directions in a few words; empty if they are not on record."""
        match self.population:
            case Arc(low, high) | Grid(low, high):
                return f"{low:g} to {high:g} degrees"
            case Cone(center, angle):
                middle = Preference.from_vector(center, self.objectives)
                return f"within {angle:g} degrees of {_weights_of(middle)}"
            case Simplex():
                return "weights of 0 and above"
            case Fixed(directions):
                return f"{len(directions)} fixed ones"
            case None:
                return ""
            case _:
                return "all directions"

    @property
    def lengths(self) -> str:
        """What low, medium and high stand for, in a few words; empty if no lengths are on record."""
        return ", ".join(
            f"{level} {degrees(length.angle)} ({length.words:.0f} words)" for level, length in self.verbosity.items()
        )

    def line(self, preference: Preference) -> str:
        """The system line that the policy reads."""
        self._own(preference)
        return render_preference(preference, self.template, self.levels)

    def messages(self, messages: Sequence[Message], preference: Preference | None) -> list[Message]:
        """Return the chat with the line in its system message, after the user's text; unchanged without a direction."""
        return list(messages) if preference is None else with_system_line(messages, self.line(preference), self.chat)

    @property
    def note(self) -> str | None:
        """What a user must know before the first question; None for a model that answers any question."""
        if self.chat != "world-v1":
            return None
        *verbs, last = DEPTHS
        begin = f"{', '.join(verbs)} or {last}"
        return f"This model knows one small language: facts about {len(THINGS)} things. Questions begin with {begin}."

    @property
    def questions(self) -> tuple[str, ...]:
        """Questions that the model of the small world can answer; empty for a model that answers any question."""
        return QUESTIONS if self.chat == "world-v1" else ()

    def to_json(self) -> dict[str, Any]:
        """Return what a client needs to draw the dial; unknown values are null.

        {objectives, arc, trained, template, front, verbosity}; trained is the distribution as in `dpa.json`.
        """
        return {
            "objectives": list(self.objectives),
            "arc": None if self.arc is None else list(self.arc),
            "trained": None if self.population is None else population_to_json(self.population),
            "template": self.template,
            "front": [point.to_json() for point in self.front] or None,
            "verbosity": {level: vars(length) for level, length in self.verbosity.items()} or None,
        }

    @contextlib.contextmanager
    def _naming_what_is_known(self) -> Iterator[None]:
        """Add the known objectives to every error about a request."""
        names = f"known: {', '.join(self.objectives)}"
        try:
            yield
        except ValueError as error:
            if names in str(error):
                raise
            raise ValueError(f"{error} ({names})") from None

    def _of_length(self, verbosity: str) -> Preference:
        """Return the direction whose answers have the length that the word stands for."""
        if not self.objectives:
            raise ValueError("verbosity: this model takes no directions; leave it out")
        if not self.verbosity:
            cure = "give a preference, or export the policy from its evaluated run"
            raise ValueError(f"verbosity: no lengths of answers are on record for this model; {cure}")
        for level, length in self.verbosity.items():
            if level == verbosity:
                return self._at(length.angle)
        raise ValueError(f"verbosity {_shown(verbosity)}; give {', '.join(self.verbosity)}")

    def _at(self, angle: object) -> Preference:
        if len(self.objectives) != 2:
            raise ValueError(f"an angle names a direction of two objectives, not of {len(self.objectives)}")
        if isinstance(angle, int | float) and not isinstance(angle, bool) and abs(angle) > 180 and angle - angle == 0:
            angle = (angle + 180) % 360 - 180  # as the chat template does: the cosine of a huge angle would differ
        return Preference.from_angle(angle, self.objectives)  # type: ignore[arg-type]  # checked there

    def _weights(self, text: str, words: str) -> dict[str, float]:
        weights: dict[str, float] = {}
        place = 0
        while place < len(text) or not text:
            term = _TERM.match(text, place)
            if term is None:
                raise ValueError(f"{_shown(words)} is no direction; give {self.example()}")
            name = term["name"] or term["last"]
            if name in weights:
                raise ValueError(f"{_shown(words)} weighs {name!r} twice; once is enough")
            size = float("".join((term["weight"] or term["first"]).split()))
            weights[name] = -size if term["sign"] == "-" else size
            place = term.end()
        return weights

    def example(self) -> str:
        """The forms that `parse` takes, for this policy's objectives."""
        names = self.objectives
        share = " ".join(f"{name}={w}" for name, w in zip(names, (0.8, -0.6, *[0.0] * len(names)), strict=False))
        return f"degrees, such as -30, or weights, such as {share}" if len(names) == 2 else f"weights, such as {share}"

    def _own(self, preference: Preference) -> None:
        if preference.objectives != self.objectives:
            raise ValueError(
                f"a direction over {', '.join(preference.objectives)} for a model that weighs "
                f"{', '.join(self.objectives)}; read it with this dial"
            )


def _holds(population: Population | None, preference: Preference) -> bool:
    """Whether a direction is among the trained ones; True if they are unknown."""
    match population:
        case Arc(low, high) | Grid(low, high):
            return (preference.angle - low + _CLOSE) % 360 <= high - low + 2 * _CLOSE
        case Cone(center, angle):
            cosine = float(Preference.from_vector(center, preference.objectives).v_K @ preference.v_K)
            return math.degrees(math.acos(max(-1.0, min(1.0, cosine)))) <= angle + _CLOSE
        case Simplex():
            return min(preference.v) >= -_CLOSE
        case Fixed(directions):
            units = [Preference.from_vector(v_K, preference.objectives).v_K for v_K in directions]
            return any(abs(v_K - preference.v_K).max() < 0.005 for v_K in units)
        case _:
            return True


def _weights_of(preference: Preference) -> str:
    return " ".join(f"{name}={w:.2f}" for name, w in preference.weights.items())


def _shown(value: object) -> str:
    text = repr(value[:_LONGEST] if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
