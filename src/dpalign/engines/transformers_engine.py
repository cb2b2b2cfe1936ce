"""Sampling with transformers, anywhere: each prompt is read once, its n answers decode side by side.

Waiting prompts take the rows of answers that have ended.

True sampling: every token is drawn from the whole softmax at the requested temperature (`generate` would cut it to the
50 likeliest). The uniform number of each draw is keyed by the answer's meaning and the token's position, so an answer
does not depend on its neighbours in the batch.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch

from dpalign.chat import Place, PromptStyle, Switch
from dpalign.engines.decoding import CopyingDecoder, Decoder, SharedDecoder, cannot_share
from dpalign.engines.engine import BROKEN, Answer, Request, require_room
from dpalign.engines.loading import load_whole
from dpalign.engines.memory import in_halves
from dpalign.engines.tokens import PromptReader
from dpalign.paper.direction import rng_for

log = logging.getLogger(__name__)

SHARE: Final = 8
"""New answers wait until they fill one row in SHARE: a prefill takes about as long as a step."""
LIKELIEST: Final = 1e-6
"""Below this temperature the likeliest token is taken, which is the limit: dividing logits by it would overflow."""


@dataclass(frozen=True)
class _Unit:
    """Answers to a request that are decoded together."""

    request: int
    samples: Sequence[int]

    def parts(self, size: int) -> Iterator["_Unit"]:
        """The same answers in units of at most `size`."""
        for start in range(0, len(self.samples), size):
            yield _Unit(self.request, self.samples[start : start + size])


@dataclass
class _Row:
    """An answer being decoded."""

    request: int
    sample: int
    uniforms: np.ndarray
    ids: list[int] = field(default_factory=list)


class TransformersEngine:
    """An `Engine` on a plain Hugging Face causal language model.

    Args:
        folder: a policy folder or hub name.
        own_chat, style, place: see `PromptReader.load`.
        rows: answers decoded side by side, halved if memory runs out. A request's n answers stay together.
        share_prefix: the answers to a prompt share its keys, if the model allows it; else each has a copy.

    Raises:
        ValueError: weights that `load_whole` refuses; layers that keep something other than keys and values.
    """

    def __init__(
        self,
        folder: str,
        own_chat: Mapping[str, Switch] | None = None,
        style: PromptStyle = "own",
        *,
        rows: int,
        dtype: str = "float32",
        place: Place | None = None,
        share_prefix: bool = True,
        trust_remote_code: bool = False,
    ) -> None:
        self.folder = folder
        self.reader = PromptReader.load(folder, own_chat, style, place=place, trust_remote_code=trust_remote_code)
        self.tokenizer = self.reader.tokenizer
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_whole("policy", folder, dtype=dtype, trust_remote_code=trust_remote_code).to(self.device)
        self.model.eval()
        self.rows = rows
        self.halved = False
        """Whether memory ran out once: from then on a request's answers may be split too."""
        reason = cannot_share(self.model) if share_prefix else "share_prefix is false"
        self.shares = reason is None
        self._decoder()  # refuses a model that it cannot decode, before the first request
        if share_prefix and reason:
            log.warning("%s: each answer has a copy of its prompt: %s", folder, reason)

    def sample(self, requests: Sequence[Request], *, temperature: float, max_new_tokens: int) -> Iterator[list[Answer]]:
        """See `Engine.sample`. The shortest prompts come first, so that those of similar length decode together.

        If memory runs out, it goes on with half the rows and keeps the finished answers.

        Raises:
            ValueError: a prompt leaves no room for an answer in the model's context; no memory for one answer; logits
                from which no token can be drawn.
        """
        prompts = [self.reader.prompt_ids(request.messages) for request in requests]
        context = getattr(self.model.config, "max_position_embeddings", None)
        require_room([request.key for request in requests], prompts, max_new_tokens, context)
        answers: list[dict[int, Answer]] = [{} for _ in requests]
        in_order = sorted(range(len(requests)), key=lambda i: len(prompts[i]))
        most = max([self.rows, *(request.n for request in requests)])

        def draw_missing(rows: int) -> None:
            together = rows if self.halved or rows < self.rows else most
            missing = [_Unit(i, [s for s in range(requests[i].n) if s not in answers[i]]) for i in in_order]
            waiting = deque(part for unit in missing for part in unit.parts(together))
            self._draw(waiting, rows, requests, prompts, answers, temperature, max_new_tokens)

        _, rows = in_halves(draw_missing, self.rows, f"{self.folder}: {{}} answers side by side")
        self.halved, self.rows = self.halved or rows < self.rows, rows
        yield from ([of_request[sample] for sample in sorted(of_request)] for of_request in answers)

    @torch.inference_mode()
    def _draw(
        self,
        waiting: deque[_Unit],
        rows: int,
        requests: Sequence[Request],
        prompts: Sequence[list[int]],
        answers: Sequence[dict[int, Answer]],
        temperature: float,
        max_new_tokens: int,
    ) -> None:
        """Draw the waiting answers, and put each into `answers` once it is finished."""
        ends = self.reader.ends
        decoder, alive = self._decoder(), list[_Row]()
        token_R = torch.empty(0, dtype=torch.long)

        def where(place: int) -> str:
            row = alive[place]
            return f"{self.folder}: token {len(row.ids) + 1} of answer {row.sample} to {requests[row.request].key}"

        while waiting or alive:
            logits = [decoder.read(token_R)] if alive else []
            if batch := _admitted(waiting, rows, decoder, len(alive)):
                joined = [unit.request for unit in batch]
                logits.append(decoder.join([prompts[i] for i in joined], [len(unit.samples) for unit in batch]))
                alive += [
                    _Row(unit.request, s, rng_for(*requests[unit.request].key, s).random(max_new_tokens))
                    for unit in batch
                    for s in unit.samples
                ]
            uniform_R = np.array([row.uniforms[len(row.ids)] for row in alive])
            token_R = draw(logits[0] if len(logits) == 1 else torch.cat(logits), uniform_R, temperature, where)
            order = []
            for place, (row, token) in enumerate(zip(alive, token_R.tolist(), strict=True)):
                row.ids.append(token)
                if token in ends or len(row.ids) == max_new_tokens:
                    answers[row.request][row.sample] = self.reader.answer(row.ids)
                else:
                    order.append(place)
            # Finished rows leave. The others keep their uniforms, so that no draw changes.
            if len(order) < len(alive):
                decoder.keep(order)
                token_R, alive = token_R[order], [alive[place] for place in order]

    def _decoder(self) -> Decoder:
        if self.shares:
            return SharedDecoder(self.model)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.reader.ends[0]
        return CopyingDecoder(self.model, pad)


