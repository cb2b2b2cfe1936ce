"""Rows of a data set, from a local file or from the hub, each with its place for error messages.

A reader filters and counts the known gaps of its data set (an empty answer, a rating "N/A"). A broken row (a line cut
in half, a missing column, a wrong type) is an error that names the file, the line and the value.
"""

import csv
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import pyarrow as pa
import pyarrow.parquet as pq

from dpalign.rows import Message
from dpalign.runs.hub import revised

SUFFIXES: Final = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
FILES: Final = f"file ends in {', '.join(SUFFIXES)}"
SAVED: Final = "state.json"
"""The file that `datasets` writes into a data set saved to disk; for several splits it writes `SAVED_SPLITS`."""
SAVED_SPLITS: Final = "dataset_dict.json"
_ROLES = ("system", "user", "assistant")
_PARQUET_BATCH = 1024
LONGEST: Final = 1 << 24
"""The most bytes of a line, or characters of a cell: far above any chat, too few to fill the memory."""


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
        """A column of text; "" if it is null, NaN, or only white space."""
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
        """A column that must hold the turns of a chat; content in parts of text is joined."""
        messages = []
        for turn in self.parts(key):
            role = turn.text("role")
            if role not in _ROLES:
                raise turn.wrong("role", role, f"one of {', '.join(_ROLES)}")
            content = turn._joined("content") if isinstance(turn.get("content"), list) else turn.text("content")
            messages.append(cast(Message, {"role": role, "content": content}))
        return messages

    def _joined(self, key: str) -> str:
        """A list of parts that must all be text, as one text."""
        parts = self.parts(key)
        for part in parts:
            if part.values.get("type", "text") != "text":
                raise part.wrong("type", part.values["type"], "text: nothing else is read")
        return "".join(part.text("text") for part in parts)

    def _checked(self, key: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.wrong(key, value, "text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.wrong(key, value, "valid Unicode (half a surrogate pair cannot be stored)") from error
        if "\0" in value:
            raise self.wrong(key, value, "text without the character NUL")
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
    """The name of a source in tables and errors: the file, or the data set's name with the split."""
    return source if split is None or _of_one_file(source) else f"{source}[{split}]"


def _of_one_file(source: str) -> bool:
    return source.endswith(SUFFIXES) and not Path(source).is_dir()


def parted(source: str) -> tuple[str, str | None]:
    """The name and the split of `name:split`; a name alone has no split."""
    name, colon, split = source.rpartition(":")
    if not colon or _of_one_file(source) or not re.fullmatch(r"\w+", split) or Path(source).exists():
        return source, None
    return name, split


def require_there(source: str) -> None:
    """Check that a source is a file of a known kind, a folder, or a possible name on the hub.

    Raises:
        ValueError: a file or a folder that is not there; a file of another kind.
    """
    name, _ = parted(source)
    path = Path(name)
    if _of_one_file(name):
        if not path.is_file():
            raise ValueError(f"{name}: no such file")
    elif path.is_file():
        raise ValueError(f"{name}: a file of a kind that is not read; a {FILES}")
    elif name.startswith((".", "/", "~")) and not path.exists():
        raise ValueError(f"{name}: no such file or folder")


def located(source: str, wanted: Sequence[str]) -> tuple[str, str | None]:
    """A source's name and the split to read: the one in `name:split`, else the only one, else the first wanted one.

    A file, or a folder saved without splits, has none. If the hub cannot be reached, the split is the last wanted one:
    reading it then gives the error.

    Raises:
        ValueError: several splits, and none of them is wanted.
    """
    name, split = parted(source)
    if split is not None or _of_one_file(name):
        return name, split
    known = _splits_of(name)
    if known == []:
        return name, None
    if known is None or len(known) == 1:
        return name, known[0] if known else wanted[-1]
    for split in wanted:
        if split in known:
            return name, split
    raise ValueError(f"{name}: has the splits {', '.join(known)}; name one of them: {name}:{known[0]}")


def _splits_of(name: str) -> list[str] | None:
    """The splits of a data set that is not one file: [] if it was saved without splits, None if they are unknown."""
    folder = Path(name)
    if (folder / SAVED).is_file():
        return []
    if (folder / SAVED_SPLITS).is_file():
        try:
            return list(json.loads((folder / SAVED_SPLITS).read_bytes())["splits"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{folder / SAVED_SPLITS}: names no splits ({error}); save the data set again") from error
    try:
        import datasets

        plain, revision = revised(name)
        return list(datasets.get_dataset_split_names(plain, revision=revision))
    except (ImportError, ValueError, OSError):
        return None


def read_source(source: str, split: str | None = None) -> Iterator[Row]:
    """All rows of a local file, or of one named split of a data set.

    Args:
        source: a path ending in .jsonl, .jsonl.gz, .json (a list), .csv or .parquet; a folder that `datasets` saved to
            disk; otherwise a name on the hub, or a folder of such files or with a copy of a hub data set.
        split: the split's own name, such as "train_prefs"; a file is one split already. Splits are never added up:
            recipes that pool train and test leak validation prompts.

    Raises:
        ValueError: no such file; an unreadable line; a split that is missing or unknown.
    """
    require_there(source)
    if not _of_one_file(source):
        yield from _dataset_rows(source, split)
        return
    path = Path(source)
    match path.suffix:
        case ".parquet":
            yield from _parquet_rows(path)
        case ".json":
            yield from _json_rows(path)
        case ".csv":
            yield from _csv_rows(path)
        case _:
            yield from _jsonl_rows(path)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:  # bad JSON, or bad UTF-8
            start = shorten(repr(line[:400].decode(errors="replace").rstrip("\n")))
            raise ValueError(
                f"{where}: not a whole JSON row ({error}): {start}; the file may be cut short: "
                "fetch it again, or remove the line"
            ) from error
        yield _row(where, values)


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, compressed or not."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            while line := file.readline(LONGEST + 1):
                number += 1
                if len(line) > LONGEST:
                    raise ValueError(
                        f"{path}, line {number}: longer than {LONGEST:,} bytes; write each row on a line of its own"
                    )
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}, after line {number}); fetch it again") from error


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not whole JSON ({error}); the file may be cut short: fetch it again") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: holds {shorten(repr(rows))}, expected a list of rows")
    for number, values in enumerate(rows, start=1):
        yield _row(f"{path}, row {number}", values)


def _csv_rows(path: Path) -> Iterator[Row]:
    """Every cell is text; an empty one is null."""
    csv.field_size_limit(LONGEST)
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            cells = csv.DictReader(lines, strict=True)
            names = cells.fieldnames or ()
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{path}: has the column {twice[0]!r} twice; rename one")
            for number, values in enumerate(cells, start=1):
                where = f"{path}, row {number}"
                if None in values or None in values.values():
                    raise ValueError(
                        f"{where}: not a cell for each of {', '.join(names)}; put quotes around "
                        "texts with commas or line breaks"
                    )
                yield Row(where, {name: cell or None for name, cell in values.items()})
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable CSV file ({error}); write it as UTF-8, or as .jsonl") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        number = 0
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{path}, row {number}", values)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error}); fetch it again") from error


def _row(where: str, values: Any) -> Row:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {shorten(repr(values))} is not an object with named columns")
    return Row(where, values)


def _dataset_rows(name: str, split: str | None) -> Iterator[Row]:
    """The rows of a data set on the hub or in a folder, through `datasets`."""
    saved = (Path(name) / SAVED).is_file()
    if not saved and (split is None or not re.fullmatch(r"\w+", split)):
        raise ValueError(
            f"{name}: split is {split!r}, expected the name of one split, such as {name}:train (a local {FILES})"
        )
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{name}: reading it needs `pip install datasets`, or name local files") from error
    try:
        if saved or (Path(name) / SAVED_SPLITS).is_file():
            table = datasets.load_from_disk(name)
            table = table if saved else table[split]
        else:
            plain, revision = revised(name)
            table = datasets.load_dataset(plain, split=split, revision=revision)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"{name}: split {split!r} could not be read ({error}); check the name, or name local files"
        ) from error
    for number, values in enumerate(table, start=1):
        yield Row(f"{describe(name, split)}, row {number}", values)
