"""Requests that nobody would write: an answer in OpenAI's shape, never a 5xx, and the server lives on.

Our own fuzzer spoils good requests in the ways that have broken servers. schemathesis reads the published schema.
"""

import contextlib
import json
import random
import re
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the extra dpalign[train]")
pytest.importorskip("fastapi", reason="needs the extra dpalign[serve]")
pytest.importorskip("openai", reason="needs the extra dpalign[dev]")

import httpx2

import api_server
from api_server import NAMES, QUESTION, Address, Running
from dpalign.dial.server.engine import Limits
from dpalign.dial.server.shapes import IGNORED, REFUSED, ChatRequest

CHAT = "/v1/chat/completions"
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"model": "mine", "messages": QUESTION, "max_tokens": 1},
    "/v1/rewards": {"messages": QUESTION, "response": "tea is hot."},
    "/v1/taste": {"choices": [{"preferred": dict.fromkeys(NAMES, 60), "other": dict.fromkeys(NAMES, 40)}] * 2},
}
"""A good body for each route that reads one."""
READ = (
    *("/v1/models", "/v1/models/mine@-30", "/v1/models/%ff%00", "/v1/dial", "/v1/openapi.json", "/v1/completions"),
    *("/health", "/metrics", "/", "/index.html", "/page.js", "/page.css", "/%2e%2e/app.py", "/page.js/..", "/docs"),
)
"""Other paths, some of which are none."""
ODD = [
    None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e308, -1e308, 2**31, 2**63, -(2**63), 10**400, "", "a", "NaN", "-30",
    "0", "\x00", "\ud800", "\U0001f642", "é" * 300, "<|assistant|>", "</s>", "{{ messages }}", "{% raw %}", "%n%s",
    "../../etc/passwd", "mine", "mine@", "mine@nan", "mine@1e999", "mine@helpfulness=0", "mine@-30", [], [[]],
    [None], [0] * 50, {}, {"": ""}, {"a": {"b": {}}}, {"helpfulness": 1}, {"helpfulness": "1"}, {"helpfulness": 0},
    {"role": "user"}, [{"role": "user", "content": "x"}], [{"role": "user", "content": None}],
    [{"role": "user", "content": []}], [{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}],
    [{"role": "system", "content": "x"}], [{"role": "user", "content": "x", "name": {}}], {"type": "json_object"},
    {"include_usage": 1}, float("nan"), float("inf"), [0] * 9000, [{}] * 3000, {str(i): 0 for i in range(3000)},
    [{"role": "user", "content": [0] * 9000}], [{"role": "user", "content": "x"}] * 2000, "y" * 50_000,
]  # fmt: skip
OURS = (
    "pydantic",
    "Input should",
    "instance of",
    "ValidationError",
    "Error:",
    "ChatRequest",
    "ChatMessage",
    "TextPart",
    "Traceback",
    "starlette",
    "fastapi",
    '.py"',
)
"""What no client needs to read: names of libraries, classes and files."""
RAW = [
    b"", b"null", b"[]", b"{", b"\xff\xfe\x00", b"\x00" * 64, b"[" * 3000, b'{"a":' * 3000, b"1e99999", b"9" * 5000,
    b"{}{}", b"[" + b"0," * 40_000 + b"0]", b'{"messages":[' + b"{}," * 20_000 + b"0]}", b'"\\"' * 9000,
    b"[" * 900 + b"]" * 900, b'{"messages":' + b"[" * 9000 + b"]" * 9000 + b"}",
]  # fmt: skip
TYPES = ["application/json; charset=utf-16", "text/plain", "", "multipart/form-data"]
FIELDS = [*ChatRequest.model_fields, *IGNORED, *REFUSED, "response", "angel", "preferences", "\ud83d", "x" * 2000]
FIELDS += ["choices"] * 3
HEADS = [
    b"GARBAGE\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9, b"\r\n" * 9, b"\x00" * 99,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET  /  HTTP/1.1\r\n\r\n", b"GET /health\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET http://[::1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET //[ HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
    b"GET /%zz%%% HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /health HTTP/1.1\r\nHost: [\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"GET / HTTP/1.1\r\nNo colon\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 9000 + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nRange: bytes=9-1,-,a-b\r\nIf-Range: \xff\r\n\r\n",
    b"GET /page.js HTTP/1.1\r\nHost: localhost\r\nRange: bytes=" + b"0-1," * 9000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nIf-Modified-Since: Sat, 99 Foo 99999 99:99:99\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    *(
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{line}\r\n\r\n".encode("latin-1") + b"{}"
        for line in (
            "Content-Length: -1", "Content-Length: 99999999999999999999", "Content-Length: \xb2",
            "Content-Length: 2\r\nContent-Length: 3", "Content-Length: 2\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding: chunked\r\n\r\nzz", "Transfer-Encoding: chunked\r\n\r\n" + "f" * 99,
            "Content-Length: 2\r\nContent-Encoding: gzip", "Content-Length: 2\r\nExpect: 100-continue",
            "Content-Length: 2\r\nContent-Type: application/json; charset=\xff", "Content-Length: 2\r\nContent-Type: /",
            "Content-Length: 2\r\nAuthorization: Bearer \xff\xfe",
        )
    ),
]  # fmt: skip
"""What comes to the port and is hardly HTTP."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return api_server.write_policy(tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    with api_server.serving(folder, Limits(max_tokens=4, max_n=4, max_body=100_000), reward=True) as server:
        yield server


def spoilt(chance: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    """Method, path, body and headers; seven in eight are spoilt."""
    path = chance.choice((*[CHAT] * 24, *["/v1/rewards"] * 8, *["/v1/taste"] * 8, *READ))
    body = dict(GOOD.get(path, {}))
    for _ in range(chance.choice((0, 1, 1, 1, 2, 2, 3, 6))):
        match chance.randrange(5):
            case 0:
                body.pop(chance.choice([*body, "none"]), None)
            case 1 if "choices" in body:
                choice = {side: dict.fromkeys(NAMES, 50) for side in ("preferred", "other")}
                chance.choice((choice, *choice.values()))[chance.choice((*choice, *NAMES, ""))] = chance.choice(ODD)
                body["choices"] = [choice] * chance.choice((1, 2, 40, 101))
            case 1:
                turns = [*map(dict, QUESTION)] * chance.choice((1, 2, 40))
                chance.choice(turns)[chance.choice(("role", "content", "name", "tool_calls"))] = chance.choice(ODD)
                body["messages"] = turns
            case _:
                body[chance.choice(FIELDS)] = chance.choice(ODD)
    content = json.dumps(body).encode()
    match chance.randrange(12):
        case 0:
            content = chance.choice(RAW)
        case 1:
            cut = chance.randrange(len(content))
            content = content[:cut] + bytes([chance.randrange(256)]) + content[cut + chance.randrange(2) :]
    headers = {"Content-Type": chance.choice(TYPES) if chance.random() < 0.15 else "application/json"}
    if chance.random() < 0.1:
        name = chance.choice(("Authorization", "Accept", "Origin", "Host", "Cookie", "Range", "Content-Encoding"))
        headers[name] = chance.choice(("", "x" * 3000, "*"))
    method = "POST" if path in GOOD else "GET"
    if chance.random() < 0.1:
        method = chance.choice(("GET", "POST", "PUT", "PATCH", "OPTIONS", "HEAD", "DELETE", "TRACE", "BREW"))
    suffix = chance.choice(("?a=%00", "/", "//", "/..%2f", "?" + "a" * 3000)) if chance.random() < 0.05 else ""
    return method, path + suffix, content, headers


def said_to(head: bytes, url: str) -> bytes:
    """All that comes back when a client sends this and waits for no more than the end of the connection."""
    host, port = url.removeprefix("http://").split(":")
    got = b""
    with socket.create_connection((host, int(port)), timeout=10) as line, contextlib.suppress(ConnectionError):
        line.sendall(head)
        line.shutdown(socket.SHUT_WR)
        while more := line.recv(65536):
            got += more
    return got


def throw(server: Address, count: int) -> None:
    """Spoilt requests, one in twenty of them hardly HTTP; an honest one has the same answer before and after."""
    before = server.ask(seed=1, temperature=1.0, max_tokens=4).json()["choices"]
    chance, statuses = random.Random(count), Counter[int]()
    with httpx2.Client(base_url=server.url, timeout=30) as client:
        for _ in range(count):
            if chance.random() < 0.05:
                head = chance.choice(HEADS)
                told = said_to(head, server.url)
                assert not re.search(rb"HTTP/1\.1 5\d\d", told), (head, told[:300])
                assert not [word for word in OURS if word.encode() in told.partition(b"\r\n\r\n")[0]]
                statuses[int(told.split()[1]) if told else 0] += 1
                continue
            request = spoilt(chance)
            method, path, content, headers = request
            answer = client.request(method, path, content=content, headers=headers)
            statuses[answer.status_code] += 1
            assert answer.status_code < 500, (request, answer.text[:300])
            if answer.status_code >= 400 and method != "HEAD":
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, request
                assert not [word for word in OURS if word in answer.text], (request, answer.text[:300])
    assert statuses[400] > count / 3
    assert statuses[200] > count / 30  # some are good all the same
    assert statuses[404] > count / 100
    assert server.ask(seed=1, temperature=1.0, max_tokens=4).json()["choices"] == before
    assert server.settles("dpa_engine_rows", 0)


def test_spoilt_requests_meet_no_5xx_and_the_server_lives_on(running: Running) -> None:
    throw(running, 300)


@pytest.mark.slow
def test_ten_thousand_spoilt_requests_meet_no_5xx_of_the_real_server(folder: Path, tmp_path: Path) -> None:
    """`dpa serve` in its own process, whose log tells of no fault of its own."""
    log = tmp_path / "log.txt"
    limits = ["--max-tokens", "4", "--max-n", "4", "--max-body", "100000", "--rows", "16"]
    with api_server.process(folder, log, *limits, "--reward", "api_server:lengths") as server:
        throw(server, 10_000)
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_a_schema_fuzzer_finds_no_server_error(running: Running) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_url(f"{running.url}/v1/openapi.json")
    seen = Counter[str]()
    for result in schema.get_all_operations():

        @given(case=result.ok().as_strategy())
        @settings(
            max_examples=300,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def throw_all(case: Any) -> None:
            answer = case.call(base_url=running.url)
            seen[case.path] += 1
            assert answer.status_code < 500, answer.text

        throw_all()
    assert seen[CHAT] >= 100
    assert running.ask(max_tokens=1).status_code == 200
