"""Typed values that are written as JSON and read back equal: the base of every part of the Summary."""

import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A frozen part of the Summary. An unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


R = TypeVar("R", bound=Record)


def rounded(record: R) -> R:
    """Round a record to six decimals, so that it equals what its JSON reads back as.

    Six decimals are far finer than any interval, and far coarser than the rounding errors of a sum. So the same
    figures give the same bytes.
    """
    return type(record).model_validate(jsonable(record.model_dump()))


def jsonable(value: Any, where: str = "summary") -> Any:
    """Convert a value to plain JSON with six decimals; arrays become lists, dataclasses become objects.

    Args:
        where: the value's place, for the message.

    Raises:
        ValueError: a value that JSON cannot hold.
    """
    match value:
        case bool() | int() | str() | None:
            return value
        case float() | np.number():
            if not math.isfinite(value):
                raise ValueError(f"{where} is {value}, which JSON cannot hold; a figure that is not defined is None")
            return round(float(value), 6) + 0.0  # + 0.0: no -0.0
        case np.ndarray():
            return jsonable(value.tolist(), where)
        case Mapping():
            return {str(key): jsonable(inner, f"{where}.{key}") for key, inner in value.items()}
        case list() | tuple():
            return [jsonable(inner, where) for inner in value]
    if is_dataclass(value) and not isinstance(value, type):
        return jsonable(asdict(value), where)
    raise ValueError(f"{where} is {value!r} of type {type(value).__name__}, which JSON cannot hold")
