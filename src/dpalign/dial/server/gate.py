"""How many requests are answered at a time, and how many may wait for their turn."""

import asyncio
import math
from collections import deque
from types import TracebackType
from typing import Self


class Busy(RuntimeError):
    """The line is full."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("the server is busy and its queue is full")
        self.retry_after = retry_after


class Gate:
    """Lets `concurrent` in at a time, in the order they came; `queue` more may wait."""

    def __init__(self, concurrent: int, queue: int) -> None:
        self.concurrent, self.queue = concurrent, queue
        self.places = asyncio.Semaphore(concurrent)
        self.running = self.waiting = 0
        self.seconds: deque[float] = deque([1.0], maxlen=32)
        """How long the last ones stayed."""

    def enter(self) -> "Place":
        """A place, to be held by `async with`.

        Raises:
            Busy: on entering, when as many wait as may; says when to try again.
        """
        return Place(self)

    def retry_after(self) -> int:
        """Whole seconds after which the line as it stands should be gone."""
        stay = sum(self.seconds) / len(self.seconds)
        return max(1, min(60, math.ceil(stay * (self.waiting + 1) / self.concurrent)))


class Place:
    """One turn at a gate."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    async def __aenter__(self) -> Self:
        gate = self.gate
        if gate.places.locked() and gate.waiting >= gate.queue:
            raise Busy(gate.retry_after())
        gate.waiting += 1
        try:
            await gate.places.acquire()
        finally:
            gate.waiting -= 1
        gate.running += 1
        self.since = asyncio.get_running_loop().time()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.gate.seconds.append(asyncio.get_running_loop().time() - self.since)
        self.gate.running -= 1
        self.gate.places.release()
