"""What computes and what is computed with: GPUs by their data sheets, and the model that a recipe starts from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dpalign.engines.architecture import KNOWN, Architecture, read_architecture
from dpalign.paper.direction import name_hint
from dpalign.recipe import Recipe

GIB: Final = 2**30


@dataclass(frozen=True)
class Gpu:
    """A kind of device."""

    name: str
    tflops: float
    """Peak of dense bfloat16 products (no sparsity), in 10^12 a second."""
    gib: float
    """Memory."""
    gb_s: float
    """Bandwidth of its memory, 10^9 bytes a second."""


GPUS: Final[Mapping[str, Gpu]] = {
    gpu.name: gpu
    for gpu in (
        Gpu("A6000", 154.8, 48, 768),
        Gpu("A100", 312.0, 80, 2039),
        Gpu("H100", 989.0, 80, 3350),
        Gpu("H200", 989.0, 141, 4800),
        Gpu("L40S", 362.0, 48, 864),
        Gpu("RTX4090", 165.2, 24, 1008),
        Gpu("cpu", 0.15, 16, 30),  # two cores with AVX2, in float32
    )
}
"""By the makers' data sheets; the A6000 is the paper's."""


def architecture_of(recipe: Recipe) -> Architecture:
    """The model that a recipe starts from.

    Raises:
        ValueError: neither a folder with a configuration nor a known name.
    """
    if not recipe.model.base:
        own = recipe.pretrain
        return Architecture(
            "the recipe's own",
            vocabulary=own.vocabulary,
            hidden=own.hidden,
            layers=own.layers,
            heads=own.heads,
            kv_heads=max(1, own.heads // 2),
            head_dim=own.hidden // own.heads,
            intermediate=own.hidden * 5 // 2,
            tied=True,
        )
    source = recipe.model.source
    if (Path(source) / "config.json").is_file():
        return read_architecture(Path(source), recipe.model.base)
    if source not in KNOWN:
        raise ValueError(
            f"model.base {source!r} is no folder with a config.json, and its shape is not known here "
            f"({name_hint(source, list(KNOWN))}); name a local folder of the model"
        )
    return KNOWN[source]
