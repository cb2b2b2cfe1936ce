"""Rewarded soups (section 2.3): experts trained for a direction each, and their weights interpolated for any other.

Whole checkpoints are mixed, tensor by tensor: computed in float32, stored in the experts' own type, and never with
more in memory than a few copies of one tensor. The paper's soup takes the direction itself for weights, which is no
interpolation where an objective is to be minimised (v2 <= 0 on section 3.1's arc); `mixtures.mixture_weights` says
what is.

Shapes: E experts.
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

from dpalign.run.modelfolder import CONFIG, INDEX, TEMPLATE, WEIGHTS, weights_files
from dpalign.train.checkpoint import Weights, require_alike

Array = NDArray[np.float64]

COPIED: Final = (
    *(CONFIG, "generation_config.json", TEMPLATE, "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
)
"""What a mixture takes from the first expert, beside the weights."""

MIXED: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types that are interpolated; tensors of any other must be equal in all experts."""


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
