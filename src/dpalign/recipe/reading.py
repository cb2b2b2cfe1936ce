"""Read a recipe: a TOML file laid over those that it extends, with words such as `--sampling.n 8` laid over both.

This module knows no knob. Every error is a ValueError that names the file, the dotted key, the value and what is
allowed. For an unknown key it names the nearest known one.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from datetime import date, time
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dpalign.runs.environment import RECIPES, shipped
from dpalign.runs.tables import Table, field_docs, leaves, literal, table_of, tables_of

T = TypeVar("T", bound=Table)

EXTENDS: Final = "extends"
"""The key of a recipe file that names its base; the recipe itself has no such knob."""
LONGEST: Final = 1 << 20
"""The most characters of a recipe file; the longest shipped one has 20,000."""
DEEPEST: Final = 16
"""The most levels of nested tables or lists in a recipe file."""


def load_table(cls: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """Read a recipe file, laid over the file that it extends, with overrides laid over both.

    `extends` names an installed recipe, or a file beside this one; that may extend another. Tables of knobs are laid
    over each other. A value, a list or a table of the user's own names replaces the base's. `name` is never inherited:
    two recipes would share a run folder.

    An override is read as its knob's type: TOML syntax (`[0, -45]`, `{n = 8}`, `true`), or a bare string. The later of
    two overrides of one key wins.

    Raises:
        ValueError: a file is missing or not TOML (with the line), files extend each other in a circle, or a key, value
            or override is refused; the message names the file that has the key.
    """
    files = _files(path)
    mapping: dict[str, Any] = {}
    for _, own in reversed(files):
        mapping = _over_base(cls, mapping, own)
    mapping = deepcopy(mapping)
    given = [(key, _override(cls, key, text)) for key, text in _override_pairs(overrides)]
    laid: dict[str, Any] = {}
    for key, value in given:
        _put(mapping, key, value)
        _put(laid, key, value)
    words = " with " + " ".join(" ".join(overrides).split()) if overrides else ""  # on one line, like the message

    def where(key: str) -> str:
        return f"{path if key in dict(given) else _origin(files, key)}{words}"

    return _build(cls, mapping, where, [*(own for _, own in reversed(files)), laid])


def from_mapping(cls: type[T], mapping: Mapping[str, Any]) -> T:
    """Build `cls` from nested plain tables.

    Raises:
        ValueError: an unknown or missing key, a wrong type, a number out of range, or a contradiction.
    """
    return _build(cls, mapping, lambda _: "recipe", [mapping])


def _build(
    cls: type[T], mapping: Mapping[str, Any], where: Callable[[str], str], layers: Sequence[Mapping[str, Any]]
) -> T:
    """Build `cls` from nested plain tables.

    Args:
        where: gives the file that a message names for a key.
        layers: the tables that `mapping` was merged from, for `Table.require_stated`.
    """
    for key, value in leaves(mapping):
        for moment in value if isinstance(value, list | tuple) else [value]:
            if isinstance(moment, date | time):  # TOML has dates and times, and no knob takes one
                raise ValueError(f"{where(key)}: {key} has the {type(moment).__name__} {moment}; write it in quotes")
    defaults = {
        name: field.get_default(call_default_factory=True, validated_data={})
        for name, field in cls.model_fields.items()
    }
    laid = _over_defaults(defaults, mapping)
    try:
        # JSON is the strict mode in which a TOML list may become a tuple, and a string a path.
        table = cls.model_validate_json(json.dumps(laid, default=str), strict=True)
    except ValidationError as error:
        raise ValueError(_message(cls, error, where)) from None
    try:
        table.require_stated(layers)
    except ValueError as error:
        raise ValueError(f"{where('')}: {error}") from None
    return table


def changed(instance: T, values: Mapping[str, Any]) -> T:
    """The instance with some leaves replaced: `changed(recipe, {"sampling.n": 8})`.

    Raises:
        ValueError: an unknown key, or a value that is refused.
    """
    mapping = instance.as_mapping()
    for key, value in values.items():
        *parents, leaf = key.split(".")
        table = mapping
        for parent in parents:
            table = table.setdefault(parent, {})
        table[leaf] = value
    return from_mapping(type(instance), mapping)


def dotted(cls: type[Table], values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Knobs by their dotted names: `{"sampling": {"n": 8}}` is `sampling.n`.

    Raises:
        ValueError: an unknown key; names the nearest.
    """
    for name, value in values.items():
        key = prefix + name
        if table_of(_kind(cls, key)) is not None and isinstance(value, Mapping):
            yield from dotted(cls, value, f"{key}.")
        else:
            yield key, value


