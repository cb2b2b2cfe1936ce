"""Scoring answers: by any Hugging Face sequence classifier (on transformers or vLLM), by a function, or by several.

Shapes: N answers, H heads. A scorer's rewards are raw; `CombinedScorer` turns those of several into points.
"""

import logging
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification

from dpalign.engines.loading import load_whole
from dpalign.engines.memory import in_halves
from dpalign.engines.vllm_engine import Vllm, show_progress
from dpalign.paper.prompts import RewardInput
from dpalign.rewards.functions import call, load_function
from dpalign.rewards.inputs import InputReader, TooLong
from dpalign.rewards.inputs import Pair as Pair
from dpalign.rewards.knobs import IDENTITY, Scale, numbered
from dpalign.rewards.scale import to_points
from dpalign.rewards.shared_prefix import cannot_share, score_shared
from dpalign.rows import prompt_id

log = logging.getLogger(__name__)

Array = NDArray[np.float32]


class Scorer(Protocol):
    """Rates answers on named heads."""

    @property
    def heads(self) -> Sequence[str]: ...

    def score(self, pairs: Sequence[Pair]) -> Array:
        """Rewards of each pair on each head: (N, H)."""


def require_finite(rewards_NH: Array, pairs: Sequence[Pair], source: str) -> Array:
    """Return the rewards; raise ValueError with the first answer whose reward is no finite number."""
    bad = np.argwhere(~np.isfinite(rewards_NH))
    if len(bad):
        n, h = bad[0]
        messages, answer = pairs[n]
        raise ValueError(
            f"{source}: head {h} scored {rewards_NH[n, h]} on answer {n} of {len(pairs)}: {answer[:80]!r}, to prompt "
            f"{prompt_id(messages)}; a reward must be a finite number"
        )
    return rewards_NH


def require_in_context(rows: Sequence[list[int]], pairs: Sequence[Pair], context: int | None, source: str) -> None:
    """Refuse an answer that is too long with its prompt.

    Raises:
        TooLong: shows the answer.
    """
    for n, ids in enumerate(rows):
        if context is not None and len(ids) > context:
            raise TooLong(
                f"{source}: answer {n} of {len(rows)} and its prompt are {len(ids)} tokens long, and the reward model "
                f"has room for {context}: {pairs[n][1][:80]!r}; take shorter prompts or answers "
                "(sampling.prompt_tokens, sampling.max_new_tokens)"
            )


def without_padding(ids: list[int], pad: int | None) -> list[int]:
    """Cut the pad tokens at the end: a classifier reads its score at the last other token."""
    end = len(ids)
    while end > 1 and ids[end - 1] == pad:
        end -= 1
    return ids[:end]


def head_names(config: PreTrainedConfig, unnamed: Sequence[str]) -> Sequence[str]:
    """Return a classifier's own head names; `unnamed` if it only numbers its heads, as the released model does."""
    own = [config.id2label[i] for i in range(config.num_labels)]
    return unnamed if numbered(own) and len(own) == len(unnamed) else own


def score_in_float32(model: PreTrainedModel) -> None:
    """Make a classifier's head compute in float32: bfloat16 rounds a reward of 70 to halves.

    Training and vLLM have a float32 head too.
    """
    head = getattr(model, "score", None)
    if isinstance(head, nn.Linear):
        head.float()
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


