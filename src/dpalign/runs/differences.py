"""The difference of two files that should be the same: Parquet, JSON and safetensors by values, others by bytes.

Shapes: N values in a column or tensor.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

BY_THE_CLOCK: Final = frozenset({"seconds", "switch_seconds", "machine"})
"""Keys of JSON whose values differ from run to run."""
_TYPES: Final = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?"},
    **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1"},
}
"""The number types of safetensors files, as numpy has them; others are compared as bytes."""


def difference(one: Path, two: Path) -> str:
    """What differs between two files of one name, and by how much at most; empty if only clock times differ.

    Raises:
        ValueError: a file cannot be read as its suffix says.
    """
    try:
        match one.suffix:
            case ".parquet":
                return _of_tables(pq.read_table(one), pq.read_table(two))
            case ".json":
                return _of_values(*(json.loads(path.read_text(encoding="utf-8")) for path in (one, two)))
            case ".safetensors":
                return _of_tensors(*(dict(_tensors(path)) for path in (one, two)))
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"{one} and {two}: one of them cannot be read ({error})") from error
    sizes = [path.stat().st_size for path in (one, two)]
    return f"{sizes[1]} bytes for {sizes[0]}" if sizes[0] != sizes[1] else "other bytes"


def _of_tables(one: pa.Table, two: pa.Table) -> str:
    if one.schema != two.schema:
        return f"columns {', '.join(two.column_names)} for {', '.join(one.column_names)}, or other types"
    if one.num_rows != two.num_rows:
        return f"{two.num_rows} rows for {one.num_rows}"
    apart = []
    for name in one.column_names:
        if not one[name].equals(two[name]):
            values = [column.to_pylist() for column in (one[name], two[name])]
            rows = sum(a != b for a, b in zip(*values, strict=True))
            apart.append(f"{name}: {rows} of {one.num_rows} rows{_at_most(*map(_numbers, (one[name], two[name])))}")
    return "; ".join(apart) or "the same rows in other bytes"


def _numbers(column: pa.ChunkedArray) -> NDArray[np.float64] | None:
    """A column's numbers, those in lists too; None if it holds anything else."""
    flat = column.combine_chunks()
    while pa.types.is_list(flat.type) or pa.types.is_large_list(flat.type):
        flat = pc.list_flatten(flat)
    numeric = pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type)
    return flat.to_numpy(zero_copy_only=False).astype(np.float64) if numeric else None


def _at_most(one: NDArray[np.float64] | None, two: NDArray[np.float64] | None) -> str:
    if one is None or two is None or len(one) != len(two):
        return ""
    return f", by at most {_apart(one, two):.3g}"


def _apart(one_N: NDArray[np.float64], two_N: NDArray[np.float64]) -> float:
    """The largest distance between two numbers of one place."""
    return float(np.where(np.isnan(one_N) & np.isnan(two_N), 0.0, np.abs(one_N - two_N)).max(initial=0.0))


def _of_values(one: Any, two: Any) -> str:
    first, second = dict(_leaves(one)), dict(_leaves(two))
    missing = object()
    keys = [
        key
        for key in dict.fromkeys([*first, *second])
        if repr(first.get(key, missing)) != repr(second.get(key, missing))  # `True == 1 == 1.0`
    ]
    if not keys:
        return ""
    pairs = [(first.get(key), second.get(key)) for key in keys]
    apart = [abs(a - b) for a, b in pairs if isinstance(a, int | float) and isinstance(b, int | float)]
    by = f", numbers by at most {max(apart):.3g}" if apart else ""
    return f"{len(keys)} of {len(first.keys() | second.keys())} values{by}; the first is {keys[0]}"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of JSON by their path, without those of `BY_THE_CLOCK`; an empty list or object is a value."""
    if isinstance(value, Mapping):
        value = {key: inner for key, inner in value.items() if key not in BY_THE_CLOCK}
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list) and value:
        for place, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{place}]")
    else:
        yield path, value


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a safetensors file: its type, shape and bytes."""

    kind: str
    shape: Sequence[int]
    content: NDArray[np.uint8]

    def numbers(self) -> NDArray[np.float64]:
        array = self.content.view(_TYPES[self.kind])
        if self.kind == "BF16":  # numpy has none: its bits are the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float64)


def _of_tensors(one: Mapping[str, _Tensor], two: Mapping[str, _Tensor]) -> str:
    forms = [{name: (tensor.kind, tensor.shape) for name, tensor in tensors.items()} for tensors in (one, two)]
    if forms[0] != forms[1]:
        return f"{len(two)} tensors for {len(one)}, or other shapes or types"
    apart = [name for name in one if not np.array_equal(one[name].content, two[name].content)]
    if not apart:
        return "the same tensors in other bytes"
    numbers = [(one[name].numbers(), two[name].numbers()) for name in apart if one[name].kind in _TYPES]
    by = f", by at most {max(_apart(*pair) for pair in numbers):.3g}" if numbers else ""
    return f"{len(apart)} of {len(one)} tensors{by}"


def _tensors(path: Path) -> Iterator[tuple[str, _Tensor]]:
    content = np.memmap(path, dtype=np.uint8, mode="r")
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    for name, entry in json.loads(content[8:start].tobytes()).items():
        if name != "__metadata__":
            low, high = entry["data_offsets"]
            yield name, _Tensor(entry["dtype"], entry["shape"], content[start + low : start + high])
