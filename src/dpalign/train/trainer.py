"""The skeleton of every training: context, arguments, resuming, progress, processes, the loss curve and the export.

A training builds its rows (`dataset.py`) and its trainer (SFT, DPO, GRPO, the reward model's), and hands both to
`train`.
"""

import json
import logging
import math
import os
import shutil
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Final

import datasets
import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from torch.distributed import fsdp
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging as transformers_logging

from dpalign.engines.forged import Guard
from dpalign.engines.loading import load_whole
from dpalign.engines.tokens import counting_marks, end_ids, guard_of
from dpalign.runs.environment import first_process
from dpalign.runs.errors import naming
from dpalign.runs.ledger import sync, sync_tree
from dpalign.runs.modelfolder import Kind
from dpalign.runs.progress import Progress
from dpalign.runs.stopping import Stopped, deferred, stop_requested
from dpalign.train.dataset import Row, Rows
from dpalign.train.knobs import Kernels, ReportTo, Training, require_package

log = logging.getLogger(__name__)

OPTIMIZERS: Final = {"adamw": "adamw_torch_fused", "rmsprop": "rmsprop"}
"""The recipe's names of optimizers, in transformers' names."""
CHECKPOINTING: Final = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
"""The name of the switch that trades time for memory; transformers 5.23 changed it."""
CURVE_POINTS: Final = 200
"""A loss curve has at most this many points."""
Curve = dict[str, list[float]]


@dataclass(frozen=True)
class RunContext:
    """The settings that a stage gives to any training."""

    start: str
    """The model to train, a folder or hub name; "" for one from scratch."""
    training: Training
    tokenizer: PreTrainedTokenizerBase
    output: Path
    """The plain checkpoint folder that the training leaves."""
    seed: int
    resume: Path
    """Scratch folder: an interrupted training continues from it to the same bytes."""
    dtype: str = "float32"
    """The type that the training computes in, and that of the exported weights."""
    trust_remote_code: bool = False
    kernels: Kernels = field(default_factory=Kernels)
    report_to: ReportTo = "none"
    """The tracker that follows the training live."""
    logs: Path | None = None
    """Folder for TensorBoard's events. Without one they go to `resume`, and are deleted with it."""
    name: str = "training"
    """The stage, as progress and trackers show it."""


@dataclass(frozen=True)
class Outcome:
    """The counts and the losses of a training, its resumes included."""

    rows: int
    too_long: int
    tokens: int
    updates: int
    loss: float
    """The mean over all updates."""
    curve: Curve
    """See `curve_of`."""


def logging_marks(rows: Iterable[Row], context: RunContext, guard: Guard | None = None) -> Iterator[Row]:
    """Yield the rows, in one pass; after the last, log how many hold a chat's marks as text."""
    guard = guard or guard_of(context.tokenizer)
    return counting_marks(rows, guard, partial(log.warning, "%s: %s", context.name))


def training_dtype(dtype: str, lora_rank: int) -> str:
    """The type of the weights that a training loads: float32, since AdamW's small steps are lost in bfloat16 weights.

    bfloat16 has 8 bits. Next to a weight of 0.02 the nearest values are 1e-4 away, and a step of 1e-5 rounds to none.
    Under a LoRA the loaded weights do not change and keep their type; the LoRA's own are float32.
    """
    return dtype if lora_rank else "float32"


def load_model(kind: Kind, context: RunContext, frozen: bool = False, **more: Any) -> PreTrainedModel:
    """Load the model to train.

    Args:
        frozen: the model is read and not trained, so its weights may have any type.
        more: see `load_whole`.

    Raises:
        ValueError: see `load_whole`.
    """
    quiet()
    with Progress(f"{context.name}: loading {context.start}"):
        model = load_whole(
            kind,
            context.start,
            dtype=context.dtype if frozen else training_dtype(context.dtype, context.training.lora_rank),
            trust_remote_code=context.trust_remote_code,
            **more,
        )
    if model.can_generate():  # the ends of an answer, for sampling while training and for readers of the checkpoint
        ends = end_ids(context.tokenizer, model.generation_config)
        model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends
    return model