def _admitted(waiting: deque[_Unit], rows: int, decoder: Decoder, alive: int) -> list[_Unit]:
    """The next units whose answers all have room, if they are worth a forward of their own.

    Args:
        rows: answers side by side.
    """
    batch: list[_Unit] = []
    if alive and not decoder.refills:
        return batch
    fresh = 0
    for unit in waiting:
        if (alive or batch) and alive + fresh + len(unit.samples) > rows:
            break
        batch.append(unit)
        fresh += len(unit.samples)
    if alive and fresh * SHARE < rows and len(batch) < len(waiting):
        return []
    for _ in batch:
        waiting.popleft()
    return batch


def draw(
    logits_RV: torch.Tensor,
    uniform_R: np.ndarray,
    temperature: float,
    where: Callable[[int], str] = "row {}".format,
) -> torch.Tensor:
    """One token per row by inversion: the first whose cumulative probability exceeds the row's uniform.

    Temperature 0 takes the likeliest token.

    Args:
        where: names a row in a message.

    Raises:
        ValueError: a row's logits are NaN, infinite, or minus infinity for every token.
    """
    if temperature < LIKELIEST:
        return likeliest(logits_RV, where)
    scaled_RV = logits_RV.double() if temperature == 1 else logits_RV.double() / temperature
    cumulative_RV = torch.softmax(scaled_RV, dim=-1).cumsum_(dim=-1)
    _require_finite(cumulative_RV[:, -1], where)
    threshold_R1 = torch.from_numpy(uniform_R).to(cumulative_RV)[:, None] * cumulative_RV[:, -1:]
    return torch.searchsorted(cumulative_RV, threshold_R1, right=True).squeeze(1).clamp(max=logits_RV.shape[1] - 1)


def likeliest(logits_RV: torch.Tensor, where: Callable[[int], str] = "row {}".format) -> torch.Tensor:
    """The likeliest token of each row; `where` and errors as in `draw`."""
    token_R = logits_RV.argmax(dim=-1)
    _require_finite(logits_RV.gather(1, token_R[:, None]).squeeze(1), where)
    return token_R


def _require_finite(value_R: torch.Tensor, where: Callable[[int], str]) -> None:
    """Refuse a row whose highest logit, or whose sum of probabilities, is not finite: its draw would be noise."""
    bad = (~value_R.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{where(bad[0])}: the model's logits are NaN or infinite; {BROKEN}")
