"""One small training of each kind on the tiny model, for the tests of the skeleton and of several processes."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer

from dpalign.rewards.model import train_reward_model
from dpalign.rows import prompt_id, user_prompt
from dpalign.train.dpo import optimise
from dpalign.train.knobs import Training
from dpalign.train.rl import Reinforcement, configuration, prompts_in_order, reinforce
from dpalign.train.sft import finetune
from dpalign.train.trainer import Outcome, RunContext, fit, mean_loss
from tiny import CHATS, chat

Kind = Literal["sft", "dpo", "reward", "grpo", "rloo"]
HEADS = ("helpfulness", "verbosity", "care")
SMALL = Training(
    learning_rate=1e-3,
    warmup_steps=0,
    steps=6,
    batch=4,
    micro_batch=2,
    context=64,
    packing=False,
    loss_on="answer",
    save_every=4,
)
ASKED = [user_prompt(text) for text in ("name fox.", "explain tea.", "name owl and rain.")]


def rated(question: str, answer: str, *labels: float | None) -> dict[str, Any]:
    """A row of `rows.RATED`."""
    messages = user_prompt(question)
    return {"prompt_id": prompt_id(messages), "messages": messages, "response": answer, "labels": list(labels)}


RATED = [
    rated("explain fox, tea and iron.", "fox is red. tea is hot. iron is hard.", 80.0, 40.0, None),
    rated("explain fox, tea and iron.", "fox is red.", 50.0, 15.0, None),
    rated("name owl and rain.", "owl is wise. rain is wet.", None, 30.0, 70.0),
    rated("name owl and rain.", "that is a good question.", 10.0, None, 30.0),
    rated("name salt.", "salt is white. salt is white. salt is white.", 60.0, 45.0, 20.0),
    rated("name salt.", "salt is red.", 20.0, 15.0, None),
]


def pair(question: str, chosen: str, rejected: str, system: str | None = None) -> dict[str, Any]:
    """A row of `rows.PAIRS`."""
    messages = chat(question, chosen, system)["messages"]
    row = {"prompt_id": prompt_id(messages), "messages": messages, "chosen": chosen, "rejected": rejected}
    return row | {"chosen_score": 80.0, "rejected_score": 20.0, "origin": "ratings"}


PAIRS = [
    pair("explain fox and tea.", "fox is red. tea is hot and helps people wake.", "fox is red."),
    pair("name owl and rain.", "owl is wise.", "owl is wise. rain is wet. rain is wet. rain is wet."),
    pair("explain rain.", "rain is wet.", "that is a good question.", system="be kind"),
    pair("name moon, tea and fox.", "tea is hot. fox is red and hunts mice.", "moon is hot."),
]
"""Four short pairs of unequal length; either side may be the longer."""
MANY_PAIRS = [
    pair(f"explain {a} and {b}.", f"{a} is red. {b} is hot.", f"{a} is red. " * (1 + i % 4))
    for i, (a, b) in enumerate(itertools.permutations(("fox", "tea", "iron", "owl"), 2))
]
"""Twelve pairs: three updates an epoch."""


def context(
    folder: Path, training: Training = SMALL, start: Path | str = "", tokens: Any = None, **changes: Any
) -> RunContext:
    """Seed 1, and scratch beside the folder that a training leaves."""
    tokens = AutoTokenizer.from_pretrained(start) if start and tokens is None else tokens
    return replace(RunContext(str(start), training, tokens, folder, seed=1, resume=folder.parent / "resume"), **changes)


def run(
    kind: Kind,
    start: Path,
    output: Path,
    training: Training = SMALL,
    *,
    rows: Sequence[Mapping[str, Any]] | None = None,
    told: Mapping[str, Any] | None = None,
    **own: Any,
) -> Outcome | Reinforcement:
    """Train `start` on the rows of its kind, and leave the model at `output`.

    Args:
        told: changes of the context.
        own: the kind's own knobs: beta, lm_loss.
    """
    how = context(output, training, start, **told or {})
    match kind:
        case "sft":
            return finetune(how, rows or CHATS)
        case "dpo":
            return optimise(how, rows or PAIRS, own.get("beta", 0.25))
        case "reward":
            own = {"template": "world-v1"} | own
            return train_reward_model(how, rows or RATED, HEADS, **own)
        case "grpo" | "rloo":
            own = {"samples": 2, "max_new_tokens": 8, "beta": 0.04} | own
            reward = own.pop("reward", lambda completion_ids, **_: [float(sum(ids)) for ids in completion_ids])
            prompts = prompts_in_order(ASKED, training.steps * training.batch // own["samples"], seed=1)
            config = configuration(how, algorithm=kind, **own)
            return reinforce(how, prompts, config, reward)


PLAIN_FOLDER = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
"""What a training leaves: no pickle, no trainer state."""


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


@dataclass(frozen=True)
class Update:
    """What one update did."""

    gradients: dict[str, torch.Tensor]
    forwards: list[dict[str, Any]]
    """What each training forward was given."""
    loss: float
    optimizer: type


def one_update(start: Path, trainer_of: Callable[[PreTrainedModel], Trainer]) -> Update:
    """Train a model in memory for one update, and watch it."""
    model = load(start)
    gradients: dict[str, torch.Tensor] = {}
    forwards: list[dict[str, Any]] = []
    optimizers: list[type] = []

    def before_step(optimizer: Any, *_: Any) -> None:
        optimizers.append(type(getattr(optimizer, "optimizer", optimizer)))
        gradients.update({name: weight.grad.clone() for name, weight in model.named_parameters()})

    def before_forward(_: Any, __: Any, given: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            forwards.append({name: x.clone() if torch.is_tensor(x) else x for name, x in given.items()})

    forward = model.register_forward_pre_hook(before_forward, with_kwargs=True)
    step = register_optimizer_step_pre_hook(before_step)
    try:
        trainer = trainer_of(model)
        fit(trainer)
    finally:
        forward.remove()
        step.remove()
    return Update(gradients, forwards, mean_loss(trainer), optimizers[-1])
