"""The shards of drawing and scoring stages: a part of the prompts or answers, and what a model makes of it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final, Generic, TypeVar

import pyarrow as pa

from dpalign.engines.memory import halvings
from dpalign.rows import write_rows
from dpalign.runs.folder import Shard, Tally
from dpalign.runs.shards import Id, named
from dpalign.stages.stage import Job

Row = dict[str, Any]
Models = TypeVar("Models")

PART: Final = "part-{:05d}.parquet"
"""A shard's file, with a place for its number."""
ANSWERS: Final = f"answers/{PART}"
"""A shard of answers; their scores are in folders beside `answers`."""

Output = tuple[str, pa.Schema, Iterable[Row]]
"""A folder within the stage's ("" for the stage's own), and the rows of the shard's file there."""


@dataclass
class Shards(Generic[Models]):
    """A `ShardWork`: each shard holds what the models make of a part of the prompts or answers."""

    job: Job
    name: str
    count: int
    part: Callable[[int], Sequence[Row]]
    """The prompts of a shard, or its answers, grouped by prompt."""
    models: Callable[[], Models]
    """Loads the models: an engine, scorers."""
    work: Callable[[Models, int, Sequence[Row], Tally], Iterator[Output]]
    """Yields what the models make of some of a shard's rows; the file of `name` comes last."""
    asked: Callable[[int], Mapping[int, int]] | None = None
    """For a shard, the number of answers a prompt by condition index; None if the rows are answers already."""

    def open(self) -> None:
        self.opened = self.models()

    def make(self, shard: Shard) -> None:
        before = halvings()
        for folder, schema, rows in self.work(self.opened, shard.index, self.part(shard.index), shard.tally):
            write_rows(self.job.out / folder / shard.path.name, rows, schema)
        shard.tally.halved += halvings() - before

    def one_by_one(self, index: int) -> Iterator[str]:
        for _, rows in groupby(self.part(index), key=lambda row: row["prompt_id"]):
            of_prompt = list(rows)
            yield named(of_prompt[0])
            for *_, outputs in self.work(self.opened, index, of_prompt, Tally()):
                deque(outputs, maxlen=0)

    def ids(self, index: int) -> list[Id]:
        rows = self.part(index)
        if self.asked is None:
            return [(row["prompt_id"], row["condition_index"], row["sample"]) for row in rows]
        answers = [(c, sample) for c, n in self.asked(index).items() for sample in range(n)]
        return [(row["prompt_id"], c, sample) for row in rows for c, sample in answers]


def parts_of(prompts: Sequence[Row], size: int) -> list[Sequence[Row]]:
    """The rows in parts of at most `size`."""
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]
