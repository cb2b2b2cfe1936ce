"""The rows of a training: stored once for all its processes, and read in an order by their lengths."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import get_length_grouped_indices

from dpalign.paper.direction import rng_for
from dpalign.runs.environment import first_process
from dpalign.runs.errors import naming
from dpalign.runs.folder import write_json
from dpalign.runs.ledger import sync

Row = Mapping[str, Any]
IDS: Final = pa.list_(pa.int32())
"""The type of a column of token ids."""
LOOK_SECONDS: Final = 0.1
"""Between two looks of a process for the file that the first process makes."""


@dataclass(frozen=True)
class Rows:
    """The rows that fit the context."""

    rows: Dataset
    """Memory-mapped: the machine holds them once for all its processes."""
    too_long: int
    """How many rows did not fit, and were left out."""
    tokens: int
    """Tokens of one epoch."""


def store_fitting(
    rows: Iterable[Row],
    what: str,
    context: int,
    file: Path,
    columns: Mapping[str, pa.DataType],
    length: Callable[[Row], int] = lambda row: len(row["input_ids"]),
    tokens: Callable[[Row], int] = lambda row: len(row["input_ids"]),
    knob: str = "its training's context",
) -> Rows:
    """Leave out the rows longer than the context, count them, and keep the others in an Arrow file.

    Only the first of several processes reads `rows`. A training that resumes finds the file.

    Args:
        what: a row's name in the message: "pair".
        file: where the rows are kept, in a training's scratch folder.
        columns: the columns to keep, with their types.
        length: tokens that must fit the context.
        tokens: tokens that an epoch reads of the row.
        knob: the error's cure if no row fits: the setting to raise.

    Raises:
        ValueError: no row fits.
    """
    counts = {"too_long": 0, "tokens": 0}

    def short() -> Iterator[dict[str, Any]]:
        for row in rows:
            if length(row) > context:
                counts["too_long"] += 1
                continue
            counts["tokens"] += tokens(row)
            yield {name: row[name] for name in columns}

    def write(beside: Path) -> None:
        kept, schema = short(), pa.schema(list(columns.items()))
        with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
            while batch := list(islice(kept, 1000)):
                stream.write_batch(pa.RecordBatch.from_pylist(batch, schema))
        if not counts["tokens"]:
            raise ValueError(
                f"no {what} of {counts['too_long']} fits a context of {context} tokens; raise {knob}, or check the data"
            )
        write_json(file.with_suffix(".json"), counts)

    make_once(file, write)
    counts = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    return Rows(Dataset.from_file(str(file)), counts["too_long"], counts["tokens"])


def make_once(file: Path, make: Callable[[Path], object]) -> None:
    """Let the first of a training's processes make a file, while the others wait.

    They look for the file, since a barrier would give up after half an hour.

    Args:
        make: writes the file at the path it is given; it is renamed once it is whole.
    """
    if first_process() and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f".{file.name}.partial")
        with naming(file):
            make(beside)
            sync(beside)
        beside.rename(file)
        sync(file.parent)
    while not file.exists():
        time.sleep(LOOK_SECONDS)


def column_lengths(rows: Dataset, column: str) -> list[int]:
    """How long each row's list is, without reading the lists."""
    lengths: list[int] = pc.list_value_length(rows.with_format("arrow")[:][column]).to_pylist()
    return lengths


class RowsByLength(Sampler[int]):
    """Rows of like length in each update, in an order that depends on the seed and the epoch alone.

    The Trainer's own order (`group_by_length`) is drawn from the process's generator. It would differ after a resume
    within the second epoch or a later one, and with another number of processes.
    """

    def __init__(self, trainer: Trainer, lengths: Sequence[int]) -> None:
        self.trainer, self.lengths = trainer, lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        args = self.trainer.args
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        epoch = int(self.trainer.state.epoch or 0)
        seed = int(rng_for(args.data_seed, "order of rows", epoch).integers(2**62))
        yield from self.order(batch, torch.Generator().manual_seed(seed))

    def order(self, batch: int, generator: torch.Generator) -> Iterator[int]:
        """Yield the index of every row once.

        Args:
            batch: rows of an update.
        """
        yield from get_length_grouped_indices(self.lengths, batch, generator=generator)


class FairBatches(RowsByLength):
    """Each update's rows are a random sample; within an update, rows of like length share a forward.

    `RowsByLength` sorts fifty updates at a time, from long rows to short ones. A reward model must not learn in that
    order: the mean label of an update would follow its length, which would mislead the verbosity head.
    """

    def order(self, batch: int, generator: torch.Generator) -> Iterator[int]:
        shuffled: list[int] = torch.randperm(len(self), generator=generator).tolist()
        for start in range(0, len(shuffled), batch):
            yield from sorted(shuffled[start : start + batch], key=lambda i: self.lengths[i], reverse=True)


class ByLength(Trainer):
    """A mix-in: the trainer reads its rows in the order of its sampler."""

    sampler: type[RowsByLength] = RowsByLength

    def _get_train_sampler(self, _: Dataset | None = None) -> Sampler[int]:
        return self.sampler(self, self.row_lengths())

    def row_lengths(self) -> list[int]:
        return column_lengths(self.train_dataset, "input_ids")
