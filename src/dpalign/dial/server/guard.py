"""What stands before the app: the key, the host, the size of a body, and the count of it all."""

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Collection, Sequence
from time import perf_counter
from typing import Any, Final

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dpalign.dial.server.limits import Limits
from dpalign.dial.server.metrics import Metrics
from dpalign.dial.server.refusals import Refusal, closing, refusal_of

log = logging.getLogger("dpalign.dial")

ROUTES: Final = ("/v1/chat/completions", "/v1/dial", "/v1/models", "/v1/rewards", "/health", "/metrics", "/")
DRAINED: Final = 8
"""How many times the largest body is read and thrown away, so that its sender comes to read the refusal."""


class Guard:
    """Refuses requests that no handler need see.

    Args:
        key: what clients give as a bearer token for /v1 and /metrics; None asks for none.
        hosts: the names by which a browser may call this server; None takes any. A page of another site that has its
            own name resolved to this machine cannot read answers that way.
        origins: sites whose pages may call this server from a browser. Their browsers ask first whether they may,
            without the key; and they read a refusal as they read an answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        metrics: Metrics,
        key: str | None,
        hosts: Collection[str] | None,
        origins: Sequence[str] = (),
    ) -> None:
        self.app, self.limits, self.metrics, self.hosts = app, limits, metrics, hosts
        self.key = None if key is None else _digest(key)
        self.closing = False
        self.bodies = 0
        """Requests whose bodies are held."""
        self.entry: ASGIApp = self._guarded
        if origins:
            self.entry = CORSMiddleware(
                self._guarded, origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["*"]
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.entry(scope, receive, send)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = perf_counter(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, counted)
        except Exception as error:
            if not status:
                await refusal_of(error).response()(scope, receive, counted)
            elif status < 500:  # an answer that broke off; the app answers other errors, and raises them all the same
                log.error("an answer broke off", exc_info=error)
        finally:
            route = _route(scope["path"])
            self.metrics.requests.labels(route, str(status or 499)).inc()
            self.metrics.seconds.labels(route).observe(perf_counter() - start)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        self._check(scope["path"], headers)
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if self.bodies >= self.limits.max_held:
            raise Refusal(429, "the server is busy", code="busy", headers={"Retry-After": "1"})
        self.bodies += 1
        try:
            await self.app(scope, _replayed(await self._body(headers, receive), receive), send)
        finally:
            self.bodies -= 1

    def _check(self, path: str, headers: dict[bytes, str]) -> None:
        if self.hosts is not None:
            host = headers.get(b"host", "").rpartition("@")[2].lower()
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
            if name not in self.hosts:
                raise Refusal(403, f"this server answers as {', '.join(sorted(self.hosts))} only", code="wrong_host")
        if self.key is not None and (path.startswith("/v1/") or path.startswith("/metrics")):
            scheme, _, given = headers.get(b"authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(given.strip()), self.key):
                what = "a wrong API key" if given else "no API key; give one as Authorization: Bearer KEY"
                challenge = {"WWW-Authenticate": "Bearer"}
                raise Refusal(401, what, code="invalid_api_key", headers=challenge)
        if self.closing:
            raise closing()

    async def _body(self, headers: dict[bytes, str], receive: Receive) -> bytes:
        """The whole body.

        Raises:
            Refusal: it is too large, or too slow, or its sender has gone.
        """
        limit = self.limits.max_body
        told = headers.get(b"content-length", "")
        taken, chunks = 0, []
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                more: Any = True
                while more and taken <= DRAINED * limit:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal(400, "the client left before its request was whole")
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    taken += len(chunk)
                    if taken <= limit:
                        chunks.append(chunk)
        except TimeoutError:
            raise Refusal(408, f"the body took more than {self.limits.body_seconds:g} s", code="timeout") from None
        if taken > limit or (told.isdecimal() and int(told) > limit):
            raise Refusal(413, f"a body of more than {limit} bytes", code="request_too_large")
        return b"".join(chunks)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """What hands out a whole body, and then whatever comes."""
    whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return whole.pop() if whole else await receive()

    return replayed


def _digest(key: str) -> bytes:
    """Of one length whatever the key's, so that comparing tells nothing of it."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _route(path: str) -> str:
    if path.startswith("/v1/models/"):
        return "/v1/models/{model}"
    return path if path in ROUTES else "other"
