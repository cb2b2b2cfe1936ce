"""What strangers can do to a server with connections and bodies alone: the real listener, before a toy app."""

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra dpalign[serve]")

from conftest import answering
from dpalign.dial.server.app import Server
from dpalign.dial.server.connections import room_for
from dpalign.dial.server.engine import Limits
from dpalign.dial.server.guard import VALUES, Guard
from dpalign.dial.server.logs import Sparing
from dpalign.dial.server.metrics import Metrics

GET = b"GET /health?key=s3cret HTTP/1.1\r\nHost: x\r\n\r\n"
HALF = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Half: "


async def toy(scope: Any, receive: Any, send: Any) -> None:
    """Answers ok; to /wait after 0.3 s."""
    if scope["type"] != "http":
        while (message := await receive())["type"] == "lifespan.startup":
            await send({"type": f"{message['type']}.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    if scope["path"] == "/wait":
        await asyncio.sleep(0.3)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@contextmanager
def serving(limits: Limits) -> Iterator[tuple[Server, Callable[[], socket.socket]]]:
    """A server, and what opens a connection to it."""

    async def close() -> None:
        pass

    service: Any = SimpleNamespace(name="toy", limits=limits, closing=False, generator=SimpleNamespace(close=close))
    app: Any = toy
    server = Server(app, service, log_level="error")
    with answering(server) as address, ExitStack() as held:
        yield server, lambda: held.enter_context(socket.create_connection(address, timeout=5))


def answer(line: socket.socket, request: bytes = GET) -> bytes:
    """The whole answer; nothing over a connection that is closed."""
    got = b""
    try:
        line.sendall(request)
        while not got.endswith(b"\r\n\r\nok") and (more := line.recv(4096)):
            got += more
    except ConnectionError:
        return b""
    return got


def is_closed(line: socket.socket) -> bool:
    try:
        return line.recv(1) == b""
    except ConnectionError:
        return True


def test_a_request_whose_head_does_not_come_in_time_is_given_up_however_it_drips() -> None:
    """Silent, half sent, half sent after an answer, and an answered one whose body goes on and on."""
    with serving(Limits(head_seconds=0.3)) as (_, opened):
        silent, half, again, body = (opened() for _ in range(4))
        assert b" 200 " in answer(again)
        assert b" 200 " in answer(body, b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\n\r\n")
        half.sendall(HALF)
        again.sendall(HALF)
        kept = opened()
        assert b" 200 " in answer(kept)
        end = time.monotonic() + 5
        dripping = [half, again, body]
        while dripping and time.monotonic() < end:
            time.sleep(0.1)
            for line in list(dripping):
                try:
                    line.sendall(b"a")
                except ConnectionError:
                    dripping.remove(line)
        assert dripping == []
        assert is_closed(silent)
        assert b" 200 " in answer(kept)  # it asks nothing, and may for longer


def test_half_sent_heads_take_no_place_from_clients_that_ask() -> None:
    """Room for 72 connections, and 300 strangers: who asks is answered, who is being answered keeps the connection."""
    limits = Limits(max_concurrent=1, max_queue=1)
    assert limits.max_connections == 72
    with serving(limits) as (server, opened):
        kept, asking = opened(), opened()
        assert b" 200 " in answer(kept)
        asking.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        strangers = []
        for i in range(300):
            strangers.append(opened())
            strangers[-1].sendall(HALF)
            if i % 20 == 0:
                assert b" 200 " in answer(opened())
                assert b" 200 " in answer(kept)
        assert b" 200 " in asking.recv(4096)
        assert len(server.server_state.connections) <= 72
        assert is_closed(strangers[0])
        assert b" 200 " in answer(strangers[-1], b"\r\n\r\n")  # the newest are slow clients like any other


def test_the_limit_on_open_files_is_raised_and_else_there_is_room_for_fewer_connections() -> None:
    code = "\n".join(
        (
            "import resource",
            "from dpalign.dial.server.connections import room_for",
            "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]",
            "resource.setrlimit(resource.RLIMIT_NOFILE, (300, min(1000, hard)))",
            "print(room_for(500), room_for(5000), resource.getrlimit(resource.RLIMIT_NOFILE)[0])",
        )
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["500", "744", "1000"]
    assert room_for(10) == 10


# --- the log ---


def lines_of(log: Sparing, *records: logging.LogRecord) -> list[str]:
    return [record.getMessage() for record in records if log.filter(record)]


def record(line: int, message: str, *values: object, name: str = "uvicorn.error") -> logging.LogRecord:
    return logging.LogRecord(name, logging.WARNING, "server.py", line, message, values, None)


def access(path: str, status: int) -> logging.LogRecord:
    return record(1, '%s - "%s %s HTTP/%s" %d', "1.2.3.4", "GET", path, "1.1", status, name="uvicorn.access")


def test_lines_of_one_kind_become_one_a_second_with_a_count(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from dpalign.dial.server import logs

    now = [100.0]
    monkeypatch.setattr(logs, "monotonic", lambda: now[0])
    log = Sparing()
    assert lines_of(log, *(record(7, "bad request %d", i) for i in range(1000)), record(8, "other")) == [
        "bad request 0",
        "other",
    ]
    log.tell()
    assert caplog.messages == []
    now[0] += 1
    log.tell()
    (told,) = caplog.messages
    assert "999" in told
    assert "bad request 999" in told
    assert lines_of(log, record(7, "bad request")) == []
    now[0] += 1
    log.tell()
    assert len(caplog.messages) == 2


def test_an_access_line_has_no_query_and_only_refused_requests_share_one() -> None:
    log = Sparing()
    assert lines_of(log, *[access("/v1/models?key=s3cret", 200)] * 2) == ['1.2.3.4 - "GET /v1/models HTTP/1.1" 200'] * 2
    assert lines_of(log, *(access(f"/{i}?key=s3cret", status) for i in range(50) for status in (401, 404))) == [
        '1.2.3.4 - "GET /0 HTTP/1.1" 401',
        '1.2.3.4 - "GET /0 HTTP/1.1" 404',
    ]


# --- bodies ---


def sent(body: bytes) -> dict[str, Any]:
    """What the guard answers to a body; the app behind it answers with status 200."""
    service: Any = SimpleNamespace(limits=Limits(), closing=False)
    messages: list[Any] = [{"type": "http.request", "body": body}]
    got: list[Any] = []

    async def receive() -> Any:
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        got.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    asyncio.run(Guard(toy, service, Metrics(dict))(scope, receive, send))
    return {"status": got[0]["status"], "body": got[1]["body"]}


ZEROS = b'{"messages":[' + b"0," * 500_000 + b"0]}"


@pytest.mark.parametrize(
    "body",
    [
        ZEROS,
        b"[" + b"[]," * 300_000 + b"0]",
        b"{" + b",".join(b'"%d":0' % i for i in range(70_000)) + b"}",
        b"[" + b'"",' * 300_000 + b"0]",
        b'["\\"' + b'",' * 100_000,
        b'["\\\\",' + b"0," * 100_000 + b"0]",
        json.dumps(["\\", *[0] * 100_000]).encode(),
        '["\\""'.encode("utf-16") + b",\x00" * 100_000,
    ],
    ids=["zeros", "lists", "keys", "strings", "quotes", "backslash", "dumped", "utf-16"],
)
def test_a_body_of_many_values_is_refused_before_it_is_parsed(body: bytes) -> None:
    refused = sent(body)
    assert refused["status"] == 400
    assert json.loads(refused["body"])["error"]["code"] in ("too_many_values", "invalid_json")


def test_a_long_text_is_one_value_whatever_stands_in_it() -> None:
    """90,000 commas, brackets, quotes and backslashes each, and as many short turns as the limit allows."""
    for content in ('a, "b" [c] {d} \\" \\\\' * 30_000, "\\" * 300_001, '"' * 300_001):
        assert sent(json.dumps({"messages": [{"role": "user", "content": content}]}).encode())["status"] == 200
    turns = [{"role": "user", "content": "x"}] * (VALUES // 3 - 2)
    assert sent(json.dumps({"messages": turns}).encode())["status"] == 200
    assert sent(json.dumps({"messages": turns * 2}).encode())["status"] == 400


# --- keys ---


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="this machine has no /proc")
def test_a_key_that_was_taken_is_in_no_environment() -> None:
    """Not in this process's own, not in what /proc shows of it, not in a child's."""
    code = "\n".join(
        (
            "import subprocess",
            "from pathlib import Path",
            "from dpalign.runs.environment import take_secret",
            "print(take_secret('DPA_API_KEY'), take_secret('DPA_API_KEY'))",
            "print(b's3cret' in Path('/proc/self/environ').read_bytes(), end=' ')",
            "print(b'beside' in Path('/proc/self/environ').read_bytes())",
            "print(subprocess.run(['env'], capture_output=True, text=True).stdout.count('DPA_API_KEY'))",
        )
    )
    environment = os.environ | {"DPA_API_KEY": "s3cret", "DPA_OTHER": "beside"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["s3cret", "None", "False", "True", "0"]
