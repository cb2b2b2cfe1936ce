"""Scoring answers: our reward folder, any Hugging Face sequence classifier (on transformers or vLLM), or a function.

Shapes: N answers, H heads. Rewards are in the units the model was trained on, 0-100 for ours.
"""

import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from dpalign.engines.vllm_engine import Vllm, show_progress
from dpalign.paper.prompts import RewardTemplate, render_reward_input
from dpalign.rewards.shared_prefix import cannot_share, score_shared
from dpalign.rows import Message

log = logging.getLogger(__name__)

Array = NDArray[np.float32]
Pair = tuple[Sequence[Message], str]
"""A prompt and an answer to it."""


class Scorer(Protocol):
    """Rates answers on named heads."""

    @property
    def heads(self) -> Sequence[str]: ...

    def score(self, pairs: Sequence[Pair]) -> Array:
        """Rewards of each pair on each head: (N, H)."""


def require_finite(rewards_NH: Array, pairs: Sequence[Pair], source: str) -> Array:
    """The rewards; a ValueError shows the first answer whose reward is no finite number."""
    bad = np.argwhere(~np.isfinite(rewards_NH))
    if len(bad):
        n, h = bad[0]
        raise ValueError(
            f"{source}: head {h} scored {rewards_NH[n, h]} on answer {n} of {len(pairs)}: {pairs[n][1][:80]!r}; "
            "a reward must be a finite number"
        )
    return rewards_NH


def head_names(config: PreTrainedConfig, unnamed: Sequence[str]) -> Sequence[str]:
    """A classifier's own head names; `unnamed` if it only numbers its heads, as the released model does."""
    own = [config.id2label[i] for i in range(config.num_labels)]
    numbered = all(name == f"LABEL_{i}" for i, name in enumerate(own))
    return unnamed if numbered and len(own) == len(unnamed) else own


def score_in_float32(model: PreTrainedModel) -> None:
    """Let a classifier's head compute in float32: bfloat16 rounds a reward of 70 to halves.

    Training and vLLM have a float32 head too.
    """
    head = getattr(model, "score", None)
    if isinstance(head, nn.Linear):
        head.float()
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


