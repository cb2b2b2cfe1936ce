"""Golden prompts: what a policy must read at some directions, written from Python and checked against its template.

The folder's chat template is Jinja that runs wherever the model does. It is rendered here by Jinja alone, set up as
transformers sets it up, so that neither an export nor a check of one needs transformers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dpalign.chat import ChatStyle, render_chat
from dpalign.dial.dial import Dial
from dpalign.paper.direction import Arc, Fixed, Preference, evaluation_grid
from dpalign.rows import Message
from dpalign.runs.folder import write_json

FILE: Final = "golden_prompts.json"
_WORDS: Final[Mapping[ChatStyle, tuple[str, str, str]]] = {
    "zephyr": ("What is tea?", "A drink.", "And coffee?"),
    "world-v1": ("explain tea and iron.", "tea is hot. iron is hard.", "name fox."),
}
"""A question, an answer and another question, in the words of the models that read a style."""


@dataclass(frozen=True)
class Golden:
    """One prompt: a chat, what is asked for, and the text that the model reads."""

    messages: tuple[Message, ...]
    preference: Mapping[str, float] | None
    """None for the plain model."""
    angle: float | None
    """The same direction in degrees, over two objectives."""
    text: str


def chats(style: ChatStyle) -> tuple[tuple[Message, ...], ...]:
    """A plain question, and a chat with a system message and an earlier answer."""
    first, answer, second = _WORDS[style]
    asked: Message = {"role": "user", "content": first}
    said: Message = {"role": "assistant", "content": answer}
    return (asked,), ({"role": "system", "content": "Be kind."}, asked, said, {"role": "user", "content": second})


def golden_prompts(dial: Dial, eos: str, directions: int = 3) -> list[Golden]:
    """Every chat without a direction and at some, rendered in Python."""
    return [
        _golden(dial, chat, v, eos) for chat in chats(dial.chat) for v in (None, *shown_directions(dial, directions))
    ]


def _golden(dial: Dial, chat: tuple[Message, ...], preference: Preference | None, eos: str) -> Golden:
    text = expected(dial, chat, preference, eos)
    if preference is None:
        return Golden(chat, None, None, text)
    angle = dial.angle_of(preference)  # rounded: stated where it still says the same
    same = angle is not None and expected(dial, chat, dial.read(angle=angle), eos) == text
    return Golden(chat, preference.weights, angle if same else None, text)


def expected(dial: Dial, chat: Sequence[Message], preference: Preference | None, eos: str) -> str:
    """The prompt in Python: what the folder's template must write."""
    return render_chat(dial.messages(chat, preference), dial.chat, add_generation_prompt=True, eos=eos)


def shown_directions(dial: Dial, n: int) -> list[Preference]:
    """Even steps over the trained directions, their ends among them; without any on record, the objectives alone."""
    if dial.arc is not None:
        v_VK = evaluation_grid(Arc(*dial.arc), n)
    elif dial.population is None:
        v_VK = np.eye(len(dial.objectives))
    elif isinstance(dial.population, Fixed):
        v_VK = np.array(dial.population.directions)
    else:
        v_VK = evaluation_grid(dial.population, max(n, len(dial.objectives)))
    return [Preference.from_vector(v_K.tolist(), dial.objectives) for v_K in v_VK]


def write_golden(folder: Path, prompts: Sequence[Golden]) -> None:
    """Write them beside the model they belong to."""
    write_json(folder / FILE, [vars(golden) for golden in prompts])


def read_golden(folder: Path) -> list[Golden]:
    """The golden prompts of an export; empty where the folder has none.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [Golden(tuple(row["messages"]), row["preference"], row["angle"], row["text"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no golden prompts ({type(error).__name__}: {error})") from error


def render(template: str, messages: Sequence[Message], *, add_generation_prompt: bool = True, **asked: Any) -> str:
    """A prompt as `apply_chat_template(messages, add_generation_prompt=True, **asked)` writes it.

    Raises:
        ValueError: the template refuses what it is asked, or is no Jinja.
    """
    try:
        return _compiled(template).render(messages=list(messages), add_generation_prompt=add_generation_prompt, **asked)
    except TemplateError as error:
        raise ValueError(f"the chat template says: {error}") from error


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    return environment


def _refuse(message: str) -> None:
    raise TemplateError(message)


class _Generation(Extension):
    """transformers' own tag around what the assistant says; it writes what stands inside."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
