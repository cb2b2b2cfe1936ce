"""A judge for the tests, over real HTTP on 127.0.0.1: it prefers the shorter answer, unless told to misbehave.

It speaks /chat/completions as OpenAI-compatible servers do, and counts what it was asked and what it answered.
`python tests/judge_server.py` serves one until it is interrupted, for trying `dpa alpaca-eval` out.
"""

import json
import math
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OURS = re.compile(r'<answer model="m">\n(.*?)\n</answer>.*<answer model="M">\n(.*?)\n</answer>', re.DOTALL)
OFFICIAL = re.compile(r'"m",\s*"output": """(.*?)""".*"M",\s*"output": """(.*?)"""', re.DOTALL)


@dataclass(frozen=True)
class Says:
    """One reply: a status, headers, and a body that is JSON unless it is text already."""

    body: Any
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    wait_for: threading.Event | None = None
    """The reply is held back until this is set."""


Behaviour = Callable[[int, Mapping[str, Any]], Says | None]
"""From the request's number (from 0) and body: what to say instead of judging, or None to judge."""


def completion(logprobs: Mapping[str, float] | None) -> dict[str, Any]:
    """A chat completion of one token with these log-probabilities; None leaves them out."""
    top = [{"token": token, "logprob": value, "bytes": None} for token, value in (logprobs or {}).items()]
    best = max(top, key=lambda one: one["logprob"])["token"] if top else "m"
    content = {"content": [{"token": best, "logprob": 0.0, "bytes": None, "top_logprobs": top}]}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "short",
        "choices": [
            {
                "index": 0,
                "finish_reason": "length",
                "message": {"role": "assistant", "content": best},
                "logprobs": None if logprobs is None else content,
            }
        ],
        "usage": {"prompt_tokens": 300, "completion_tokens": 1, "total_tokens": 301},
    }


def shorter(body: Mapping[str, Any]) -> dict[str, Any]:
    """P(m) = logistic((length of M - length of m) / 10): 10 characters shorter wins with 0.731."""
    text = body["messages"][-1]["content"]
    found = OURS.search(text) or OFFICIAL.search(text)
    assert found, text
    lead = (len(found[2]) - len(found[1])) / 10
    share = 1 / (1 + math.exp(-lead))
    return completion({"m": math.log(share), "M": math.log1p(-share)})


class Judge:
    """The running server: its base URL, and every request and reply so far."""

    def __init__(self, behave: Behaviour) -> None:
        self.behave = behave
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []
        self.answered = 0
        """Replies of status 200 that went out whole: what a real judge bills."""
        self.url = ""
        self.lock = threading.Lock()

    def prompts(self) -> list[str]:
        return [request["messages"][-1]["content"] for request in self.requests]


@contextmanager
def serving(behave: Behaviour = lambda number, body: None) -> Iterator[Judge]:
    """A judge on a free port of 127.0.0.1."""
    judge = Judge(behave)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with judge.lock:
                number = len(judge.requests)
                judge.requests.append(body)
                judge.headers.append(dict(self.headers))
            says = judge.behave(number, body) or Says(shorter(body))
            if says.wait_for is not None:
                says.wait_for.wait(30)
            data = (says.body if isinstance(says.body, str) else json.dumps(says.body)).encode()
            try:
                self.send_response(says.status)
                for name, value in {
                    "Content-Type": "application/json",
                    "Content-Length": str(len(data)),
                    **says.headers,
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
                self.wfile.flush()
            except OSError:  # the asker is gone
                return
            if says.status == 200:
                with judge.lock:
                    judge.answered += 1

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    with serving() as running:
        sys.stdout.write(f"{running.url}\n")
        sys.stdout.flush()
        threading.Event().wait()
