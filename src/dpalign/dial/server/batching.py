"""The generator on transformers: one thread that decodes all answers side by side.

Prompts wait in the order they came and join between two steps, a few at a time, when all their answers have room; an
answer that is finished, or that nobody waits for any more, leaves before the next step. The event loop hears of a whole
step at once.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dpalign.dial.server.decoder import Decoder
from dpalign.dial.server.generation import Closing, Delta, GenerationError, Sampling
from dpalign.dial.server.prompts import Prompts
from dpalign.dial.server.text import AnswerText, Detokenizer
from dpalign.paper.direction import rng_for
from dpalign.rows import Message

log = logging.getLogger("dpalign.dial")

PATIENCE: Final = 4
"""Steps between two readings of newcomers while others are decoded: a reading takes about as long as a step."""
CROWD: Final = 8
"""Newcomers whose answers are this part of all rows are read at once."""


class _Ticket:
    """One prompt, from when it is asked until its last answer is out or nobody wants it."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling) -> None:
        self.prompt, self.sampling = prompt, sampling
        self.cancelled = False
        self.open = sampling.n
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
    tokens: int = 0


@dataclass
class _Waiting:
    """What the event loop and the thread share; both hold `changed` to touch it."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    tickets: deque[_Ticket] = field(default_factory=deque)
    cancelled: bool = False
    closed: bool = False
    ended: GenerationError | None = None
    """Why the thread is no more."""


class BatchingGenerator:
    """A `Generator` on a plain Hugging Face causal language model.

    Args:
        folder: a policy folder or hub name.
        rows: answers decoded side by side.
        prefill_tokens: prompt tokens read between two steps, so that a crowd of newcomers does not hold up those who
            are being answered; a longer prompt is read alone.
    """

    def __init__(self, folder: str, *, rows: int, dtype: str = "auto", prefill_tokens: int = 4096) -> None:
        self.rows, self.prefill_tokens = rows, prefill_tokens
        self.prompts = Prompts(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # the thread's own
        self.decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
        ).to(device)
        model.eval()
        self.ends = _end_tokens(model.generation_config, tokenizer.eos_token_id)
        self.special = self.ends.union(tokenizer.all_special_ids)
        pad = tokenizer.pad_token_id
        self.decoder = Decoder(model, pad if pad is not None else min(self.ends, default=0))
        self._context = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 20)
        self.shared = _Waiting()
        self.decoding: list[_Row] = []
        self.joining: list[_Ticket] = []
        self.steps = self.joined = 0
        self.thread = threading.Thread(target=self._work, name="decoding", daemon=True)

    @property
    def context(self) -> int:
        return self._context

    @property
    def load(self) -> Mapping[str, float]:
        return {"rows": len(self.decoding), "waiting": len(self.shared.tickets), "steps": self.steps}

    @property
    def failed(self) -> bool:
        return self.thread.ident is not None and not self.thread.is_alive() and not self.shared.closed

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    async def close(self) -> None:
        with self.shared.changed:
            self.shared.closed = True
            self.shared.changed.notify()
        if self.thread.is_alive():
            await asyncio.to_thread(self.thread.join)
        self.prompts.close()

    async def prompt_ids(self, messages: Sequence[Message], preference: Mapping[str, float] | None) -> list[int]:
        return await self.prompts.ids(messages, preference)

    async def stream(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[list[Delta], None]:
        """See `Generator.stream`.

        Raises:
            ValueError: more answers than rows, or no room for the answer in the context.
            GenerationError: the model failed on these answers, or for good; the server is shutting down.
        """
        if not 1 <= sampling.n <= self.rows:
            raise ValueError(f"{sampling.n} answers to a prompt; this server decodes 1 to {self.rows} side by side")
        if len(prompt) + sampling.max_tokens > self.context:
            raise ValueError(f"{len(prompt)} tokens and {sampling.max_tokens} new ones exceed {self.context}")
        ticket = _Ticket(prompt, sampling)
        with self.shared.changed:
            if self.shared.closed:
                raise Closing
            if self.shared.ended is not None:
                raise self.shared.ended
            self.shared.tickets.append(ticket)
            self.shared.changed.notify()
        unfinished = sampling.n
        try:
            while unfinished:
                await ticket.news.wait()
                ticket.news.clear()
                news, ticket.pending = ticket.pending, []
                unfinished -= sum(delta.finish is not None for delta in news)
                if news:
                    yield news
                if ticket.error is not None:
                    raise ticket.error
        finally:
            if unfinished:
                self._cancel(ticket)

    def _cancel(self, ticket: _Ticket) -> None:
        with self.shared.changed:
            ticket.cancelled = self.shared.cancelled = True
            if ticket in self.shared.tickets:
                self.shared.tickets.remove(ticket)
            self.shared.changed.notify()

    # What follows runs in the thread.

    def _work(self) -> None:
        """Decode until told to stop. However it ends, whoever still waits hears why."""
        why = GenerationError("the engine has died; see the log, and start the server again")
        try:
            while self._wait():
                try:
                    self._turn()
                except Exception:
                    log.exception("decoding failed; %d answers are given up", len(self.decoding))
                    self._give_up(GenerationError("the model failed on this batch of answers; see the log"))
                    self.decoder.keep([])
            why = Closing()
        finally:
            with self.shared.changed:
                self.shared.ended = why
                self._give_up(why, self.shared.tickets)

    def _wait(self) -> bool:
        """Sleep until there is something to do; False where that is to end."""
        with self.shared.changed:
            self.shared.changed.wait_for(lambda: self.shared.tickets or self.decoding or self.shared.closed)
            return not self.shared.closed

    def _admitted(self) -> list[_Ticket]:
        """The next tickets in line whose answers all have room, now and then while others are decoded."""
        newcomers: list[_Ticket] = []
        asked = sum(ticket.sampling.n for ticket in self.shared.tickets)
        if self.decoding and self.steps < self.joined + PATIENCE and asked * CROWD < self.rows:
            return newcomers
        room, width = self.rows - len(self.decoding), 0
        while self.shared.tickets and self.shared.tickets[0].sampling.n <= room:
            width = max(width, len(self.shared.tickets[0].prompt))
            if newcomers and width * (len(newcomers) + 1) > self.prefill_tokens:
                break
            newcomers.append(self.shared.tickets.popleft())
            room -= newcomers[-1].sampling.n
        return newcomers

    def _turn(self) -> None:
        """One step: who is gone leaves, newcomers join, all draw a token, the finished leave, others read theirs."""
        with self.shared.changed:
            left, self.shared.cancelled = self.shared.cancelled, False
        if left:
            self._keep([i for i, row in enumerate(self.decoding) if not row.ticket.cancelled])
        with self.shared.changed:
            newcomers = self.joining = self._admitted()
        if newcomers:
            self.joined = self.steps
            self.decoder.join([t.prompt for t in newcomers], [t.sampling.n for t in newcomers])
            self.decoding += [self._row(ticket, i) for ticket in newcomers for i in range(ticket.sampling.n)]
            self.joining = []
        if not self.decoding:
            return
        asked = [row.ticket.sampling for row in self.decoding]
        token_R = self.decoder.draw(
            [row.uniforms[row.tokens] for row in self.decoding],
            [sampling.temperature for sampling in asked],
            [sampling.top_p for sampling in asked],
        )
        news = [self._delta(row, token) for row, token in zip(self.decoding, token_R, strict=True)]
        self._tell([(row.ticket, delta) for row, delta in zip(self.decoding, news, strict=True)])
        going = [i for i, delta in enumerate(news) if delta.finish is None]
        self._keep(going)
        if going:
            self.decoder.step([token_R[i] for i in going])
        self.steps += 1

    def _row(self, ticket: _Ticket, index: int) -> _Row:
        uniforms = rng_for("serve", ticket.sampling.seed, index).random(ticket.sampling.max_tokens)
        text = AnswerText(Detokenizer(self.decode, self.special), ticket.sampling.stop)
        return _Row(ticket, index, text, uniforms)

    def _delta(self, row: _Row, token: int) -> Delta:
        row.tokens += 1
        ended, cut = token in self.ends, row.tokens == row.ticket.sampling.max_tokens
        text, stopped = row.text.push([token], last=ended or cut)
        return Delta(row.index, text, 1, "stop" if ended or stopped else "length" if cut else None)

    def _keep(self, going: Sequence[int]) -> None:
        if len(going) < len(self.decoding):
            self.decoder.keep(going)
            self.decoding = [self.decoding[i] for i in going]

    def _give_up(self, why: GenerationError, more: Iterable[_Ticket] = ()) -> None:
        """Tell everyone whose answers are decoded or about to be, and these. It must not fail: they wait for it."""
        tickets = {id(t): t for t in [*(row.ticket for row in self.decoding), *self.joining, *more]}
        self.decoding, self.joining = [], []

        def tell() -> None:
            for ticket in tickets.values():
                ticket.error = why
                ticket.news.set()

        self._in_loop(tell)

    def _tell(self, news: Sequence[tuple[_Ticket, Delta]]) -> None:
        def tell() -> None:
            for ticket, delta in news:
                ticket.pending.append(delta)
                if delta.text or delta.finish:
                    ticket.news.set()

        self._in_loop(tell)

    def _in_loop(self, tell: Callable[[], None]) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(tell)


def _end_tokens(config: GenerationConfig | None, eos: int | None) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's, and those that the model's generation config names."""
    named = getattr(config, "eos_token_id", None)
    return frozenset([*(named if isinstance(named, list) else [named]), eos]) - {None}
