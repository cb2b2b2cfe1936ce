"""Rows of a data set, from a local file or from the hub, each with its place for error messages.

A reader filters and counts the known gaps of its data set (an empty answer, a rating "N/A"). A broken row (a line cut
in half, a missing column, a wrong type) is an error that names the file, the line and the value.
"""

import gzip
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from dpalign.rows import Message

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
_ROLES = ("system", "user", "assistant")
_PARQUET_BATCH = 1024


@dataclass(frozen=True)
class Row:
    """One row of a file, or a part of one, with its place (`where`)."""

    where: str
    values: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """The value of a column that must be there; it may be null."""
        if key not in self.values:
            raise ValueError(
                f"{self.where}: no column {key!r} (it has {', '.join(self.values)}); is it the right file?"
            )
        return self.values[key]

    def text(self, key: str) -> str:
        """A column that must hold text."""
        return self._checked(key, self.get(key))

    def text_or_empty(self, key: str) -> str:
        """A column of text; "" where it is null, NaN, or holds nothing but spaces."""
        value = self.get(key)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        return value if self._checked(key, value).strip() else ""

    def part(self, key: str) -> "Row":
        """A column that must hold an object."""
        value = self.get(key)
        if not isinstance(value, Mapping):
            raise self.wrong(key, value, "an object")
        return Row(f"{self.where}, {key}", value)

    def parts(self, key: str) -> list["Row"]:
        """A column that must hold a list of objects."""
        value = self.get(key)
        if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            raise self.wrong(key, value, "a list of objects")
        return [Row(f"{self.where}, {key}[{i}]", item) for i, item in enumerate(value)]

    def chat(self, key: str) -> list[Message]:
        """A column that must hold the turns of a chat."""
        messages = []
        for turn in self.parts(key):
            role = turn.text("role")
            if role not in _ROLES:
                raise turn.wrong("role", role, f"one of {', '.join(_ROLES)}")
            messages.append(cast(Message, {"role": role, "content": turn.text("content")}))
        return messages

    def _checked(self, key: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.wrong(key, value, "text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.wrong(key, value, "valid Unicode (half a surrogate pair cannot be stored)") from error
        return value

    def wrong(self, key: str, value: Any, expected: str) -> ValueError:
        """The error for a value that this column must not hold."""
        return ValueError(
            f"{self.where}: {key} is {shorten(repr(value))}, expected {expected}; correct or remove the row"
        )


def shorten(text: str, limit: int = 80) -> str:
    """The start of a text, for an error message."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def describe(source: str, split: str | None) -> str:
    """The name of a source in tables and errors: the file, or the hub's name with the split."""
    return source if split is None or source.endswith(SUFFIXES) else f"{source}[{split}]"


def read_source(source: str, split: str | None = None) -> Iterator[Row]:
    """All rows of a local file, or of one named split of a data set.

    Args:
        source: a path ending in .jsonl, .jsonl.gz, .json (a list) or .parquet; otherwise a name on
            the hub, or a folder that holds a copy of one, read through `datasets`.
        split: the split's own name on the hub, such as "train_prefs"; a file is one split already.
            Splits are never added up: recipes that pool train and test leak validation prompts.

    Raises:
        ValueError: no such file; an unreadable line; a split that is missing or unknown.
    """
    suffix = next((s for s in SUFFIXES if source.endswith(s)), None)
    if suffix is None:
        yield from _hub_rows(source, split)
        return
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"{source}: no such file")
    match suffix:
        case ".parquet":
            yield from _parquet_rows(path)
        case ".json":
            yield from _json_rows(path)
        case _:
            yield from _jsonl_rows(path)


def split_named(source: str, wanted: Sequence[str]) -> str | None:
    """The first of the wanted splits that a hub data set has; None for a file, which is one split already.

    If the hub cannot be asked, the last one: reading it then gives the error.
    """
    if source.endswith(SUFFIXES):
        return None
    if len(wanted) == 1:
        return wanted[0]
    try:
        import datasets

        names = datasets.get_dataset_split_names(source)
    except (ImportError, ValueError, OSError):
        names = []
    return next((split for split in wanted if split in names), wanted[-1])


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                values = json.loads(line)
            except ValueError as error:  # of JSON, or of UTF-8
                start = shorten(repr(line.decode(errors="replace").rstrip("\n")))
                raise ValueError(
                    f"{where}: not a whole JSON row ({error}): {start}; the file may be cut short: "
                    "fetch it again, or remove the line"
                ) from error
            yield _row(where, values)


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not whole JSON ({error}); the file may be cut short: fetch it again") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: holds {shorten(repr(rows))}, expected a list of rows")
    for number, values in enumerate(rows, start=1):
        yield _row(f"{path}, row {number}", values)


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        file = pq.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{path}, row {number}", values)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error}); fetch it again") from error


def _row(where: str, values: Any) -> Row:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {shorten(repr(values))} is not an object with named columns")
    return Row(where, values)


def _hub_rows(name: str, split: str | None) -> Iterator[Row]:
    if split is None or not re.fullmatch(r"\w+", split):
        raise ValueError(
            f"{name}: split is {split!r}, expected the name of one split, such as 'train'"
            f" (a local file would end in {', '.join(SUFFIXES)})"
        )
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{name}: reading from the hub needs `pip install datasets`, or name local files") from error
    try:
        table = datasets.load_dataset(name, split=split)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{name}: split {split!r} could not be read ({error}); check the name, or name local files"
        ) from error
    for number, values in enumerate(table, start=1):
        yield Row(f"{describe(name, split)}, row {number}", values)
