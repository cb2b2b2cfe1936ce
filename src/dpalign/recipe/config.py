"""Typed recipe files: TOML read strictly into nested frozen dataclasses, and written back with its help.

A knob is a dataclass field; the string literal under the field is its help. This module knows no knob:
`recipe.py` says which there are. Every error is a ValueError that names the file, the dotted key, the value
and what is possible. A key may be a bool, int, float, str, Path, Literal, a tuple, a `dict[str, X]`, another
dataclass, or `X | None`; TOML has no null, so None is written "none".
"""

import ast
import contextlib
import difflib
import inspect
import itertools
import math
import re
import textwrap
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dpalign.recipe.toml_text import NONE, literal, table_lines

T = TypeVar("T")


def load(cls: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """Read a recipe file, with command-line words such as `--sampling.n 8` or `--sampling.n=8` laid over it.

    An override is read as its field's type: TOML syntax (`[0, -45]`, `{n = 8}`, `true`), or a bare string.
    A table given whole replaces the file's table; of two overrides of one key the later holds.

    Raises:
        ValueError: the file is missing or not TOML (with the line), or a key, value or override is refused.
    """
    mapping = _read_toml(path)
    for key, text in _override_pairs(overrides):
        _override(cls, mapping, key, text)
    return from_mapping(cls, mapping, f"{path} with {' '.join(overrides)}" if overrides else str(path))


def from_mapping(cls: type[T], mapping: Mapping[str, Any], where: str = "recipe") -> T:
    """Build `cls` from nested tables, strictly; `where` is the file that messages name.

    Raises:
        ValueError: an unknown or missing key, a wrong type, or what a `__post_init__` refuses.
    """
    instance: T = _build(cls, mapping, _Place(where, "", cls))
    return instance


def changed(instance: T, values: Mapping[str, Any]) -> T:
    """The instance with some leaves set anew: `changed(recipe, {"sampling.n": 8})`.

    Raises:
        ValueError: an unknown key, or a value of a wrong type.
    """
    mapping = as_mapping(instance)
    for key, value in values.items():
        *parents, leaf = key.split(".")
        table = mapping
        for parent in parents:
            table = table.setdefault(parent, {})
        table[leaf] = value
    return from_mapping(type(instance), mapping)


def as_mapping(instance: Any) -> dict[str, Any]:
    """The instance as nested plain tables: tuples become lists, paths strings; None stays None."""
    return {field.name: _plain(getattr(instance, field.name)) for field in fields(instance) if field.init}


def to_toml(instance: Any, comments: bool = True) -> str:
    """The resolved recipe as TOML that reads back equal, each key under its help if `comments`."""
    docs = field_docs(type(instance)) if comments else {}
    return "\n".join(table_lines(as_mapping(instance), (), (), docs)).strip("\n") + "\n"


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two tables (nested or already flat): `["steerlm.epochs 2 -> 3", "seed 1 is new"]`."""
    before, after = dict(leaves(old)), dict(leaves(new))
    said = []
    for key in dict.fromkeys([*before, *after]):
        if key not in before:
            said.append(f"{key} {literal(after[key])} is new")
        elif key not in after:
            said.append(f"{key} {literal(before[key])} is gone")
        elif literal(before[key]) != literal(after[key]):
            said.append(f"{key} {literal(before[key])} -> {literal(after[key])}")
    return said


def knobs(instance: Any, *names: str) -> dict[str, Any]:
    """The dotted leaf values a stage reads: `knobs(recipe, "sampling.n", "reward")`; a table gives all its leaves.

    Raises:
        ValueError: the recipe has no such key.
    """
    chosen: dict[str, Any] = {}
    for name in names:
        value: Any = as_mapping(instance)
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                here = tuple(value) if isinstance(value, dict) else ()
                raise _Place(type(instance).__name__, "", type(instance)).unknown(name, here)
            value = value[part]
        chosen.update(leaves(value, (name,)) if isinstance(value, dict) else {name: value})
    return chosen


def field_docs(cls: type) -> dict[str, str]:
    """The help of every key by its dotted name, "" where a field has none; `*` stands for any key of a dict.

    A field's help is the string literal below it in the class; `objectives: dict[str, Objective]` gives
    "objectives" and "objectives.*.heads".
    """
    own: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if "__dataclass_fields__" in vars(base):
            own |= _docstrings_below_fields(base)
    docs: dict[str, str] = {}
    for name, kind in _fields_of(cls).items():
        docs[name] = own.get(name, "")
        inner, prefix = _without_none(kind), name
        if get_origin(inner) is dict:
            inner, prefix = _without_none(get_args(inner)[1]), f"{name}.*"
        if is_dataclass(inner) and isinstance(inner, type):
            docs |= {f"{prefix}.{key}": doc for key, doc in field_docs(inner).items()}
    return docs


def _docstrings_below_fields(cls: type) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # a class made at run time has no source, hence no help
        return {}
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef), cls
    docs = {}
    for field, below in itertools.pairwise(body.body):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        match below:
            case ast.Expr(value=ast.Constant(value=str(text))):
                docs[field.target.id] = inspect.cleandoc(text)
    return docs


def _fields_of(cls: Any) -> dict[str, Any]:
    """The types of the fields a file may set, by name."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls) if field.init}


def _without_none(kind: Any) -> Any:
    """`X` of `X | None`; any other type as it is."""
    arms = _arms(kind)
    return arms[0] if len(arms) == 1 else kind


def _arms(kind: Any) -> list[Any]:
    """The alternatives of a union other than None; a plain type is its own only one."""
    if get_origin(kind) not in (Union, types.UnionType):
        return [kind]
    return [arm for arm in get_args(kind) if arm is not types.NoneType]


@dataclass(frozen=True)
class _Place:
    """Where in a recipe a value stands, so that an error can say so."""

    where: str
    key: str
    root: Any

    def child(self, name: str) -> "_Place":
        return replace(self, key=f"{self.key}.{name}" if self.key else name)

    def item(self, index: int) -> "_Place":
        return replace(self, key=f"{self.key}[{index}]")

    def wrong(self, value: Any, kind: Any) -> ValueError:
        return ValueError(f"{self.where}: {self.key} must be {_expected(kind)}, got {literal(_plain(value))}")

    def unknown(self, dotted: str, here: Sequence[str]) -> ValueError:
        """`here`: the known names of the table that was asked for `dotted`."""
        known = ", ".join(here) if here else f"none, {dotted.rpartition('.')[0]} is a value and no table"
        nearest = _nearest(dotted, here, tuple(field_docs(self.root)))
        return ValueError(f"{self.where}: unknown key {dotted}; the nearest is {nearest} (known here: {known})")


def _nearest(dotted: str, here: Sequence[str], everywhere: Sequence[str]) -> str:
    """The likeliest meaning: a similar name of that table, the same name in another, a similar name anywhere."""
    table, _, name = dotted.rpartition(".")
    similar_here = difflib.get_close_matches(name, here, n=1)
    if similar_here:
        return f"{table}.{similar_here[0]}" if table else similar_here[0]
    same_elsewhere = [known for known in everywhere if known.rpartition(".")[2] == name]
    return (same_elsewhere or difflib.get_close_matches(dotted, everywhere, n=1, cutoff=0.0))[0]


def _expected(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        optional = [f'"{NONE}"'] if types.NoneType in args else []
        return " or ".join([*(_expected(arm) for arm in _arms(kind)), *optional])
    if origin is Literal:
        return "one of " + ", ".join(literal(choice) for choice in args)
    if origin is tuple:
        return f"a list, each {_expected(args[0])}" if args[1:] == (...,) else f"a list of {len(args)} values"
    if origin is dict or is_dataclass(kind):
        return "a table"
    return {bool: "true or false", int: "an int", float: "a finite number", str: "a string", Path: "a path"}[kind]


def _build(cls: Any, mapping: Any, place: _Place) -> Any:
    """The dataclass `cls` from a table."""
    if not isinstance(mapping, Mapping):
        raise place.wrong(mapping, cls)
    kinds = _fields_of(cls)
    for name in mapping:
        if name not in kinds:
            raise place.unknown(place.child(str(name)).key, tuple(kinds))
    for field in fields(cls):
        if field.init and field.name not in mapping and field.default is MISSING and field.default_factory is MISSING:
            key = place.child(field.name).key
            raise ValueError(f"{place.where}: {key} is missing; give it {_expected(kinds[field.name])}")
    given = {name: _over_default(cls, name, value) for name, value in mapping.items()}
    values = {name: _convert(kinds[name], value, place.child(name)) for name, value in given.items()}
    try:
        return cls(**values)
    except ValueError as error:
        table = f" [{place.key}]" if place.key else ""
        raise ValueError(f"{place.where}:{table} {error}") from error


def _over_default(cls: Any, name: str, value: Any) -> Any:
    """A table laid over the field's own default, which may differ from the defaults of the table's class."""
    factory = cls.__dataclass_fields__[name].default_factory
    default = factory() if factory is not MISSING and isinstance(value, Mapping) else None
    if not is_dataclass(default):
        return value
    laid = {key: _over_default(default, key, inner) if hasattr(default, key) else inner for key, inner in value.items()}
    return as_mapping(default) | laid


def _convert(kind: Any, value: Any, place: _Place) -> Any:
    """`value`, as TOML or Python gave it, as the annotated type `kind`."""
    arms = _arms(kind)
    if arms != [kind]:
        return _convert_union(kind, arms, value, place)
    if is_dataclass(kind):
        return _build(kind, value, place)
    match get_origin(kind), value:
        case origin, _ if origin is Literal:
            accepted = [choice for choice in get_args(kind) if choice == value and type(choice) is type(value)]
            if accepted:
                return accepted[0]
        case origin, dict() if origin is dict:
            return {name: _convert(get_args(kind)[1], inner, place.child(name)) for name, inner in value.items()}
        case origin, list() | tuple() if origin is tuple:
            args = get_args(kind)
            each = args[:1] * len(value) if args[1:] == (...,) else args
            if len(each) == len(value):
                pairs = enumerate(zip(each, value, strict=True))
                return tuple(_convert(arm, inner, place.item(i)) for i, (arm, inner) in pairs)
        case None, bool():
            if kind is bool:
                return value
        case None, int() | float():
            if kind is int and isinstance(value, int):
                return value
            if kind is float and math.isfinite(value):
                return float(value)
        case None, str() | Path():
            if kind is Path:
                return Path(value)
            if kind is str and isinstance(value, str):
                return value
    raise place.wrong(value, kind)


def _convert_union(kind: Any, arms: list[Any], value: Any, place: _Place) -> Any:
    if types.NoneType in get_args(kind) and (value is None or value == NONE):
        return None
    if len(arms) == 1 and isinstance(value, dict | list | tuple):  # its own message names the key inside
        return _convert(arms[0], value, place)
    for arm in arms:
        try:
            return _convert(arm, value, place)
        except ValueError:
            continue
    raise place.wrong(value, kind)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such recipe file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error
    except tomllib.TOMLDecodeError as error:
        said = str(error).replace("at end of document", f"at line {len(text.splitlines())}, the end of the file")
        raise ValueError(f"{path}: not valid TOML: {said}") from error


def _override_pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """`--key value` and `--key=value` as (key, value)."""
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not re.fullmatch(r"--[^-=\s][^=]*(=.*)?", word, re.DOTALL):
            raise ValueError(f"command line: expected --key value, got {word!r} (say --sampling.n 8)")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                raise ValueError(f"command line: --{key} needs a value (say --{key} VALUE; true or false for a switch)")
            text = remaining.pop(0)
        yield key, text


def _override(cls: Any, mapping: dict[str, Any], key: str, text: str) -> None:
    """Put one override into the nested tables of `mapping`, checked against its field's type."""
    place = _Place("command line", key, cls)
    parts = key.split(".")
    kind = cls
    for depth, part in enumerate(parts):
        kind = _without_none(kind)
        if is_dataclass(kind) and part in _fields_of(kind):
            kind = _fields_of(kind)[part]
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            here = tuple(_fields_of(kind)) if is_dataclass(kind) else ()
            raise place.unknown(".".join(parts[: depth + 1]), here)
    value = _parse_override(kind, text, place)
    table = mapping
    for part in parts[:-1]:
        if table.get(part, NONE) == NONE:
            table[part] = {}
        table = table[part]
        if not isinstance(table, dict):  # the file itself is wrong here: from_mapping says how
            return
    table[parts[-1]] = value


def _parse_override(kind: Any, text: str, place: _Place) -> Any:
    """The raw value of an override: TOML if that fits the type, else the bare text."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    reading = parsed["value"] if set(parsed) == {"value"} else text
    try:
        _convert(kind, reading, place)
    except ValueError:
        with contextlib.suppress(ValueError):
            _convert(kind, text, place)
            return text
        raise
    return reading


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return as_mapping(value)
    match value:
        case Mapping():
            return {name: _plain(inner) for name, inner in value.items()}
        case tuple() | list():
            return [_plain(inner) for inner in value]
        case Path():
            return str(value)
    return value


def leaves(table: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """The values of nested tables by their dotted names."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*prefix, name))
        else:
            yield ".".join((*prefix, name)), value
