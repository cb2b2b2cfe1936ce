"""A model's own chat template: rendered by Jinja alone, and tried out before anything is trained.

Rendering finds where the dial's line goes, what stands between a prompt and its answer, and how an answer ends. A
template that cannot carry a dial is refused by name.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, lru_cache
from typing import Any, Final

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dpalign.chat import OwnChat, Place, Switch, base_text
from dpalign.paper.direction import name_hint
from dpalign.rows import Message
from dpalign.runs.modelfolder import NAMED_TOKENS, Marks

TODAY: Final = datetime(2024, 7, 26)
"""What a template that writes today's date writes here: the default of Llama's own."""
_OURS: Final = ("messages", "tools", "documents", "add_generation_prompt", "preference", "angle", *NAMED_TOKENS)
"""Arguments of a chat template that are no switches."""

_SYSTEM: Final[Message] = {"role": "system", "content": "Zsystem 1."}
_ASK: Final[Message] = {"role": "user", "content": "Zquestion 2."}
_ANSWER: Final[Message] = {"role": "assistant", "content": "Zanswer 3."}

Write = Callable[[Sequence[Message], bool], str]
"""A chat as text, with or without the opening of an answer; ValueError where the template refuses the chat."""


@dataclass(frozen=True)
class Turn:
    """The assistant's turn as a chat template writes it: what surrounds the answer in it."""

    lead: str
    """Between the prompt and the answer; the model writes it: a space, or an empty block of thoughts."""
    end: str
    """After the answer, up to the token that stops the generation."""
    stop: str
    """That token."""

    def written(self, answer: str) -> str:
        """What a model has to write after its prompt to give an answer.

        An answer that has its thoughts within it, as a thinking model draws it, stays as it is.
        """
        marks = re.findall(r"</?\w+>|\S+", self.lead)
        lead = "" if marks and marks[-1] in answer else self.lead
        return lead + answer.removeprefix(self.lead).removesuffix(self.end[: -len(self.end.lstrip())]) + self.end


def render(template: str, messages: Sequence[Message], ask: bool = True, /, **given: Any) -> str:
    """A chat as `apply_chat_template(messages, add_generation_prompt=ask, **given)` writes it.

    Args:
        given: the direction, switches, and special tokens by name, where the template reads any.

    Raises:
        ValueError: the template refuses what it is asked, or is no Jinja.
    """
    try:
        return _compiled(template).render(messages=list(messages), add_generation_prompt=ask, **given)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"the chat template says: {error}") from error


def find_own_chat(
    template: str | None, marks: Marks, switches: Mapping[str, Switch], source: str, place: Place | None = None
) -> OwnChat:
    """How a policy keeps a model's own chat template.

    Args:
        template: the model's, or a policy's that keeps it.
        source: the model's name, for messages.
        place: where the dial's line goes; None finds out whether the template takes a system message.

    Raises:
        ValueError: the template cannot carry a dial; the message says why.
    """
    cure = 'give a chat model, or model.chat = "zephyr", which replaces the template'
    if template is None:
        raise ValueError(f'{source}: has no chat template, and model.chat = "model" keeps the model\'s own; {cure}')
    base = base_text(template)

    def write(messages: Sequence[Message], ask: bool) -> str:
        return render(base, messages, ask, **{**marks.named, **switches})

    try:
        _require_read(base, switches)
        place = _place(write, place)
        turn = find_turn(write, marks)
    except ValueError as error:
        raise ValueError(f"{source}: its chat template cannot carry the dial: {error}; {cure}") from error
    # What decoding leaves out no answer's text can hold: the prompt has to write it.
    opening = turn.lead if any(mark in turn.lead for mark in marks.special) else ""
    return OwnChat(base, place, opening, dict(switches), turn.stop)


def find_turn(write: Write, marks: Marks) -> Turn:
    """What a chat template writes around an answer.

    Raises:
        ValueError: the answer cannot be told from the rest; or no single token ends it.
    """
    prompt, whole = write([_ASK], True), write([_ASK, _ANSWER], False)
    head, found, tail = whole.partition(_ANSWER["content"])
    if not found or _ANSWER["content"] in tail:
        raise ValueError(f"it writes the answer {_ANSWER['content']!r} {'twice' if found else 'altered or not at all'}")
    if head.startswith(prompt):
        lead = head.removeprefix(prompt)
    else:  # it writes past turns in another form: an answer follows its prompt, out of the thoughts that this opens
        opened = re.search(r"<(\w+)>\s*\Z", prompt)
        lead = f"\n</{opened[1]}>\n\n" if opened else ""
    return Turn(lead, *_end(tail, marks))


def _end(tail: str, marks: Marks) -> tuple[str, str]:
    """(what ends an answer, the token that stops the generation), of what a template writes after an answer."""
    ending = tail.lstrip()
    run: list[str] = []
    while token := max((mark for mark in marks.added if mark and ending.startswith(mark)), key=len, default=""):
        run.append(token)
        ending = ending.removeprefix(token)
    if run:
        # Of several tokens in a row the last one may be known to stop the model: else it is the first.
        tokens = run[: run.index(marks.eos) + 1] if marks.eos in run else run[:1]
        return tail[: len(tail) - len(tail.lstrip())] + "".join(tokens), tokens[-1]
    if ending:
        raise ValueError(f"it ends an answer with {ending.strip()[:40]!r}, which is no single token of its tokenizer")
    if marks.eos is None:
        raise ValueError("it writes nothing after an answer, and its tokenizer names no eos_token")
    return marks.eos, marks.eos


def _place(write: Write, asked: Place | None) -> Place:
    """Where a template takes a system message, if not where it was asked to."""
    reasons = []
    places: tuple[Place, ...] = ("system", "user") if asked is None else (asked,)
    for place in places:
        try:
            text = write(OwnChat("", place).placed([_SYSTEM, _ASK]), True)
        except ValueError as error:
            reasons.append(f"is refused ({error})")
            continue
        counts = [text.count(message["content"]) for message in (_SYSTEM, _ASK)]
        if counts == [1, 1] and text.index(_SYSTEM["content"]) < text.index(_ASK["content"]):
            return place
        reasons.append(
            f"is written {counts[0]} times, and the question {counts[1]} times"
            if counts != [1, 1]
            else "is written after the question"
        )
    if asked is not None:
        raise ValueError(f"what stands in the {asked}'s turn {reasons[0]}; leave model.place out")
    raise ValueError(f"a system message {reasons[0]}; before the user's first words it {reasons[1]}")


def _require_read(base: str, switches: Mapping[str, Switch]) -> None:
    try:
        read = meta.find_undeclared_variables(_environment().parse(base))
    except TemplateError as error:
        raise ValueError(f"it is no Jinja ({error})") from error
    known = sorted(name for name in read if name not in (*_OURS, *_environment().globals))
    for name in switches:
        if name not in known:
            hint = name_hint(name, known) if known else "it has no switches"
            raise ValueError(f"model.chat_kwargs has {name!r}, which it does not read; {hint}")


@lru_cache(maxsize=32)
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja, set up as transformers sets it up."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": TODAY.strftime}
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, **{"ensure_ascii": False, **how})
    return environment


def _refuse(message: str) -> None:
    raise TemplateError(message)


class _Generation(Extension):
    """transformers' own tag around what the assistant says; it writes what stands inside."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
