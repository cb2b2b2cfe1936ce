"""Reinforcement of one scalar reward at one fixed direction, from SFT: what stands for Table 1's PPO.

TRL no longer has PPO. Its online trainers keep PPO's objective (the expected reward of sampled answers, clipped steps,
a KL divergence from SFT) and take the place of its value network with the other answers to the same prompt: GRPO with
their mean and spread, RLOO with the mean of all but one. The reward is Eq. 2's v . r(x, y), by a function of ours: of a
reward model with several heads TRL itself would read the first.

Shapes: N answers, H heads, K objectives.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, PrinterCallback, set_seed
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from dpalign.engines.transformers_engine import prompt_ids
from dpalign.paper.direction import rng_for
from dpalign.paper.objectives import Objective, read_objectives
from dpalign.paper.selection import scalarize
from dpalign.rewards.score import Scorer
from dpalign.rows import Message
from dpalign.stages.stage import Job
from dpalign.train.common import (
    ProgressCallback,
    arguments,
    export,
    forget,
    last_checkpoint,
    lora,
    quiet,
    require_spread,
    training_dtype,
    whole_weights,
)

if TYPE_CHECKING:
    from dpalign.stages.rl import RL

Array = NDArray[np.float64]
Reward = Callable[..., list[float]]
Config: TypeAlias = GRPOConfig | RLOOConfig

SPREAD: Final = 25.0
"""Points that one unit of KL divergence is weighed against: about a standard deviation of the rewards."""


@dataclass(frozen=True)
class Reinforced:
    """What a training did, over all processes and resumes."""

    sampled: int
    """Tokens of the answers, each one's end of text included."""
    scored: int
    """Answers."""
    trained: int
    """Tokens of the answers and of their prompts."""
    updates: list[dict[str, float]]
    """Of each update the mean reward, the KL divergence a token, the answers' mean length and how many were cut."""


def drawn(prompts: Sequence[list[Message]], count: int, seed: int) -> list[list[Message]]:
    """So many prompts in the order they are answered in: all once, then all again in another order."""
    rounds = [rng_for(seed, "rl", i).permutation(len(prompts)) for i in range(math.ceil(count / len(prompts)))]
    return [prompts[i] for i in np.concatenate(rounds)[:count]]


def scalar_reward(
    scorer: Scorer,
    heads: Sequence[str],
    objectives: Sequence[Objective],
    v_K: Array,
    tokenizer: PreTrainedTokenizerBase,
) -> Reward:
    """Eq. 2 at a fixed direction, in the form that TRL calls: v . r(x, y) of each answer, in points.

    An answer is read as the sampling stage reads it. What selection never keeps, an answer that says nothing or one
    that was cut, is worth the least that the direction can give on the scale of 0-100, and no more than the worst of
    the others. Raters have hardly seen either, and what a reward model makes of them is chance; where it likes them,
    a policy soon writes nothing else.

    Raises (when called):
        ValueError: a score that is not a finite number; the message shows its answer.
    """

    def reward(prompts: Sequence[list[Message]], completion_ids: Sequence[list[int]], **_: Any) -> list[float]:
        answers = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        reward_NH = scorer.score(list(zip(prompts, answers, strict=True)))
        reward_NK = read_objectives(reward_NH, heads, objectives)
        score_N = scalarize(reward_NK[None], v_K[None])[0]
        whole_N = [
            bool(answer.strip()) and ids[-1] == tokenizer.eos_token_id
            for answer, ids in zip(answers, completion_ids, strict=True)
        ]
        least = min([100 * np.minimum(v_K, 0).sum(), *score_N[whole_N]])
        scores: list[float] = np.where(whole_N, score_N, least).tolist()
        return scores

    return reward