class ModelScorer:
    """A sequence classifier on transformers.

    If the model allows it, a prompt is read once for all its answers (`shared_prefix`). Else answers are scored in
    batches sorted by length. The order of the pairs changes a reward by rounding alone; the same pairs in the same
    order give the same bytes.

    Args:
        source: a folder or hub name.
        unnamed: head names for a model that only numbers its heads.
        template: the text that the model reads.
        batch_tokens: most tokens per forward; halved if memory runs out.

    Raises:
        ValueError: weights are missing (`load_whole`), or the model should read its own chat template and has none.
    """

    def __init__(
        self,
        source: str,
        unnamed: Sequence[str] = (),
        *,
        template: RewardInput,
        batch_tokens: int,
        dtype: str,
        share_prefix: bool = True,
        trust_remote_code: bool = False,
    ) -> None:
        self.unnamed = unnamed
        self.source, self.batch_tokens = source, batch_tokens
        self.tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        self.reader = InputReader(self.tokenizer, template, source)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_whole("reward model", source, dtype=dtype, trust_remote_code=trust_remote_code).to(
            self.device
        )
        self.model.eval()
        score_in_float32(self.model)
        text_config = self.model.config.get_text_config()
        self.pad: int | None = text_config.pad_token_id
        self.context: int | None = getattr(text_config, "max_position_embeddings", None)
        reason = cannot_share(self.model) if share_prefix else "reward.share_prefix is false"
        self.shares = reason is None
        if share_prefix and reason:
            log.warning("%s: the prompt is read again for each answer: %s", source, reason)

    @property
    def heads(self) -> Sequence[str]:
        return head_names(self.model.config, self.unnamed)

    def score(self, pairs: Sequence[Pair]) -> Array:
        """See `Scorer.score`.

        Raises:
            TooLong: an answer with its prompt exceeds the model's context.
            ValueError: a reward is no finite number; its answer is shown.
        """
        rows = [without_padding(self.reader.ids(pair), self.pad) for pair in pairs]
        require_in_context(rows, pairs, self.context, self.source)
        if not rows:
            return np.empty((0, self.model.config.num_labels), dtype=np.float32)
        keys = [self.reader.key(messages) for messages, _ in pairs] if self.shares else []

        def rewards(tokens: int) -> Array:
            if not self.shares:
                return self._score_apart(rows, tokens)
            shared: Array = score_shared(self.model, rows, keys, tokens).numpy()
            return shared

        what = f"{self.source}: forwards of {{}} tokens"
        rewards_NH, self.batch_tokens = in_halves(rewards, self.batch_tokens, what, least=max(map(len, rows)))
        return require_finite(rewards_NH, pairs, self.source)

    @torch.inference_mode()
    def _score_apart(self, rows: Sequence[list[int]], tokens: int) -> Array:
        """Score each row whole, in batches sorted by length with at most this many tokens."""
        rewards_NH = np.empty((len(rows), self.model.config.num_labels), dtype=np.float32)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        reads_last = isinstance(self.model, GenericForSequenceClassification)
        while order:
            width = len(rows[order[-1]])
            count = max(1, tokens // width) if reads_last or self.pad is not None else 1
            batch = order[-count:]
            del order[-len(batch) :]
            ids = torch.tensor([rows[i] + [self.pad or 0] * (width - len(rows[i])) for i in batch], device=self.device)
            length_B = torch.tensor([len(rows[i]) for i in batch], device=self.device)
            logits_BH = self._read_last(ids, length_B) if reads_last else self._read_whole(ids, length_B)
            rewards_NH[batch] = logits_BH.float().cpu().numpy()
        return rewards_NH

    def _read_last(self, ids: torch.Tensor, length_B: torch.Tensor) -> torch.Tensor:
        """Return the scores at each row's last token; under causal attention padding on the right needs no mask."""
        backbone = getattr(self.model, self.model.base_model_prefix)
        hidden_BTD = backbone(input_ids=ids, use_cache=False).last_hidden_state
        scores: torch.Tensor = self.model.score(hidden_BTD[torch.arange(len(ids), device=ids.device), length_B - 1])
        return scores

    def _read_whole(self, ids: torch.Tensor, length_B: torch.Tensor) -> torch.Tensor:
        """Return the scores of a model that reads them elsewhere, such as an encoder."""
        mask = torch.arange(ids.shape[1], device=ids.device) < length_B[:, None]
        scores: torch.Tensor = self.model(input_ids=ids, attention_mask=mask.long()).logits
        return scores


class FunctionScorer:
    """A Python function as a reward, named as module:function (`rewards.functions`).

    It sees the last user turn of each chat, and the answers.

    Raises:
        ValueError: there is no such function.
    """

    def __init__(self, source: str, heads: Sequence[str]) -> None:
        self.named, self.heads = f"function {source}", tuple(heads)
        self.function = load_function(source, self.named)

    def score(self, pairs: Sequence[Pair]) -> Array:
        """See `Scorer.score`.

        Raises:
            ValueError: the function fails, or returns another shape or a number that is not finite.
        """
        if not pairs:
            return np.empty((0, len(self.heads)), dtype=np.float32)
        prompts = [messages[-1]["content"] for messages, _ in pairs]
        answers = [answer for _, answer in pairs]
        return require_finite(call(self.function, prompts, answers, len(self.heads), self.named), pairs, self.named)


class CombinedScorer:
    """Several rewards as one: their heads side by side, in points.

    Args:
        heads: the heads of all parts, in order.
        parts: the scorers, each with its name in messages.
        scales: one map per head; None leaves the head raw.
    """

    def __init__(
        self, heads: Sequence[str], parts: Sequence[tuple[str, Scorer]], scales: Sequence[Scale | None]
    ) -> None:
        assert len(heads) == len(scales) == sum(len(scorer.heads) for _, scorer in parts)
        self.heads, self.parts = tuple(heads), parts
        self.scales = [scale or IDENTITY for scale in scales]

    def score(self, pairs: Sequence[Pair]) -> Array:
        """See `Scorer.score`; an error names the reward."""
        columns = []
        for named, scorer in self.parts:
            try:
                columns.append(scorer.score(pairs))
            except ValueError as error:
                raise type(error)(f"{named} {error}") from error
        return to_points(np.concatenate(columns, axis=1), self.scales).astype(np.float32)

    def close(self) -> None:
        """End the engines of the parts that have one."""
        for _, scorer in self.parts:
            if isinstance(scorer, VllmScorer):
                scorer.close()


class VllmScorer:
    """A sequence classifier on vLLM's pooling runner: the same folder and texts, and raw values.

    vLLM must be started with `classifies`. Its prefix cache reads a prompt once for neighbouring answers to it.

    Args:
        unnamed: head names for a model that only numbers its heads.
    """

    def __init__(self, vllm: Vllm, unnamed: Sequence[str] = (), *, template: RewardInput) -> None:
        self.vllm, self.close = vllm, vllm.close
        self.source = vllm.folder
        self.tokenizer = AutoTokenizer.from_pretrained(vllm.folder, trust_remote_code=vllm.trust_remote_code)
        self.reader = InputReader(self.tokenizer, template, vllm.folder)
        self.heads = head_names(vllm.config, unnamed)

    def score(self, pairs: Sequence[Pair]) -> Array:
        """See `Scorer.score`.

        Raises:
            TooLong: an answer with its prompt exceeds vLLM's context.
            ValueError: a reward is no finite number; its answer is shown.
        """
        pad = self.vllm.config.pad_token_id
        rows = [without_padding(self.reader.ids(pair), pad) for pair in pairs]
        require_in_context(rows, pairs, self.vllm.context, f"{self.source} on vLLM")
        rewards_NH = np.empty((len(rows), self.vllm.config.num_labels), dtype=np.float32)
        if rows:
            inputs = [{"prompt_token_ids": ids} for ids in rows]
            for n, output in enumerate(self.vllm.llm.classify(inputs, use_tqdm=show_progress())):
                rewards_NH[n] = output.outputs.probs
        return require_finite(rewards_NH, pairs, self.source)
