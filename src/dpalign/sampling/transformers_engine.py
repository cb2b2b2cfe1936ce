"""Sampling with transformers, anywhere: each prompt is read once, its n answers decode side by side.

True sampling: every token is drawn from the whole softmax at the asked temperature (`generate` would
cut it to the 50 likeliest). The uniform behind each draw is keyed by the meaning of the answer and the
position of the token, so an answer does not depend on its neighbours in the batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizerBase

from dpalign.preference import rng_for
from dpalign.records import Message
from dpalign.sampling.engine import Answer, Request, require_room


@dataclass
class _Row:
    """An answer being decoded."""

    request: int
    uniforms: np.ndarray
    ids: list[int] = field(default_factory=list)
    finished: bool = False


class PromptReader:
    """A `Reader` on the tokenizer of a policy folder or hub name, without its weights."""

    def __init__(self, folder: str, *, trust_remote_code: bool = False) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        return prompt_ids(self.tokenizer, messages)

    def prompt_tokens(self, messages: Sequence[Message]) -> int:
        return len(self.prompt_ids(messages))


class TransformersEngine:
    """An `Engine` on a plain Hugging Face causal language model.

    Args:
        folder: a policy folder or hub name.
        rows: answers decoded side by side; a request's n answers stay together.
    """

    def __init__(self, folder: str, *, rows: int, dtype: str = "float32", trust_remote_code: bool = False) -> None:
        self.reader = PromptReader(folder, trust_remote_code=trust_remote_code)
        self.tokenizer = self.reader.tokenizer
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
        ).to(self.device)
        self.model.eval()
        self.rows = rows

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        return self.reader.prompt_ids(messages)

    def prompt_tokens(self, messages: Sequence[Message]) -> int:
        return self.reader.prompt_tokens(messages)

    def sample(self, requests: Sequence[Request], *, temperature: float, max_new_tokens: int) -> Iterator[list[Answer]]:
        """See `Engine.sample`. Batches are cut by the order of the requests alone.

        Raises:
            ValueError: a prompt leaves no room for an answer in the model's context.
        """
        prompts = [self.prompt_ids(request.messages) for request in requests]
        context = getattr(self.model.config, "max_position_embeddings", None)
        require_room(requests, prompts, max_new_tokens, context)
        start = 0
        while start < len(requests):
            end, rows = start, 0
            while end < len(requests) and (end == start or rows + requests[end].n <= self.rows):
                rows += requests[end].n
                end += 1
            yield from self._batch(requests[start:end], prompts[start:end], temperature, max_new_tokens)
            start = end

    @torch.inference_mode()
    def _batch(
        self, requests: Sequence[Request], prompts: Sequence[list[int]], temperature: float, max_new_tokens: int
    ) -> list[list[Answer]]:
        rows = [
            _Row(i, rng_for(*request.key, sample).random(max_new_tokens))
            for i, request in enumerate(requests)
            for sample in range(request.n)
        ]
        cache, mask_BT, logits_BV = self._prefill(prompts)
        owner_R = torch.tensor([row.request for row in rows], device=self.device)
        cache.batch_select_indices(owner_R)
        mask_RT, logits_RV = mask_BT[owner_R], logits_BV[owner_R]
        position_R = mask_RT.sum(dim=1)
        eos = self.tokenizer.eos_token_id
        alive = rows
        for step in range(max_new_tokens):
            token_R = draw(logits_RV, np.array([row.uniforms[step] for row in alive]), temperature)
            for row, token in zip(alive, token_R.tolist(), strict=True):
                row.ids.append(token)
                row.finished = token == eos
            going = [i for i, row in enumerate(alive) if not row.finished]
            if not going or step + 1 == max_new_tokens:
                break
            if len(going) < len(alive):
                keep = torch.tensor(going, device=self.device)
                cache.batch_select_indices(keep)
                token_R, mask_RT, position_R = token_R[keep], mask_RT[keep], position_R[keep]
                alive = [alive[i] for i in going]
            mask_RT = torch.cat([mask_RT, mask_RT.new_ones(len(alive), 1)], dim=1)
            logits_RV = self.model(
                input_ids=token_R[:, None],
                attention_mask=mask_RT,
                position_ids=position_R[:, None],
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
            position_R = position_R + 1
        answers: list[list[Answer]] = [[] for _ in requests]
        for row in rows:
            ids = row.ids[:-1] if row.finished else row.ids
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            answers[row.request].append(Answer(text, len(row.ids), row.finished))
        return answers

    def _prefill(self, prompts: Sequence[list[int]]) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
        """Read each prompt once, left-padded: the cache, the mask and the logits of the first new token."""
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        ids_BT = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=self.device)
        mask_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        cache = DynamicCache(config=self.model.config)
        logits = self.model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=(mask_BT.cumsum(dim=1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return cache, mask_BT, logits


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """A prompt as a policy reads it, up to where its answer begins; the chat template writes all special tokens."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def draw(logits_RV: torch.Tensor, uniform_R: np.ndarray, temperature: float) -> torch.Tensor:
    """One token a row by inversion: the first whose cumulative probability exceeds the row's uniform.

    Temperature 0 takes the likeliest token.
    """
    if temperature == 0:
        return logits_RV.argmax(dim=-1)
    cumulative_RV = torch.softmax(logits_RV.double() / temperature, dim=-1).cumsum(dim=-1)
    threshold_R1 = torch.from_numpy(uniform_R).to(cumulative_RV)[:, None] * cumulative_RV[:, -1:]
    return torch.searchsorted(cumulative_RV, threshold_R1, right=True).squeeze(1).clamp(max=logits_RV.shape[1] - 1)