def configuration(settings: "RL", max_new_tokens: int, seed: int, resume: Path, dtype: str = "float32") -> Config:
    """TRL's arguments: true sampling, fresh answers for each update, the prompts in the order they are given.

    Raises:
        ValueError: no number of updates, or a batch that holds no whole groups of answers.
    """
    training, samples = settings.training, settings.samples
    if training.steps < 1:
        raise ValueError(f"rl.training.steps is {training.steps}; reinforcement counts updates: give at least 1")
    if samples < 2:
        raise ValueError(f"rl.samples is {samples}; an answer is weighed against others to its prompt: give at least 2")
    if training.batch % samples:
        raise ValueError(f"rl.training.batch {training.batch} is not a multiple of rl.samples {samples}; make it one")
    shared = arguments(training, seed, dtype) | {
        "output_dir": str(resume),
        "num_generations": samples,
        "max_completion_length": max_new_tokens,
        "temperature": settings.temperature,
        "top_k": 0,
        "top_p": 1.0,
        "shuffle_dataset": False,
        "logging_strategy": "steps",  # into the trainer's state alone: what is counted outlives a kill
        "logging_steps": 1,
    }
    if settings.algorithm == "grpo":
        return GRPOConfig(beta=settings.beta, **shared)
    # RLOO takes the divergence from a reward in points, where GRPO weighs it against one of unit spread.
    return RLOOConfig(beta=settings.beta * SPREAD, normalize_advantages=True, **shared)


def reinforce(
    start: str,
    prompts: Sequence[list[Message]],
    output: Path,
    args: Config,
    reward: Reward,
    *,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    lora_rank: int = 0,
    trust_remote_code: bool = False,
) -> Reinforced:
    """Train the model `start` on its own answers to the prompts, and leave a plain checkpoint folder at `output`.

    Args:
        prompts: one a group of answers, in order, for all updates.
        args: its `output_dir` is a scratch folder; an interrupted call continues from it with the same result.
        reward: scores answers; see `scalar_reward`.

    Raises:
        ValueError: a prompt and its answer may exceed the model's context; a score that is not a finite number.
    """
    quiet()
    set_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(
        start, dtype=training_dtype(dtype, lora_rank), use_safetensors=True, trust_remote_code=trust_remote_code
    )
    _check_context(model.config, prompts, tokenizer, args.max_completion_length)
    args.trust_remote_code = trust_remote_code  # of the reference model, which is `start` again
    resume = Path(args.output_dir)
    trainer = (GRPOTrainer if isinstance(args, GRPOConfig) else RLOOTrainer)(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": messages} for messages in prompts]),
        processing_class=tokenizer,
        peft_config=lora(lora_rank, "CAUSAL_LM"),
        callbacks=[ProgressCallback()],
    )
    trainer.remove_callback(PrinterCallback)
    require_spread(trainer)
    trainer.train(resume_from_checkpoint=last_checkpoint(resume))
    trained = trainer.model.merge_and_unload() if lora_rank else trainer.model
    export(trained, tokenizer, output, dtype, whole_weights(trainer))
    forget(resume)
    return _account(trainer.state, args.generation_batch_size)


def _check_context(config: Any, prompts: Sequence[list[Message]], tokenizer: PreTrainedTokenizerBase, new: int) -> None:
    context = getattr(config, "max_position_embeddings", None)
    longest = max(len(prompt_ids(tokenizer, messages)) for messages in prompts)
    if context and longest + new > context:
        raise ValueError(
            f"a prompt of {longest} tokens and {new} new ones exceed the model's context of {context}; "
            "lower sampling.prompt_tokens or sampling.max_new_tokens"
        )


def _account(state: Any, batch: int) -> Reinforced:
    """What the trainer's state kept of each update; its means are over all processes."""
    logs = [entry for entry in state.log_history if "reward" in entry]
    updates = [
        {
            "update": entry["step"],
            "reward": entry["reward"],
            "kl": entry.get("kl", 0.0),
            "tokens": entry["completions/mean_length"],
            "cut": round(entry["completions/clipped_ratio"] * batch),
        }
        for entry in logs
    ]
    return Reinforced(
        sampled=sum(round(update["tokens"] * batch) for update in updates),
        scored=batch * len(updates),
        trained=state.num_input_tokens_seen,
        updates=updates,
    )


def _count(job: Job, prompts: int, done: Reinforced) -> None:
    reached = min(prompts, done.scored // job.recipe.rl.samples)
    missed = {"not reached": prompts - reached} if reached < prompts else {}
    tally = job.work.tally
    tally.add(prompts, reached, missed, scored=done.scored, trained=done.trained)
    tally.sampled += done.sampled
    cut = sum(update["cut"] for update in done.updates)
    if cut:
        job.work.run.log(
            f"{cut} of {done.scored} answers were cut at sampling.max_new_tokens, and given the least reward"
        )
