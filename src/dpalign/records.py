"""The rows that pass between stages, and their Parquet schemas.

Every stage reads finished Parquet files and writes finished Parquet files: zstd, one row group a
shard, stable ids. A prompt is a chat (`messages`, ending with the user's turn); its id is a hash of
its text, so that the same prompt has the same id wherever it comes from. A candidate is identified by
(prompt_id, t, condition_index, sample); rewards are stored for all heads, so that a new direction or
objective re-ranks old candidates without scoring them again.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

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


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str


_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_REWARDS = pa.list_(pa.float32())

PROMPTS: Final = pa.schema([("prompt_id", pa.string()), ("messages", _MESSAGES), ("split", pa.string())])

RATED: Final = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("messages", _MESSAGES),
        ("response", pa.string()),
        ("source", pa.string()),
        ("labels", _REWARDS),  # one a head, 0-100; null where the data set has no such label
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
        ("messages", _MESSAGES),  # as sampled: the system line that carried the condition included
        ("response", pa.string()),
        ("tokens", pa.int32()),
        ("finished", pa.bool_()),  # False: cut at max_new_tokens
    ]
)

SCORES: Final = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("t", pa.int32()),
        ("condition_index", pa.int32()),
        ("sample", pa.int32()),
        ("rewards", _REWARDS),  # one a head, 0-100
    ]
)

CONVERSATIONS: Final = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("messages", _MESSAGES),  # what the model reads, system line included
        ("response", pa.string()),  # what it learns to say
        ("origin", pa.string()),  # selected | replay | sft | steerlm
    ]
)

PAIRS: Final = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("messages", _MESSAGES),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("chosen_score", pa.float32()),  # 0-100: a rating, or the reward model's
        ("rejected_score", pa.float32()),
        ("origin", pa.string()),  # ratings | candidates
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
    pq.write_table(table, beside, compression="zstd", row_group_size=max(1, table.num_rows))
    os.replace(beside, path)


def shards(path: Path) -> list[Path]:
    """The Parquet files of a stage's folder in order, or the one file that `path` names."""
    if path.is_file():
        return [path]
    found = sorted(path.glob("*.parquet"))
    if not found:
        raise ValueError(f"{path}: no Parquet files here; has the stage that writes them finished?")
    return found


def read_table(path: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """All shards below `path` as one table.

    Raises:
        ValueError: a shard is unreadable, or lacks a column of `schema`; the message names the file.
    """
    names = list(columns) if columns is not None else schema.names
    tables = []
    for shard in shards(path):
        try:
            present = pq.read_schema(shard).names
            missing = [name for name in names if name not in present]
            if missing:
                raise ValueError(f"{shard}: no column {missing[0]!r} (it has {', '.join(present)})")
            tables.append(pq.read_table(shard, columns=names).cast(pa.schema([schema.field(n) for n in names])))
        except pa.ArrowInvalid as error:
            raise ValueError(f"{shard}: not a readable Parquet file ({error}); delete it and run again") from error
    return pa.concat_tables(tables)


def read_rows(path: Path, schema: pa.Schema) -> Iterator[dict[str, Any]]:
    """The rows of all shards below `path`, one shard in memory at a time."""
    for shard in shards(path):
        yield from read_table(shard, schema).to_pylist()
