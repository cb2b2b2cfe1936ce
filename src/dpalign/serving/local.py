"""A chat with a model in this process: the server's own generator, on an event loop in a thread."""

import asyncio
import queue
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final, TypeVar

from dpalign.contract import read_contract
from dpalign.records import Message
from dpalign.serving.dial import Dial
from dpalign.serving.generation import GenerationError, Generator, Sampling
from dpalign.serving.rewards import Rewards
from dpalign.serving.speakers import Ask, Piece

LONGEST: Final = 2048
"""Tokens of an answer where nobody says otherwise: the released policy's."""

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

    def stream(self, ask: Ask) -> Iterator[Piece]:
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
            preference = None if ask.preference is None else ask.preference.weights
            prompt = await self.generator.prompt_ids(ask.messages, preference)
            room = self.generator.context - len(prompt)
            if room < 1:
                raise ValueError(
                    f"the chat is {len(prompt)} tokens long, and the model's context holds {self.generator.context}; "
                    "/clear begins a new one"
                )
            longest = min(ask.max_tokens or LONGEST, room)
            sampling = Sampling(longest, temperature=ask.temperature, seed=ask.seed)
            async with aclosing(self.generator.stream(prompt, sampling)) as stream:
                async for news in stream:
                    for delta in news:
                        pieces.put(Piece(delta.text, delta.finish))
            pieces.put(None)
        except Exception as error:
            pieces.put(error)

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
