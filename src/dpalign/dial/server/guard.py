"""The middleware before the routes: key, host, body size, clients that leave or stop reading, and counting."""

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Collection, Mapping
from time import perf_counter
from typing import Any, Final

from fastapi import Response
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dpalign.dial.server.engine import Closing, GenerationError
from dpalign.dial.server.metrics import Metrics
from dpalign.dial.server.service import Service
from dpalign.dial.server.shapes import ApiError, fault_words

log = logging.getLogger("dpalign.dial")

ROUTES: Final = (
    "/v1/chat/completions",
    "/v1/dial",
    "/v1/models",
    "/v1/rewards",
    "/v1/taste",
    "/health",
    "/metrics",
    "/",
)
"""Paths that are counted by name."""
DRAINED: Final = 8
"""An oversized body is read up to this many times the limit, so that its sender gets to read the error."""
VALUES: Final = 10_000
"""Most JSON values of a body. A million of them would hold the event loop, and all other clients, for seconds."""


class Gone(Exception):
    """The client has left, or reads no more."""


class Guard:
    """Refuses requests that no route needs to see, and ends requests whose client has left.

    Args:
        key: the bearer token for /v1 and /metrics; None needs none.
        hosts: names by which a browser may call this server; None allows any. They keep a page of another site from
            reading answers through its own name, pointed at this machine.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        metrics: Metrics,
        key: str | None = None,
        hosts: Collection[str] | None = None,
    ) -> None:
        self.app, self.service, self.metrics, self.hosts = app, service, metrics, hosts
        self.limits = service.limits
        self.bodies = 0
        """Requests whose bodies are in memory."""
        self.key = None if key is None else _digest(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, reply = perf_counter(), _Reply(send, self.limits.read_seconds)
        try:
            await self._answer(scope, receive, reply)
        except Gone:
            self.metrics.gone.inc()
        except Exception as error:
            if reply.status:
                log.error("an answer broke off", exc_info=error)
            else:
                await error_response(error)(scope, receive, reply)
        finally:
            route = _route(scope["path"])
            self.metrics.requests.labels(route, str(reply.status or 499)).inc()
            self.metrics.seconds.labels(route).observe(perf_counter() - start)

    async def _answer(self, scope: Scope, receive: Receive, reply: "_Reply") -> None:
        headers = Headers(scope=scope)
        self._check(scope["path"], headers)
        if scope["method"] != "POST":
            await self.app(scope, receive, reply)
            return
        if self.bodies >= self.limits.max_bodies:
            raise ApiError(429, "the server is busy", code="busy", headers={"Retry-After": "1"})
        self.bodies += 1
        try:
            body = await self._body(headers, receive)
            await _unless_gone(self.app, scope, body, receive, reply)
        finally:
            self.bodies -= 1

    def _check(self, path: str, headers: Headers) -> None:
        """Refuse a request by its head."""
        if self.hosts is not None:
            host = headers.get("host", "").rpartition("@")[2].lower()
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
            if name not in self.hosts:
                raise ApiError(403, f"this server answers as {', '.join(sorted(self.hosts))} only", code="wrong_host")
        if self.key is not None and path.startswith(("/v1/", "/metrics")):
            scheme, _, token = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(token.strip()), self.key):
                what = "a wrong API key" if token else "no API key; give one as Authorization: Bearer KEY"
                raise ApiError(401, what, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if self.service.closing:
            raise Closing

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body.

        Raises:
            ApiError: it is too large or too slow.
            Gone: its sender has left.
        """
        limit = self.limits.max_body
        declared = headers.get("content-length", "")
        size, chunks, more = 0, [], True
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while more and size <= DRAINED * limit:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    size += len(chunk)
                    if size <= limit:
                        chunks.append(chunk)
        except TimeoutError:
            raise ApiError(408, f"the body took more than {self.limits.body_seconds:g} s", code="timeout") from None
        if size > limit or (declared.isdecimal() and int(declared) > limit):
            raise ApiError(413, f"a body of more than {limit} bytes", code="request_too_large")
        body = b"".join(chunks)
        if b"\0" in body:  # or UTF-16 would hide its values from the count
            raise ApiError(400, "the body is no JSON in UTF-8", code="invalid_json")
        if _values(body) > VALUES:
            raise ApiError(400, f"a body of more than {VALUES} JSON values", code="too_many_values")
        return body


