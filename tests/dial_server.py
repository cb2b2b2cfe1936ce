"""A server for the tests with the surface of `dpa serve`, over real HTTP on 127.0.0.1, and no model behind it.

The less verbosity is asked for, the shorter its answers; each is streamed as OpenAI's servers do, word by word. It
keeps every request. `python tests/dial_server.py` serves one until it is interrupted.
"""

import asyncio
import json
import mimetypes
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra dpalign[serve]")

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

PAGE = files("dpalign") / "dial" / "server" / "page"
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:"
TEXT = "tea is dark and hot. tea grows on hills and dries in pans. iron is hard and heavy. iron rusts in rain."
WORDS = TEXT.split()
FRONT = [(0, 97.1, 72.1), (-15, 94.7, 64.7), (-30, 90.2, 54.0), (-45, 79.1, 43.4)]


def shorter(body: Mapping[str, Any]) -> str:
    """As many words as helpfulness and verbosity are worth together, from 3 to 21."""
    wanted = body.get("preference") or {}
    share = (1 + wanted.get("verbosity", 0) / max(0.2, wanted.get("helpfulness", 1))) / 2
    return " ".join(WORDS[: max(3, round(2 * share * len(WORDS)))])


@dataclass
class Model:
    """What the server pretends to serve, and what it was asked."""

    objectives: Sequence[str] = ("helpfulness", "verbosity")
    arc: Sequence[float] | None = (-45.0, 0.0)
    trained: Mapping[str, Any] | None = None
    front: Sequence[tuple[float, float, float]] | None = tuple(FRONT)
    dial: bool = True
    """False: a server that knows nothing of directions."""
    verbosity: Mapping[str, Mapping[str, float]] | None = None
    rewards: bool = True
    key: str | None = None
    answer: Callable[[Mapping[str, Any]], str] = shorter
    pause: float = 0.0
    """Seconds before each word."""
    hold: threading.Event | None = None
    """Set, an answer goes on after its first word."""
    breaks: bool = False
    """The connection ends within the answer."""
    bare: bool = False
    """An answer is its text and [DONE]: no reason is given for its end; an answer of NUL is no JSON at all."""
    warning: str | None = None
    template: str = "fig1"
    note: str | None = None
    questions: Sequence[str] = ()
    chosen: Mapping[str, Any] | None = None
    """What an answer tells of how it was chosen, where it is asked for as the best of several."""
    taste: Mapping[str, Any] | None = None
    """What it makes of choices."""
    choices: list[dict[str, Any]] = field(default_factory=list)
    """The bodies of all requests for a taste."""
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """The bodies of all chat completions."""
    keys: list[str] = field(default_factory=list)
    gone: int = 0
    """Clients that left before their answer was whole."""

    def preferences(self) -> list[dict[str, float]]:
        return [request["preference"] for request in self.requests]

    def described(self) -> dict[str, Any]:
        front = [
            {
                "angle": angle,
                "direction": {"helpfulness": 1.0, "verbosity": angle / 45 * 1.0},
                "rewards": {"helpfulness": helpfulness, "verbosity": verbosity},
            }
            for angle, helpfulness, verbosity in self.front or ()
        ]
        return {
            "model": "world",
            "objectives": list(self.objectives),
            "arc": self.arc and list(self.arc),
            "trained": self.trained,
            "template": self.template,
            "rewards": self.rewards,
            "max_best_of": 16 if self.rewards else 0,
            "front": front or None,
            "verbosity": self.verbosity,
            "note": self.note,
            "questions": list(self.questions),
        }


