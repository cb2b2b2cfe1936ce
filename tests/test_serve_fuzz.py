"""Requests that nobody would write, by the thousand: an answer in OpenAI's shape, never a 5xx, and the server lives on.

Our own fuzzer starts from good requests and spoils them in the ways that have broken servers; schemathesis reads the
published schema.
"""

import json
import random
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

PATHS = (
    "/v1/chat/completions",
    "/v1/chat/completions",
    "/v1/chat/completions",
    "/v1/rewards",
    "/v1/models",
    "/v1/dial",
)

ODD = [
    None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e308, -1e308, 2**31, 2**63, -(2**63), 10**400, "", "a", "NaN", "-30",
    "0", "\x00", "\ud800", "\U0001f642", "é" * 300, "<|assistant|>", "</s>", "{{ messages }}", "{% raw %}", "%n%s",
    "../../etc/passwd", "mine", "mine@", "mine@nan", "mine@1e999", "mine@helpfulness=0", "mine@-30", [], [[]],
    [None], [0] * 50, {}, {"": ""}, {"a": {"b": {}}}, {"helpfulness": 1}, {"helpfulness": "1"}, {"helpfulness": 0},
    {"role": "user"}, [{"role": "user", "content": "x"}], [{"role": "user", "content": None}],
    [{"role": "user", "content": []}], [{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}],
    [{"role": "system", "content": "x"}], [{"role": "user", "content": "x", "name": {}}], {"type": "json_object"},
    {"include_usage": 1}, float("nan"), float("inf"),
]  # fmt: skip
RAW = [
    b"",
    b"null",
    b"[]",
    b"{",
    b"\xff\xfe\x00",
    b"\x00" * 64,
    b"[" * 3000,
    b'{"a":' * 3000,
    b"1e99999",
    b"9" * 5000,
    b"{}{}",
]
TYPES = [
    "application/json",
    "application/json",
    "application/json; charset=utf-16",
    "text/plain",
    "",
    "multipart/form-data",
]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = api_server.write_policy(tmp_path_factory.mktemp("policy") / "model")
    with api_server.serving(folder, Limits(max_tokens=4, max_n=4, max_body=100_000), reward=True) as server:
        yield server


def spoilt(chance: random.Random) -> tuple[str, str, dict[str, Any]]:
    """Method, path and what else a request is made of; seven in eight are spoilt."""
    body: dict[str, Any] = {"model": "mine", "messages": QUESTION, "max_tokens": 2}
    path = chance.choice(PATHS)
    if path == "/v1/rewards":
        body = {"messages": QUESTION, "response": "tea is hot."}
    fields = [*ChatRequest.model_fields, *IGNORED, *REFUSED, "response", "angel", "preferences", "\ud83d", "x" * 2000]
    for _ in range(chance.choice((0, 1, 1, 1, 2, 2, 3, 6))):
        match chance.randrange(5):
            case 0:
                body.pop(chance.choice([*body, "none"]), None)
            case 1 if isinstance(body.get("messages"), list) and body["messages"]:
                turns = [*map(dict, QUESTION)] * chance.choice((1, 2, 40))
                turns[chance.randrange(len(turns))][chance.choice(("role", "content", "name", "tool_calls"))] = (
                    chance.choice(ODD)
                )
                body["messages"] = turns
            case _:
                body[chance.choice(fields)] = chance.choice(ODD)
    content = json.dumps(body).encode()
    match chance.randrange(12):
        case 0:
            content = chance.choice(RAW)
        case 1:
            cut = chance.randrange(len(content))
            content = content[:cut] + bytes([chance.randrange(256)]) + content[cut + chance.randrange(2) :]
    headers = {"Content-Type": chance.choice(TYPES) if chance.random() < 0.2 else "application/json"}
    if chance.random() < 0.1:
        headers[chance.choice(("Authorization", "Accept", "Origin", "Host", "Cookie"))] = chance.choice(
            ("", "x" * 3000, "*")
        )
    method = chance.choice(("GET", "PUT", "PATCH", "OPTIONS", "HEAD", "DELETE")) if chance.random() < 0.1 else "POST"
    suffix = chance.choice(("?a=%00", "/", "//", "/..%2f", "?" + "a" * 3000)) if chance.random() < 0.05 else ""
    return method, path + suffix, {"content": content, "headers": headers}


def throw(running: Running, count: int, seed: int) -> dict[int, int]:
    """How often each status came."""
    chance = random.Random(seed)
    statuses: dict[int, int] = {}
    with httpx2.Client(base_url=running.url, timeout=30) as client:
        for number in range(count):
            method, path, made_of = spoilt(chance)
            answer = client.request(method, path, **made_of)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            told = f"request {number}: {method} {path} {made_of} -> {answer.status_code} {answer.text[:300]}"
            assert answer.status_code < 500, told
            if answer.status_code >= 400 and method != "HEAD" and answer.headers.get("content-type") != "text/plain":
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, told
    return statuses


def test_spoilt_requests_are_refused_and_the_server_lives_on(running: Running) -> None:
    before = running.ask(seed=1, temperature=1.0).json()["choices"]
    statuses = throw(running, 300, seed=0)
    assert statuses[400] > 100
    assert statuses[200] > 10  # some are good all the same
    assert running.ask(seed=1, temperature=1.0).json()["choices"] == before


@pytest.mark.slow
def test_ten_thousand_spoilt_requests_meet_no_5xx_and_no_crash(running: Running) -> None:
    before = running.ask(seed=1, temperature=1.0).json()["choices"]
    statuses = throw(running, 10_000, seed=1)
    assert sum(statuses.values()) == 10_000
    assert statuses[400] > 4_000
    assert running.ask(seed=1, temperature=1.0).json()["choices"] == before
    assert running.settles("dpa_engine_rows", 0)


@pytest.mark.slow
def test_a_schema_fuzzer_finds_no_server_error(running: Running) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_url(f"{running.url}/v1/openapi.json")
    seen: dict[str, int] = {}
    for result in schema.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
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
            seen[case.path] = seen.get(case.path, 0) + 1
            assert answer.status_code < 500, answer.text

        throw_all()
    assert seen["/v1/chat/completions"] >= 100
    assert running.ask(max_tokens=1).status_code == 200
