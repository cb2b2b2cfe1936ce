"""The engines that draw and score answers, and the model that a run starts from: the tables [engines] and [model].

Both engines write the same records. Scores agree within rounding, greedy answers agree token for token. Sampled answers
are other draws from the same distribution: a change of the engine redoes a stage.
"""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import Field, model_validator

from dpalign.chat import ChatStyle, Place, Switch
from dpalign.runs.tables import ModelName, Table

WORLD_BASE: Final = Path(str(files("dpalign.world").joinpath("base")))
"""The base model of the embedded world, installed with the package."""


class Engines(Table):
    """The engines that draw and score answers (paper silent on all of it)."""

    sampling: Literal["transformers", "vllm"] = "transformers"
    """Draws answers; vLLM needs the extra vllm, and is several times faster on a GPU."""
    scoring: Literal["transformers", "vllm"] = "transformers"
    """Scores answers with a reward model in a folder or on the hub. A Python function needs no engine."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs that one vLLM engine is split over."""
    gpu_memory: float = Field(0.9, gt=0, le=1)
    """Share of each GPU for all vLLM engines of a stage, weights and cache."""
    cpu_cache: float = Field(0.0, ge=0)
    """GiB of vLLM's key-value cache without a GPU; 0: room for `sampling.rows` answers of full length, up to a quarter
    of the memory."""
    eager: bool = False
    """Neither compile nor record CUDA graphs: vLLM starts a minute sooner and decodes slower. Always so without a
    GPU."""

    @model_validator(mode="after")
    def _something_is_split(self) -> Self:
        if self.tensor_parallel > 1 and "vllm" not in (self.sampling, self.scoring):
            raise ValueError(
                f"tensor_parallel {self.tensor_parallel} splits vLLM engines, and there is none; "
                'set sampling or scoring to "vllm", or tensor_parallel to 1'
            )
        return self

    def on_transformers(self) -> "Engines":
        """The same without vLLM: for a stage that trains in the same process and needs the GPU's memory."""
        return self.model_copy(update={"sampling": "transformers", "scoring": "transformers", "tensor_parallel": 1})


class Model(Table):
    """The model that everything starts from."""

    base: ModelName = "mistralai/Mistral-7B-v0.1"
    """A folder or hub name (section 3.1; Zephyr's base), which NAME@REVISION pins, as it does wherever a model or data
    set is named; "world" is the world's own, installed with this package; "" trains one from scratch ([pretrain])."""
    chat: ChatStyle = "zephyr"
    """The chat template of every policy: the released checkpoints' own, that of the world, or "model", which keeps the
    template that the model came with."""
    chat_kwargs: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """With "model": arguments of the model's own template, for every chat; Qwen3's {enable_thinking = false}, say."""
    place: Literal["", "system", "user"] = ""
    """With "model": where the dial's line stands. "" is the system message, where the model's template has one; "user"
    opens the first user's turn, which a small model obeys sooner (not in the paper)."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Weights as stored, sampled and scored with (paper silent; bfloat16 as in Zephyr's recipe). In training they are
    float32 and computed with in this type: AdamW's steps of 1e-5 are lost in bfloat16 weights."""
    trust_remote_code: bool = False
    """Run code that a hub repository ships; never needed for the paper's models."""

    @model_validator(mode="after")
    def _switches_have_a_template(self) -> Self:
        if self.chat_kwargs and self.chat != "model":
            raise ValueError(f'chat_kwargs {self.chat_kwargs} are arguments of a model\'s own template: chat = "model"')
        if self.place and self.chat != "model":
            raise ValueError(f'place is "{self.place}", in a model\'s own chat template: chat = "model"')
        return self

    @property
    def own_chat(self) -> Mapping[str, Switch] | None:
        """The arguments of the model's own chat template; None if it is not kept."""
        switches = self.chat_kwargs
        return switches if self.chat == "model" else None

    @property
    def dial_place(self) -> Place | None:
        """The place of the dial's line in the model's own chat template; None lets the template decide."""
        return self.place or None

    @property
    def source(self) -> str:
        """Folder or hub name of the base model."""
        return str(WORLD_BASE) if self.base == "world" else self.base
