"""Nested plain tables as TOML text: what `config.py` reads back."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

NONE: Final = "none"
"""How a file or a command line says None, which TOML has not."""


def table_lines(
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
            yield from table_lines(value, (*path, name), documented, docs)
            if not of_fields:  # the entries of a dict share one help: said once
                docs = {}
        else:
            yield from (*comment, f"{_key(name)} = {literal(value)}")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else literal(name)


def literal(value: Any) -> str:
    """One value in TOML's syntax, on one line; None as "none"."""
    match value:
        case None:
            return f'"{NONE}"'
        case bool():
            return "true" if value else "false"
        case str() | Path():
            return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
        case list() | tuple():
            return f"[{', '.join(literal(inner) for inner in value)}]"
        case Mapping():
            return "{" + ", ".join(f"{_key(str(name))} = {literal(inner)}" for name, inner in value.items()) + "}"
    return str(value)
