"""Four trainings, in as many processes as there are: SFT, packed SFT, a reward model and DPO, from one tiny model.

python spread_work.py START OUT DTYPE      alone
torchrun ... spread_work.py START OUT DTYPE      several; the models and OUT/losses.json are the first one's
torchrun ... spread_work.py START OUT DTYPE killed      until the first of the trainings that was not killed before has
                                                        made three of its five updates: there its last process is
"""

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpalign.train.knobs import Training
from dpalign.train.trainer import first_process, leave_processes
from tiny import changed
from trainings import run

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
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
