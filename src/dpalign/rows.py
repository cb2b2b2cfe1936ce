"""The rows that pass between stages, and their Parquet schemas.

Every stage reads finished Parquet files and writes finished Parquet files: zstd, one row group a shard, stable ids. A
prompt is a chat (`messages`, ending with the user's turn); its id is a hash of its text, the same in every data set. A
candidate is identified by (prompt_id, t, condition_index, sample). Rewards are stored for all heads: a new direction or
objective ranks old candidates without a new score.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dpalign.paper.prompts import Message as Message

HEADS: Final = (
    "helpsteer-helpfulness",
    "helpsteer-correctness",
    "helpsteer-coherence",
    "helpsteer-complexity",
    "helpsteer-verbosity",
    "ultrafeedback-overall_score",
    "ultrafeedback-instruction_following",
    "ultrafeedback-truthfulness",
    "ultrafeedback-honesty",
    "ultrafeedback-helpfulness",
)
"""The ten reward heads of section 3.1, in the order of the released reward model."""


HALVES: Final = ("D1", "D2")
"""The splits that take turns in the iterations (section 3.1)."""

PART: Final = 65_536
"""Rows of a shard in `write_parts`."""
BATCH: Final = 4096
"""Rows in memory at once in `take_rows`."""
LEDGER: Final = "ledger.json"
"""The file beside a finished stage's outputs that names them all (`runs/ledger.py`)."""


_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_REWARDS = pa.list_(pa.float32())


class Prompt(TypedDict):
    """A row of PROMPTS."""

    prompt_id: str
    messages: list[Message]
    split: str


class Rated(TypedDict):
    """A row of RATED: an answer and its labels of 0-100 by head; a head without a label is left out."""

    prompt_id: str
    messages: list[Message]
    response: str
    source: str
    labels: dict[str, float]


class Conversation(TypedDict):
    """A row of CONVERSATIONS: a chat up to the user's last turn, and the answer to learn."""

    prompt_id: str
    messages: list[Message]
    response: str
    origin: str


class Pair(TypedDict):
    """A row of PAIRS: two answers, the preferred one first."""

    prompt_id: str
    messages: list[Message]
    chosen: str
    rejected: str
    chosen_score: float | None
    rejected_score: float | None
    origin: str


PROMPTS: Final = pa.schema([("prompt_id", pa.string()), ("messages", _MESSAGES), ("split", pa.string())])

RATED: Final = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("messages", _MESSAGES),
        ("response", pa.string()),
        ("source", pa.string()),  # helpsteer (trains only the reward model), or rows
        ("labels", pa.map_(pa.string(), pa.float32())),  # head -> 0-100; no entry without a label
    ]
)

CANDIDATES: Final = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("t", pa.int32()),
        ("condition_index", pa.int32()),
        ("sample", pa.int32()),
        ("condition_kind", pa.string()),  # direction | target | plain
        ("condition", _REWARDS),  # the direction v, or at t=1 the reward target, by objective
        ("messages", _MESSAGES),  # as sampled, with the system line of the condition
        ("response", pa.string()),
        ("tokens", pa.int32()),
        ("finished", pa.bool_()),  # False: cut at max_new_tokens, or empty; never chosen
    ]
)

UNFINISHED: Final = "cut at max_new_tokens, or empty"
"""The reason in the counts for candidates that are not finished."""

SCORES: Final = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("t", pa.int32()),
        ("condition_index", pa.int32()),
        ("sample", pa.int32()),
        ("rewards", _REWARDS),  # one a head, 0-100
    ]
)

DIVERGENCES: Final = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("t", pa.int32()),
        ("condition_index", pa.int32()),
        ("sample", pa.int32()),
        ("log_policy", pa.float64()),  # log pi(y | x, v) in nats, summed over the answer's tokens
        ("log_sft", pa.float64()),  # log pi_sft(y | x); SFT reads the prompt without the condition's line
        ("tokens", pa.int32()),  # of the answer as the policy reads it, with its end
    ]
)

CONVERSATIONS: Final = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("messages", _MESSAGES),  # the model's prompt, with its system line
        ("response", pa.string()),  # the answer to learn
        ("origin", pa.string()),  # selected | replay | sft | steerlm
    ]
)

PAIRS: Final = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("messages", _MESSAGES),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("chosen_score", pa.float32()),  # 0-100: a rating, or the reward model's; null in the data's own pairs
        ("rejected_score", pa.float32()),
        ("origin", pa.string()),  # ratings | candidates | pairs
    ]
)


def user_prompt(text: str) -> list[Message]:
    """A single-turn prompt as a chat."""
    return [{"role": "user", "content": text}]


def prompt_id(messages: Sequence[Message]) -> str:
    """16 hex digits: the hash of a single user turn's text, or of the chat's canonical JSON."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        text = messages[0]["content"]
    else:
        text = json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> int:
    """Write one finished shard (atomically) and return its number of rows."""
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    write_table(path, table)
    return int(table.num_rows)


def write_table(path: Path, table: pa.Table) -> None:
    """Write beside, then rename: a file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    row_group = max(1, table.num_rows)
    try:
        pq.write_table(table, beside, compression="zstd", row_group_size=row_group, write_page_checksum=True)
    except OSError as error:  # such as a full disk: pyarrow names no file
        error.filename = error.filename or str(path)
        raise
    os.replace(beside, path)