def app_of(model: Model) -> Starlette:
    """Answers as the model says."""

    def allowed(request: Request) -> bool:
        model.keys.append(request.headers.get("Authorization", ""))
        return model.key in (None, model.keys[-1].removeprefix("Bearer "))

    def reply(request: Request, content: Mapping[str, Any] | None, why: str) -> Response:
        if not allowed(request):
            return JSONResponse(error("give the API key as a bearer token"), 401)
        return JSONResponse(error(why), 404) if content is None else JSONResponse(content)

    async def dial(request: Request) -> Response:
        return reply(request, model.described() if model.dial else None, "not found")

    async def models(request: Request) -> Response:
        return reply(request, {"object": "list", "data": [{"id": "world", "object": "model"}]}, "")

    async def rewards(request: Request) -> Response:
        words = len((await request.json())["response"].split())
        earned = {name: 90.0 - 3 * words * k for k, name in enumerate(model.objectives)}
        return reply(request, {"rewards": earned} if model.rewards else None, "this server has no reward model")

    async def taste(request: Request) -> Response:
        model.choices.append(await request.json())
        return reply(request, model.taste, "not found")

    async def chat(request: Request) -> Response:
        if not allowed(request):
            return JSONResponse(error("give the API key as a bearer token"), 401)
        model.requests.append(await request.json())
        headers = {"x-dpa-warning": model.warning} if model.warning else {}
        return StreamingResponse(stream(model, model.requests[-1]), media_type="text/event-stream", headers=headers)

    async def page(request: Request) -> Response:
        file = PAGE / (request.path_params.get("name", "index.html"))
        if not file.is_file():
            return JSONResponse(error("no such page"), 404)
        kind = mimetypes.guess_type(file.name)[0]
        return Response(file.read_bytes(), media_type=kind, headers={"Content-Security-Policy": POLICY})

    return Starlette(
        routes=[
            Route("/v1/dial", dial),
            Route("/v1/models", models),
            Route("/v1/rewards", rewards, methods=["POST"]),
            Route("/v1/taste", taste, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/{name}", page),
            Route("/", page, name="index"),
        ]
    )


async def stream(model: Model, body: Mapping[str, Any]) -> AsyncIterator[str]:
    """An answer word by word, as OpenAI's servers send it."""

    def event(choice: Mapping[str, Any], **more: Any) -> str:
        return f"data: {json.dumps({'choices': [{'index': 0, **choice}]} | more)}\n\n"

    text = model.answer(body)
    whole = False
    try:
        yield event({"delta": {"role": "assistant", "content": ""}})
        for i, word in enumerate(text.split(" ")):
            if i == 1 and model.breaks:
                return
            while i == 1 and model.hold is not None and not model.hold.is_set():
                await asyncio.sleep(0.02)
            await asyncio.sleep(model.pause)
            yield event({"delta": {"content": f" {word}" if i else word}})
        if text == "\0":
            yield "data: [nonsense\n\n"
        if not model.bare:
            report = {"best_of": chosen(model, body)} if body.get("best_of") else {}
            yield event({"delta": {}, "finish_reason": "stop"}, **report)
        yield "data: [DONE]\n\n"
        whole = True
    finally:
        model.gone += not whole


def chosen(model: Model, body: Mapping[str, Any]) -> Mapping[str, Any]:
    if model.chosen is not None:
        return model.chosen
    rewards = {name: 81.0 - 3 * k for k, name in enumerate(model.objectives)}
    value = sum(w * rewards[name] for name, w in body["preference"].items())
    report = {"drawn": body["best_of"], "angle_spread": body.get("angle_spread", 10.0)}
    return report | {"drawn_at": body["preference"], "rewards": rewards, "value": value, "mean_value": value - 2}


@contextmanager
def serving(model: Model | None = None) -> Iterator[Model]:
    """The server at work, on a free port; its address is in `url`."""
    model = model or Model()
    server = uvicorn.Server(uvicorn.Config(app_of(model), log_level="critical", timeout_graceful_shutdown=1))
    listening = socket.create_server(("127.0.0.1", 0))
    model.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield model
    finally:
        server.should_exit = True
        thread.join(5)
        listening.close()


def error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


if __name__ == "__main__":
    with serving(Model(pause=0.05)) as running:
        sys.stdout.write(f"{running.url}\n")
        sys.stdout.flush()
        threading.Event().wait()
