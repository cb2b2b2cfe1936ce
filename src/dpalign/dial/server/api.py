"""The HTTP surface: OpenAI's chat completions with a dial, what the page needs, health and metrics."""

import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import aclosing
from pathlib import Path
from time import time
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from starlette.staticfiles import StaticFiles

from dpalign import __version__
from dpalign.dial.server import refusals
from dpalign.dial.server.answering import Order, Service
from dpalign.dial.server.generation import Delta, collect
from dpalign.dial.server.guard import Guard
from dpalign.dial.server.protocol import ChatRequest, RewardRequest, choice, piece, plain_messages, usage
from dpalign.dial.server.refusals import Refusal, json_response
from dpalign.dial.server.streaming import EventStream, Gone, unless_gone

PAGE: Final = Path(__file__).parent / "page"
"""The web page's files."""

OURS: Final = ("preference", "warnings")
"""Fields of a completion, and of the first chunk of each answer, that OpenAI's have not."""

PAGE_HEADERS: Final = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
"""Of the page's files. The page states the rest of its policy itself, but only a header can forbid frames around it;
and a browser asks whether a file has changed, so that no page of an earlier version meets this server."""


def create_app(
    service: Service,
    *,
    key: str | None = None,
    hosts: Collection[str] | None = None,
    origins: Sequence[str] = (),
) -> Guard:
    """The app, with the guard that stands before it.

    Args:
        key: asked of clients of /v1 and /metrics.
        hosts: see `Guard`.
        origins: see `Guard`; none by default.
    """

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await service.generator.start()
        yield
        await service.generator.close()
        if service.rewards is not None:
            service.rewards.close()

    app = FastAPI(
        title="dpalign",
        version=__version__,
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        openapi_url="/v1/openapi.json",
    )
    refusals.install(app)
    _add_chat(app, service)
    _add_models(app, service)
    _add_rewards(app, service)
    _add_operations(app, service)
    if PAGE.is_dir():
        app.mount("/", _PageFiles(directory=PAGE, html=True))
    return Guard(app, limits=service.limits, metrics=service.metrics, key=key, hosts=hosts, origins=origins)


class _PageFiles(StaticFiles):
    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers.update(PAGE_HEADERS)
        return response


def _add_chat(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request, body: ChatRequest) -> Response:
        """Answers to a chat, at a direction if one is asked for."""
        try:
            order = await unless_gone(request, service.read(body))
            head = _head(service, order, "chat.completion.chunk" if body.stream else "chat.completion")
            if body.stream:
                options = body.stream_options
                events = _events(service, order, head, with_usage=bool(options and options.include_usage))
                first = await unless_gone(request, anext(events))
                return EventStream(first, events, _headers(order), service.limits.read_seconds, service.metrics)
            return await unless_gone(request, _completion(service, order, head))
        except Gone:
            service.metrics.gone.inc()
            return Response(status_code=499)


async def _completion(service: Service, order: Order, head: dict[str, Any]) -> Response:
    if order.best_of is not None:
        best = await service.best(order)
        choices = [choice(0, best.answer.text, best.answer.finish)]
        told = {"usage": usage(len(order.prompt), best.tokens), "best_of": best.chosen.to_json()}
        body = head | {"choices": choices} | told
        return json_response(body, headers=_headers(order))
    async with aclosing(service.answers(order)) as stream:
        answers = await collect(stream, order.sampling.n)
    choices = [choice(i, answer.text, answer.finish) for i, answer in enumerate(answers)]
    drawn = sum(answer.tokens for answer in answers)
    body = head | {"choices": choices, "usage": usage(len(order.prompt), drawn)}
    return json_response(body, headers=_headers(order))


async def _events(
    service: Service, order: Order, head: dict[str, Any], *, with_usage: bool
) -> AsyncGenerator[list[dict[str, Any]], None]:
    """The chunks of a streamed completion, in lists that are sent together."""
    told = {name: value for name, value in head.items() if name not in OURS} | ({"usage": None} if with_usage else {})

    def chunk(one: dict[str, Any], **more: Any) -> dict[str, Any]:
        return told | {"choices": [one]} | more

    ours = {name: head[name] for name in OURS}
    opening = [chunk(piece(i, {"role": "assistant", "content": ""}), **ours) for i in range(order.sampling.n)]
    drawn = 0
    if order.best_of is not None:
        best = await service.best(order)
        drawn = best.tokens
        ending = chunk(piece(0, {}, best.answer.finish), best_of=best.chosen.to_json())
        yield [*opening, chunk(piece(0, {"content": best.answer.text})), ending]
    else:
        async with aclosing(service.answers(order)) as stream:
            async for news in stream:
                drawn += sum(delta.tokens for delta in news)
                yield opening + [chunk(one) for one in _pieces(news)]
                opening = []
    if with_usage:
        yield [told | {"choices": [], "usage": usage(len(order.prompt), drawn)}]


def _pieces(news: Sequence[Delta]) -> list[dict[str, Any]]:
    """One piece an answer of all its new text, and one for its end."""
    texts: dict[int, str] = {}
    for delta in news:
        texts[delta.index] = texts.get(delta.index, "") + delta.text
    pieces = [piece(index, {"content": text}) for index, text in texts.items() if text]
    return pieces + [piece(delta.index, {}, delta.finish) for delta in news if delta.finish is not None]


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
            raise Refusal(404, f"no model {name[:100]!r} here; there is {service.name!r}", code="model_not_found")
        return model()

    @app.get("/v1/dial")
    async def dial() -> dict[str, Any]:
        """What a client needs to draw the dial."""
        told = {"model": service.name, "rewards": service.rewards is not None, "max_best_of": service.max_best_of}
        return service.dial.to_json() | told | {"temperature": service.temperature}


def _add_rewards(app: FastAPI, service: Service) -> None:
    @app.post("/v1/rewards", response_model=None)
    async def rewards(request: Request, body: RewardRequest) -> Response:
        """What an answer to a chat earns on each objective."""
        if service.rewards is None:
            raise Refusal(404, "no reward model here; start the server with --reward", code="no_reward_model")
        messages = plain_messages(body.messages)
        try:
            async with service.scoring.enter():
                reward_NK = await unless_gone(request, service.scores(messages, [body.response]))
        except Gone:
            service.metrics.gone.inc()
            return Response(status_code=499)
        return json_response({"rewards": service.rewards.named(reward_NK[0])})


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether answers can be had: whoever watches may start a server anew whose engine has died."""
        if service.generator.failed:
            raise Refusal(503, "the engine has died; see the log, and start the server again", code="engine_dead")
        return {"status": "ok", "model": service.name, "version": __version__}

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _head(service: Service, order: Order, kind: str) -> dict[str, Any]:
    """The fields that a completion begins with."""
    asked = order.preference
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time()),
        "model": service.name,
        "system_fingerprint": f"dpalign-{__version__}",
        "preference": None if asked is None else {name: round(w, 6) + 0.0 for name, w in asked.weights.items()},
        "warnings": list(order.warnings),
    }


def _headers(order: Order) -> dict[str, str]:
    warnings = " | ".join(order.warnings).encode("ascii", "replace").decode()
    return {"x-dpa-warning": warnings} if warnings else {}
