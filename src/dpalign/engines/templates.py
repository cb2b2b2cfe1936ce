"""A model's own chat template: rendered by Jinja alone, and tried out before anything is trained.

Rendering finds the place of the dial's line, the text between a prompt and its answer, the end of an answer, and the
marks that separate turns. A template that cannot carry a dial is refused by name.

A template comes with its model, and anybody may have written it. It is rendered in Jinja's sandbox, and stopped if it
takes too long or grows without end.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import cache, lru_cache, wraps
from time import monotonic
from typing import Any, Final

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from dpalign.chat import OwnChat, Place, Switch, base_text
from dpalign.paper.direction import name_hint
from dpalign.rows import Message
from dpalign.runs.modelfolder import NAMED_TOKENS, Marks

TODAY: Final = datetime(2024, 7, 26)
"""The date that a template gets as today's: the default of Llama's own."""
_OURS: Final = ("messages", "tools", "documents", "add_generation_prompt", "preference", "angle", *NAMED_TOKENS)
"""Arguments of a chat template that are no switches."""

SECONDS: Final = 5.0
"""The most time that a template may take to write a chat; real ones take milliseconds."""
MOST: Final = 10_000_000
"""The most characters of a text, and items of a list, that a template may make."""
WIDEST: Final = 10_000
"""The largest width that a template may pad a text to, and the most bits of a whole number that it may make."""
GROWING: Final = frozenset(
    {"batch", "center", "expandtabs", "format", "indent", "join", "ljust", "replace", "rjust", "slice", "wordwrap"}
    | {"zfill"}
)
"""Filters and string methods whose result may be far longer than their arguments."""
REFUSALS: Final = (
    *(TemplateError, TypeError, ValueError, LookupError, AttributeError),
    *(ArithmeticError, RecursionError, MemoryError, SyntaxError),
)
"""Errors that rendering raises if the template or the chat is wrong."""

_SYSTEM: Final[Message] = {"role": "system", "content": "Zsystem 1."}
_ASK: Final[Message] = {"role": "user", "content": "Zquestion 2."}
_ANSWER: Final[Message] = {"role": "assistant", "content": "Zanswer 3."}
_AGAIN: Final[Message] = {"role": "user", "content": "Zquestion 4."}
_TAG: Final = re.compile(r"<+[^<>\s]+>+|\[[^\[\]\s]+\]")
_BLOCK: Final = re.compile(r"<(\w+)>\s*</\1>")
"""An empty block of thoughts: part of an answer's form."""

Write = Callable[[Sequence[Message], bool], str]
"""A chat as text, with or without the opening of an answer; ValueError if the template refuses the chat."""


class Unbounded(ValueError):
    """A chat template goes on for too long, or makes too long a text."""


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


def render(template: str, messages: Sequence[Message], ask: bool = True, /, **given: Any) -> str:
    """A chat as `apply_chat_template(messages, add_generation_prompt=ask, **given)` writes it.

    Args:
        given: the direction, switches, and special tokens by name, if the template reads them.

    Raises:
        ValueError: the template refuses the chat or an argument, or is not Jinja.
        Unbounded: it takes more than SECONDS, or writes too much.
    """
    begun = _ends.set(monotonic() + SECONDS)
    try:
        return _compiled(template).render(messages=list(messages), add_generation_prompt=ask, **given)
    except Unbounded:
        raise
    except REFUSALS as error:
        raise ValueError(f"the chat template says: {error}") from error
    finally:
        _ends.reset(begun)


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
    try:
        read = meta.find_undeclared_variables(_environment().parse(base))
    except (TemplateError, RecursionError) as error:
        raise ValueError(f"it is no Jinja ({error})") from error
    known = sorted(name for name in read if name not in (*_OURS, *_environment().globals))
    for name in switches:
        if name not in known:
            hint = name_hint(name, known) if known else "it has no switches"
            raise ValueError(f"model.chat_kwargs has {name!r}, which it does not read; {hint}")


@lru_cache(maxsize=32)
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


