"""Requests that nobody would write: an answer in OpenAI's shape, never a 5xx, and the server lives on.

Our own fuzzer spoils good requests in the ways that have broken servers. schemathesis reads the published schema.
"""

import json
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the extra dpalign[train]")
pytest.importorskip("fastapi", reason="needs the extra dpalign[serve]")
pytest.importorskip("openai", reason="needs the extra dpalign[dev]")

import httpx2

import api_server
from api_server import QUESTION, Running
from dpalign.dial.server.engine import Limits
from dpalign.dial.server.shapes import IGNORED, REFUSED, ChatRequest

CHAT = "/v1/chat/completions"
PATHS = (CHAT, CHAT, CHAT, "/v1/rewards", "/v1/models", "/v1/dial")
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
)
"""What no client needs to read: names of libraries and classes."""
RAW = [
    b"", b"null", b"[]", b"{", b"\xff\xfe\x00", b"\x00" * 64, b"[" * 3000, b'{"a":' * 3000, b"1e99999", b"9" * 5000,
    b"{}{}", b"[" + b"0," * 40_000 + b"0]", b'{"messages":[' + b"{}," * 20_000 + b"0]}", b'"\\"' * 9000,
]  # fmt: skip
TYPES = ["application/json; charset=utf-16", "text/plain", "", "multipart/form-data"]
FIELDS = [*ChatRequest.model_fields, *IGNORED, *REFUSED, "response", "angel", "preferences", "\ud83d", "x" * 2000]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = api_server.write_policy(tmp_path_factory.mktemp("policy") / "model")
    with api_server.serving(folder, Limits(max_tokens=4, max_n=4, max_body=100_000), reward=True) as server:
        yield server


def spoilt(chance: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    """Method, path, body and headers; seven in eight are spoilt."""
    path = chance.choice(PATHS)
    body: dict[str, Any] = {"model": "mine", "messages": QUESTION, "max_tokens": 2}
    if path == "/v1/rewards":
        body = {"messages": QUESTION, "response": "tea is hot."}
    for _ in range(chance.choice((0, 1, 1, 1, 2, 2, 3, 6))):
        match chance.randrange(5):
            case 0:
                body.pop(chance.choice([*body, "none"]), None)
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
        name = chance.choice(("Authorization", "Accept", "Origin", "Host", "Cookie"))
        headers[name] = chance.choice(("", "x" * 3000, "*"))
    method = chance.choice(("GET", "PUT", "PATCH", "OPTIONS", "HEAD", "DELETE")) if chance.random() < 0.1 else "POST"
    suffix = chance.choice(("?a=%00", "/", "//", "/..%2f", "?" + "a" * 3000)) if chance.random() < 0.05 else ""
    return method, path + suffix, content, headers


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_spoilt_requests_meet_no_5xx_and_the_server_lives_on(running: Running, count: int) -> None:
    before = running.ask(seed=1, temperature=1.0).json()["choices"]
    chance, statuses = random.Random(count), Counter[int]()
    with httpx2.Client(base_url=running.url, timeout=30) as client:
        for _ in range(count):
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
    assert running.ask(seed=1, temperature=1.0).json()["choices"] == before
    assert running.settles("dpa_engine_rows", 0)


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
