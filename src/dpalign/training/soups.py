"""Rewarded soups (section 2.3): experts trained for a direction each, and their weights interpolated for any other.

Whole checkpoints are mixed, tensor by tensor: computed in float32, stored in the experts' own type, and never with
more in memory than a few copies of one tensor. The paper's soup takes the direction itself for weights, which is no
interpolation where an objective is to be minimised (v2 <= 0 on section 3.1's arc); `mixture_weights` says what is.

Shapes: E experts, K objectives.
"""

import json
import math
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog, nnls  # type: ignore[import-untyped]

from dpalign.modelfolder import CONFIG, INDEX, TEMPLATE, WEIGHTS, weights_files
from dpalign.training.checkpoint import Weights, require_alike

Array = NDArray[np.float64]

COPIED: Final = (
    *(CONFIG, "generation_config.json", TEMPLATE, "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
)
"""What a mixture takes from the first expert, beside the weights."""

NEAR: Final = 1e-3
"""How far from what the experts span a direction may lie (0.06 degrees): theirs may be written with few digits."""

MIXED: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types that are interpolated; tensors of any other must be equal in all experts."""


def mixture_weights(v_K: Sequence[float] | Array, experts_EK: Sequence[Sequence[float]] | Array) -> Array:
    """How much of each expert a direction takes: w_E >= 0, of sum 1.

    The direction is written as v = sum_e a_e expert_e with a >= 0, and w = a / sum(a). For experts of (1, 0) and
    (0, -1) that is |v| / sum |v|; for the two ends of an arc it runs from (1, 0) to (0, 1). Of more experts than
    objectives the smallest such a is taken, which mixes neighbours.

    Raises:
        ValueError: a direction that is no such sum, which no interpolation of these experts can be asked for;
            directions of another length, zero or not finite.
    """
    unit_K = _unit_rows([v_K], "the direction")[0]
    unit_EK = _unit_rows(experts_EK, "the experts' directions")
    if unit_EK.shape[1] != len(unit_K):
        raise ValueError(f"direction {_shown(unit_K)} of {len(unit_K)} objectives, for experts of {unit_EK.shape[1]}")
    a_E, distance = nnls(unit_EK.T, unit_K)
    nearest_K = unit_EK.T @ a_E
    if distance > NEAR:
        raise ValueError(
            f"direction {_shown(unit_K)} lies outside what the experts {', '.join(map(_shown, unit_EK))} span: their "
            f"nearest sum is {_shown(nearest_K)}, {distance:.3g} away; train experts on both sides of it"
        )
    smallest = linprog(np.ones(len(unit_EK)), A_eq=unit_EK.T, b_eq=nearest_K)
    assert smallest.success, smallest.message
    w_E: Array = (smallest.x / smallest.x.sum()).round(12) + 0.0  # an expert that a rounding error lets in is left out
    return w_E


def _unit_rows(rows: Sequence[Any] | Array, what: str) -> Array:
    listed = [[float(w) for w in row] for row in rows]
    if len({len(row) for row in listed}) != 1:
        raise ValueError(f"{what}: {listed}; give at least one, and each a weight by objective")
    given_NK = np.array(listed)
    norm_N = np.linalg.norm(given_NK, axis=1)
    if not np.isfinite(norm_N).all() or not norm_N.all():
        raise ValueError(f"{what}: {listed}; each needs finite weights, not all of them 0")
    unit_NK: Array = given_NK / norm_N[:, None]
    return unit_NK


def _shown(v_K: Array) -> str:
    return f"({', '.join(f'{w:g}' for w in (v_K.round(4) + 0.0).tolist())})"


def mix(experts: Sequence[Path], weights: Sequence[float] | Array, output: Path) -> None:
    """Write the weighted mean of whole checkpoints, itself a plain Hugging Face checkpoint.

    The mean is computed in float32 and stored in the experts' type; an expert of weight 0 is not read, so that
    weights (1, 0) give the first expert's own. Configuration, tokenizer, chat template and the division into files
    are the first expert's.

        mix([helpful, brief], mixture_weights((0.8, -0.6), [(1, 0), (0, -1)]), Path("soup"))

    Args:
        experts: checkpoint folders with safetensors, in one file or in several with their index.
        weights: one an expert, not negative, of sum 1 (`mixture_weights`).
        output: the folder to make; it appears whole or not at all.

    Raises:
        ValueError: weights that are no convex combination; a folder without weights; experts that differ in
            configuration, tokenizer or chat template, or in a tensor's name, shape or type (the message names the
            file, the key and both values); `output` stands already.
    """
    w_E = _convex(weights, experts)
    if output.exists():
        raise ValueError(f"{output}: stands already; name a folder to make")
    with ExitStack() as stack:
        opened = [Weights.open(folder, stack) for folder in experts]
        for other in opened[1:]:
            require_alike(opened[0], other)
        beside = output.with_name(f".{output.name}.partial")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for file in opened[0].files:
            _write(beside / file, opened, w_E, file)
    for name in COPIED if (beside / WEIGHTS).is_file() else (*COPIED, INDEX):
        if (experts[0] / name).is_file():
            shutil.copyfile(experts[0] / name, beside / name)
    beside.rename(output)


def bytes_of(folder: Path) -> int:
    """What a checkpoint's weights take on disk."""
    return sum((folder / file).stat().st_size for file in weights_files(folder))


def _convex(weights: Sequence[float] | Array, experts: Sequence[Path]) -> list[float]:
    w_E = [float(w) for w in weights]
    if len(w_E) != len(experts):
        raise ValueError(f"{len(w_E)} weights {w_E} for {len(experts)} experts; give each its own")
    if not all(w >= 0 for w in w_E) or not math.isclose(sum(w_E), 1.0, abs_tol=1e-6):
        raise ValueError(f"weights {w_E} of sum {sum(w_E):g}: a mixture needs weights of 0 or more whose sum is 1")
    return w_E


def _write(path: Path, experts: Sequence[Weights], w_E: Sequence[float], file: str) -> None:
    """One of the mixture's files: safetensors are the length of a JSON header, the header, and the tensors' bytes.

    Written out here because the library's own writer wants all of a file's tensors at once.
    """
    first = experts[0]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names, end = first.files[file].offset_keys(), 0
    for name in names:
        begin, end = end, end + first.tensor(name).nbytes
        header[name] = {"dtype": first.dtype(name), "shape": first.shape(name), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            out.write(_mixed(experts, w_E, name).reshape(-1).view(torch.uint8).numpy().data)


def _mixed(experts: Sequence[Weights], w_E: Sequence[float], name: str) -> torch.Tensor:
    first = experts[0].tensor(name)
    if first.dtype not in MIXED:
        for other in experts[1:]:
            if not torch.equal(first, other.tensor(name)):
                raise ValueError(
                    f"{other.path(name)}: {name} of type {first.dtype} differs from the one in "
                    f"{experts[0].path(name)}; only floating-point weights can be mixed"
                )
        return first
    computed = torch.promote_types(first.dtype, torch.float32)
    parts = (expert.tensor(name).to(computed, copy=True).mul_(w) for expert, w in zip(experts, w_E, strict=True) if w)
    total = next(parts)
    for part in parts:
        total += part
    return total.to(first.dtype)
