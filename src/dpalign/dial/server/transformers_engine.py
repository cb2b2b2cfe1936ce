"""The engine on transformers: all answers are decoded side by side, one step at a time in a thread.

Prompts wait in the order they came. They join between two steps, a few at a time, when all their answers have room. An
answer leaves when it ends, or when its client has left. Between two steps the event loop delivers what was drawn.

If a step fails, each of its answers is tried alone. Only answers that fail alone are given up.

Shapes: R rows (answers being decoded), V vocabulary.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from transformers import AutoTokenizer

from dpalign.dial.server.engine import Closing, Delta, GenerationError, Sampling, require_embedded, require_known
from dpalign.dial.server.text import AnswerText, Detokenizer, Prompts, decoder_of
from dpalign.engines.decoding import CopyingDecoder, batches
from dpalign.engines.loading import load_whole
from dpalign.engines.tokens import end_ids
from dpalign.engines.transformers_engine import LIKELIEST, draw, likeliest
from dpalign.paper.direction import rng_for

log = logging.getLogger("dpalign.dial")

JOIN_EVERY: Final = 4
"""Steps between two prefills while others are decoded: a prefill takes about as long as a step."""
CROWD: Final = 8
"""Waiting prompts join at once if their answers fill at least one in CROWD of all rows."""


class _Ticket:
    """One prompt, from its request until its last answer is out or its client has left."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling) -> None:
        self.prompt, self.sampling = prompt, sampling
        self.cancelled = False
        self.pending: list[Delta] = []
        self.error: GenerationError | None = None
        self.news = asyncio.Event()


@dataclass
class _Row:
    """An answer being decoded."""

    ticket: _Ticket
    index: int
    text: AnswerText
    uniforms: np.ndarray
    drawn: list[int] = field(default_factory=list)
    """Its tokens; the model has not read the last one yet."""
    ended: bool = False

    @property
    def ids(self) -> list[int]:
        """Prompt and answer so far, for a model that has read none of it."""
        return [*self.ticket.prompt, *self.drawn]


