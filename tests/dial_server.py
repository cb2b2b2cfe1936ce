"""A server for the tests with the surface of `dpa serve`, over real HTTP on 127.0.0.1, and no model behind it.

The less verbosity is asked for, the shorter its answers; each is streamed as OpenAI's servers do, word by word. It
keeps every request. `python tests/dial_server.py` serves one until it is interrupted.
"""

import json
import mimetypes
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

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
    front: Sequence[tuple[float, float, float]] | None = tuple(FRONT)
    dial: bool = True
    """False: a server that knows nothing of directions."""
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
            "template": self.template,
            "rewards": self.rewards,
            "max_best_of": 16 if self.rewards else 0,
            "front": front or None,
            "note": self.note,
            "questions": list(self.questions),
        }


class Handler(BaseHTTPRequestHandler):
    """Answers as `server.model` says."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    @property
    def model(self) -> Model:
        return self.server.model

    def do_GET(self) -> None:
        if self.path == "/v1/dial":
            if self.allowed():
                self.reply(
                    self.model.described() if self.model.dial else error("not found"), 200 if self.model.dial else 404
                )
        elif self.path == "/v1/models":
            if self.allowed():
                self.reply({"object": "list", "data": [{"id": "world", "object": "model"}]})
        else:
            self.file(self.path.split("?")[0].lstrip("/") or "index.html")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        if self.path == "/v1/rewards" and self.model.rewards:
            spoken = len(body["response"].split())
            self.reply({"rewards": {name: 90.0 - 3 * spoken * k for k, name in enumerate(self.model.objectives)}})
        elif self.path == "/v1/chat/completions":
            self.model.requests.append(body)
            self.chat(body)
        else:
            self.reply(error("this server has no reward model"), 404)

    def chat(self, body: Mapping[str, Any]) -> None:
        text = self.model.answer(body)
        if not body.get("stream"):
            message = {"role": "assistant", "content": text}
            self.reply({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
            return
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        if self.model.warning:
            self.send_header("x-dpa-warning", self.model.warning)
        self.end_headers()
        try:
            self.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            for i, word in enumerate(text.split(" ")):
                if i == 1 and self.model.breaks:
                    return
                if i == 1 and self.model.hold is not None:
                    while not self.model.hold.wait(0.05):
                        self.wfile.write(b": still here\n\n")  # notices that the client has left
                time.sleep(self.model.pause)
                self.event({"choices": [{"index": 0, "delta": {"content": f" {word}" if i else word}}]})
            if text == "\0":
                self.wfile.write(b"data: [nonsense\n\n")
            if not self.model.bare:
                told = {"best_of": self.chosen(body)} if body.get("best_of") else {}
                self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]} | told)
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.model.gone += 1

    def chosen(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.model.chosen is not None:
            return self.model.chosen
        rewards = {name: 81.0 - 3 * k for k, name in enumerate(self.model.objectives)}
        value = sum(w * rewards[name] for name, w in body["preference"].items())
        told = {"drawn": body["best_of"], "angle_spread": body.get("angle_spread", 10.0)}
        return told | {"drawn_at": body["preference"], "rewards": rewards, "value": value, "mean_value": value - 2}

    def event(self, data: object) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def allowed(self) -> bool:
        given = self.headers.get("Authorization", "")
        self.model.keys.append(given)
        if self.model.key is None or given == f"Bearer {self.model.key}":
            return True
        self.reply(error("give the API key as a bearer token"), 401)
        return False

    def file(self, name: str) -> None:
        found = PAGE / name
        if "/" in name or not found.is_file():
            self.reply(error("no such page"), 404)
            return
        self.send(found.read_bytes(), 200, mimetypes.guess_type(name)[0] or "application/octet-stream")

    def reply(self, data: object, status: int = 200) -> None:
        self.send(json.dumps(data).encode(), status, "application/json")

    def send(self, data: bytes, status: int, kind: str) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(data)),
            "Content-Security-Policy": POLICY,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """On a free port of this machine."""

    daemon_threads = True

    def __init__(self, model: Model) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = model


@contextmanager
def serving(model: Model | None = None) -> Iterator[Model]:
    """The server at work; its address is in `url`."""
    model = model or Model()
    server = Server(model)
    model.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield model
    finally:
        server.shutdown()
        server.server_close()


def error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


if __name__ == "__main__":
    with serving(Model(pause=0.05)) as running:
        sys.stdout.write(f"{running.url}\n")
        sys.stdout.flush()
        threading.Event().wait()
