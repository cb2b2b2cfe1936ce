"""Faster code for the same computation, where a GPU has it: `[kernels]` of a recipe."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal


@dataclass(frozen=True)
class Kernels:
    """What fine-tuning computes with. Results differ by rounding alone: a change redoes nothing that is done."""

    attention: Literal["sdpa", "flash_attention_2"] = "sdpa"
    """Attention (paper silent). torch's own needs a mask for packed rows, of the square of `context`. Zephyr's recipe
    has flash_attention_2, which needs none and takes any `micro_batch` (NVIDIA GPUs; package flash-attn)."""
    liger: bool = False
    """Liger's fused norms, rotary embeddings and MLPs (paper silent; GPUs; package liger-kernel). The loss is computed
    in chunks, without all logits in memory, with or without."""

    def require(self, on_gpu: bool) -> None:
        """ValueError where what is asked for cannot run here: says what is missing, and what to do."""
        for asked, knob, module, package in (
            (
                self.attention == "flash_attention_2",
                'kernels.attention = "flash_attention_2"',
                "flash_attn",
                "flash-attn",
            ),
            (self.liger, "kernels.liger = true", "liger_kernel", "liger-kernel"),
        ):
            if not asked:
                continue
            if not on_gpu:
                raise ValueError(f"{knob} needs a GPU, and this machine has none; leave it at its default")
            if find_spec(module) is None:
                raise ValueError(f"{knob} needs {package}, which is not installed: pip install {package}")
