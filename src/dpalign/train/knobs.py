"""The knobs of all trainings: the optimizer's, faster code for the same computation, and live tracking."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

ReportTo = Literal["none", "tensorboard", "wandb", "trackio"]
"""Trackers that can follow a training live, each a package of that name."""


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
        """ValueError where these kernels cannot run here: says what is missing, and what to do."""
        chosen = {
            ("flash-attn", 'kernels.attention = "flash_attention_2"'): self.attention == "flash_attention_2",
            ("liger-kernel", "kernels.liger = true"): self.liger,
        }
        for package, knob in (key for key, wanted in chosen.items() if wanted):
            if not on_gpu:
                raise ValueError(f"{knob} needs a GPU, and this machine has none; leave it at its default")
            require_package(package, knob)


def require_package(package: str, knob: str) -> None:
    """ValueError where a package that a knob needs is not installed."""
    module = {"flash-attn": "flash_attn", "liger-kernel": "liger_kernel"}.get(package, package)
    if find_spec(module) is None:
        raise ValueError(f"{knob} needs {package}, which is not installed: pip install {package}")


@dataclass(frozen=True)
class Training:
    """Supervised fine-tuning, as section 3.1 does it for every t."""

    checkpoint: str = ""
    """Take this model, a folder or hub name, instead of training one."""
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """Section 3.1 has AdamW. Zephyr's DPO was trained with RMSprop: its model card says Adam, its authors that the card
    is wrong (alignment-handbook, issue 43)."""
    learning_rate: float = 1e-5
    """The optimizer's peak (section 3.1)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate schedule (section 3.1)."""
    warmup_steps: int | float = 20
    """Updates of warm-up (section 3.1); below 1 they are a share of all updates."""
    epochs: float = 2.0
    """Passes over the rows (section 3.1)."""
    steps: int = 0
    """Updates, in place of epochs when above 0: small runs count updates."""
    batch: int = 64
    """Rows an update, over all processes (section 3.1)."""
    micro_batch: int = 1
    """Rows a forward. Packed rows stand alone without flash-attention, whatever this says: TRL makes one long row of a
    micro-batch, and its mask grows with the square of that."""
    context: int = 4096
    """Tokens a row (section 3.1); a longer conversation is left out, and counted."""
    packing: bool = True
    """Several conversations a row, blind to each other (section 3.1; best-fit decreasing)."""
    loss_on: Literal["text", "answer"] = "text"
    """Section 3.1 optimises the loss "across the text corpus"; "answer" leaves prompts out of it."""
    weight_decay: float = 0.0
    """The optimizer's (paper silent)."""
    lora_rank: int = 0
    """Train a LoRA of this rank and merge it; 0 trains all weights (section 3.1)."""
    save_every: int = 500
    """Updates between the checkpoints that an interrupted training resumes from."""
