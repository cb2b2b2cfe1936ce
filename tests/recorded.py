"""A recipe that writes down which of its knobs are read: stands in for a recipe while a stage is at work."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from dpalign.pipeline.steps import STAGES
from dpalign.recipe import Recipe
from dpalign.runs.tables import Table, leaves, tables_of
from dpalign.stages.stage import Job, Stage

Reads = dict[tuple[str, str], set[str]]
"""The knobs that were read, by stage and condition."""
WHOLE = ("as_mapping", "to_toml", "model_dump")
"""Ask for all knobs. Of the whole recipe this is to keep or to show them; of one of its tables it reads them."""


class Recorded:
    """A table of a recipe; every leaf that is taken from it, or by its own methods, goes into `read`.

    Args:
        settled: leaves that the stage itself has set, which so are not the user's.
    """

    def __init__(self, table: Table, read: set[str], path: str = "", settled: frozenset[str] = frozenset()) -> None:
        self._table, self._read, self._path, self._settled = table, read, path, settled

    def __getattr__(self, name: str) -> Any:
        if name in WHOLE:
            if self._path:
                self._read.update(f"{self._path}{leaf}" for leaf, _ in leaves(self._table.as_mapping()))
            return getattr(self._table, name)
        if name == "model_copy":
            return self._changed
        if name in type(self._table).model_fields:
            value, path = getattr(self._table, name), f"{self._path}{name}"
            if isinstance(value, Table):
                return Recorded(value, self._read, f"{path}.", self._settled)
            if tables_of(type(self._table).model_fields[name].annotation) is not None:
                return {key: Recorded(one, self._read, f"{path}.*.", self._settled) for key, one in value.items()}
            if path not in self._settled:
                self._read.add(path)
            return value
        own = getattr(type(self._table), name)
        return own.fget(self) if isinstance(own, property) else own.__get__(self)

    def _changed(self, update: Mapping[str, Any]) -> "Recorded":
        settled = set(self._settled)
        for name, value in update.items():
            settled |= value._settled if isinstance(value, Recorded) else {f"{self._path}{name}"}
        table = self._table.model_copy(update={name: plain(value) for name, value in update.items()})
        return Recorded(table, self._read, self._path, frozenset(settled))

    def __eq__(self, other: object) -> bool:
        return bool(self._table == plain(other))

    def __hash__(self) -> int:
        return id(self)


def plain(value: Any) -> Any:
    """The table behind a recorded one."""
    return value._table if isinstance(value, Recorded) else value


@contextmanager
def reads_recorded(reads: Reads) -> Iterator[None]:
    """Write down which knobs each stage reads while it is at work in this process."""
    run = Stage.run

    def recording(stage: Stage, job: Job) -> None:
        read = reads.setdefault((stage.name, job.condition), set())
        recipe: Any = Recorded(job.recipe, read) if isinstance(job.recipe, Recipe) else job.recipe
        run(stage, replace(job, recipe=recipe))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Stage, "run", recording)
        yield


MACHINE = (
    *("name", "launcher", "jobs", "processes", "launch", "cluster", "kernels", "report_to"),
    *("engines.gpu_memory", "engines.cpu_cache", "engines.eager", "reward.share_prefix"),
)
"""The knobs that say where and how fast a stage runs: any stage may read them, and none is redone for them."""
READ_BY_ALL = "threads"
"""What every stage settles before it works."""


def undeclared(reads: Reads) -> dict[tuple[str, str], list[str]]:
    """The knobs that a stage read under a condition and does not declare for it."""
    found = {}
    for (name, condition), read in reads.items():
        tables = (*STAGES[name].knob_names(condition), *MACHINE)
        own = {knob for knob in read if not any(knob == table or knob.startswith(f"{table}.") for table in tables)}
        if others := own - {READ_BY_ALL}:
            found[name, condition] = sorted(others)
    return found