def write_parts(folder: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> int:
    """Write tables in order into finished shards of `PART` rows; return the number of all rows."""
    waiting = schema.empty_table()
    part = total = 0
    for table in tables:
        waiting = pa.concat_tables([waiting, table])
        while waiting.num_rows > PART:
            write_table(folder / f"part-{part:05d}.parquet", waiting.slice(0, PART).combine_chunks())
            waiting, part, total = waiting.slice(PART), part + 1, total + PART
    write_table(folder / f"part-{part:05d}.parquet", waiting.combine_chunks())
    return total + int(waiting.num_rows)


def shards(path: Path) -> list[Path]:
    """The Parquet files of a stage's folder in order, checked against its ledger; or `path` itself if it is a file.

    Raises:
        ValueError: there are none; the ledger does not name a file; or a file that it names is missing.
    """
    if path.is_file():
        return [path]
    files = sorted(path.glob("*.parquet"))
    for ledger in (path / LEDGER, path.parent / LEDGER):
        if (named := _named(ledger, path)) is None:
            continue
        for file in sorted({*files} ^ named):
            if file in named:
                raise ValueError(f"{file}: missing, and {ledger} names it; run again to make it again")
            raise ValueError(f"{file}: {ledger} does not name it, so its stage did not write it; move it away")
        break
    if not files:
        raise ValueError(f"{path}: no Parquet files here; has the stage that writes them finished?")
    return files


def _named(ledger: Path, folder: Path) -> set[Path] | None:
    """The Parquet files of a folder that a stage's ledger names; None if `ledger` is not a stage's ledger."""
    try:
        outputs = json.loads(ledger.read_text(encoding="utf-8"))["outputs"]
        paths = [ledger.parent / str(name) for name in dict(outputs)]
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{ledger}: damaged ledger ({error}); delete {ledger.parent} to redo the stage") from error
    except (KeyError, TypeError):  # another kind of file with this name
        return None
    return {path for path in paths if path.parent == folder and path.suffix == ".parquet"}


def read_table(path: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """All shards below `path` as one table.

    Raises:
        ValueError: a shard is unreadable, or lacks a column of `schema`; the message names the file.
    """
    names = list(columns) if columns is not None else schema.names
    tables = []
    for shard in shards(path):
        with _opened(shard, names) as file:
            tables.append(file.read(names).cast(pa.schema([schema.field(n) for n in names])))
    return pa.concat_tables(tables)


@contextlib.contextmanager
def _opened(shard: Path, names: Sequence[str]) -> Iterator[pq.ParquetFile]:
    """Open a shard and check its columns; a ValueError names the file if it lacks one or is unreadable."""
    try:
        with pq.ParquetFile(shard, page_checksum_verification=True) as file:
            present = file.schema_arrow.names
            missing = [name for name in names if name not in present]
            if missing:
                raise ValueError(f"{shard}: no column {missing[0]!r} (it has {', '.join(present)})")
            told = file.metadata
            rows = sum(told.row_group(i).num_rows for i in range(told.num_row_groups))
            if rows != told.num_rows:  # no checksum covers these two
                raise pa.ArrowInvalid(f"{told.num_rows} rows by its footer, {rows} in its row groups")
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # OSError: also a wrong page checksum
        raise ValueError(f"{shard}: not a readable Parquet file ({error}); delete it and run again") from error


def take_rows(path: Path, schema: pa.Schema, columns: Sequence[str], row_N: NDArray[np.int64]) -> pa.Table:
    """Rows of the shards below `path` by number, in the order of `row_N`; a number may repeat.

    At most one batch of the other rows is in memory.

    Args:
        row_N: row numbers, counted over all shards.
    """
    number_N = np.unique(row_N)
    fields = pa.schema([schema.field(name) for name in columns])
    tables = [fields.empty_table()]
    first = 0
    for shard in shards(path):
        with _opened(shard, columns) as file:
            inside = number_N[(number_N >= first) & (number_N < first + file.metadata.num_rows)] - first
            first += file.metadata.num_rows
            if len(inside):
                tables += [part.cast(fields) for part in _rows_within(file, columns, inside)]
    assert not len(number_N) or number_N[-1] < first, f"{path} has {first} rows, none numbered {number_N[-1]}"
    return pa.concat_tables(tables).take(pa.array(np.searchsorted(number_N, row_N)))


def _rows_within(file: pq.ParquetFile, columns: Sequence[str], row_N: NDArray[np.int64]) -> Iterator[pa.Table]:
    """Yield rows of one file by number, as tables; `row_N` is ascending."""
    start = 0
    for batch in file.iter_batches(BATCH, columns=list(columns)):
        inside = row_N[(row_N >= start) & (row_N < start + batch.num_rows)] - start
        start += batch.num_rows
        if len(inside):
            yield pa.Table.from_batches([batch.take(pa.array(inside))])


def matrix_of(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """A column of equally long lists as a matrix, (rows, length); a null is NaN.

    Raises:
        ValueError: the lists differ in length; the message names the first such row.
    """
    if not len(column):
        return np.empty((0, 0))
    length_N = np.asarray(pc.fill_null(pc.list_value_length(column), 0))
    odd = np.flatnonzero(length_N != length_N[0])
    if len(odd):
        raise ValueError(
            f"row {odd[0]}: {length_N[odd[0]]} numbers, where row 0 has {length_N[0]}; write the file again"
        )
    numbers = np.asarray(pc.list_flatten(column).to_numpy(), dtype=np.float64)
    return numbers.reshape(len(column), int(length_N[0]))


def read_rows(path: Path, schema: pa.Schema) -> Iterator[dict[str, Any]]:
    """The rows of all shards below `path`, one shard in memory at a time."""
    for shard in shards(path):
        yield from read_table(shard, schema).to_pylist(maps_as_pydicts="strict")