def arguments(context: RunContext) -> dict[str, Any]:
    """The arguments that every trainer shares, in transformers' names.

    With dtype bfloat16 the trainer computes by autocast, over weights of `training_dtype`.

    Raises:
        ValueError: the batch does not divide into micro-batches over the processes; the tracker is not installed.
    """
    quiet()
    training = context.training
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    accumulate, remainder = divmod(training.batch, training.micro_batch * processes)
    if remainder or not accumulate:
        raise ValueError(
            f"batch {training.batch} is not a multiple of micro_batch {training.micro_batch} x {processes} processes"
        )
    if context.report_to != "none":
        require_package(context.report_to, f'report_to = "{context.report_to}"')
    if context.logs:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(context.logs)
    on_gpu, bf16 = torch.cuda.is_available(), context.dtype == "bfloat16"
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if bf16 else "no"  # overrides launch.config
    return {
        "output_dir": str(context.resume),
        "run_name": context.name,
        "report_to": context.report_to,
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
        "save_total_limit": 2,  # the older is read if the newer is damaged
        "seed": context.seed,
        "data_seed": context.seed,
        "disable_tqdm": True,
        # Each update's loss by itself: a mean over several would depend on where a training resumed.
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # the filter would log the mean of other losses in place of a NaN
        "use_cpu": not on_gpu,
        "bf16": bf16,
        CHECKPOINTING: on_gpu,
        "dataloader_pin_memory": on_gpu,
    }


def quiet() -> None:
    """Silence the bars of datasets, transformers and TRL: the stages show their own progress."""
    os.environ["TQDM_DISABLE"] = "1"  # the switch that TRL's DPO trainer reads
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # TRL's own use of it
    warnings.filterwarnings("ignore", "`use_liger_kernel=True` is deprecated", FutureWarning)  # until TRL 2
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def wants_whole_logits(model: PreTrainedModel) -> bool:
    """Whether a loss should take whole logits of some positions: without a GPU, if the model can select positions.

    TRL computes logits in tiles, which saves GPU memory. Without a GPU the tiles cover every position. Models with
    code of their own may be unable to select.
    """
    return "logits_to_keep" in signature(model.forward).parameters and not torch.cuda.is_available()


def lora(rank: int, task: str = "CAUSAL_LM") -> LoraConfig | None:
    """LoRA on every linear layer; None trains all weights. A classifier's new head is trained in full."""
    if not rank:
        return None
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )


# Training


def train(trainer: Trainer, rows: Rows, context: RunContext) -> Outcome:
    """Train, write a plain checkpoint to the context's output, and delete the training's own checkpoints."""
    model = fit(trainer)
    export(model, context, whole_weights(trainer))
    return finish(trainer, rows)


def fit(trainer: Trainer) -> PreTrainedModel:
    """Train in memory, from the last checkpoint if there is one; returns the model with its LoRA merged.

    Raises:
        Stopped: SIGTERM has come; a checkpoint of the current update is written.
        ValueError: a loss is not a finite number; names the stage and the update.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(shown := ProgressCallback(trainer.args.run_name))
    trainer.add_callback(StopWhereNothingIsLeft())
    trainer.add_callback(StopAtNoNumber())
    trainer.add_callback(KeepCheckpoints())
    require_spread(trainer)
    resume = Path(trainer.args.output_dir)
    try:
        with deferred(), suppress(NothingLeft), float32_sums(trainer), naming(resume):
            trainer.train(resume_from_checkpoint=last_checkpoint(resume))
    finally:
        shown.close()
    model: PreTrainedModel = trainer.model
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def finish(trainer: Trainer, rows: Rows) -> Outcome:
    """Delete the checkpoints of a training whose model is exported; returns its outcome."""
    wait_for_all()
    if first_process():
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    state = trainer.state
    return Outcome(
        rows=len(rows.rows),
        too_long=rows.too_long,
        tokens=math.ceil((state.epoch or 0.0) * rows.tokens),
        updates=state.global_step,
        loss=mean_loss(trainer),
        curve=curve_of(state.log_history),
    )


def mean_loss(trainer: Trainer) -> float:
    """The mean loss over all updates and processes."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return math.fsum(losses) / len(losses)


