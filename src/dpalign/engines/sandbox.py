"""A stranger's chat template, rendered in Jinja's sandbox with bounds of time and size.

A template comes with its model, and anybody may have written it. Jinja's sandbox keeps it from running code; the
bounds stop one that takes too long or grows without end.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set, ValuesView
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import cache, lru_cache, wraps
from itertools import chain
from string import Formatter
from time import monotonic
from typing import Any, Final

from jinja2 import Template, TemplateError, meta, nodes, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import make_attrgetter, sync_do_join
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from dpalign.rows import Message

TODAY: Final = datetime(2024, 7, 26)
"""The date that a template gets as today's: the default of Llama's own."""
SECONDS: Final = 5.0
"""The most time that a template may take to write a chat; real ones take milliseconds."""
MOST: Final = 10_000_000
"""The most characters that a template may make in one step."""
ALTOGETHER: Final = 20 * MOST
"""The most characters that it may make in all steps of one chat."""
WIDEST: Final = 10_000
"""The most bits of a whole number that a template may make, and its widest indent of JSON."""
REFUSALS: Final = (
    *(TemplateError, TypeError, ValueError, LookupError, AttributeError),
    *(ArithmeticError, RecursionError, MemoryError, SyntaxError),
)
"""Errors that rendering raises if the template or the chat is wrong."""


class Unbounded(ValueError):
    """A chat template goes on for too long, or makes too long a text."""


def render(template: str, messages: Sequence[Message], ask: bool = True, /, **given: Any) -> str:
    """A chat as `apply_chat_template(messages, add_generation_prompt=ask, **given)` writes it.

    Args:
        given: the direction, switches, and special tokens by name, if the template reads them.

    Raises:
        ValueError: the template refuses the chat or an argument, or is not Jinja.
        Unbounded: it takes more than SECONDS, or writes too much.
    """
    before = _left.set(_Left(monotonic() + SECONDS, ALTOGETHER))
    try:
        return _compiled(template).render(messages=list(messages), add_generation_prompt=ask, **given)
    except Unbounded:
        raise
    except REFUSALS as error:
        raise ValueError(f"the chat template says: {error}") from error
    finally:
        _left.reset(before)


def variables(template: str) -> set[str]:
    """The names that a template reads, without Jinja's own.

    Raises:
        ValueError: it is no Jinja.
    """
    try:
        return meta.find_undeclared_variables(_environment().parse(template)) - {*_environment().globals}
    except (TemplateError, RecursionError) as error:
        raise ValueError(f"it is no Jinja ({error})") from error


@lru_cache(maxsize=32)
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


@dataclass
class _Left:
    """What the current rendering may still use."""

    until: float = float("inf")
    parts: float = float("inf")


_left: ContextVar[_Left] = ContextVar("_left", default=_Left())  # noqa: B039  # infinite, so it never changes


def _spend(size: int) -> None:
    """Count what the rendering makes; raises Unbounded if it is too much."""
    left = _left.get()
    left.parts -= size
    if size > MOST or left.parts < 0:
        limits = f"{MOST:,} characters, or {ALTOGETHER:,} in all"
        raise Unbounded(f"the chat template makes a text, a list or a number of more than {limits}")


def _size(value: Any) -> int:
    """The length of a value as text, roughly; an item counts 8 more. A part that is there twice counts twice.

    Raises:
        Unbounded: it exceeds MOST.
        SecurityError: a namespace is in it: it may grow later, uncounted.
    """
    match value:
        case str():
            return len(value)
        case int() | float() | complex():
            return len(str(value))
        case Mapping():
            parts: Iterable[Any] = chain.from_iterable(value.items())
        case list() | tuple() | Set() | ValuesView():
            parts = value
        case Namespace():
            raise SecurityError("a namespace is put into a list, a filter or a text")
        case _:
            return 1
    size = 2
    for part in parts:
        size += 8 + _size(part)
        if size > MOST:
            _spend(size)
    return size


def _form(text: Any, *given: Any, **named: Any) -> int:
    """The most that `text.format(...)` or `text % ...` writes: any number in the text may be a width."""
    text = str(text)
    if any("{" in (spec or "") for _, _, spec, _ in _fields(text)):
        raise SecurityError("a format has its width from a value")
    values = (*given, *named.values())
    numbers = [abs(value) for value in values if isinstance(value, int)]
    size = len(text) + sum(map(int, re.findall(r"\d+", text))) + text.count("*") * max(numbers, default=0)
    return size + (text.count("%") + text.count("{")) * max(map(_size, values), default=0)


def _fields(text: str) -> Iterable[tuple[str, str | None, str | None, str | None]]:
    try:
        return [*Formatter().parse(text)]
    except ValueError:  # a text for `%`
        return ()


def _search(text: Any, *given: Any, **named: Any) -> int:
    """Searches from the right, and sets of characters, take the product of both lengths in time."""
    longest = max((len(value) for value in (*given, *named.values()) if isinstance(value, str)), default=0)
    return len(str(text)) * longest // 100


def _indent(text: str, width: int | str = 4, *_: Any, **__: Any) -> int:
    return len(text) + (len(text.splitlines()) + 1) * (len(width) if isinstance(width, str) else width)


def _replace(s: Any, old: Any, new: Any, count: int | None = None) -> int:
    return len(str(s)) + str(s).count(str(old)) * len(str(new))


def _round(value: Any, precision: int = 0, *_: Any, **__: Any) -> int:
    return MOST + 1 if abs(precision) > WIDEST else 0


def _sum(value: Any, attribute: Any = None, start: Any = 0) -> int:
    if not isinstance(start, int | float):
        raise SecurityError("a sum begins with something else than a number")
    return 0


_GROWING: Final[Mapping[str, Callable[..., int]]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), lambda text, width=80, *_: width),
    **dict.fromkeys(("lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip", "trim"), _search),
    "batch": lambda value, linecount, *_, **__: linecount,
    "expandtabs": lambda text, tabsize=8: len(text) + text.count("\t") * tabsize,
    "format": _form,
    "format_map": _form,
    "indent": _indent,
    "replace": _replace,
    "round": _round,
    "slice": lambda value, slices, *_, **__: slices,
    "sum": _sum,
}
"""By filter or method, the most that a call makes. The others make little more than they get."""
_METHODS: Final = {
    *("capitalize", "casefold", "copy", "count", "endswith", "find", "get", "index", "is_integer", "isalnum"),
    *("isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace"),
    *(
        "istitle",
        "isupper",
        "items",
        "join",
        "keys",
        "lower",
        "partition",
        "removeprefix",
        "removesuffix",
        "split",
        "splitlines",
    ),
    *("startswith", "swapcase", "title", "upper", "values", *_GROWING),
}
"""The methods of texts, lists, mappings and numbers that a template may call."""
_FILTERS: Final = (
    *("abs", "attr", "batch", "capitalize", "center", "count", "d", "default", "dictsort", "e", "escape", "first"),
    *("float", "format", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max"),
    *("min", "random", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "slice"),
    *("sort", "string", "sum", "title", "tojson", "trim", "truncate", "unique", "upper", "wordcount"),
)
"""The filters that a template may use: Jinja's, without those for web pages and those that take too long."""


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja, set up as transformers sets it up, with bounds."""
    environment = _Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _today}
    filters = environment.filters | {"tojson": _tojson, "join": _join}
    environment.filters = {name: environment.bounded(name, filters[name]) for name in _FILTERS}
    environment.finalize = environment.written
    del environment.globals["lipsum"]  # writes texts of any length
    return environment


class _Bounded(ImmutableSandboxedEnvironment):
    """Stops a template that takes too long or makes too much.

    The size of all that an operator, a filter, a method, a slice or a list makes is counted. What could be far larger
    than its parts is bounded before it is made.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _generate(self, source: nodes.Template, *rest: Any, **named: Any) -> str:
        bounded: nodes.Template = _Bounds().visit(source)
        bounded.set_environment(self)
        return super()._generate(bounded, *rest, **named)

    def is_safe_callable(self, obj: Any) -> bool:
        """Whether it is one of `_METHODS`, a global, a macro or Jinja's own, such as `loop.cycle`."""
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        if any(obj is one for one in self.globals.values()) or _is_jinjas(getattr(method, "__self__", obj)):
            return True
        return getattr(method, "__name__", "") in _METHODS

    def call(self, context: Context, called: Any, /, *given: Any, **named: Any) -> Any:
        if getattr(called, "__self__", None) is self:  # a check of `_Bounds`
            return called(*given)
        self.goes_on()
        method = getattr(called, "__wrapped__", called)
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str) and name == "join":
            given = ([*given[0]],)
            _spend(_size(given[0]) + len(owner) * len(given[0]))
        elif isinstance(owner, str) and name in _GROWING:
            _spend(_GROWING[name](owner, *given, **named))
        return self.sized(super().call(context, called, *given, **named))

    def bounded(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """The filter with checks of its arguments and its result."""

        @wraps(run)
        def bounded(*given: Any, **named: Any) -> Any:
            self.goes_on()
            own = given[1:] if hasattr(run, "jinja_pass_arg") else given
            for value in (*own, *named.values()):
                if not isinstance(value, Namespace):
                    _size(value)
            if name in _GROWING:
                _spend(_GROWING[name](*own, **named))
            return self.sized(run(*given, **named))

        return bounded

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.goes_on()
        match operator, left, right:
            case "*" | "**", int(), int():
                bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
                _spend(MOST + 1 if bits > WIDEST else 0)
            case "*", (str() | list() | tuple()), int():
                _spend(_size(left) * right)
            case "*", int(), (str() | list() | tuple()):
                _spend(left * _size(right))
            case "+", (str() | list() | tuple()), (str() | list() | tuple()):
                _spend(_size(left) + _size(right))
            case "%", str(), _:
                _spend(_form(left, *(right if isinstance(right, tuple) else (right,))))
        return self.sized(super().call_binop(context, operator, left, right))

    def goes_on(self) -> bool:
        """True while there is time; raises Unbounded afterwards."""
        if monotonic() > _left.get().until:
            raise Unbounded(f"the chat template writes one chat for more than {SECONDS:g} seconds: it may never end")
        return True

    def sized(self, value: Any) -> Any:
        """The value, whose size is counted: now, or as it is read."""
        if isinstance(value, Iterator):
            return self.counted(value)
        if not isinstance(value, Namespace):
            _spend(_size(value))
        return value

    def counted(self, values: Iterator[Any]) -> Iterator[Any]:
        size = 0
        for value in values:
            self.goes_on()
            size += 8 + _size(value)
            if size > MOST:
                _spend(size)
            yield value

    @staticmethod
    def written(value: Any) -> Any:
        """A value that the template writes."""
        if not isinstance(value, str):
            _spend(_size(value))
        return value

    def joined(self, *parts: Any) -> str:
        """The result of `~` for values."""
        self.goes_on()
        return self.concat(str(self.written(part)) for part in parts)

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join the texts that a template, a macro or a block writes."""
        kept, size = [], 0
        for part in parts:
            size += len(part)
            if size > MOST:
                _spend(size)
            kept.append(part)
        _spend(size)
        return "".join(kept)


def _is_jinjas(value: object) -> bool:
    return type(value).__module__.startswith("jinja2.")


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

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        self.generic_visit(node)
        return _asks("sized", [node])

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        self.generic_visit(node)
        return _asks("sized", [node])

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return _asks("sized", [node]) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _asks("sized", [node]) if isinstance(node.arg, nodes.Slice) else node


def _asks(method: str, given: Sequence[nodes.Expr] = ()) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), list(given), [], None, None)


@pass_eval_context
def _join(eval_ctx: EvalContext, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    """Jinja's filter, with the size of its result counted first."""
    if attribute is not None:
        value = map(make_attrgetter(eval_ctx.environment, attribute), value)
    parts = [*value]
    _spend(_size(parts) + len(str(d)) * len(parts))
    return sync_do_join(eval_ctx, parts, d)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' own filter, which writes a piece at a time."""
    if (len(indent) if isinstance(indent, str) else indent or 0) > WIDEST:
        _spend(MOST + 1)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return _Bounded.concat(encoder.iterencode(value))


def _today(form: str) -> str:
    _spend(256 * len(form))  # the most that strftime writes
    return TODAY.strftime(form)


def _refuse(message: str) -> None:
    raise TemplateError(message)


class _Generation(Extension):
    """transformers' own tag around the assistant's text; it writes its content."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
