"""A stage whose work is a fixed list of shards: made here one after the other, or by the actors of a cluster.

The recipe alone decides what a shard holds, so the shards have the same bytes wherever they are made.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from dpalign.run.folder import Shard, unfinished

if TYPE_CHECKING:
    from dpalign.stages.stage import Job

Id: TypeAlias = tuple[str, int, int]
"""What tells an answer from the others of a stage: prompt_id, condition_index, sample."""


class ShardWork(Protocol):
    """The shards of one stage at work, as its job lays them out."""

    @property
    def name(self) -> str:
        """A shard's file in the stage's folder, with a place for its number."""
        ...

    @property
    def count(self) -> int: ...

    def open(self) -> None:
        """Load the models; `make` and `one_by_one` need them, nothing else does."""
        ...

    def make(self, shard: Shard) -> None:
        """Write the shard, whole, and count what it took."""
        ...

    def one_by_one(self, index: int) -> Iterator[str]:
        """The work of a shard a prompt at a time, for nothing: each prompt's name first, then the work on it."""
        ...

    def ids(self, index: int) -> list[Id]:
        """The answers that a shard must hold, in order."""
        ...


def make_shards(job: "Job", plan: "Callable[[Job], ShardWork]") -> None:
    """Make the stage's shards that are not finished, where the recipe wants them made.

    Args:
        plan: a function or class of a module, by whose name the actors of a cluster find it too.

    Raises:
        ValueError: bad input, or shards that could not be made.
    """
    work = plan(job)
    if job.recipe.cluster.address:
        from dpalign.run.cluster import make_on_cluster

        make_on_cluster(job, plan, work)
        return
    if unfinished(job.out, range(work.count), work.name):
        work.open()
    for shard in job.work.shards(work.count, work.name):
        work.make(shard)


def named(row: Mapping[str, Any]) -> str:
    """A row's prompt as a message can name it: its id and how it begins."""
    return f"{row['prompt_id']} ({row['messages'][-1]['content'][:60]!r})"