class ModelScorer:
    """A sequence classifier on transformers.

    If the model allows it, a prompt is read once for all its answers (`shared_prefix`). Else answers are scored in
    batches sorted by length; right padding needs no mask under causal attention. The order of the pairs changes a
    reward by rounding alone; the same pairs in the same order give the same bytes.

    Args:
        source: a folder or hub name.
        unnamed: head names for a model that only numbers its heads.
        batch_tokens: tokens of a forward at most.

    Raises:
        ValueError: the model's pad token is missing, or is its end-of-text token.
    """

    def __init__(
        self,
        source: str,
        unnamed: Sequence[str] = (),
        *,
        template: RewardTemplate,
        batch_tokens: int,
        dtype: str,
        share_prefix: bool = True,
        trust_remote_code: bool = False,
    ) -> None:
        self.unnamed = unnamed
        self.source, self.template, self.batch_tokens = source, template, batch_tokens
        self.tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
        ).to(self.device)
        self.model.eval()
        score_in_float32(self.model)
        self.pad = self.model.config.pad_token_id
        if self.pad is None or self.pad == self.tokenizer.eos_token_id:
            raise ValueError(
                f"{source}: its pad token ({self.pad}) must be set and differ from the end-of-text token, or scores "
                "would be read at the wrong place; set config.pad_token_id to an unused token"
            )
        reason = cannot_share(self.model) if share_prefix else "reward.share_prefix is false"
        self.shares = reason is None
        if share_prefix and reason:
            log.warning("%s: the prompt is read anew for each answer: %s", source, reason)

    @property
    def heads(self) -> Sequence[str]:
        return head_names(self.model.config, self.unnamed)

    def score(self, pairs: Sequence[Pair]) -> Array:
        rows = [self.tokenizer(render_reward_input(*pair, self.template))["input_ids"] for pair in pairs]
        if self.shares:
            keys = [render_reward_input(messages, "", self.template) for messages, _ in pairs]
            rewards_NH: Array = score_shared(self.model, rows, keys, self.batch_tokens).numpy()
        else:
            rewards_NH = self._score_apart(rows)
        return require_finite(rewards_NH, pairs, self.source)

    @torch.inference_mode()
    def _score_apart(self, rows: Sequence[list[int]]) -> Array:
        """Each row whole, in batches sorted by length."""
        rewards_NH = np.empty((len(rows), self.model.config.num_labels), dtype=np.float32)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        while order:
            width = len(rows[order[-1]])
            batch = order[-max(1, self.batch_tokens // width) :]
            del order[-len(batch) :]
            ids = [rows[i] + [self.pad] * (width - len(rows[i])) for i in batch]
            logits = self.model(input_ids=torch.tensor(ids, device=self.device), use_cache=False).logits
            rewards_NH[batch] = logits.float().cpu().numpy()
        return rewards_NH


class FunctionScorer:
    """A Python function as a reward: `python:module:function`.

    It takes (prompts, responses), two lists of texts, and returns an (N, H) array.

    Raises:
        ValueError: there is no such function.
    """

    def __init__(self, source: str, heads: Sequence[str]) -> None:
        self.source, self.heads = source, tuple(heads)
        _, module, name = (*source.split(":", 2), "", "")[:3]
        try:
            self.function: Callable[[list[str], list[str]], Array] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{source}: {error}; name a function that Python can import, as python:module:function"
            ) from error

    def score(self, pairs: Sequence[Pair]) -> Array:
        prompts = [messages[-1]["content"] for messages, _ in pairs]
        rewards_NH = np.asarray(self.function(prompts, [answer for _, answer in pairs]), dtype=np.float32)
        if rewards_NH.shape != (len(pairs), len(self.heads)):
            raise ValueError(
                f"{self.source}: returned shape {rewards_NH.shape} for {len(pairs)} answers and {len(self.heads)} heads"
            )
        return require_finite(rewards_NH, pairs, self.source)


class VllmScorer:
    """A sequence classifier on vLLM's pooling runner: the same folder and texts, and raw values.

    vLLM must be started with `classifies`. Its prefix cache reads a prompt once for neighbouring answers to it.

    Args:
        unnamed: head names for a model that only numbers its heads.
    """

    def __init__(self, vllm: Vllm, unnamed: Sequence[str] = (), *, template: RewardTemplate) -> None:
        self.vllm, self.close = vllm, vllm.close
        self.source, self.template = vllm.folder, template
        self.tokenizer = AutoTokenizer.from_pretrained(vllm.folder, trust_remote_code=vllm.trust_remote_code)
        self.heads = head_names(vllm.config, unnamed)

    def score(self, pairs: Sequence[Pair]) -> Array:
        """See `Scorer.score`.

        Raises:
            ValueError: an answer is too long, or its reward is no number; it is shown.
        """
        rows = [self.tokenizer(render_reward_input(*pair, self.template))["input_ids"] for pair in pairs]
        for n, ids in enumerate(rows):
            if len(ids) > self.vllm.context:
                raise ValueError(
                    f"{self.source}: answer {n} of {len(rows)} and its prompt are {len(ids)} tokens, and vLLM has room "
                    f"for {self.vllm.context}: {pairs[n][1][:80]!r}; filter by length, or score with transformers "
                    "(engines.scoring)"
                )
        rewards_NH = np.empty((len(rows), self.vllm.config.num_labels), dtype=np.float32)
        if rows:
            inputs = [{"prompt_token_ids": ids} for ids in rows]
            for n, output in enumerate(self.vllm.llm.classify(inputs, use_tqdm=show_progress())):
                rewards_NH[n] = output.outputs.probs
        return require_finite(rewards_NH, pairs, self.source)
