"""A judge for the tests, over real HTTP on 127.0.0.1: it prefers the shorter answer, unless told to misbehave.

It speaks /chat/completions as OpenAI-compatible servers do, reads AlpacaEval 2's official prompt, and counts requests.
`python tests/judge_server.py` serves one until it is interrupted, to try `dpa alpaca-eval`.
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

PROMPT = re.compile(r'"m",\s*"output": """(.*?)""".*"M",\s*"output": """(.*?)"""', re.DOTALL)


@dataclass(frozen=True)
class Reply:
    """A status and a JSON body; held back until `wait_for` is set."""

    body: Any
    status: int = 200
    wait_for: threading.Event | None = None


Behaviour = Callable[[int, Mapping[str, Any]], Reply | None]
"""From the request's number (from 0) and body: a reply instead of a judgement, or None to judge."""


def completion(logprobs: Mapping[str, float]) -> dict[str, Any]:
    """A chat completion of one token with these log-probabilities."""
    top = [{"token": token, "logprob": value, "bytes": None} for token, value in logprobs.items()]
    best = max(logprobs, key=lambda token: logprobs[token])
    content = [{"token": best, "logprob": 0.0, "bytes": None, "top_logprobs": top}]
    message = {"role": "assistant", "content": best}
    choice = {"index": 0, "finish_reason": "length", "message": message, "logprobs": {"content": content}}
    usage = {"prompt_tokens": 300, "completion_tokens": 1, "total_tokens": 301}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "j", "choices": [choice], "usage": usage}


def shorter(body: Mapping[str, Any]) -> dict[str, Any]:
    """P(m) = logistic((length of M - length of m) / 10): 10 characters shorter wins with 0.731."""
    match = PROMPT.search(body["messages"][-1]["content"])
    assert match, body
    share = 1 / (1 + math.exp((len(match[1]) - len(match[2])) / 10))
    return completion({"m": math.log(share), "M": math.log1p(-share)})


@dataclass
class Judge:
    """The running server: its base URL, and every request so far."""

    behave: Behaviour
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)


@contextmanager
def serving(behave: Behaviour = lambda number, body: None) -> Iterator[Judge]:
    """A judge on a free port of 127.0.0.1."""
    judge, lock = Judge(behave), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(judge.requests)
                judge.requests.append(body)
                judge.headers.append({name.lower(): value for name, value in self.headers.items()})
            reply = judge.behave(number, body) or Reply(shorter(body))
            if reply.wait_for is not None:
                reply.wait_for.wait(30)
            data = json.dumps(reply.body).encode()
            self.send_response(reply.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:  # the client is gone
            pass

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