def curve_of(log_history: Sequence[Mapping[str, float]], *more: str) -> Curve:
    """The loss as a curve of at most CURVE_POINTS points: lists of one length by `step`, `loss` and `learning_rate`.

    A point is the mean over a fixed number of updates, up to its step; the last point may have fewer. Its learning rate
    is that of its last update.

    Args:
        more: other names of the trainer's log, averaged like the loss: "reward".
    """
    updates = [entry for entry in log_history if "loss" in entry]
    width = max(1, -(-len(updates) // CURVE_POINTS))
    points = [updates[i : i + width] for i in range(0, len(updates), width)]
    curve: Curve = {"step": [point[-1]["step"] for point in points]}
    for name in ("loss", *more):
        curve[name] = [_figure(math.fsum(entry[name] for entry in point) / len(point)) for point in points]
    curve["learning_rate"] = [_figure(point[-1]["learning_rate"]) for point in points]
    return curve


def _figure(number: float) -> float:
    return float(f"{number:.6g}")


def last_checkpoint(resume: Path) -> str | None:
    """The newest readable checkpoint of an interrupted training; None without one."""
    newest_first = sorted(resume.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for path in newest_first:
        reason = _damage(path)
        if reason is None:
            return str(path)
        if first_process():
            log.warning("%s cannot be read (%s); an earlier checkpoint is taken, or the start", path, reason)
    return None


def _damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be read; None if it can. The Trainer writes its own state last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        names = [path.name for path in checkpoint.rglob("*")]
        for part in ("model", "optim", "rng_state"):
            if not any(part in name for name in names):
                return f"{part} is missing"
        for path in checkpoint.iterdir():
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):  # reads the header, and compares the file's size with it
                    pass
            elif path.suffix in (".pt", ".pth", ".bin") and (name := zipfile.ZipFile(path).testzip()):
                return f"{path.name}: {name} is damaged"
    except Exception as error:  # the readers may raise any error on damaged bytes
        return f"{type(error).__name__}: {error}"
    return None


class ProgressCallback(TrainerCallback):
    """Shows how many updates are done, and how long the others will take."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.progress: Progress | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress = Progress(f"{self.name}: update", state.max_steps, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.progress:
            self.progress.update(state.global_step)

    def close(self) -> None:
        if self.progress:
            self.progress.close()


class NothingLeft(Exception):
    """All updates were made earlier: the last checkpoint is the trained model."""


class StopWhereNothingIsLeft(TrainerCallback):
    """Ends a training that resumes from its last update; the Trainer itself would make one more within an epoch."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            raise NothingLeft


class KeepCheckpoints(TrainerCallback):
    """Syncs each checkpoint to disk while the previous one exists. After SIGTERM it saves one and ends the training."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if asked_of_any(args.device):
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        sync_tree(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        sync(Path(args.output_dir))
        if asked_of_any(args.device):
            if first_process():
                log.warning("ended by SIGTERM after update %d; its checkpoint is kept", state.global_step)
            raise Stopped


class StopAtNoNumber(TrainerCallback):
    """Ends a training whose loss is NaN or infinite, at that update: its weights are lost."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise ValueError(
                f"{args.run_name}: the loss of update {state.global_step} is {loss}; lower its learning_rate "
                f"({args.learning_rate:g}), or look for odd rows in its data"
            )


# Several processes


def asked_of_any(device: torch.device) -> bool:
    """Whether SIGTERM has come to any of a training's processes: all of them must write the same checkpoint."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return stop_requested()
    any_asked = torch.tensor([int(stop_requested())], device=device)
    torch.distributed.all_reduce(any_asked, torch.distributed.ReduceOp.MAX)
    return bool(any_asked.item())


def wait_for_all() -> None:
    """Wait until all processes of a training have come here."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def leave_processes() -> None:
    """Destroy the process group of a training, once all processes have come here.

    Its threads would otherwise run while the interpreter ends, and may abort a process that has finished.
    """
    wait_for_all()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def require_spread(trainer: Trainer) -> None:
    """Check that a training uses the processes and the sharing that it was launched with.

    Raises:
        ValueError: it uses fewer processes, or not the FSDP or DeepSpeed of its configuration: accelerate silently does
            either on a machine without GPUs. Or a LoRA's model is shared.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if trainer.args.world_size != launched:
        raise ValueError(f"{launched} processes were launched, and the training knows {trainer.args.world_size}")
    for variable, method, enabled in (
        ("ACCELERATE_USE_FSDP", "FSDP", trainer.is_fsdp_enabled),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed", trainer.is_deepspeed_enabled),
    ):
        if os.environ.get(variable) == "true" and not enabled:
            raise ValueError(f"launch.config asks for {method}, and accelerate left it out: it needs GPUs")
        if isinstance(trainer.model, PeftModel) and enabled:
            raise ValueError(
                "a LoRA is merged into whole weights: use it with launcher torchrun, without launch.config"
            )


@contextmanager
def float32_sums(trainer: Trainer) -> Iterator[None]:
    """Let FSDP2 sum gradients over processes in float32, and round neither rewards nor labels.

    For a bfloat16 training accelerate asks FSDP2 for bfloat16 throughout: weights, sums, inputs and outputs. Here
    only the gathered weights are bfloat16. A reward model's head, which is a few vectors, is gathered in float32.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2 or plugin.mixed_precision_policy is None:
        yield
        return
    plugin.mixed_precision_policy = replace(
        plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
    )
    model, head, shard = trainer.model, getattr(trainer.model, "score", None), fsdp.fully_shard

    def head_first(module: Any, **options: Any) -> Any:
        if module is model and head is not None:
            shard(head, **options | {"mp_policy": fsdp.MixedPrecisionPolicy()})
        return shard(module, **options)

    fsdp.fully_shard = head_first  # accelerate has one policy for all parts, and looks up this name when it shards
    try:
        yield
    finally:
        fsdp.fully_shard = shard


def whole_weights(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """Gather the weights of a model that several processes share; None if each process holds the whole model."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return None
    model = trainer.model if trainer.is_fsdp_enabled else trainer.deepspeed
    gathered: dict[str, torch.Tensor] = trainer.accelerator.get_state_dict(model)
    return gathered


def export(model: PreTrainedModel, context: RunContext, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write a plain checkpoint: safetensors, config, tokenizer and chat template, and nothing else.

    Only the first of several processes writes; the others wait for it.

    Args:
        state: the weights, if the model holds only a part of them.

    Raises:
        ValueError: a weight is not a finite number; names the stage and the tensor.
    """
    output, dtype = context.output, context.dtype
    if first_process():
        weights, stored = model.state_dict() if state is None else state, getattr(torch, dtype)
        # Gathered, tied weights are copies: only the model's own list tells them from separate weights.
        cast = {
            name: x.to("cpu", stored if x.is_floating_point() else x.dtype)
            for name, x in weights.items()
            if name not in model.all_tied_weights_keys
        }
        for name, x in cast.items():
            if not x.isfinite().all():
                raise ValueError(
                    f"{context.name}: after its last update {name} holds NaN or infinite weights, and is not written; "
                    f"lower its learning_rate ({context.training.learning_rate:g})"
                )
        beside = output.with_name(f".{output.name}.partial")
        shutil.rmtree(beside, ignore_errors=True)
        model.config.use_cache = True
        with naming(output):
            model.save_pretrained(beside, state_dict=cast)
            model.config.dtype = dtype
            model.config.save_pretrained(beside)
            context.tokenizer.save_pretrained(beside)
            sync_tree(beside)
        shutil.rmtree(output, ignore_errors=True)
        beside.rename(output)
        sync(output.parent)
    wait_for_all()
