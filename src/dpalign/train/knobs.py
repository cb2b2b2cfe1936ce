"""The knobs of all trainings: section 3.1's fine-tuning, and the kernels that compute it."""

from importlib.util import find_spec
from typing import Final, Literal, Self

from pydantic import Field, model_validator

from dpalign.runs.tables import ModelName, Table

ReportTo = Literal["none", "tensorboard", "wandb", "trackio"]
"""Trackers that can follow a training live, each a package of that name."""


class Kernels(Table):
    """The kernels of fine-tuning. Results differ only by rounding, so a change redoes no finished stage."""

    attention: Literal["sdpa", "flash_attention_2"] = "sdpa"
    """Attention (paper silent). For packed rows torch's own needs a mask as large as the square of `context`. Zephyr's
    recipe has flash_attention_2, which needs no mask and takes any `micro_batch` (NVIDIA GPUs; package flash-attn)."""
    liger: bool = False
    """Liger's fused norms, rotary embeddings and MLPs (paper silent; GPUs; package liger-kernel). With or without it,
    the loss is computed in chunks, so memory never holds all logits."""

    @property
    def packages(self) -> list[tuple[str, str]]:
        """The packages that these kernels need, and the knob that asks for each."""
        flash, liger = self.attention == "flash_attention_2", self.liger
        return [
            *([("flash-attn", 'kernels.attention = "flash_attention_2"')] if flash else []),
            *([("liger-kernel", "kernels.liger = true")] if liger else []),
        ]

    def require(self, on_gpu: bool) -> None:
        """Raise ValueError if these kernels cannot run here; it says what is missing, and what to do."""
        for package, knob in self.packages:
            if not on_gpu:
                raise ValueError(f"{knob} needs a GPU, and this machine has none; leave it at its default")
            require_package(package, knob)


EXTRAS: Final = {"vllm": "-e '.[vllm]'", "ray": "-e '.[ray]'"} | dict.fromkeys(
    ("torch", "transformers", "datasets", "accelerate", "peft", "trl"), "-e '.[train]'"
)
"""What pip installs for a package of one of our extras."""


def require_package(package: str, knob: str) -> None:
    """Raise ValueError if a package that a knob needs is not installed."""
    module = {"flash-attn": "flash_attn", "liger-kernel": "liger_kernel"}.get(package, package)
    if find_spec(module) is None:
        cure = f"pip install {EXTRAS.get(package, package)}"
        raise ValueError(f"{knob} needs {package}, which is not installed: {cure}")


class Training(Table):
    """Supervised fine-tuning, as section 3.1 does it for every t."""

    checkpoint: ModelName = ""
    """Take this model, a folder or hub name, instead of training one."""
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """Section 3.1 has AdamW. Zephyr's DPO was trained with RMSprop: its model card says Adam, but its authors say
    that the card is wrong (alignment-handbook, issue 43)."""
    learning_rate: float = Field(1e-5, gt=0, le=1)
    """The optimizer's peak (section 3.1)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate schedule (section 3.1)."""
    warmup_steps: int | float = Field(20, ge=0)
    """Updates of warm-up (section 3.1); below 1 they are a share of all updates."""
    epochs: float = Field(2.0, ge=0)
    """Passes over the rows (section 3.1)."""
    steps: int = Field(0, ge=0)
    """Updates, in place of epochs when above 0: small runs count updates."""
    batch: int = Field(64, ge=1)
    """Rows an update, over all processes (section 3.1)."""
    micro_batch: int = Field(1, ge=1)
    """Rows a forward. Without flash-attention a packed row is always alone in its forward: TRL joins a micro-batch into
    one long row, and its mask grows with the square of that length."""
    context: int = Field(4096, ge=1)
    """Tokens a row (section 3.1); a longer conversation is left out, and counted."""
    packing: bool = True
    """Several conversations a row, blind to each other (section 3.1; best-fit decreasing)."""
    loss_on: Literal["text", "answer"] = "text"
    """Section 3.1 optimises the loss "across the text corpus"; "answer" leaves prompts out of it."""
    weight_decay: float = Field(0.0, ge=0, le=1)
    """The optimizer's weight decay (paper silent)."""
    lora_rank: int = Field(0, ge=0)
    """Train a LoRA of this rank and merge it; 0 trains all weights (section 3.1)."""
    save_every: int = Field(500, ge=1)
    """Updates between the checkpoints that an interrupted training resumes from."""

    @model_validator(mode="after")
    def _updates_are_whole(self) -> Self:
        if self.batch % self.micro_batch:
            raise ValueError(
                f"batch is {self.batch}, and micro_batch {self.micro_batch}; give a batch that is a multiple of its "
                "micro-batch"
            )
        if not self.steps and not self.epochs:
            raise ValueError(f"{self.steps} steps and {self.epochs:g} epochs; give either above 0")
        return self
