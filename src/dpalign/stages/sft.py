"""Supervised fine-tuning on chats (section 3.1; Zephyr's)."""

from dpalign.chat import PromptStyle
from dpalign.rows import CONVERSATIONS, read_rows
from dpalign.stages.stage import Job, chat_read, model_read, stage
from dpalign.stages.training import train_policy
from dpalign.train.knobs import Training


class SFT(Training):
    """Supervised fine-tuning on chats (section 3.1; Zephyr's)."""

    prompt: PromptStyle = "own"
    """How chats are written for SFT, and for models without a dial that start from it. "own": by [model] chat, or by a
    checkpoint's own template. "zephyr-sft": with BOS, and with an empty system turn if there is no system message, as
    Zephyr's SFT was trained. "zephyr-dpo": the same without BOS."""


@stage(
    reads=lambda r: (r.seed, r.sft, r.model.base, *chat_read(r), *model_read(r)),
    inputs=("data",),
    optional=("base",),
    several=True,
    trains=lambda r: r.sft,
    cost=lambda costs, step: costs.train(step, costs.sizes.chats, costs.sizes.chat),
)
def sft(job: Job) -> None:
    """Fine-tune the base model on chats."""
    start = str(job.inputs["base"] / "model") if "base" in job.inputs else job.recipe.model.source
    chats = job.inputs["data"] / "chats"
    if not job.recipe.sft.checkpoint and not chats.exists():
        raise ValueError("no chats to fine-tune on: set data.sft, or name a finished model in sft.checkpoint")
    rows = [] if job.recipe.sft.checkpoint else read_rows(chats, CONVERSATIONS)
    train_policy(job, start, rows, job.recipe.sft, style=job.recipe.sft.prompt)
