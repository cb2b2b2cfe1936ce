"""What drawing and scoring stages do, as shards: prompts or answers in parts, and what a model makes of a part."""

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
"""A shard of answers whose scores lie in folders beside them."""

Output = tuple[str, pa.Schema, Iterable[Row]]
"""A folder of the stage ("" for its own), and the rows of a shard's file there."""


@dataclass
class Shards(Generic[Models]):
    """A `ShardWork`: each of a stage's shards is what some models make of a part of its prompts or answers."""

    job: Job
    name: str
    count: int
    part: Callable[[int], Sequence[Row]]
    """The prompts of a shard, or the answers, those to a prompt together."""
    models: Callable[[], Models]
    """Loads what works: an engine, scorers."""
    work: Callable[[Models, int, Sequence[Row], Tally], Iterator[Output]]
    """What the models make of some of a shard's rows; the file that `name` names comes last."""
    asked: Callable[[int], Mapping[int, int]] | None = None
    """How many answers each prompt of a shard gets under each condition, by its index; None where rows are answers."""

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
    """Prompts in shards of `sampling.shard`."""
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]
