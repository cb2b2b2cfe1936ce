"""Golden prompts: what a policy must read at some directions, written from Python and checked against its template.

The folder's chat template is Jinja and runs wherever the model does. Here Jinja alone renders it, so that neither an
export nor its check needs transformers. A template that writes today's date writes a fixed date here.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from dpalign.chat import ChatStyle, OwnChat, render_chat
from dpalign.dial.dial import Dial
from dpalign.engines.sandbox import render
from dpalign.paper.direction import Arc, Preference, even_or_all
from dpalign.rows import Message
from dpalign.runs.folder import write_json

FILE: Final = "golden_prompts.json"
_WORDS: Final = ("What is tea?", "A drink.", "And coffee?")
_OF_THE_WORLD: Final = ("explain tea and iron.", "tea is hot. iron is hard.", "name fox.")
"""A question, an answer and another question, in the language of the small world."""


@dataclass(frozen=True)
class Form:
    """What a folder's prompts depend on besides its dial."""

    tokens: Mapping[str, str]
    """Special tokens by their names in a chat template, such as eos_token."""
    own: OwnChat | None = None
    """The model's own chat template, if the policy keeps it."""


@dataclass(frozen=True)
class Golden:
    """One prompt: a chat, a direction, and the text that the model reads."""

    messages: tuple[Message, ...]
    preference: Mapping[str, float] | None
    """None for the plain model."""
    angle: float | None
    """The same direction in degrees; None unless it has two objectives and its rounded angle gives this text."""
    text: str


def chats(style: ChatStyle) -> tuple[tuple[Message, ...], ...]:
    """A plain question, and a chat with a system message and an earlier answer."""
    first, answer, second = _OF_THE_WORLD if style == "world-v1" else _WORDS
    asked: Message = {"role": "user", "content": first}
    said: Message = {"role": "assistant", "content": answer}
    return (asked,), ({"role": "system", "content": "Be kind."}, asked, said, {"role": "user", "content": second})


def golden_prompts(dial: Dial, form: Form, directions: int = 3) -> list[Golden]:
    """Render each chat in Python, without a direction and at several."""
    return [
        _golden(dial, chat, v, form) for chat in chats(dial.chat) for v in (None, *shown_directions(dial, directions))
    ]


def _golden(dial: Dial, chat: tuple[Message, ...], preference: Preference | None, form: Form) -> Golden:
    text = expected(dial, chat, preference, form)
    if preference is None:
        return Golden(chat, None, None, text)
    angle = dial.angle_of(preference)  # rounded: kept only if it gives the same text
    same = angle is not None and expected(dial, chat, dial.read(angle=angle), form) == text
    return Golden(chat, preference.weights, angle if same else None, text)


def expected(dial: Dial, chat: Sequence[Message], preference: Preference | None, form: Form) -> str:
    """Render the prompt in Python; the folder's template must write the same."""
    messages, own = dial.messages(chat, preference), form.own
    if own is None:
        return render_chat(messages, dial.chat, add_generation_prompt=True, eos=form.tokens["eos_token"])
    return render(own.base, own.placed(messages), **{**form.tokens, **own.switches}) + own.opening


def shown_directions(dial: Dial, n: int) -> list[Preference]:
    """Return even steps over the trained directions with both ends; the single objectives if none are on record."""
    trained = dial.population if dial.arc is None else Arc(*dial.arc)
    v_VK = np.eye(len(dial.objectives)) if trained is None else even_or_all(trained, max(n, len(dial.objectives)))
    return [Preference.from_vector(v_K.tolist(), dial.objectives) for v_K in v_VK]


def write_golden(folder: Path, prompts: Sequence[Golden]) -> None:
    """Write the golden prompts beside their model."""
    write_json(folder / FILE, [vars(golden) for golden in prompts])


def read_golden(folder: Path) -> list[Golden]:
    """Read the golden prompts of an export; empty if the folder has none.

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