class BatchingGenerator:
    """A `Generator` on a plain Hugging Face causal language model.

    Args:
        folder: a policy folder or hub name.
        rows: answers decoded side by side.
        prefill_tokens: prompt tokens read in one step. More would delay the answers in progress. A longer prompt is
            read alone.

    Raises:
        ValueError: weights are missing (`load_whole`); a layer keeps something other than keys and values; the
            tokenizer has tokens that the model lacks.
    """

    def __init__(self, folder: str, *, rows: int, dtype: str = "auto", prefill_tokens: int = 4096) -> None:
        self.rows, self.prefill_tokens = rows, prefill_tokens
        self.prompts = Prompts(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # the decoding thread's own
        self.decode = decoder_of(tokenizer)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_whole("policy", folder, dtype=dtype).to(self.device)
        model.eval()
        self.embedded = int(model.get_input_embeddings().weight.shape[0])
        require_embedded(folder, tokenizer.get_vocab(), self.embedded)
        self.ends = frozenset(end_ids(tokenizer, model.generation_config))
        self.special = self.ends.union(tokenizer.all_special_ids)
        pad = tokenizer.pad_token_id
        self.decoder = CopyingDecoder(model, pad if pad is not None else min(self.ends, default=0))
        self.context = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 20)
        self.tickets: deque[_Ticket] = deque()
        self.decoding: list[_Row] = []
        self.failing: list[_Ticket] = []
        """The tickets that failed in the last step."""
        self.steps = self.joined = 0
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="decoding")
        self.wake = asyncio.Event()
        self.work: asyncio.Task[None] | None = None
        self.closed = False
        self.ended: GenerationError | None = None
        """Why decoding has ended; None before that."""

    @property
    def load(self) -> Mapping[str, float]:
        return {"rows": self._unended, "waiting": len(self.tickets), "steps": self.steps}

    @property
    def _unended(self) -> int:
        return sum(not row.ended for row in self.decoding)

    @property
    def failed(self) -> bool:
        return self.ended is not None and not self.closed

    async def start(self) -> None:
        self.work = asyncio.create_task(self._work())

    async def close(self) -> None:
        self.closed = True
        self.wake.set()
        if self.work is not None:
            await asyncio.wait({self.work})
        self.thread.shutdown()
        self.prompts.close()

    async def stream(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[list[Delta], None]:
        """See `Generator.stream`.

        Raises:
            ValueError: more answers than rows, or no room for the answer in the context.
            GenerationError: the model failed on these answers or for good; it lacks a token of the prompt; or the
                server is shutting down.
        """
        if not 1 <= sampling.n <= self.rows:
            raise ValueError(f"{sampling.n} answers to a prompt; this server decodes 1 to {self.rows} side by side")
        if len(prompt) + sampling.max_tokens > self.context:
            raise ValueError(f"{len(prompt)} tokens and {sampling.max_tokens} new ones exceed {self.context}")
        require_known(prompt, self.embedded)
        if self.closed:
            raise Closing
        if self.ended is not None:
            raise self.ended
        ticket = _Ticket(prompt, sampling)
        self.tickets.append(ticket)
        self.wake.set()
        unfinished = sampling.n
        try:
            while unfinished:
                await ticket.news.wait()
                ticket.news.clear()
                deltas, ticket.pending = ticket.pending, []
                unfinished -= sum(delta.finish is not None for delta in deltas)
                if deltas:
                    yield deltas
                if ticket.error is not None:
                    raise ticket.error
        finally:
            ticket.cancelled = True
            if ticket in self.tickets:
                self.tickets.remove(ticket)

    async def _work(self) -> None:
        """Decode until closed. If decoding ends, every waiting client gets the reason."""
        reason = GenerationError("the engine has died; see the log, and start the server again")
        try:
            while not self.closed:
                if self.tickets or self.decoding:
                    await self._turn()
                else:
                    self.wake.clear()
                    await self.wake.wait()
            reason = Closing()
        except Exception:
            log.exception("the engine has died")
        finally:
            self.ended = reason
            self._give_up(reason, self.tickets)

    async def _turn(self) -> None:
        """Take one step and deliver its deltas."""
        loop = asyncio.get_running_loop()
        newcomers = self._admitted()
        try:
            deltas = await self._tried(newcomers)
        except Exception:
            log.exception("decoding failed; %d answers are given up", len(self.decoding))
            self._give_up(GenerationError("the model failed on this batch of answers; see the log"), newcomers)
            await loop.run_in_executor(self.thread, self.decoder.keep, [])
            return
        finally:
            self._fail(GenerationError("the model failed on this answer; see the log"), self.failing)
            self.failing = []
        for ticket, delta in deltas:
            ticket.pending.append(delta)
            if delta.text or delta.finish:
                ticket.news.set()

    async def _tried(self, newcomers: Sequence[_Ticket]) -> list[tuple[_Ticket, Delta]]:
        """Take one step. If it fails, take another, without the answers that fail alone."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self.thread, self._step, newcomers)
        except Exception:
            log.exception("a step failed; each of its answers is tried alone")
        return await loop.run_in_executor(self.thread, self._retry_step, newcomers)

    def _admitted(self) -> list[_Ticket]:
        """Take the next tickets whose answers all have room. While others decode, wait for JOIN_EVERY or CROWD."""
        newcomers: list[_Ticket] = []
        wanted = sum(ticket.sampling.n for ticket in self.tickets)
        decoding = self._unended
        if decoding and self.steps < self.joined + JOIN_EVERY and wanted * CROWD < self.rows:
            return newcomers
        room, width = self.rows - decoding, 0
        while self.tickets and self.tickets[0].sampling.n <= room:
            width = max(width, len(self.tickets[0].prompt))
            if newcomers and width * (len(newcomers) + 1) > self.prefill_tokens:
                break
            newcomers.append(self.tickets.popleft())
            room -= newcomers[-1].sampling.n
        return newcomers

    def _give_up(self, reason: GenerationError, more: Iterable[_Ticket]) -> None:
        """Fail every answer that is being decoded, and the tickets of `more`."""
        self._fail(reason, [*(row.ticket for row in self.decoding), *more])
        self.decoding = []

    def _fail(self, reason: GenerationError, tickets: Iterable[_Ticket]) -> None:
        for ticket in tickets:
            ticket.error = ticket.error or reason
            ticket.news.set()

    @torch.inference_mode()
    def _step(self, newcomers: Sequence[_Ticket]) -> list[tuple[_Ticket, Delta]]:
        """Drop ended rows, read the last token of the others, let newcomers join, draw each row's next token.

        It runs in the thread, while the event loop sends the deltas of the previous step.
        """
        self._keep([i for i, row in enumerate(self.decoding) if not (row.ended or row.ticket.cancelled)])
        logits: list[torch.Tensor] = []
        if self.decoding:
            logits.append(self.decoder.read(torch.tensor([row.drawn[-1] for row in self.decoding], device=self.device)))
        if newcomers:
            self.joined = self.steps
            logits.append(self.decoder.join([t.prompt for t in newcomers], [t.sampling.n for t in newcomers]))
            self.decoding += [self._row(ticket, i) for ticket in newcomers for i in range(ticket.sampling.n)]
        return self._deltas(logits)

    @torch.inference_mode()
    def _retry_step(self, newcomers: Sequence[_Ticket]) -> list[tuple[_Ticket, Delta]]:
        """Take a failed step again with an emptied decoder: read every answer from its prompt on.

        Each answer is first read alone. If it fails, its whole request is left out.
        """
        rows = [row for row in self.decoding if not (row.ended or row.ticket.cancelled)]
        joined = {row.ticket for row in rows}
        rows += [self._row(t, i) for t in newcomers if t not in joined for i in range(t.sampling.n)]
        self.decoding = []
        for row in rows:
            if row.ticket in self.failing:
                continue
            self.decoder.keep([])
            try:
                self._tokens([row], self.decoder.join([row.ids], [1]))
            except Exception:
                log.exception("an answer failed alone, and is given up")
                self.failing.append(row.ticket)
        self.decoder.keep([])
        self.joined = self.steps
        self.decoding = [row for row in rows if row.ticket not in self.failing]
        parts = batches([len(row.ids) for row in self.decoding], self.prefill_tokens)
        return self._deltas(
            [self.decoder.join([self.decoding[i].ids for i in part], [1] * len(part)) for part in parts]
        )

    def _deltas(self, logits: Sequence[torch.Tensor]) -> list[tuple[_Ticket, Delta]]:
        """Draw the next token of each row; returns them as deltas."""
        if not self.decoding:
            return []
        self.steps += 1
        token_R = self._tokens(self.decoding, torch.cat(list(logits)))
        deltas = []
        for row, token in zip(self.decoding, token_R, strict=True):
            try:
                deltas.append((row.ticket, self._delta(row, token)))
            except Exception:  # only this row is at fault: the others have their tokens already
                log.exception("an answer has no text, and is given up")
                self.failing.append(row.ticket)
        return deltas

    def _tokens(self, rows: Sequence[_Row], logits_RV: torch.Tensor) -> list[int]:
        samplings = [row.ticket.sampling for row in rows]
        token_R: list[int] = draw_rows(
            logits_RV,
            np.array([row.uniforms[len(row.drawn)] for row in rows]),
            np.array([sampling.temperature for sampling in samplings]),
            np.array([sampling.top_p for sampling in samplings]),
        ).tolist()
        return token_R

    def _row(self, ticket: _Ticket, index: int) -> _Row:
        uniforms = rng_for("serve", ticket.sampling.seed, index).random(ticket.sampling.max_tokens)
        text = AnswerText(Detokenizer(self.decode, self.special), ticket.sampling.stop)
        return _Row(ticket, index, text, uniforms)

    def _delta(self, row: _Row, token: int) -> Delta:
        row.drawn.append(token)
        ended, cut = token in self.ends, len(row.drawn) == row.ticket.sampling.max_tokens
        text, stopped = row.text.push([token], last=ended or cut)
        row.ended = ended or stopped or cut
        return Delta(row.index, text, 1, "stop" if ended or stopped else "length" if cut else None)

    def _keep(self, rows: Sequence[int]) -> None:
        if len(rows) < len(self.decoding):
            self.decoder.keep(rows)
            self.decoding = [self.decoding[i] for i in rows]


def draw_rows(
    logits_RV: torch.Tensor, uniform_R: np.ndarray, temperature_R: np.ndarray, top_p_R: np.ndarray
) -> torch.Tensor:
    """One token a row, each at its own temperature and top-p; temperature 0 takes the likeliest.

    Raises:
        ValueError: see `draw`.
    """
    token_R = likeliest(logits_RV)
    warm = np.flatnonzero(temperature_R >= LIKELIEST)
    if not len(warm):
        return token_R
    temperature = torch.from_numpy(temperature_R[warm]).to(logits_RV.device)
    scaled_RV = logits_RV[warm].double() / temperature[:, None]
    cut = np.flatnonzero(top_p_R[warm] < 1)
    if len(cut):
        scaled_RV[cut] = nucleus(scaled_RV[cut], torch.from_numpy(top_p_R[warm][cut]).to(logits_RV.device))
    token_R[warm] = draw(scaled_RV, uniform_R[warm], 1.0)
    return token_R


def nucleus(logits_RV: torch.Tensor, top_p_R: torch.Tensor) -> torch.Tensor:
    """The logits, with minus infinity outside the fewest likeliest tokens whose probabilities reach top-p."""
    sorted_RV, order_RV = logits_RV.sort(dim=-1, descending=True, stable=True)
    share_RV = torch.softmax(sorted_RV, dim=-1)
    before_RV = share_RV.cumsum(dim=-1) - share_RV
    outside_RV = before_RV >= top_p_R[:, None]
    outside_RV[:, 0] = False
    return logits_RV.masked_fill(torch.zeros_like(outside_RV).scatter(-1, order_RV, outside_RV), -torch.inf)
