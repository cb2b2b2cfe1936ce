"""Sampling with transformers, anywhere: each prompt is read once, its n answers decode side by side.

True sampling: every token is drawn from the whole softmax at the requested temperature (`generate` would cut it to the
50 likeliest). The uniform number of each draw is keyed by the meaning of the answer and the position of the token: an
answer does not depend on its neighbours in the batch.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from dpalign.chat import Switch
from dpalign.engines.decoding import CopyingDecoder, Decoder, SharedDecoder, batches, cannot_share, closing
from dpalign.engines.engine import Answer, Request, require_room
from dpalign.engines.tokens import PromptReader
from dpalign.paper.direction import rng_for

log = logging.getLogger(__name__)


@dataclass
class _Row:
    """An answer being decoded."""

    request: int
    uniforms: np.ndarray
    ids: list[int] = field(default_factory=list)
    finished: bool = False


class TransformersEngine:
    """An `Engine` on a plain Hugging Face causal language model.

    Args:
        folder: a policy folder or hub name.
        own_chat: see `PromptReader.load`.
        rows: answers decoded side by side; a request's n answers stay together.
        share_prefix: the answers to a prompt share its keys, if the model allows it; else each has a copy.
    """

    def __init__(
        self,
        folder: str,
        own_chat: Mapping[str, Switch] | None = None,
        *,
        rows: int,
        dtype: str = "float32",
        share_prefix: bool = True,
        trust_remote_code: bool = False,
    ) -> None:
        self.reader = PromptReader.load(folder, own_chat, trust_remote_code=trust_remote_code)
        self.tokenizer = self.reader.tokenizer
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
        ).to(self.device)
        self.model.eval()
        self.rows = rows
        reason = cannot_share(self.model) if share_prefix else "share_prefix is false"
        self.shares = reason is None
        if share_prefix and reason:
            log.warning("%s: each answer has a copy of its prompt: %s", folder, reason)

    def sample(self, requests: Sequence[Request], *, temperature: float, max_new_tokens: int) -> Iterator[list[Answer]]:
        """See `Engine.sample`. Prompts of similar length decode together.

        Raises:
            ValueError: a prompt leaves no room for an answer in the model's context.
        """
        prompts = [self.reader.prompt_ids(request.messages) for request in requests]
        context = getattr(self.model.config, "max_position_embeddings", None)
        require_room([request.key for request in requests], prompts, max_new_tokens, context)
        order = sorted(range(len(requests)), key=lambda i: len(prompts[i]))
        answers: list[list[Answer]] = [[] for _ in requests]
        for places in batches([requests[i].n for i in order], self.rows):
            batch = [order[place] for place in places]
            result = self._batch([requests[i] for i in batch], [prompts[i] for i in batch], temperature, max_new_tokens)
            for i, of_request in zip(batch, result, strict=True):
                answers[i] = of_request
        yield from answers

    @torch.inference_mode()
    def _batch(
        self, requests: Sequence[Request], prompts: Sequence[list[int]], temperature: float, max_new_tokens: int
    ) -> list[list[Answer]]:
        rows = [
            _Row(i, rng_for(*request.key, sample).random(max_new_tokens))
            for i, request in enumerate(requests)
            for sample in range(request.n)
        ]
        decoder = self._decoder(prompts, [row.request for row in rows])
        logits_RV = decoder.first()[[row.request for row in rows]]
        alive = rows
        for step in range(max_new_tokens):
            token_R = draw(logits_RV, np.array([row.uniforms[step] for row in alive]), temperature)
            for row, token in zip(alive, token_R.tolist(), strict=True):
                row.ids.append(token)
                row.finished = token in self.reader.ends
            # Finished rows leave the batch. The others keep their uniforms, so that no draw changes.
            order = closing([not row.finished for row in alive])
            if not order or step + 1 == max_new_tokens:
                break
            if len(order) < len(alive):
                decoder.keep(order)
                token_R, alive = token_R[order], [alive[i] for i in order]
            logits_RV = decoder.read(token_R)
        answers: list[list[Answer]] = [[] for _ in requests]
        for row in rows:
            answers[row.request].append(self.reader.answer(row.ids))
        return answers

    def _decoder(self, prompts: Sequence[list[int]], owner: Sequence[int]) -> Decoder:
        if self.shares:
            return SharedDecoder(self.model, prompts, owner)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.reader.ends[0]
        return CopyingDecoder(self.model, prompts, owner, pad)


def draw(logits_RV: torch.Tensor, uniform_R: np.ndarray, temperature: float) -> torch.Tensor:
    """One token a row by inversion: the first whose cumulative probability exceeds the row's uniform.

    Temperature 0 takes the likeliest token.
    """
    if temperature == 0:
        return logits_RV.argmax(dim=-1)
    scaled_RV = logits_RV.double() if temperature == 1 else logits_RV.double() / temperature
    cumulative_RV = torch.softmax(scaled_RV, dim=-1).cumsum_(dim=-1)
    threshold_R1 = torch.from_numpy(uniform_R).to(cumulative_RV)[:, None] * cumulative_RV[:, -1:]
    return torch.searchsorted(cumulative_RV, threshold_R1, right=True).squeeze(1).clamp(max=logits_RV.shape[1] - 1)
