"""How full packed rows are at 4096 tokens: ours, against each of TRL's strategies as its trainer applies them."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from datasets import Dataset
from trl import pack_dataset

from dpalign.train.sft import packed
from dpalign.train.trainer import quiet
from harness import Row, equal, main

COMMAND = "python bench/packing.py"
ROOM = 4096


def rows(quick: bool) -> Iterator[Row]:
    quiet()
    count = 3_000 if quick else 32_000
    given = conversations(count)
    tokens = len(given.data["input_ids"].combine_chunks().flatten())
    ours = packed(given, ROOM)
    what = f"{count:,} conversations, {tokens / count:.0f} tokens on average"
    fill = 100 * tokens / (len(ours) * ROOM)
    fewest = -(-tokens // ROOM)
    equal(tokens, sum(map(sum, ours["seq_lengths"])), 0, "packed tokens")
    equal(split(given, ours), 0, 0, "conversations split")
    note = f"{what}; {len(ours)} rows, and fewer than {fewest} cannot hold them"
    yield Row("packed rows filled at 4096, none split", fill, fill, fill, 99.8, "no peer: a limit", COMMAND, note, "%")
    for strategy in ("bfd", "bfd_split", "wrapped"):
        theirs = pack_dataset(given, ROOM, strategy)
        ratio = len(theirs) / len(ours)
        filled = f"{100 * tokens / (len(theirs) * ROOM):.2f}% full"
        note = f"{filled}, {split(given, theirs)} conversations split; ours {fill:.2f}%, none"
        peer = f"TRL's {strategy}, a thousand at a time"
        yield Row(f"packed rows needed at 4096, against {strategy}", ratio, ratio, ratio, None, peer, COMMAND, note)


def conversations(count: int) -> Dataset:
    """Each of its own number over and over; most of 200 to 800 tokens, some of thousands, as in UltraFeedback."""
    length_N = np.random.default_rng(0).lognormal(6.0, 0.7, count).astype(np.int32).clip(30, ROOM)
    offsets = np.concatenate([[0], np.cumsum(length_N)]).astype(np.int32)
    ids = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.repeat(np.arange(count, dtype=np.int32), length_N)))
    return Dataset(pa.table({"input_ids": ids, "labels": ids}))


def split(given: Dataset, made: Dataset) -> int:
    """How many conversations do not lie in one row whole."""
    ids = made.data["input_ids"].combine_chunks()
    row_T = np.repeat(np.arange(len(ids)), ids.value_lengths().to_numpy())
    met = np.unique(ids.flatten().to_numpy().astype(np.int64) * len(ids) + row_T) // len(ids)
    return int((np.bincount(met, minlength=len(given)) != 1).sum())


if __name__ == "__main__":
    main(rows, "packing")
