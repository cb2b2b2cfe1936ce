"""A table of a recipe: typed knobs with ranges, whose docstrings are their help.

A stage declares its knobs as a `Table` beside the function that reads them; `recipe/` composes them all. Every
table can become plain values, become TOML, and be compared with another.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator

MOST: Final = 2**32 - 1
"""The largest number that a knob may have, and the largest seed that numpy takes."""


class Table(BaseModel):
    """Frozen and strict: an unknown key, another type, or a number out of range is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    gone: ClassVar[Mapping[str, str]] = {}
    """Knobs of earlier versions, and what to write instead."""

    @model_validator(mode="after")
    def _numbers_can_be_meant(self) -> Self:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, int | float) and abs(value) > MOST:
                raise ValueError(f"{name} is {value}; give a number of at most {MOST:,}")
        return self

    def require_stated(self, layers: Sequence[Mapping[str, Any]]) -> None:
        """Refuse a table without a knob that the user must state; a table may override it.

        Args:
            layers: the plain tables that this one was read from; later ones override earlier ones.

        Raises:
            ValueError: a knob is left to a default that means nothing.
        """

    def as_mapping(self) -> dict[str, Any]:
        """Nested plain values: tuples become lists, paths become strings."""
        return self.model_dump(mode="json")

    def to_toml(self, comments: bool = True) -> str:
        """TOML that reads back equal, each key under its help if `comments`."""
        docs = field_docs(type(self)) if comments else {}
        return "\n".join(_table_lines(self.as_mapping(), (), (), docs)).strip("\n") + "\n"


@dataclass(frozen=True)
class Names:
    """Marks a knob that names something on this machine: it is hashed with the stage's inputs."""

    what: Literal["data", "model", "function"]


DataName = Annotated[str, Names("data")]
"""A data file, or a name on the hub."""
ModelName = Annotated[str, Names("model")]
"""A model folder, or a name on the hub."""
FunctionName = Annotated[str, Names("function")]
"""A Python function, as module:function."""


def knobs_naming(cls: type[Table], what: Literal["data", "model", "function"], prefix: str = "") -> Iterator[str]:
    """The dotted names of the knobs that name files of this kind, one each or a list; `*` is any key of a dict."""
    for name, field in cls.model_fields.items():
        inside = [mark for item in get_args(field.annotation) for mark in get_args(item)]
        if Names(what) in (*field.metadata, *inside):
            yield prefix + name
        if (inner := table_of(field.annotation)) is not None:
            yield from knobs_naming(inner, what, f"{prefix}{name}.")
        if (inner := tables_of(field.annotation)) is not None:
            yield from knobs_naming(inner, what, f"{prefix}{name}.*.")


def table_of(annotation: Any) -> type[Table] | None:
    """The table that a field's annotation means; None for a plain value."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, Table) else None


def tables_of(annotation: Any) -> type[Table] | None:
    """The table that a dict of tables holds; None for anything else."""
    return table_of(get_args(annotation)[1]) if get_origin(annotation) is dict else None


def field_docs(cls: type[Table], prefix: str = "") -> dict[str, str]:
    """The help of every knob by its dotted name; `*` stands for any key of a dict."""
    docs: dict[str, str] = {}
    for name, field in cls.model_fields.items():
        docs[prefix + name] = field.description or ""
        if (inner := table_of(field.annotation)) is not None:
            docs |= field_docs(inner, f"{prefix}{name}.")
        if (inner := tables_of(field.annotation)) is not None:
            docs |= field_docs(inner, f"{prefix}{name}.*.")
    return docs


def leaves(table: Mapping[str, Any], prefix: str = "", empty: bool = False) -> Iterator[tuple[str, Any]]:
    """The values of nested plain tables by their dotted names; also the empty tables if `empty`."""
    for name, value in table.items():
        if isinstance(value, Mapping) and (value or not empty):
            yield from leaves(value, f"{prefix}{name}.", empty)
        else:
            yield prefix + name, value


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two plain tables: `["steerlm.epochs 2 -> 3", "seed 1 is new"]`."""
    before, after = dict(leaves(old, empty=True)), dict(leaves(new, empty=True))
    differences = []
    for key in dict.fromkeys([*before, *after]):
        if any(other.startswith(f"{key}.") for other in (*before, *after)):
            continue  # a table that is empty on one side: its knobs on the other say so
        if key not in before:
            differences.append(f"{key} {literal(after[key])} is new")
        elif key not in after:
            differences.append(f"{key} {literal(before[key])} is gone")
        elif literal(before[key]) != literal(after[key]):
            differences.append(f"{key} {literal(before[key])} -> {literal(after[key])}")
    return differences


_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")


def literal(value: Any) -> str:
    """One value in TOML's syntax, on one line."""
    match value:
        case bool():
            return "true" if value else "false"
        case str() | Path():
            return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
        case list() | tuple():
            return f"[{', '.join(literal(inner) for inner in value)}]"
        case Mapping():
            return "{" + ", ".join(f"{_key(str(name))} = {literal(inner)}" for name, inner in value.items()) + "}"
    return str(value)


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else literal(name)


def _table_lines(
    table: Mapping[str, Any], path: tuple[str, ...], doc_path: tuple[str, ...], docs: Mapping[str, str]
) -> Iterator[str]:
    """The lines of one table: its values first, as TOML demands, then its tables; `docs` by dotted `doc_path`."""
    of_fields = any(".".join((*doc_path, name)) in docs for name in table)
    for name, value in sorted(table.items(), key=lambda item: isinstance(item[1], dict)):
        documented = (*doc_path, name if of_fields else "*")
        comment = [f"# {line}".rstrip() for line in docs.get(".".join(documented), "").splitlines()]
        if isinstance(value, dict):
            header = ".".join(_key(part) for part in (*path, name))
            yield from ("", *comment, f"[{header}]")
            inside = {knob.rpartition(".")[2]: text for knob, text in docs.items() if knob.startswith(f"{name}.*.")}
            if inside and not value:  # an empty dict of tables: the knobs that each may have
                yield f"# [{header}.NAME]"
                yield from (f"# {knob}: {' '.join(text.split())}" for knob, text in inside.items())
            yield from _table_lines(value, (*path, name), documented, docs)
            if not of_fields:  # the entries of a dict share one help: written once
                docs = {}
        else:
            yield from (*comment, f"{_key(name)} = {literal(value)}")