_ends: ContextVar[float] = ContextVar("_ends", default=float("inf"))
"""The time by which the current rendering must end."""


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja, set up as transformers sets it up, with bounds."""
    environment = _Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.globals |= {"raise_exception": _refuse, "strftime_now": TODAY.strftime}
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, **{"ensure_ascii": False, **how})
    environment.filters |= {name: _modest(name, environment.filters[name]) for name in GROWING & {*environment.filters}}
    del environment.globals["lipsum"]  # writes texts of any length
    return environment


class _Bounded(ImmutableSandboxedEnvironment):
    """Stops a template in a loop, a macro or a join when its time is over or its result is too long."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _generate(self, source: nodes.Template, *rest: Any, **named: Any) -> str:
        bounded: nodes.Template = _Bounds().visit(source)
        bounded.set_environment(self)
        return super()._generate(bounded, *rest, **named)

    def call(self, context: Context, called: Any, /, *given: Any, **named: Any) -> Any:
        self.goes_on()
        method = getattr(called, "__wrapped__", called)  # the sandbox wraps str.format
        if isinstance(getattr(method, "__self__", None), str) and method.__name__ in GROWING:
            _require_modest(method.__name__, (method.__self__, *given), named)
        return super().call(context, called, *given, **named)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.goes_on()
        size = 0
        match operator, left, right:
            case "*" | "**", int(), int():
                bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
                size = MOST + 1 if bits > WIDEST else 0
            case "*", (str() | list() | tuple()), int():
                size = len(left) * right
            case "*", int(), (str() | list() | tuple()):
                size = left * len(right)
            case "+", (str() | list() | tuple()), (str() | list() | tuple()):
                size = len(left) + len(right)
            case "%", str(), _:
                _require_modest("format", (left, right), {})
        _require_size(size)
        return super().call_binop(context, operator, left, right)

    def goes_on(self) -> bool:
        """True while there is time; raises Unbounded afterwards."""
        if monotonic() > _ends.get():
            raise Unbounded(f"the chat template writes one chat for more than {SECONDS:g} seconds: it may never end")
        return True

    def joined(self, *parts: Any) -> str:
        """The result of `~` for values."""
        self.goes_on()
        return self.concat(map(str, parts))

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join the texts that a template, a macro or a block writes."""
        kept, size = [], 0
        for part in parts:
            size += len(part)
            _require_size(size)
            kept.append(part)
        return "".join(kept)


class _Bounds(NodeTransformer):
    """Puts the checks of `_Bounded` into a template's tree."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_asks("goes_on")))
        if node.test is not None:
            node.test = nodes.And(_asks("goes_on"), node.test)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_asks("goes_on")))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _asks("joined", node.nodes)


def _asks(method: str, given: Sequence[nodes.Expr] = ()) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), list(given), [], None, None)


def _modest(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """The filter with a check of its arguments before it runs."""

    @wraps(run)
    def bounded(*given: Any, **named: Any) -> Any:
        _require_modest(name, given, named)
        return run(*given, **named)

    return bounded


def _require_modest(name: str, given: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Raise Unbounded if a function of GROWING would make too long a text of its arguments."""
    if any(isinstance(value, int) and value > WIDEST for value in (*given, *named.values())):
        _require_size(MOST + 1)
    texts = [value for value in (*given, *named.values()) if isinstance(value, str)]
    if name == "replace" and len(texts) > 2:
        _require_size(len(texts[0]) + texts[0].count(texts[1]) * len(texts[2]))
    if name == "join":
        lists = [value for value in given if isinstance(value, list | tuple)]
        _require_size(sum(len(part) for value in lists for part in value if isinstance(part, str)))
        _require_size(sum(map(len, texts)) * sum(map(len, lists)))
    if name == "format" and texts and re.search(r"\d{5}|\*", texts[0]):
        _require_size(MOST + 1)


def _require_size(size: int) -> None:
    if size > MOST:
        raise Unbounded(f"the chat template makes a text, a list or a number of more than {MOST} parts")


def _refuse(message: str) -> None:
    raise TemplateError(message)


class _Generation(Extension):
    """transformers' own tag around the assistant's text; it writes its content."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
