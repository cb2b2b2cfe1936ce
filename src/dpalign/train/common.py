"""What every trainer here shares: arguments, LoRA, progress, export."""

import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import datasets
import torch
from peft import LoraConfig, PeftModel
from torch.utils.data import Sampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.utils import logging as transformers_logging

from dpalign.paper.direction import rng_for
from dpalign.train.knobs import Training

OPTIMIZERS: Final = {"adamw": "adamw_torch_fused", "rmsprop": "rmsprop"}
"""By the recipe's names, in transformers'."""


@dataclass(frozen=True)
class Fitted:
    """What a training did."""

    rows: int
    too_long: int
    tokens: int
    updates: int
    loss: float
    """The mean over its updates; in a training that was resumed, over those since."""


@dataclass(frozen=True)
class Trained:
    """A trained model in memory, and what its training did."""

    model: PreTrainedModel
    state: dict[str, torch.Tensor] | None
    """Its whole weights, where processes share it (`whole_weights`)."""
    tokens: int
    updates: int
    loss: float


def training_dtype(dtype: str, lora_rank: int) -> str:
    """The type of the weights that a training loads: float32, since AdamW's small steps are lost in bfloat16 weights.

    bfloat16 has 8 bits: next to a weight of 0.02 the nearest others are 1e-4 away, and a step of 1e-5 rounds to none.
    Under a LoRA the weights stand still and keep their type; its own are float32.
    """
    return dtype if lora_rank else "float32"


def arguments(training: Training, seed: int, dtype: str) -> dict[str, Any]:
    """The arguments that every trainer of this package shares, in transformers' names.

    Args:
        dtype: what is computed in; with bfloat16 by autocast, over weights of `training_dtype`.

    Raises:
        ValueError: the batch does not divide into micro-batches over the processes.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    accumulate, remainder = divmod(training.batch, training.micro_batch * processes)
    if remainder or not accumulate:
        raise ValueError(
            f"batch {training.batch} is not a multiple of micro_batch {training.micro_batch} x {processes} processes"
        )
    on_gpu = torch.cuda.is_available()
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if dtype == "bfloat16" else "no"  # over launch.config's own
    return {
        "optim": OPTIMIZERS[training.optimizer],
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.schedule,
        "warmup_steps": training.warmup_steps,
        "weight_decay": training.weight_decay,
        "num_train_epochs": training.epochs,
        "max_steps": training.steps or -1,
        "per_device_train_batch_size": training.micro_batch,
        "gradient_accumulation_steps": accumulate,
        "save_strategy": "steps",
        "save_steps": training.save_every,
        "save_total_limit": 1,
        "seed": seed,
        "data_seed": seed,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "use_cpu": not on_gpu,
        "bf16": dtype == "bfloat16",
        "activation_checkpointing": on_gpu,
        "dataloader_pin_memory": on_gpu,
    }


def quiet() -> None:
    """No bars of datasets, transformers and TRL: the stages say how far they are."""
    os.environ["TQDM_DISABLE"] = "1"  # what TRL's DPO trainer asks
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # TRL's own use of it
    warnings.filterwarnings("ignore", "`use_liger_kernel=True` is deprecated", FutureWarning)  # until TRL 2
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def require_weights(folder: Path) -> None:
    """ValueError unless a folder holds a model's configuration and safetensors."""
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: a checkpoint folder needs config.json and *.safetensors; it holds no weights")


def last_checkpoint(resume: Path) -> str | None:
    """The newest whole checkpoint that an interrupted training left, if any."""
    newest_first = sorted(resume.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    return next((str(path) for path in newest_first if _is_whole(path)), None)


def _is_whole(checkpoint: Path) -> bool:
    """Whether its writing was carried through: the Trainer writes its own state last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True


def lora(rank: int, task: str) -> LoraConfig | None:
    """LoRA on every linear layer; None trains all weights. A task's new head is trained in full."""
    if not rank:
        return None
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )


def first_process() -> bool:
    """Whether this is the first of a training's processes, which alone writes."""
    return os.environ.get("RANK", "0") == "0"


