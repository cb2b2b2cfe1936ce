"""Open connections: how many there may be, and how long one may take to ask.

uvicorn waits for ever for the end of a request's head, and its `limit_concurrency` refuses requests, not connections:
half-sent heads would hold every file descriptor while honest clients get 503. Here a connection that asks nothing is
closed in time, and before that where a new one needs its place.
"""

import asyncio
import contextlib
import logging
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger("dpalign.dial")

BATCH: Final = 32
"""Connections that the event loop accepts at once. Some batches are open before the first of them can be counted."""
RESERVED: Final = 256
"""Open files that are left to all else: model, libraries, and some batches of connections."""


def room_for(connections: int) -> int:
    """So many connections, or as many as the limit on open files allows; it is raised as far as it may be."""
    try:
        import resource
    except ImportError:  # no such limit here
        return connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + RESERVED
    if 0 <= soft < wanted:
        soft = wanted if hard < 0 else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return connections if soft < 0 else min(connections, max(soft - RESERVED, soft // 2))


class Connection(H11Protocol):
    """A client's connection. Of uvicorn's two parsers only h11 limits the size of a head.

    Args:
        most: open connections of the server.
        seconds: from a connection's first byte, or its opening, to the end of its request's head.
        options: uvicorn's own.
    """

    def __init__(self, *, most: int, seconds: float, **options: Any) -> None:
        super().__init__(**options)
        self.most, self.seconds = most, seconds
        self.since = self.loop.time()
        """When it was opened, got its last answer, or began its present request."""

    @property
    def asks(self) -> bool:
        """Whether a request of it is being answered."""
        return self.cycle is not None and not self.cycle.response_complete and not self.transport.is_closing()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        if self.timeout_keep_alive_task is not None:  # the first bytes after an answer
            self.since = self.loop.time()
        super().data_received(data)

    def on_response_complete(self) -> None:
        self.since = self.loop.time()
        super().on_response_complete()

    def end_if_late(self) -> None:
        """Close it where its request's head does not come, or nobody reads the end of its answer."""
        late = self.loop.time() - self.since > self.seconds
        if late and not self.asks and (self.timeout_keep_alive_task is None or self.transport.is_closing()):
            self._end()

    def _make_room(self) -> None:
        """Close some of those that have waited longest, first those that never asked."""
        others = [other for other in self.connections if isinstance(other, Connection) and other is not self]
        idle = sorted((other for other in others if not other.asks), key=lambda other: (bool(other.cycle), other.since))
        ended = idle[: 1 + self.most // 16] or [self]  # several: to look for one each time would take long
        log.warning("all %d connections are in use; closed %d that asked nothing", self.most, len(ended))
        for other in ended:
            other._end()

    def _end(self) -> None:
        self.connections.discard(self)
        self.transport.abort()  # to close would wait until its client has read everything
