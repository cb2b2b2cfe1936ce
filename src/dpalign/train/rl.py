"""Reinforcement learning on v . r(x, y): at one fixed direction, in place of Table 1's PPO, or at each prompt's own.

TRL no longer has PPO. Its online trainers keep PPO's objective (the expected reward of sampled answers, clipped steps,
a KL divergence from SFT). In place of PPO's value network they use the other answers to the same prompt: GRPO their
mean and spread, RLOO the mean of all but one. A function of ours computes the reward, Eq. 2's v . r(x, y). TRL itself
would read only the first head of a reward model.

Shapes: N answers, H heads, K objectives, V directions.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from numpy.typing import NDArray
from torch.nn import functional
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy

from dpalign.engines.engine import require_room
from dpalign.engines.tokens import PromptReader, prompt_ids
from dpalign.paper.direction import rng_for
from dpalign.paper.objectives import Objective, read_objectives
from dpalign.rows import Message
from dpalign.train.dataset import Rows
from dpalign.train.trainer import (
    Curve,
    RunContext,
    arguments,
    curve_of,
    load_model,
    lora,
    train,
    wants_whole_logits,
)

Array = NDArray[np.float64]
Scores = Callable[[Sequence[tuple[list[Message], str]]], NDArray[np.floating[Any]]]
"""A `Scorer`'s function: from prompts with their answers to rewards (N, H)."""
Worth = Callable[[Array, Array], Array]
"""From rewards (N, H) and directions (V, K) to what each answer is worth at each direction, in points: (V, N)."""
Reward = Callable[..., list[float]]
Config: TypeAlias = GRPOConfig | RLOOConfig
Prompt = TypeVar("Prompt")

SPREAD: Final = 25.0
"""Points that one unit of KL divergence is weighed against: about a standard deviation of the rewards."""


@dataclass(frozen=True)
class Reinforcement:
    """The counts and the curve of a training, over all processes and resumes."""

    sampled: int
    """Tokens of the answers, each one's end of text included."""
    scored: int
    """Answers."""
    trained: int
    """Tokens of the answers and of their prompts."""
    cut: int
    """Answers that were cut before they ended."""
    curve: Curve
    """See `trainer.curve_of`; beside the loss the mean `reward`, the `kl` divergence a token, and the `tokens` of an
    answer."""


