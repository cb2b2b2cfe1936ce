"""A recipe that writes down which of its knobs are read."""

from collections.abc import Iterable
from types import MethodType
from typing import Any

from dpalign.run.tables import Table


class Recorded:
    """Stands for a table: the same values, and each leaf that is read is noted by its dotted name."""

    def __init__(self, table: Table, read: set[str], prefix: str = "", fixed: Iterable[str] = ()) -> None:
        self._table, self._read, self._prefix, self._fixed = table, read, prefix, set(fixed)

    def __getattr__(self, name: str) -> Any:
        table = self._table
        attribute = getattr(type(table), name, None)
        if isinstance(attribute, property):
            assert attribute.fget is not None
            return attribute.fget(self)
        if name == "model_copy":
            return lambda update: Recorded(
                table.model_copy(update=_plain(update)), self._read, self._prefix, {*self._fixed, *update}
            )
        if callable(attribute) and name not in type(table).model_fields:
            return MethodType(attribute, self)
        value = getattr(table, name)
        if name in self._fixed:  # set by the stage itself: no knob is read
            return value
        if isinstance(value, Table):
            return Recorded(value, self._read, f"{self._prefix}{name}.")
        if name in type(table).model_fields:
            self._read.add(self._prefix + name)
        return value

    def to_toml(self) -> str:
        """The page shows the whole recipe as it was when the page was made: nothing is computed from it."""
        return self._table.to_toml()

    def model_dump(self, **how: Any) -> Any:
        """The whole table: all of its leaves are read."""
        for name in type(self._table).model_fields:
            value = getattr(self, name)
            if isinstance(value, Recorded):
                value.model_dump(**how)
        return self._table.model_dump(**how)

    def __eq__(self, other: object) -> bool:
        return self._table == (other._table if isinstance(other, Recorded) else other)

    __hash__ = None  # type: ignore[assignment]


def _plain(update: dict[str, Any]) -> dict[str, Any]:
    return {name: value._table if isinstance(value, Recorded) else value for name, value in update.items()}
