"""The routes: OpenAI's chat completions with a dial, what the page needs, health and metrics; and the server itself."""

import asyncio
import contextlib
import secrets
import socket
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from time import time
from typing import Any, Final

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.sse import EventSourceResponse, format_sse_event
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from dpalign import __version__
from dpalign.dial.best_of import BestOf
from dpalign.dial.server.connections import BATCH, Connection, room_for
from dpalign.dial.server.engine import Finish, collect
from dpalign.dial.server.guard import Guard, api_error, error_response
from dpalign.dial.server.logs import SPARING, spare_the_log
from dpalign.dial.server.metrics import Metrics
from dpalign.dial.server.service import Order, Service, unknown_model
from dpalign.dial.server.shapes import (
    ApiError,
    ChatRequest,
    Choice,
    Completion,
    DialReply,
    RewardRequest,
    TasteReply,
    TasteRequest,
    Usage,
)

PAGE: Final = Path(__file__).parent / "page"
"""The web page's files."""

PAGE_HEADERS: Final = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
"""Headers of the page's files. The page itself states the rest of its policy, but only a header can forbid frames.
With no-cache a browser always checks for changes, so no page of an earlier version talks to this server."""


def create_app(
    service: Service,
    *,
    key: str | None = None,
    hosts: Collection[str] | None = None,
    origins: Sequence[str] = (),
) -> FastAPI:
    """Return the app with its middleware.

    Args:
        key: clients of /v1 and /metrics must send it; None needs none.
        hosts: see `Guard`.
        origins: sites whose pages may call this server from a browser.
    """

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await service.generator.start()
        yield
        await service.close()

    app = FastAPI(
        title="dpalign",
        version=__version__,
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        openapi_url="/v1/openapi.json",
    )
    metrics = Metrics(service.now)
    service.on_work = metrics.count
    app.add_middleware(Guard, service=service, metrics=metrics, key=key, hosts=hosts)
    if origins:
        # outside the guard: a browser's preflight request has no key, and a page must be able to read refusals
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["*"]
        )
    for error in (RequestValidationError, HTTPException):
        app.add_exception_handler(error, _in_openais_shape)
    _add_chat(app, service)
    _add_models(app, service)
    _add_operations(app, service, metrics)
    app.mount("/", _PageFiles(directory=PAGE, html=True))
    return app


async def _in_openais_shape(request: Request, error: Exception) -> Response:
    """Answer FastAPI's own errors; the guard answers all others."""
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        what = f"{request.method} {request.url.path}: {error.detail}"
        error = ApiError(error.status_code, what, headers=error.headers)
    return error_response(error)


class _PageFiles(StaticFiles):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        whole = [(name, value) for name, value in scope["headers"] if name != b"range"]  # no client needs a part
        await super().__call__({**scope, "headers": whole}, receive, send)

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers.update(PAGE_HEADERS)
        return response


# --- chat ---


def _add_chat(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=Completion, response_model_exclude_unset=True)
    async def chat(request: ChatRequest, response: Response) -> Any:
        """Answer a chat, at a direction if the request has one."""
        if request.stream:
            options = request.stream_options
            chunks = _chunks(service, request, with_usage=bool(options and options.include_usage))
            first = await anext(chunks)  # an error before it still gets its own status
            return _EventStream(first, chunks, headers=_warned(first[0]))
        completion = await _completion(service, request)
        response.headers.update(_warned(completion))
        return completion


async def _completion(service: Service, request: ChatRequest) -> Completion:
    async with service.placed(request) as order, aclosing(service.answers(order)) as stream:
        answers = await collect(stream, order.sampling.n)
    choices = [
        Choice(
            index=i,
            message={"role": "assistant", "content": answer.text, "refusal": None},
            logprobs=None,
            finish_reason=answer.finish,
        )
        for i, answer in enumerate(answers)
    ]
    tokens = sum(answer.tokens for answer in answers)
    fields = _head(service, "chat.completion") | _direction(order) | _report(answers[0].report)
    return Completion(**fields, choices=choices, usage=Usage.of(len(order.prompt), tokens))


async def _chunks(
    service: Service, request: ChatRequest, *, with_usage: bool
) -> AsyncGenerator[list[Completion], None]:
    """The chunks of a streamed completion, in lists that are sent together."""
    head = _head(service, "chat.completion.chunk") | ({"usage": None} if with_usage else {})

    def chunk(index: int, delta: dict[str, str], finish: Finish | None = None, **more: Any) -> Completion:
        choice = Choice(index=index, delta=delta, logprobs=None, finish_reason=finish)
        return Completion(**head, choices=[choice], **more)

    tokens = 0
    async with service.placed(request) as order, aclosing(service.answers(order)) as stream:
        opening = [chunk(i, {"role": "assistant", "content": ""}, **_direction(order)) for i in range(order.sampling.n)]
        async for deltas in stream:
            tokens += sum(delta.tokens for delta in deltas)
            texts: dict[int, str] = {}  # all new text of an answer goes into one chunk
            for delta in deltas:
                texts[delta.index] = texts.get(delta.index, "") + delta.text
            pieces = [chunk(index, {"content": text}) for index, text in texts.items() if text]
            ends = [chunk(d.index, {}, d.finish, **_report(d.report)) for d in deltas if d.finish is not None]
            yield opening + pieces + ends
            opening = []
    if with_usage:
        yield [Completion(**head | {"usage": Usage.of(len(order.prompt), tokens)}, choices=[])]