def prompts_in_order(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """Return `count` prompts in the order of training: all once, then all again in another order."""
    rounds = [rng_for(seed, "rl", i).permutation(len(prompts)) for i in range(math.ceil(count / len(prompts)))]
    return [prompts[i] for i in np.concatenate(rounds)[:count]]


def scalar_reward(
    scores: Scores,
    heads: Sequence[str],
    objectives: Sequence[Objective],
    v_K: Array,
    reader: PromptReader,
) -> Reward:
    """Return Eq. 2 at a fixed direction, for prompts that state none; see `directional_reward`."""
    rated = directional_reward(scores, lambda r_NH, v_VK: v_VK @ read_objectives(r_NH, heads, objectives).T, reader)

    def reward(prompts: Sequence[list[Message]], completion_ids: Sequence[list[int]], **_: Any) -> list[float]:
        return rated(asked=prompts, v=[v_K] * len(prompts), completion_ids=completion_ids)

    return reward


def directional_reward(
    scores: Scores, worth: Worth, reader: PromptReader, sound: Callable[[str], bool] = lambda text: True
) -> Reward:
    """Return Eq. 2 as the function that TRL calls: the reward of each answer at its own direction, in points.

    Beside the answers TRL passes the columns `asked`, the prompts as users wrote them, and `v`. An answer is read as
    the sampling stage reads it. Selection never keeps an empty or a cut answer. Here such an answer gets the least that
    its direction can give on the scale of 0-100, and no more than the worst of the others, over all processes. Raters
    have hardly seen such answers, so a reward model scores them by chance. If it likes them, a policy soon writes
    nothing else.

    Args:
        sound: whether an answer that is whole gets its own reward; otherwise it gets the least too.

    Raises (when called):
        ValueError: a score that is not a finite number; the message shows its answer.
    """

    def reward(
        asked: Sequence[list[Message]], v: Sequence[Sequence[float]], completion_ids: Sequence[list[int]], **_: Any
    ) -> list[float]:
        answers = [reader.answer(ids) for ids in completion_ids]
        pairs = [(prompt, answer.text) for prompt, answer in zip(asked, answers, strict=True)]
        v_NK = np.array(v, dtype=np.float64)
        reward_NH = np.asarray(scores(pairs), dtype=np.float64)
        kept_N = np.array([sound(answer.text) and answer.whole for answer in answers])
        everyones_NH = np.array(gather_object(reward_NH[kept_N].tolist())).reshape(-1, reward_NH.shape[1])
        worst_N = worth(everyones_NH, v_NK).min(axis=1, initial=np.inf)
        least_N = np.minimum(100 * np.minimum(v_NK, 0).sum(axis=1), worst_N)
        return [float(points) for points in np.where(kept_N, worth(reward_NH, v_NK).diagonal(), least_N)]

    return reward


def configuration(
    context: RunContext,
    *,
    samples: int,
    max_new_tokens: int,
    beta: float,
    algorithm: Literal["grpo", "rloo"] = "grpo",
    temperature: float = 1.0,
    knob: str = "rl",
) -> Config:
    """TRL's arguments: true sampling, fresh answers for each update, the prompts in the order they are given.

    Args:
        knob: the table of the recipe, for messages.

    Raises:
        ValueError: no number of updates, fewer than 2 samples, or a batch that holds no whole groups of answers.
    """
    training = context.training
    if training.steps < 1:
        raise ValueError(f"{knob}.training.steps is {training.steps}; reinforcement counts updates: give at least 1")
    if samples < 2:
        raise ValueError(
            f"{knob}.samples is {samples}; an answer is weighed against others to its prompt: give at least 2"
        )
    if training.batch % samples:
        raise ValueError(
            f"{knob}.training.batch {training.batch} is not a multiple of {knob}.samples {samples}; make it one"
        )
    shared = arguments(context) | {
        "num_generations": samples,
        "max_completion_length": max_new_tokens,
        "temperature": temperature,
        "top_k": 0,
        "top_p": 1.0,
        "shuffle_dataset": False,
        "trust_remote_code": context.trust_remote_code,  # for the reference model, which TRL loads itself
    }
    if algorithm == "grpo":
        return GRPOConfig(beta=beta, **shared)
    # RLOO subtracts the divergence from a reward in points. GRPO weighs it against a reward of unit spread.
    return RLOOConfig(beta=beta * SPREAD, normalize_advantages=True, **shared)


def reinforce(
    context: RunContext,
    prompts: Sequence[list[Message]],
    config: Config,
    reward: Reward,
    columns: Sequence[Mapping[str, Any]] = (),
    reference: str = "",
    knob: str = "rl",
) -> Reinforcement:
    """Train a model on its own answers to the prompts.

    Args:
        prompts: one for each group of answers, in order, for all updates.
        config: from `configuration`.
        reward: scores answers; see `scalar_reward`.
        columns: further values of each prompt, for the reward.
        reference: the model that the divergence is measured from; "" for the start.
        knob: the table of its settings, for messages.

    Raises:
        ValueError: a prompt and its answer may exceed the model's context; a score that is not a finite number.
    """
    set_seed(context.seed)
    model = load_model("policy", context)
    whole = wants_whole_logits(model)  # checked before LoRA wraps the model and hides its signature
    ids = [prompt_ids(context.tokenizer, messages) for messages in prompts]
    limit = getattr(model.config, "max_position_embeddings", None)
    require_room([repr(messages[-1]["content"][:80]) for messages in prompts], ids, config.max_completion_length, limit)
    beside = columns or [{}] * len(prompts)
    dataset = Dataset.from_list([{"prompt": prompt, **more} for prompt, more in zip(prompts, beside, strict=True)])
    if reference:
        model.config._name_or_path = reference  # where TRL loads its reference from
    trainer = (_Grpo if isinstance(config, GRPOConfig) else _Rloo)(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=dataset,
        processing_class=context.tokenizer,
        peft_config=lora(context.training.lora_rank),
    )
    trainer.whole_logits = whole
    try:
        train(trainer, Rows(dataset, 0, 0), context)
    except RuntimeError as error:  # torch's, if a policy's probabilities are not finite
        if "probability tensor contains" not in str(error):
            raise
        lower = f"lower {knob}.training.learning_rate ({context.training.learning_rate:g})"
        raise ValueError(f"{context.name}: after update {trainer.state.global_step} {error}; {lower}") from error
    return _account(trainer.state, config.generation_batch_size)


class _OwnPrompts:
    """A mix-in that reads prompts as sampling does. TRL would read special tokens in a user's text."""

    processing_class: Any

    def _tokenize_prompts(self, prompts: list[list[Message]]) -> tuple[Any, ...]:
        _, *others = super()._tokenize_prompts(prompts)  # type: ignore[misc]
        return [prompt_ids(self.processing_class, messages) for messages in prompts], *others


class _ReadTokens:
    """A mix-in that reads a micro-batch at its own width. TRL reads all at the width of the longest answer.

    Without a GPU it computes whole logits, only at the answers' positions. TRL's tiles save GPU memory, but
    without a GPU they cover every position, prompts and padding included.

    Shapes: N rows, B of them in a micro-batch, T tokens, S of them for answers, V the vocabulary.
    """

    whole_logits = False
    """Whether to compute whole logits."""
    temperature: float

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if compute_aux_loss or any(given is not None for given in images.values()):  # left to TRL
            both = compute_entropy, compute_aux_loss
            return super()._get_per_token_logps_and_entropies(  # type: ignore[misc,no-any-return]
                model, input_ids, attention_mask, logits_to_keep, batch_size, *both, **images
            )
        read = self._by_whole_logits if self.whole_logits else super()._get_per_token_logps_and_entropies  # type: ignore[misc]
        rows = batch_size or len(input_ids)
        parts: list[list[torch.Tensor]] = []
        for ids_BT, mask_BT in zip(input_ids.split(rows), attention_mask.split(rows), strict=True):
            first, *_, last = mask_BT.any(dim=0).nonzero().flatten().tolist()
            after, width_T = ids_BT.shape[1] - 1 - last, slice(first, last + 1)
            found = read(
                model, ids_BT[:, width_T], mask_BT[:, width_T], logits_to_keep - after, compute_entropy=compute_entropy
            )
            parts.append([functional.pad(x_BS, (0, after)) for x_BS in found if x_BS is not None])
        log_p_NS, *entropy_NS = (torch.cat(x) for x in zip(*parts, strict=True))
        return log_p_NS, entropy_NS[0] if entropy_NS else None, None

    def _by_whole_logits(
        self, model: torch.nn.Module, ids_BT: torch.Tensor, mask_BT: torch.Tensor, answers: int, compute_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        out = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, logits_to_keep=answers + 1)
        logits_BSV, chosen_BS = out.logits[:, :-1] / self.temperature, ids_BT[:, -answers:]
        if not compute_entropy:
            return selective_log_softmax(logits_BSV, chosen_BS), None, None
        return *selective_log_softmax_and_entropy(logits_BSV, chosen_BS, entropy_requires_grad=False), None


class _Grpo(_OwnPrompts, _ReadTokens, GRPOTrainer):  # type: ignore[misc]
    pass


class _Rloo(_OwnPrompts, _ReadTokens, RLOOTrainer):  # type: ignore[misc]
    pass


def _account(state: Any, batch: int) -> Reinforcement:
    """Sum up the trainer's log of each update; its means are over all processes."""
    updates = [
        {"kl": 0.0, **entry, "tokens": entry["completions/mean_length"]}  # without a reference there is no divergence
        for entry in state.log_history
        if "loss" in entry
    ]
    return Reinforcement(
        sampled=sum(round(update["tokens"] * batch) for update in updates),
        scored=batch * len(updates),
        trained=state.num_input_tokens_seen,
        cut=sum(round(update["completions/clipped_ratio"] * batch) for update in updates),
        curve=curve_of(updates, "reward", "kl", "tokens"),
    )
