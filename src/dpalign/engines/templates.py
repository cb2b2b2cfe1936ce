"""A model's own chat template: rendered by Jinja alone, and tried out before anything is trained.

Rendering finds the place of the dial's line, the text between a prompt and its answer, the end of an answer, and the
marks that separate turns. A template that cannot carry a dial is refused by name.

A template comes with its model, and anybody may have written it: `sandbox.py` bounds what it may do.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from dpalign.chat import OwnChat, Place, Switch, base_text
from dpalign.engines.sandbox import Unbounded, render, variables
from dpalign.paper.direction import name_hint
from dpalign.rows import Message
from dpalign.runs.modelfolder import NAMED_TOKENS, Marks

_OURS: Final = ("messages", "tools", "documents", "add_generation_prompt", "preference", "angle", *NAMED_TOKENS)
"""Arguments of a chat template that are no switches."""

_SYSTEM: Final[Message] = {"role": "system", "content": "Zsystem 1."}
_ASK: Final[Message] = {"role": "user", "content": "Zquestion 2."}
_ANSWER: Final[Message] = {"role": "assistant", "content": "Zanswer 3."}
_AGAIN: Final[Message] = {"role": "user", "content": "Zquestion 4."}
_TAG: Final = re.compile(r"<+[^<>\s]+>+|\[[^\[\]\s]+\]")
_BLOCK: Final = re.compile(r"<(\w+)>\s*</\1>")
"""An empty block of thoughts: part of an answer's form."""

Write = Callable[[Sequence[Message], bool], str]
"""A chat as text, with or without the opening of an answer; ValueError if the template refuses the chat."""


@dataclass(frozen=True)
class Turn:
    """The assistant's turn as a chat template writes it: the text around the answer."""

    lead: str
    """Between the prompt and the answer; the model writes it: a space, or an empty block of thoughts."""
    end: str
    """After the answer, up to the token that stops the generation."""
    stop: str
    """The token that stops the generation."""

    def written(self, answer: str) -> str:
        """The text that a model has to write after its prompt to give an answer.

        An answer that has its own thoughts, as a thinking model samples it, gets no lead.
        """
        marks = re.findall(r"</?\w+>|\S+", self.lead)
        lead = "" if marks and marks[-1] in answer else self.lead
        return lead + answer.removeprefix(self.lead).removesuffix(self.end[: -len(self.end.lstrip())]) + self.end


def find_own_chat(
    template: str | None, marks: Marks, switches: Mapping[str, Switch], source: str, place: Place | None = None
) -> OwnChat:
    """Find out how a policy keeps a model's own chat template.

    Args:
        template: that of the model, or of a policy that keeps it.
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
    except Unbounded as error:
        raise ValueError(f"{source}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{source}: its chat template cannot carry the dial: {error}; {cure}") from error
    # Decoding drops special tokens, so an answer's text cannot hold them: the prompt has to write them.
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
    else:  # it writes past turns in another form: the answer first closes the thoughts that the prompt opens
        opened = re.search(r"<(\w+)>\s*\Z", prompt)
        lead = f"\n</{opened[1]}>\n\n" if opened else ""
    return Turn(lead, *_end(tail, marks))


def find_marks(write: Write, marks: Marks) -> frozenset[str]:
    """The texts between messages with which a chat template separates turns.

    They are added tokens and tags, such as `<|user|>` or `[INST]`. If there is neither between two turns, they are
    whole lines, such as `USER:`. Special tokens need not be among them.

    Raises:
        Unbounded: see `render`.
    """
    chat = [_SYSTEM, _ASK, _ANSWER, _AGAIN]
    for messages in (chat, chat[1:]):
        try:
            text = write(messages, True)
        except Unbounded:
            raise
        except ValueError:
            continue
        # Without the text that opens the next answer: it may begin the answer's own thoughts.
        between = re.split("|".join(re.escape(message["content"]) for message in messages), text)[:-1]
        return frozenset(mark for n, piece in enumerate(between) for mark in _marks_in(piece, marks, first=n == 0))
    return frozenset()


def _marks_in(piece: str, marks: Marks, *, first: bool) -> set[str]:
    piece = _BLOCK.sub("", piece)
    found = {token for token in marks.added if token.strip() and token in piece} | {*_TAG.findall(piece)}
    ends = {marks.eos, marks.named.get("bos_token")}
    if not found <= ends:
        return found
    for end in found:
        piece = piece.replace(end, "\n")
    lines = [line.strip() for line in piece.split("\n") if line.strip()]
    # Before the first message, all lines but the last are the template's own system text.
    named = [line for line in (lines[-1:] if first else lines) if len(line) > 2 and re.search(r"[^\w\s]", line)]
    return found | {*named}


def _end(tail: str, marks: Marks) -> tuple[str, str]:
    """The text that ends an answer, and the token that stops the generation, from the text after an answer."""
    ending = tail.lstrip()
    run: list[str] = []
    while token := max((mark for mark in marks.added if mark and ending.startswith(mark)), key=len, default=""):
        run.append(token)
        ending = ending.removeprefix(token)
    if run:
        # Of several tokens in a row, the end-of-sequence token stops the model if it is there, else the first.
        tokens = run[: run.index(marks.eos) + 1] if marks.eos in run else run[:1]
        return tail[: len(tail) - len(tail.lstrip())] + "".join(tokens), tokens[-1]
    if ending:
        raise ValueError(f"it ends an answer with {ending.strip()[:40]!r}, which is no single token of its tokenizer")
    if marks.eos is None:
        raise ValueError("it writes nothing after an answer, and its tokenizer names no eos_token")
    return marks.eos, marks.eos


def _place(write: Write, asked: Place | None) -> Place:
    """The place where a template takes a system message; only the asked one is tried, if any."""
    reasons = []
    places: tuple[Place, ...] = ("system", "user") if asked is None else (asked,)
    for place in places:
        try:
            text = write(OwnChat("", place).placed([_SYSTEM, _ASK]), True)
        except Unbounded:
            raise
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
    known = sorted(variables(base) - {*_OURS})
    for name in switches:
        if name not in known:
            hint = name_hint(name, known) if known else "it has no switches"
            raise ValueError(f"model.chat_kwargs has {name!r}, which it does not read; {hint}")