def _values(body: bytes) -> int:
    """Estimate how many values a JSON text has, by its commas and brackets outside strings, at memory speed."""
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    if (quotes := plain.count(b'"')) > 4 * VALUES:
        return quotes
    outside = b"".join(plain.split(b'"')[::2])
    return sum(map(outside.count, (b",", b"[", b"{")))


class _Reply:
    """Sends a response, and records its status and whether it is complete.

    Args:
        seconds: how long the client may leave data unread. Without this limit it would keep its place in line for good.
    """

    def __init__(self, send: Send, seconds: float) -> None:
        self.send, self.seconds = send, seconds
        self.status = 0
        self.whole = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        self.whole = message["type"] == "http.response.body" and not message.get("more_body", False)
        try:
            async with asyncio.timeout(self.seconds):
                await self.send(message)
        except TimeoutError:
            raise Gone from None


async def _unless_gone(app: ASGIApp, scope: Scope, body: bytes, receive: Receive, reply: _Reply) -> None:
    """Answer a request whose body has arrived; cancel the work when its client leaves.

    Raises:
        Gone: the client has left.
    """
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        if not messages:
            await asyncio.Event().wait()  # no more input comes; `left` notices when the client leaves
        return messages.pop()

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    work = asyncio.ensure_future(app(scope, replayed, reply))
    leaving = asyncio.ensure_future(left())
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done() and not reply.whole:
            raise Gone
        await work
    finally:
        for task in (work, leaving):
            task.cancel()
        await asyncio.gather(work, leaving, return_exceptions=True)


# --- errors as a client reads them ---


def error_response(error: Exception) -> Response:
    """An error in OpenAI's shape."""
    api = api_error(error)
    return Response(api.json(), api.status, dict(api.headers or {}), media_type="application/json")


def api_error(error: Exception) -> ApiError:
    """An error as the client may see it; the details of our own faults go to the log."""
    match error:
        case ApiError():
            return error
        case Closing():
            return ApiError(503, str(error), code="shutting_down", headers={"Retry-After": "30"})
        case GenerationError():
            return ApiError(500, str(error), code="generation_failed")
        case RequestValidationError():
            return _invalid(error.errors()[0])
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
        case _:
            log.error("a request failed", exc_info=error)
            return ApiError(500, "the server failed on this request; see its log", code="internal_error")


def _invalid(error: Mapping[str, Any]) -> ApiError:
    """What pydantic found wrong with a body."""
    context: Mapping[str, Any] = error.get("ctx", {})
    path = [str(part) for part in error["loc"] if part != "body"] + [*filter(None, [context.get("field")])]
    where = ".".join(path)
    match error["type"]:
        case "unknown_field" | "unsupported" | "invalid_value" as code:
            return ApiError(400, error["msg"], param=where, code=code)
        case "extra_forbidden":
            known = "; known: preference, angle" if path[0] == "chat_template_kwargs" else ""
            return ApiError(400, f"unknown field {where!r}{known}", param=where, code="unknown_field")
        case "json_invalid":
            return ApiError(400, f"the body is no JSON that can be read: {context.get('error')}", code="invalid_json")
        case _ if not where:
            what = "the body is no JSON object; send one, with Content-Type: application/json"
            return ApiError(400, what, code="invalid_json")
        case _:
            return ApiError(400, f"{where} {fault_words(error)}", param=where, code="invalid_value")


def _digest(key: str) -> bytes:
    """Hash a key to a fixed length, so that the time of a comparison reveals nothing."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _route(path: str) -> str:
    if path.startswith("/v1/models/"):
        return "/v1/models/{model}"
    return path if path in ROUTES else "other"