async def _events(
    first: list[Completion], chunks: AsyncGenerator[list[Completion], None]
) -> AsyncGenerator[bytes, None]:
    """Encode chunks as server-sent events. An error becomes one more event, before [DONE]."""

    def encoded(some: list[Completion]) -> bytes:
        return b"".join(
            format_sse_event(data_str=chunk.model_dump_json(exclude_unset=True, ensure_ascii=True)) for chunk in some
        )

    yield encoded(first)
    try:
        async for some in chunks:
            yield encoded(some)
    except Exception as error:
        yield format_sse_event(data_str=api_error(error).json())
    yield format_sse_event(data_str="[DONE]")


class _EventStream(EventSourceResponse):
    """Closes the chunks with the response, so that an answer stops at once when its client leaves."""

    def __init__(
        self, first: list[Completion], chunks: AsyncGenerator[list[Completion], None], headers: dict[str, str]
    ) -> None:
        self.events, self.chunks = _events(first, chunks), chunks
        super().__init__(self.events, headers=headers | {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.chunks), aclosing(self.events):  # the events may not have begun
            await super().__call__(scope, receive, send)


def _head(service: Service, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time()),
        "model": service.name,
        "system_fingerprint": f"dpalign-{__version__}",
    }


def _direction(order: Order) -> dict[str, Any]:
    """Return the fields that OpenAI's completions lack: the direction as the server read it, and warnings."""
    v = order.preference
    weights = None if v is None else {name: round(w, 6) + 0.0 for name, w in v.weights.items()}
    return {"preference": weights, "warnings": list(order.warnings)}


def _warned(completion: Completion) -> dict[str, str]:
    """Return the completion's warnings as a header."""
    warnings = " | ".join(completion.warnings).encode("ascii", "replace").decode()
    return {"x-dpa-warning": warnings} if warnings else {}


def _report(best_of: BestOf | None) -> dict[str, BestOf]:
    return {} if best_of is None else {"best_of": best_of}


# --- the other routes ---


def _add_models(app: FastAPI, service: Service) -> None:
    def model() -> dict[str, Any]:
        return {
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "dpalign",
            "max_model_len": service.generator.context,
            "dial": service.dial.to_json(),
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name.partition("@")[0] != service.name:
            raise unknown_model(name, service.name)
        return model()

    @app.get("/v1/dial")
    async def dial() -> DialReply:
        return service.described()


def _add_operations(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.post("/v1/rewards")
    async def rewards(request: RewardRequest) -> dict[str, dict[str, float]]:
        """Score an answer to a chat on each objective."""
        async with service.scoring.place():
            reward_NK = await service.scores([message.plain() for message in request.messages], [request.response])
        assert service.rewards is not None
        return {"rewards": service.rewards.named(reward_NK[0])}

    @app.post("/v1/taste")
    async def taste(request: TasteRequest) -> TasteReply:
        """Estimate a person's direction from choices between answers with known rewards. Nothing is stored."""
        return service.taste([(choice.preferred, choice.other) for choice in request.choices])

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the engine answers; a watchdog may restart a server whose engine has died."""
        if service.generator.failed:
            raise ApiError(503, "the engine has died; see the log, and start the server again", code="engine_dead")
        return {"status": "ok", "model": service.name, "version": __version__}

    @app.get("/metrics", response_model=None)
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


# --- the server ---


_WAITING: Final = 2048
"""Connections that the machine holds until the event loop accepts them."""


class Server(uvicorn.Server):
    """Prints its address at startup. At shutdown it refuses new requests, and ends the others after the grace time."""

    def __init__(self, app: FastAPI, service: Service, *, access_log: bool = False, log_level: str = "warning") -> None:
        limits = service.limits
        most = room_for(limits.max_connections)
        config = uvicorn.Config(
            app,
            http=partial(Connection, most=most, seconds=limits.head_seconds),  # type: ignore[arg-type]  # a factory
            backlog=BATCH,
            log_level="info" if access_log else log_level,
            access_log=access_log,
            server_header=False,
            ws="none",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=int(limits.grace) + 5,
        )
        spare_the_log()
        super().__init__(config)
        self.service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for listening in sockets or []:
            # Connections inherit this option. asyncio sets it only on sockets that name their protocol; these do not.
            # Without it a body waits 40 ms for the acknowledgement of its headers.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await super().startup(sockets)
        for listening in sockets or []:
            listening.listen(_WAITING)  # BATCH bounds only what the event loop accepts at once; more may wait
            host, port = listening.getsockname()[:2]
            sys.stdout.write(f"{self.service.name} at http://{f'[{host}]' if ':' in host else host}:{port}\n")
            sys.stdout.flush()

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # each second
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.end_if_late()
            SPARING.tell()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.closing = True
        ending = asyncio.create_task(self._end_after_grace())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_after_grace(self) -> None:
        await asyncio.sleep(self.service.limits.grace)
        with contextlib.suppress(Exception):
            await self.service.generator.close()
