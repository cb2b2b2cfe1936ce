"""Open connections: how many the server allows, and how long a request's head may take.

uvicorn waits for ever for the end of a request's head. Its `limit_concurrency` refuses requests, not connections. So
half-sent heads would hold every file descriptor while honest clients get 503. Here a connection without a request is
closed after a time limit, or sooner if a new connection needs its place.
"""

import asyncio
import contextlib
import logging
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger("dpalign.dial")

BATCH: Final = 32
"""Connections that the event loop accepts at once. Some batches are open before their connections can be counted."""
RESERVED: Final = 256
"""Open files reserved for everything else: model, libraries, and some batches of connections."""


def room_for(connections: int) -> int:
    """Return how many of these connections fit the limit on open files; raise the soft limit first if it is too low."""
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
        most: open connections that the server allows.
        seconds: time for a request's head, from the connection's opening or from the first byte after an answer.
        options: uvicorn's own.
    """

    def __init__(self, *, most: int, seconds: float, **options: Any) -> None:
        super().__init__(**options)
        self.most, self.seconds = most, seconds
        self.since = self.loop.time()
        """When it opened, got its last answer, or began its current request; the latest of these."""

    @property
    def busy(self) -> bool:
        """Whether one of its requests is being answered."""
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
        """Close the connection if its request's head is late, or if its client does not read the end of an answer."""
        late = self.loop.time() - self.since > self.seconds
        if late and not self.busy and (self.timeout_keep_alive_task is None or self.transport.is_closing()):
            self._end()

    def _make_room(self) -> None:
        """Close some idle connections: first those without any request so far, the oldest first. If none, this one."""
        others = [other for other in self.connections if isinstance(other, Connection) and other is not self]
        idle = sorted((other for other in others if not other.busy), key=lambda other: (bool(other.cycle), other.since))
        ended = idle[: 1 + self.most // 16] or [self]  # several: a search for each new one would be slow
        log.warning("all %d connections are in use; closed %d that asked nothing", self.most, len(ended))
        for other in ended:
            other._end()

    def _end(self) -> None:
        self.connections.discard(self)
        self.transport.abort()  # close() would wait until the client has read everything
