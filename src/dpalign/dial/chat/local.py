"""A chat with a model in this process: the server's own generator, on an event loop in a thread."""

import asyncio
import queue
import threading
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dpalign.dial.best_of import SPREAD, draw_best
from dpalign.dial.chat.speakers import Ask, Piece, Pieces
from dpalign.dial.dial import Dial
from dpalign.dial.server.engine import Answer, GenerationError, Generator, Limits, Rewards, Sampling, collect
from dpalign.paper.direction import Preference
from dpalign.rows import Message
from dpalign.train.contract import read_contract

_T = TypeVar("_T")


class Local:
    """A `Speaker` on a generator of ours.

    Args:
        folder: the one with the policy's contract, for its dial.
        generator: not started yet; closed with the speaker.
        rewards: closed with the speaker.
    """

    def __init__(self, name: str, folder: Path, generator: Generator, rewards: Rewards | None = None) -> None:
        self.name, self.generator, self.reader = name, generator, rewards
        contract = read_contract(folder)
        self.dial = None if contract is None else Dial.of(contract)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="chat", daemon=True)
        self.thread.start()
        self._wait(generator.start())

    @property
    def scores(self) -> bool:
        return self.reader is not None

    @property
    def max_best_of(self) -> int:
        return 0 if self.reader is None else Limits.max_n

    def stream(self, ask: Ask) -> Pieces:
        """See `Speaker.stream`."""
        pieces: queue.SimpleQueue[Piece | Exception | None] = queue.SimpleQueue()
        drawing = asyncio.run_coroutine_threadsafe(self._draw(ask, pieces), self.loop)
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, GenerationError):
                    raise ValueError(str(piece)) from piece
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            drawing.cancel()

    async def _draw(self, ask: Ask, pieces: "queue.SimpleQueue[Piece | Exception | None]") -> None:
        try:
            if ask.best_of is not None:
                pieces.put(await self._best(ask, ask.best_of))
            else:
                prompt, sampling = await self._read(ask, ask.preference)
                async with aclosing(self.generator.stream(prompt, sampling)) as stream:
                    async for news in stream:
                        for delta in news:
                            pieces.put(Piece(delta.text, delta.finish))
            pieces.put(None)
        except Exception as error:
            pieces.put(error)

    async def _read(self, ask: Ask, preference: Preference | None) -> tuple[list[int], Sampling]:
        """The prompt at a direction, and how its answer is drawn."""
        prompt = await self.generator.prompt_ids(ask.messages, None if preference is None else preference.weights)
        room = self.generator.context - len(prompt)
        if room < 1:
            raise ValueError(
                f"the chat is {len(prompt)} tokens long, and the model's context holds {self.generator.context}; "
                "/clear begins a new one"
            )
        longest = min(ask.max_tokens or Limits.max_tokens, room)
        return prompt, Sampling(longest, temperature=ask.temperature, seed=ask.seed)

    async def _best(self, ask: Ask, n: int) -> Piece:
        """As the server draws it (`Service.best`): with the same seed it is the same answer."""
        if self.reader is None or self.dial is None or ask.preference is None:
            raise ValueError("the best of several answers needs a reward model and a direction")
        reader, spread = self.reader, SPREAD if ask.spread is None else ask.spread

        async def draw(near: Preference, copies: int, seed: int) -> list[Answer]:
            prompt, sampling = await self._read(ask, near)
            async with aclosing(self.generator.stream(prompt, replace(sampling, n=copies, seed=seed))) as stream:
                return await collect(stream, copies)

        best = await draw_best(
            self.dial, ask.preference, n, spread, ask.seed, draw=draw, score=partial(reader.score, ask.messages)
        )
        return Piece(best.text, best.finish, chosen=best.report)

    def rewards(self, messages: Sequence[Message], answer: str) -> Mapping[str, float]:
        """See `Speaker.rewards`."""
        if self.reader is None:
            raise ValueError("no reward model here; name one with --reward")
        return self.reader.named(self._wait(self.reader.score(messages, [answer]))[0])

    def close(self) -> None:
        self._wait(self.generator.close())
        if self.reader is not None:
            self.reader.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def _wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()