def _files(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """A recipe file and those that it extends, itself first, with their content; a base's own name is left out."""
    files: list[tuple[Path, dict[str, Any]]] = []
    while True:
        own = _read_toml(path)
        base = own.pop(EXTENDS, None)
        if files:
            own.pop("name", None)
        files.append((path, own))
        if base is None:
            return files
        path = _base(path, base)
        if path.resolve() in {earlier.resolve() for earlier, _ in files}:
            circle = " extends ".join(str(one) for one in [*(earlier for earlier, _ in files), path])
            raise ValueError(f"{circle}: a circle; take one of these lines out")


def _base(path: Path, name: object) -> Path:
    """The file that `extends` names."""
    names = ", ".join(shipped())
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"{path}: {EXTENDS} must be the name of an installed recipe ({names}) or a path, got {literal(name)}"
        )
    beside, installed = path.parent / name, RECIPES / f"{name}.toml"
    if beside.is_file():
        return beside
    if "/" in name or not installed.is_file():
        raise ValueError(f"{path}: {EXTENDS} is {literal(name)}: no file {beside}, and no installed recipe ({names})")
    return installed


def _over_base(cls: type[Table], base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """One file's tables laid over its base's, knob by knob."""
    laid = dict(base) | dict(own)
    for name, value in own.items():
        table = table_of(cls.model_fields[name].annotation) if name in cls.model_fields else None
        if table is not None and isinstance(value, Mapping) and isinstance(base.get(name), Mapping):
            laid[name] = _over_base(table, base[name], value)
    return laid


def _origin(files: Sequence[tuple[Path, Mapping[str, Any]]], key: str) -> Path:
    """The first file that has a key; the recipe's own file if none has."""
    parts = re.sub(r"\[\d+\]", "", key).split(".")
    for path, own in files:
        here: Any = own
        for part in parts:
            here = here.get(part) if isinstance(here, Mapping) else None
        if here is not None:
            return path
    return files[0][0]


def _over_defaults(defaults: Mapping[str, Any], mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Tables laid over their fields' own defaults, which may differ from the defaults of the tables' classes."""
    laid = dict(mapping)
    for name, value in mapping.items():
        default = defaults.get(name)
        if isinstance(default, Table) and isinstance(value, Mapping):
            own = {key: of for key, of in default.as_mapping().items() if key in default.model_fields_set}
            laid[name] = own | _over_defaults(dict(default), value)
    return laid


def _message(cls: type[Table], error: ValidationError, where_of: Callable[[str], str]) -> str:
    """The first thing that is wrong, as one line. Unknown keys come first: they explain what is missing."""
    details = sorted(error.errors(include_url=False), key=lambda detail: detail["type"] != "extra_forbidden")
    detail = details[0]
    key, field = _place(cls, detail["loc"])
    where = where_of(key)
    arms = [other for other in details if _place(cls, other["loc"])[0] == key]
    match detail["type"]:
        case "extra_forbidden":
            return f"{where}: {unknown(cls, key)}"
        case "missing":
            return f"{where}: {key} is missing; give it {_expected(detail, field)}"
        case "value_error":
            context = detail.get("ctx") or {}
            return f"{where}:{f' [{key}]' if key else ''} {context['error']}"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            bounds = " and ".join(_bounds(field))
            return (
                f"{where}: {key} is {literal(detail['input'])}; give a number {'of ' * bounds.startswith('at')}{bounds}"
            )
        case _:
            expected = dict.fromkeys(_expected(arm, field) for arm in arms)
            return f"{where}: {key} must be {' or '.join(expected)}, got {literal(detail['input'])}"


def _place(cls: type[Table], loc: Sequence[str | int]) -> tuple[str, FieldInfo | None]:
    """The dotted key of an error, and its field: the arms of a union are left out."""
    key, field = "", None
    table: type[Table] | None = cls
    of_dict = False
    for part in loc:
        if isinstance(part, int):
            key += f"[{part}]"
        elif of_dict and field is not None:
            key, of_dict, table = f"{key}.{part}", False, tables_of(field.annotation)
        elif table is not None and part in table.model_fields:
            field = table.model_fields[part]
            key = f"{key}.{part}" if key else part
            of_dict = get_origin(field.annotation) is dict
            table = table_of(field.annotation)
        elif table is not None:
            return (f"{key}.{part}" if key else part), None
    return key, field


_EXPECTED: Final = {
    "an int": ("int_type", "int_from_float", "int_parsing"),
    "a finite number": ("float_type", "finite_number", "float_parsing"),
    "true or false": ("bool_type", "bool_parsing"),
    "a string": ("string_type",),
    "a path": ("path_type",),
    "a list": ("tuple_type", "list_type", "too_long", "too_short"),
    "a table": ("dict_type", "model_type", "model_attributes_type"),
}
"""What a value must be, with pydantic's types of the errors that say so."""


def _expected(detail: ErrorDetails, field: FieldInfo | None) -> str:
    """What a value must be."""
    if detail["type"] == "literal_error":
        return "one of " + ", ".join(_choices(field.annotation if field else None))
    for words, kinds in _EXPECTED.items():
        if detail["type"] in kinds:
            return words
    annotation = field.annotation if field else None
    simple = {str: "a string", int: "an int", float: "a finite number", bool: "true or false"}
    return simple.get(annotation, "a value") if isinstance(annotation, type) else detail["msg"]


def ranges(cls: type[Table], prefix: str = "") -> dict[str, str]:
    """The range or the allowed values of each knob that has any, by its dotted name."""
    allowed: dict[str, str] = {}
    for name, field in cls.model_fields.items():
        if (table := table_of(field.annotation)) is not None:
            allowed |= ranges(table, f"{prefix}{name}.")
        elif words := " and ".join(_bounds(field)) or ", ".join(_choices(field.annotation)):
            allowed[prefix + name] = words
    return allowed


def _bounds(field: FieldInfo | None) -> Iterator[str]:
    """The range of a number, or of each number in a list: "at least 0", "below 1"."""
    for constraint in (*field.metadata, *_constraints(field.annotation)) if field else ():
        for name, words in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
            if (bound := getattr(constraint, name, None)) is not None:
                yield f"{words} {bound:,}" if isinstance(bound, int) else f"{words} {bound:g}"


def _constraints(annotation: Any) -> Iterator[Any]:
    for inner in get_args(annotation):
        if isinstance(inner, FieldInfo):
            yield from inner.metadata
        else:
            yield from _constraints(inner)


def _choices(annotation: Any) -> Iterator[str]:
    """The values of an annotation that is a Literal, or of the Literals inside a tuple or a union."""
    if get_origin(annotation) is Literal:
        yield from map(literal, get_args(annotation))
    else:
        for inner in get_args(annotation):
            yield from _choices(inner)


def unknown(cls: type[Table], dotted: str) -> str:
    """The message for an unknown key: the nearest name, and the names known in its table."""
    everywhere = (*field_docs(cls), EXTENDS)
    table, _, name = dotted.rpartition(".")
    if why := _table_at(cls, table).gone.get(name):
        return f"{dotted} {why}"
    inside = _starred(cls, table)
    here = [known.rpartition(".")[2] for known in everywhere if known.rpartition(".")[0] == inside]
    if not here:
        return f"unknown key {dotted}; {table} is a value and no table"
    similar_here = difflib.get_close_matches(name, here, n=1)
    if similar_here:
        nearest = f"{table}.{similar_here[0]}" if table else similar_here[0]
    else:
        same_elsewhere = [known for known in everywhere if known.rpartition(".")[2] == name]
        nearest = (same_elsewhere or difflib.get_close_matches(dotted, everywhere, n=1, cutoff=0.0))[0]
    return f"unknown key {dotted or literal(dotted)}; the nearest is {nearest} (known here: {', '.join(here)})"


def _table_at(cls: type[Table], dotted: str) -> type[Table]:
    """The table of a dotted name; `cls` if there is none."""
    table: type[Table] | None = cls
    of_dict: type[Table] | None = None
    for part in filter(None, dotted.split(".")):
        if of_dict is not None:
            table, of_dict = of_dict, None
        elif table is not None and part in table.model_fields:
            annotation = table.model_fields[part].annotation
            table, of_dict = table_of(annotation), tables_of(annotation)
        else:
            return cls
    return table or cls


def _starred(cls: type[Table], dotted: str) -> str:
    """A dotted name as `field_docs` has it: `rewards.mine` is `rewards.*`."""
    first, _, rest = dotted.partition(".")
    field = cls.model_fields.get(first)
    if not rest or field is None:
        return dotted
    if (table := table_of(field.annotation)) is not None:
        return f"{first}.{_starred(table, rest)}"
    return f"{first}.*" if tables_of(field.annotation) is not None else dotted


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such recipe file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: a folder, where a recipe file was asked for") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error
    if len(text) > LONGEST:
        raise ValueError(f"{path}: more than {LONGEST:,} characters; is it a recipe?")
    try:
        read = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        why = str(error).replace("at end of document", f"at line {len(text.splitlines())}, the end of the file")
        raise ValueError(f"{path}: not valid TOML: {why}") from error
    if _is_deep(read, DEEPEST):
        raise ValueError(f"{path}: tables or lists more than {DEEPEST} deep; no knob has so many")
    return read


def _is_deep(value: Any, levels: int) -> bool:
    """Whether tables or lists are nested deeper than so many levels."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return levels < 0 or any(_is_deep(one, levels - 1) for one in inner)


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


def _override(cls: type[Table], key: str, text: str) -> Any:
    """The plain value of an override: TOML if that fits the knob's type, else the bare text."""
    try:
        kind = _kind(cls, key)
    except ValueError as error:
        raise ValueError(f"command line: {error}") from None
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    if set(parsed) != {"value"}:
        return text
    return parsed["value"] if _fits(kind, parsed["value"]) or not _fits(kind, text) else text


def _put(mapping: dict[str, Any], key: str, value: Any) -> None:
    """Put the value of a dotted key into nested tables."""
    *parents, leaf = key.split(".")
    for part in parents:
        mapping = mapping.setdefault(part, {})
        if not isinstance(mapping, dict):  # the file itself is wrong here: `_build` reports it
            return
    mapping[leaf] = value


def _kind(cls: type[Table], key: str) -> Any:
    """The type of a knob, by its dotted name."""
    parts = key.split(".")
    kind: Any = cls
    for depth, part in enumerate(parts):
        if (table := table_of(kind)) is not None and part in table.model_fields:
            kind = table.model_fields[part].annotation
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            raise ValueError(unknown(cls, ".".join(parts[: depth + 1])))
    return kind


def _fits(kind: Any, value: Any) -> bool:
    try:
        if table_of(kind) is not None:
            return isinstance(value, Mapping)
        TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError):
        return False
    return True