def wait_for_all() -> None:
    """Let no process of a training go on before all have come here."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def require_spread(trainer: Trainer) -> None:
    """Check that a training is spread over processes as it was launched.

    Raises:
        ValueError: over fewer processes, or without the sharing that its configuration asks for: accelerate does either
            without a word on a machine without GPUs. Or a LoRA whose model is shared.
    """
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if trainer.args.world_size != asked:
        raise ValueError(f"{asked} processes were launched, and the training knows {trainer.args.world_size}")
    for variable, what, there in (
        ("ACCELERATE_USE_FSDP", "FSDP", trainer.is_fsdp_enabled),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed", trainer.is_deepspeed_enabled),
    ):
        if os.environ.get(variable) == "true" and not there:
            raise ValueError(f"launch.config asks for {what}, and accelerate left it out: it needs GPUs")
    if isinstance(trainer.model, PeftModel) and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError("a LoRA is merged into whole weights: use it with launcher torchrun, without launch.config")


def mean_loss(trainer: Trainer, own: float) -> float:
    """The loss over all processes: what a Trainer reports is the first one's."""
    found: float = trainer.accelerator.gather(torch.tensor([own], device=trainer.accelerator.device)).mean().item()
    return found


def whole_weights(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """The weights of a model that several processes share, gathered by all of them; None where each holds it whole."""
    if trainer.is_fsdp_enabled:
        gathered: dict[str, torch.Tensor] = trainer.accelerator.get_state_dict(trainer.model)
        return gathered
    if trainer.is_deepspeed_enabled:
        gathered = trainer.accelerator.get_state_dict(trainer.deepspeed)
        return gathered
    return None


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    dtype: str,
    state: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Leave a plain checkpoint: safetensors, config, tokenizer and chat template, and nothing else.

    Of several processes the first alone writes, and the others wait for it.

    Args:
        dtype: of the weights as stored.
        state: the weights, where the model has only a part of them.
    """
    if first_process():
        beside = output.with_name(f".{output.name}.partial")
        shutil.rmtree(beside, ignore_errors=True)
        model.config.use_cache = True
        weights = model.state_dict() if state is None else state
        stored = getattr(torch, dtype)
        tied = (
            model.all_tied_weights_keys
        )  # gathered, they are copies that nothing else tells from weights of their own
        cast = {
            name: x.to("cpu", stored if x.is_floating_point() else x.dtype)
            for name, x in weights.items()
            if name not in tied
        }
        model.save_pretrained(beside, state_dict=cast)
        model.config.dtype = dtype
        model.config.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        shutil.rmtree(output, ignore_errors=True)
        beside.rename(output)
    wait_for_all()


def forget(resume: Path) -> None:
    """Drop the checkpoints of a training that is through: once, and not under another process's hands."""
    wait_for_all()
    if first_process():
        shutil.rmtree(resume, ignore_errors=True)


class RowsByLength(Sampler[int]):
    """Rows of like length in each update, in an order that depends on the seed and the epoch alone.

    The Trainer's own order (`group_by_length`) is drawn from the process's generator: a training that resumes within
    its second epoch, or a later one, would go on in another order, and so would another number of processes.
    """

    def __init__(self, trainer: Trainer, lengths: Sequence[int]) -> None:
        self.trainer, self.lengths = trainer, lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        args = self.trainer.args
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        epoch = int(self.trainer.state.epoch or 0)
        seed = int(rng_for(args.data_seed, "order of rows", epoch).integers(2**62))
        yield from get_length_grouped_indices(self.lengths, batch, generator=torch.Generator().manual_seed(seed))


class ProgressCallback(TrainerCallback):
    """One line now and then: how far a training is, and how long it will still take."""

    def __init__(self, every_seconds: float = 10.0) -> None:
        self.every_seconds = every_seconds
        self.started = self.last = 0.0
        self.first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = self.last = time.monotonic()
        self.first_step = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        now = time.monotonic()
        if now - self.last < self.every_seconds or not state.is_world_process_zero:
            return
        self.last = now
        done = state.global_step - self.first_step
        left = (now - self.started) / done * (state.max_steps - state.global_step)
        sys.stderr.write(f"  update {state.global_step} of {state.max_steps}, {left:.0f} s to go\n")
