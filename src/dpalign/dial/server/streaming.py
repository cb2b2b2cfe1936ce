"""Sending to clients that may leave, or stop reading: what they no longer wait for ends at once."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Sequence
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import Message, Receive, Scope, Send

from dpalign.dial.server.metrics import Metrics
from dpalign.dial.server.refusals import refusal_of

_T = TypeVar("_T")


class Gone(Exception):
    """The client has left."""


class EventStream(Response):
    """Server-sent events; a client that leaves ends them at once, and one that stops reading before long.

    Args:
        first: the chunks there are already.
        events: those to come.
        read_seconds: how long a client may leave what is sent unread.
    """

    def __init__(
        self,
        first: list[dict[str, Any]],
        events: AsyncGenerator[list[dict[str, Any]], None],
        headers: dict[str, str],
        read_seconds: float,
        metrics: Metrics,
    ) -> None:
        super().__init__(headers=headers | {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        self.raw_headers.append((b"content-type", b"text/event-stream; charset=utf-8"))
        self.first, self.events, self.read_seconds, self.metrics = first, events, read_seconds, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            else:
                raise Gone
        except Gone:
            self.metrics.gone.inc()
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await self.events.aclose()

    async def _send(self, send: Send) -> None:
        await self._in_time(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})

        async def out(chunks: Sequence[object], more: bool = True) -> None:
            data = "".join(f"data: {c if isinstance(c, str) else json.dumps(c)}\n\n" for c in chunks)
            await self._in_time(send, {"type": "http.response.body", "body": data.encode(), "more_body": more})

        await out(self.first)
        try:
            async for chunks in self.events:
                await out(chunks)
        except Gone:
            raise
        except Exception as error:
            await out([refusal_of(error).body()])
        await out(["[DONE]"], more=False)

    async def _in_time(self, send: Send, message: Message) -> None:
        """Send, or give the client up: one that reads nothing would keep its place for good."""
        try:
            async with asyncio.timeout(self.read_seconds):
                await send(message)
        except TimeoutError:
            raise Gone from None


async def unless_gone(request: Request, work: Awaitable[_T]) -> _T:
    """What the work returns; it is given up when the client leaves.

    Raises:
        Gone: it has left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_left(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
