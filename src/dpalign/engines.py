"""What draws answers and what scores them: the recipe's table [engines]. No torch here.

Either engine writes the same records. Scores agree within the arithmetic's rounding, greedy answers token for
token; sampled answers are other draws from the same distribution, so a change of the engine redoes a stage.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dpalign.recipe import Recipe

ROOM_FOR_LINES = 512
"""Tokens that a system line and the chat's own markup may add to a prompt (the longest published line takes 131)."""
PLENTY = 8192
"""Tokens of a prompt and its answer that vLLM makes room for where the model could hold more."""


@dataclass(frozen=True)
class Engines:
    """What draws answers and what scores them (paper silent on all of it)."""

    sampling: Literal["transformers", "vllm"] = "transformers"
    """Draws answers; vLLM needs dpalign[vllm], and is several times faster on a GPU."""
    scoring: Literal["transformers", "vllm"] = "transformers"
    """Scores answers with a reward model that is a folder or hub name; a `python:` reward is called all the same."""
    tensor_parallel: int = 1
    """GPUs that one vLLM engine is split over."""
    gpu_memory: float = 0.9
    """Share of each GPU that the vLLM engines of a stage may take together, weights and cache."""
    cpu_cache: float = 0.0
    """GiB of vLLM's key-value cache where there is no GPU; 0: what `sampling.rows` answers of full length need, up to a
    quarter of the memory."""
    eager: bool = False
    """Neither compile nor record CUDA graphs: vLLM starts a minute sooner and decodes slower. Always so without a
    GPU."""

    def __post_init__(self) -> None:
        if self.tensor_parallel < 1:
            raise ValueError(f"tensor_parallel must be at least 1, got {self.tensor_parallel}")
        if self.tensor_parallel > 1 and "vllm" not in (self.sampling, self.scoring):
            raise ValueError(
                f"tensor_parallel {self.tensor_parallel} splits vLLM engines, and none is asked for; "
                'set sampling or scoring to "vllm", or tensor_parallel to 1'
            )
        if not 0 < self.gpu_memory <= 1:
            raise ValueError(f"gpu_memory is a share of a GPU, above 0 and at most 1, got {self.gpu_memory}")
        if self.cpu_cache < 0:
            raise ValueError(f"cpu_cache is in GiB, 0 or more, got {self.cpu_cache}")


def on_transformers(recipe: "Recipe") -> "Recipe":
    """The recipe without vLLM: for a stage that trains in the same process, whose GPU is taken."""
    return replace(
        recipe, engines=replace(recipe.engines, sampling="transformers", scoring="transformers", tensor_parallel=1)
    )


def longest(context: int | None, prompt_tokens: int, max_new_tokens: int) -> int:
    """Tokens of a prompt and its answer that vLLM makes room for: the model's context, unless that is beyond need."""
    needed = max(PLENTY, prompt_tokens + ROOM_FOR_LINES + max_new_tokens)
    return min(context, needed) if context else needed
