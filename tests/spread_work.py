"""Three trainings, in as many processes as there are: SFT, a reward model and DPO, from one tiny model.

python spread_work.py START OUT      alone
torchrun ... spread_work.py START OUT      several; OUT/losses.json and the models are the first one's
"""

import json
import os
import sys
from pathlib import Path

from transformers import AutoTokenizer

from dpalign.recipe import DPO, Reward, Training
from dpalign.training.common import first_process
from dpalign.training.dpo import optimise
from dpalign.training.sft import finetune

TRAINING = Training(
    learning_rate=1e-3, warmup_steps=1, steps=5, batch=2, micro_batch=1, context=96, packing=False, loss_on="answer"
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


def main(start: str, out: Path, dtype: str) -> None:
    from dpalign.reward.model import train_reward_model
    from test_dpo import ROWS
    from test_reward_model import HEADS, RATED
    from tiny import CHATS

    tokens = AutoTokenizer.from_pretrained(start)
    shared = {"tokenizer": tokens, "dtype": dtype, "seed": 3}
    packed = Training(**vars(TRAINING) | {"packing": True, "loss_on": "text", "context": 64})
    settings = Reward(template="world-v1", lm_loss=0.1, training=TRAINING)
    losses = {
        "sft": finetune(start, CHATS, out / "sft", TRAINING, resume=out / "r1", **shared),
        "packed": finetune(start, CHATS, out / "packed", packed, resume=out / "r2", **shared),
        "reward": train_reward_model(start, RATED, HEADS, out / "reward", settings, resume=out / "r3", **shared),
        "dpo": optimise(start, ROWS, out / "dpo", DPO(training=TRAINING), resume=out / "r4", **shared),
    }
    if first_process():
        (out / "losses.json").write_text(json.dumps({name: vars(fitted) for name, fitted in losses.items()}))


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        share_on_a_cpu()
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
