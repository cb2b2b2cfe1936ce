"""Four trainings, in as many processes as there are: SFT, packed SFT, a reward model and DPO, from one tiny model.

python spread_work.py START OUT DTYPE      alone
torchrun ... spread_work.py START OUT DTYPE      several; the models and OUT/losses.json are the first one's
torchrun ... spread_work.py START OUT DTYPE killed      until the first of the trainings that was not killed before has
                                                        made three of its five updates: there its last process is
torchrun ... spread_work.py START OUT DTYPE watched     the reward model alone; OUT/watched-RANK.json are the types of
                                                        what was computed and sent
"""

import json
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dpalign.rewards import model as reward_model
from dpalign.runs.environment import first_process
from dpalign.runs.launch import configuration
from dpalign.train.knobs import Training
from dpalign.train.trainer import leave_processes
from tiny import changed
from trainings import HEADS, rated, run

TRAINING = Training(
    learning_rate=1e-3,
    warmup_steps=1,
    steps=5,
    save_every=2,
    batch=2,
    micro_batch=1,
    context=96,
    packing=False,
    loss_on="answer",
)


def sharing() -> dict[str, str]:
    """What accelerate tells two processes that are to share one model (FSDP2), which it refuses to tell on a CPU."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    given = launch_command_parser().parse_args(["--use_fsdp", "script"])
    for name, value in load_config_from_file(str(configuration("fsdp2"))).fsdp_config.items():
        setattr(given, name, value)
    given.num_processes, given.num_machines, given.mixed_precision, given.dynamo_backend = 2, 1, "bf16", "no"
    given.use_cpu, given.num_cpu_threads_per_process, given.debug = False, 1, False
    told = {name: value for name, value in prepare_multi_gpu_env(given).items() if name.startswith(("FSDP", "ACCEL"))}
    assert told["ACCELERATE_USE_FSDP"] == "true"
    return told


def share_on_a_cpu() -> None:
    """Let accelerate shard a model over processes without GPUs: it leaves FSDP out there, though torch has it."""
    from accelerate.state import DistributedType, PartialState

    init = PartialState.__init__

    def started(self: PartialState, *args: object, **options: object) -> None:
        init(self, *args, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = started


def be_killed(out: Path) -> None:
    """Let the last process be killed after a training's third update, once in each; OUT/steps-... are those it made."""
    from dpalign.train.trainer import ProgressCallback

    def on_step_end(_: Any, args: Any, state: Any, *__: Any, **___: Any) -> None:
        if args.process_index == args.world_size - 1:
            steps = out / f"steps-{Path(args.output_dir).name}"
            made = [*(steps.read_text().split() if steps.exists() else []), str(state.global_step)]
            steps.write_text(" ".join(made))
            if made == ["1", "2", "3"]:
                os.kill(os.getpid(), signal.SIGKILL)

    ProgressCallback.on_step_end = on_step_end  # type: ignore[method-assign]


LABEL = 57.58
"""A label that bfloat16 rounds to 57.5."""


def watch(start: str, out: Path, dtype: str) -> None:
    """Train a reward model, and keep the types of its head, its rewards, its loss, and of what processes send."""
    types: dict[str, set[str]] = defaultdict(set)

    def noting(name: str, function: Callable[..., Any], sent: Callable[[Any], torch.Tensor]) -> Callable[..., Any]:
        def noted(*given: Any, **named: Any) -> Any:
            result = function(*given, **named)
            types[name].add(str(sent([*given, *named.values(), result]).dtype))
            return result

        return noted

    def head(module: torch.nn.Module, given: tuple[torch.Tensor], result: torch.Tensor) -> None:
        if isinstance(module, torch.nn.Linear) and module.out_features == len(HEADS):
            types["head"].add(str(module.weight.dtype))
            types["rounded rewards"].add(str(bool((result == result.bfloat16()).all())))
        elif isinstance(module, torch.nn.Linear) and torch.is_grad_enabled():
            types["other weights"].add(str(module.weight.dtype))

    def loss_of(reward_BH: torch.Tensor, target_BH: torch.Tensor, normalize: Any) -> torch.Tensor:
        types["labels"].update(str(round(label, 4)) for label in target_BH[~target_BH.isnan()].tolist())
        return masked_mse(reward_BH, target_BH, normalize)

    torch.nn.modules.module.register_module_forward_hook(head)  # type: ignore[arg-type]
    masked_mse, reward_model.masked_mse = reward_model.masked_mse, loss_of
    distributed: Any = torch.distributed
    sums = noting("sums", distributed.reduce_scatter_single, lambda given: next(filter(torch.is_tensor, given)))
    distributed.reduce_scatter_single = sums
    trainer: Any = reward_model.RewardTrainer
    trainer.compute_loss = noting("loss", trainer.compute_loss, lambda given: given[-1])
    rows = [rated("name salt.", "salt is white. " * i, LABEL, None, None) for i in range(1, 5)]
    run("reward", Path(start), out / "reward", TRAINING, rows=rows, told={"dtype": dtype, "resume": out / "r"})
    rank = os.environ["RANK"]
    (out / f"watched-{rank}.json").write_text(json.dumps({name: sorted(found) for name, found in types.items()}))
    leave_processes()


def main(start: str, out: Path, dtype: str) -> None:
    packed = changed(TRAINING, packing=True, loss_on="text", context=64)
    trainings: dict[str, Any] = {
        "sft": ("sft", TRAINING, {}),
        "packed": ("sft", packed, {}),
        "reward": ("reward", TRAINING, {"lm_loss": 0.1}),
        "dpo": ("dpo", TRAINING, {"beta": 0.1}),
    }
    figures = {}
    for i, (name, (kind, training, own)) in enumerate(trainings.items(), start=1):
        if not (out / name).exists():
            told = {"dtype": dtype, "seed": 3, "resume": out / f"r{i}"}
            outcome = asdict(run(kind, Path(start), out / name, training, told=told, **own))
            curve = outcome.pop("curve")
            figures[name] = outcome | {"last loss": curve["loss"][-1]}
    if first_process():
        (out / "losses.json").write_text(json.dumps(figures))
    leave_processes()


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        share_on_a_cpu()
    if sys.argv[4:] == ["killed"]:
        be_killed(Path(sys.argv[2]))
    do = watch if sys.argv[4:] == ["watched"] else main
    do(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
