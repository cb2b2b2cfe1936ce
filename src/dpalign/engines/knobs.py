"""The engines of a run and the model it starts from: the recipe's tables [engines] and [model]. No torch here.

Both engines write the same records. Scores agree within rounding, greedy answers agree token for token. Sampled answers
are other draws from the same distribution: a change of the engine redoes a stage.
"""

from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Final, Literal, Self

WORLD_BASE: Final = Path(str(files("dpalign.world").joinpath("base")))
"""The base model of the embedded world, installed with the package."""


@dataclass(frozen=True)
class Engines:
    """The engines that draw and score answers (paper silent on all of it)."""

    sampling: Literal["transformers", "vllm"] = "transformers"
    """Draws answers; vLLM needs dpalign[vllm], and is several times faster on a GPU."""
    scoring: Literal["transformers", "vllm"] = "transformers"
    """Scores answers with a reward model in a folder or on the hub. A `python:` reward needs no engine."""
    tensor_parallel: int = 1
    """GPUs that one vLLM engine is split over."""
    gpu_memory: float = 0.9
    """Share of each GPU for all vLLM engines of a stage, weights and cache."""
    cpu_cache: float = 0.0
    """GiB of vLLM's key-value cache without a GPU; 0: room for `sampling.rows` answers of full length, up to a quarter
    of the memory."""
    eager: bool = False
    """Neither compile nor record CUDA graphs: vLLM starts a minute sooner and decodes slower. Always so without a
    GPU."""

    def __post_init__(self) -> None:
        if self.tensor_parallel < 1:
            raise ValueError(f"tensor_parallel must be at least 1, got {self.tensor_parallel}")
        if self.tensor_parallel > 1 and "vllm" not in (self.sampling, self.scoring):
            raise ValueError(
                f"tensor_parallel {self.tensor_parallel} splits vLLM engines, and there is none; "
                'set sampling or scoring to "vllm", or tensor_parallel to 1'
            )
        if not 0 < self.gpu_memory <= 1:
            raise ValueError(f"gpu_memory is a share of a GPU, above 0 and at most 1, got {self.gpu_memory}")
        if self.cpu_cache < 0:
            raise ValueError(f"cpu_cache is in GiB, 0 or more, got {self.cpu_cache}")

    def on_transformers(self) -> Self:
        """The same without vLLM: for a stage that trains in the same process and needs the GPU's memory."""
        return replace(self, sampling="transformers", scoring="transformers", tensor_parallel=1)


@dataclass(frozen=True)
class Model:
    """The model that everything starts from."""

    base: str = "mistralai/Mistral-7B-v0.1"
    """A folder or hub name (section 3.1; Zephyr's base); "world" is the world's own, installed with this package;
    "" trains one from scratch ([pretrain])."""
    chat: Literal["zephyr", "world-v1"] = "zephyr"
    """The chat template of every policy (the released checkpoints' own)."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of stored weights, and of the arithmetic of sampling and scoring (paper silent; bfloat16 as in Zephyr's
    recipe). Training keeps float32 weights and computes in this type: AdamW's steps of 1e-5 are lost in bfloat16."""
    trust_remote_code: bool = False
    """Run code that a hub repository ships; the paper's models never need it."""

    @property
    def source(self) -> str:
        """Folder or hub name of the base model."""
        return str(WORLD_BASE) if self.base == "world" else self.base
