"""What a server withstands: no key, too much, too many, clients that leave, and its own end."""

import asyncio
import contextlib
import multiprocessing
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the extra dpalign[train]")
pytest.importorskip("fastapi", reason="needs the extra dpalign[serve]")
pytest.importorskip("openai", reason="needs the extra dpalign[dev]")

import httpx2
import numpy as np
import openai

import api_server
from api_server import QUESTION, Running
from conftest import MICRO
from dpalign.cli import main, parser_of
from dpalign.dial.server.command import LOCAL_NAMES, api_key, build, limits_of, vllm_of
from dpalign.dial.server.connections import room_for
from dpalign.dial.server.engine import Closing, Limits, Sampling, collect
from dpalign.dial.server.guard import Guard
from dpalign.dial.server.metrics import Metrics
from dpalign.dial.server.service import open_generator
from dpalign.recipe import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return api_server.write_policy(tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture
def slow(folder: Path) -> Iterator[Running]:
    """Two rows, one request at a time beside the one that waits, 20 ms a token."""
    limits = Limits(max_tokens=200, max_n=2, max_concurrent=1, max_queue=1, grace=1)
    with api_server.serving(folder, limits, rows=2) as server:
        server.slow_down(0.02)
        yield server


LONG = {"temperature": 2.0, "max_tokens": 200, "seed": 0, "n": 2}
"""Flat enough to run on: the answers' first ends are far away."""


def until(so: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_without_the_right_key_there_is_no_answer(folder: Path) -> None:
    with api_server.serving(folder, key="s3cret") as running:
        assert running.client("s3cret").models.list().data[0].id == "mine"
        with pytest.raises(openai.AuthenticationError, match="wrong API key"):
            running.client("s3cre").chat.completions.create(model="mine", messages=QUESTION)
        for words in (None, "s3cret", "Basic s3cret", "Bearer"):
            headers = {} if words is None else {"Authorization": words}
            for path in ("/v1/models", "/v1/dial", "/v1/openapi.json", "/metrics"):
                answer = httpx2.get(running.url + path, headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"
                assert "s3cret" not in answer.text
            assert running.post({}, headers=headers).status_code == 401
        assert httpx2.get(running.url + "/health").status_code == 200
        assert running.generator.steps == 0


def test_a_page_of_another_site_cannot_name_this_machine_and_read(folder: Path) -> None:
    with api_server.serving(folder, hosts=LOCAL_NAMES) as running:
        for host, status in (("evil.example", 403), ("127.0.0.1.evil.example:80", 403), ("localhost:1", 200)):
            assert httpx2.get(running.url + "/health", headers={"Host": host}).status_code == status
        answer = httpx2.get(running.url + "/health", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in answer.headers


def test_a_site_that_is_allowed_asks_without_the_key_whether_it_may_call_and_reads_why_it_may_not(folder: Path) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with api_server.serving(folder, key="s3cret", origins=["https://good.example"]) as running:
        for origin, status in (("https://good.example", 200), ("https://evil.example", 400)):
            url = f"{running.url}/v1/chat/completions"
            assert httpx2.options(url, headers=asks | {"Origin": origin}).status_code == status
            refused = running.post({}, headers={"Origin": origin})
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert (refused.headers.get("access-control-allow-origin") == origin) == (status == 200)


def test_the_page_stands_in_no_frame_and_is_asked_for_anew(folder: Path) -> None:
    with api_server.serving(folder, key="s3cret") as running:
        for path in ("/", "/page.js", "/page.css"):
            first = httpx2.get(running.url + path)
            again = httpx2.get(running.url + path, headers={"If-None-Match": first.headers["etag"]})
            assert (first.status_code, again.status_code) == (200, 304)
            for answer in (first, again):
                assert answer.headers["content-security-policy"] == "frame-ancestors 'none'"
                assert answer.headers["cache-control"] == "no-cache"
            assert first.headers["x-content-type-options"] == "nosniff"


def test_a_body_does_not_wait_for_the_acknowledgement_of_its_headers(folder: Path) -> None:
    """Where it does, most requests on one connection take 40 ms."""
    seconds = []
    with api_server.serving(folder) as running, httpx2.Client(base_url=running.url) as client:
        for _ in range(40):
            began = time.perf_counter()
            assert client.get("/v1/models").status_code == 200
            seconds.append(time.perf_counter() - began)
    assert statistics.median(seconds) < 0.03


def test_a_body_above_the_limit_is_refused(folder: Path) -> None:
    with api_server.serving(folder, Limits(max_body=2000, max_n=8)) as running:
        assert running.ask(user="x" * 1500, max_tokens=1).status_code == 200
        answer = running.ask(user="x" * 2000)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
        in_pieces = httpx2.post(f"{running.url}/v1/chat/completions", content=(b"x" * 100 for _ in range(50)))
        assert in_pieces.status_code == 413


def test_a_body_that_does_not_come_is_given_up(folder: Path) -> None:
    with api_server.serving(folder, Limits(body_seconds=0.2, max_n=8)) as running:
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as line:
            line.sendall(b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345")
            assert b" 408 " in line.recv(4096)


def test_only_so_many_bodies_are_held_at_a_time() -> None:
    """Two may run or wait, and twice as many bodies be held: the fifth is refused, and taken once they have left."""
    service = SimpleNamespace(limits=Limits(max_concurrent=1, max_queue=1), closing=False)
    scope = {"type": "http", "method": "POST", "path": "/v1/rewards", "headers": []}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("no body is whole")

    async def statuses() -> list[list[int]]:
        guard = Guard(app, service, Metrics(dict))  # type: ignore[arg-type]
        sent: list[int] = []

        async def send(message: Any) -> None:
            sent.append(message.get("status", 0))

        async def silent() -> Any:
            await asyncio.Event().wait()

        async def left() -> Any:
            return {"type": "http.disconnect"}

        held = [asyncio.ensure_future(guard(scope, silent, send)) for _ in range(4)]
        await asyncio.sleep(0)
        await guard(scope, left, send)
        busy = list(sent)
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        await guard(scope, left, send)
        return [busy, sent[len(busy) :]]

    assert asyncio.run(statuses()) == [[429, 0], []]


def test_a_client_that_stops_reading_loses_its_place() -> None:
    """The app sends for ever, and nothing is read: after 0.05 s it is ended, and the client counts as gone."""
    service, metrics = SimpleNamespace(limits=Limits(read_seconds=0.05), closing=False), Metrics(dict)
    ended: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
        finally:
            ended.append("app")

    async def receive() -> Any:
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    messages = [{"type": "http.request", "body": b"", "more_body": False}]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    asyncio.run(asyncio.wait_for(Guard(app, service, metrics)(scope, receive, send), 5))  # type: ignore[arg-type]
    assert ended == ["app"]
    assert b"dpa_disconnects_total 1.0" in metrics.text()


def test_when_the_line_is_full_clients_are_told_when_to_come_back(slow: Running) -> None:
    """One is answered, one waits, the third is sent away; the other two get their answers."""
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(slow.ask, **LONG)
        assert slow.settles("dpa_requests_running", 1)
        second = pool.submit(slow.ask, max_tokens=1)
        assert slow.settles("dpa_requests_waiting", 1)
        third = slow.ask()
        assert (third.status_code, third.json()["error"]["code"]) == (429, "queue_full")
        assert int(third.headers["retry-after"]) >= 1
        assert [first.result().status_code, second.result().status_code] == [200, 200]
    assert slow.metric('dpa_requests_total{code="429"') == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place_at_once(slow: Running, stream: bool) -> None:
    """Its two answers of 200 tokens would take 4 s; it leaves after the first, and the next is answered at once."""
    if stream:
        events = slow.client().chat.completions.create(model="mine", messages=QUESTION, stream=True, **LONG)
        next(iter(events))
        assert slow.generator.load["rows"] == 2
        events.close()
    else:
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(
                f"{slow.url}/v1/chat/completions", json={"model": "mine", "messages": QUESTION} | LONG, timeout=0.2
            )
    steps = slow.generator.steps
    assert slow.settles("dpa_engine_rows", 0, seconds=1.5)
    assert slow.generator.steps < 100
    assert slow.ask(max_tokens=1).status_code == 200
    assert slow.generator.steps <= steps + 30
    assert slow.settles("dpa_disconnects_total", 1)
    assert slow.metric("dpa_requests_running") == 0


def test_one_who_leaves_while_waiting_leaves_the_line(slow: Running) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(slow.ask, **LONG)
        assert slow.settles("dpa_requests_running", 1)
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{slow.url}/v1/chat/completions", json={"model": "mine", "messages": QUESTION}, timeout=0.2)
        assert slow.settles("dpa_requests_waiting", 0, seconds=1)
        assert first.result().status_code == 200


def test_a_server_that_is_told_to_stop_lets_answers_end_and_takes_no_new_ones(folder: Path) -> None:
    limits = Limits(max_tokens=200, max_n=2, grace=10)
    with api_server.serving(folder, limits, rows=2) as running:
        running.slow_down(0.005)
        with httpx2.Client(base_url=running.url) as kept, ThreadPoolExecutor(1) as pool:
            kept.get("/health")  # a connection that stays open
            first = pool.submit(running.ask, **LONG)
            assert running.settles("dpa_requests_running", 1)
            running.server.should_exit = True
            answer = first.result()
        assert answer.status_code == 200
        assert len(answer.json()["choices"]) == 2
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(running.url + "/health")


def test_answers_that_outlast_the_grace_time_end_with_an_error_in_the_stream(folder: Path) -> None:
    limits = Limits(max_tokens=200, max_n=2, grace=0.2)
    with api_server.serving(folder, limits, rows=2) as running:
        running.slow_down(0.05)
        events = running.client().chat.completions.create(model="mine", messages=QUESTION, stream=True, **LONG)
        next(iter(events))
        running.server.should_exit = True
        with pytest.raises(openai.APIError, match="shutting down"):
            list(events)


def test_requests_tokens_and_times_are_counted(folder: Path) -> None:
    with api_server.serving(folder) as running:
        usage = running.ask(n=2, max_tokens=9).json()["usage"]
        running.ask(n=0)
        chat = 'route="/v1/chat/completions"'
        assert running.metric(f'dpa_requests_total{{code="200",{chat}') == 1
        assert running.metric(f'dpa_requests_total{{code="400",{chat}') == 1
        assert running.metric("dpa_generated_tokens_total") == usage["completion_tokens"]
        assert running.metric("dpa_prompt_tokens_total") == usage["prompt_tokens"]
        assert running.metric("dpa_first_token_seconds_count") == 1
        assert running.metric(f"dpa_request_seconds_count{{{chat}") == 2
        assert running.metric("dpa_engine_rows") == running.metric("dpa_requests_waiting") == 0


def test_sixteen_clients_at_a_time_get_what_each_would_get_alone(folder: Path) -> None:
    """With eight rows, so that half of them wait; from threads, streaming and not."""
    with api_server.serving(folder, rows=8) as running:
        client = running.client()

        def ask(seed: int) -> str:
            asked = {"model": f"mine@-{seed}", "messages": QUESTION, "seed": seed, "max_tokens": 60}
            if seed % 2:
                return str(client.chat.completions.create(**asked).choices[0].message.content)
            chunks = client.chat.completions.create(**asked, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        alone = [ask(seed) for seed in range(16)]
        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(ask, range(16))) == alone
        assert len(set(alone)) > 8


def test_a_server_whose_engine_has_died_says_so_to_clients_and_to_health_checks(folder: Path) -> None:
    def die(*_: object) -> None:
        raise MemoryError

    with api_server.serving(folder) as running:
        assert httpx2.get(f"{running.url}/health").json()["status"] == "ok"
        running.generator.decoder.join = running.generator.decoder.keep = die
        for _ in range(2):
            answer = running.ask()
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "generation_failed")
            until(lambda: running.generator.failed)
        answer = httpx2.get(f"{running.url}/health")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")


def test_dpa_serve_says_where_it_answers_hides_its_key_and_ends_at_sigterm(folder: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("s3cret\n")
    words = [str(folder), "--name", "mine", "--port", "0", "--api-key-file", str(key), "--access-log", "--max-n", "4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dpalign", "serve", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    killer = threading.Timer(120, process.kill)
    killer.start()
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.fullmatch(r"mine at (http://127\.0\.0\.1:\d+)\n", said)
        assert found, said or process.communicate()[1]
        url = f"{found[1]}/v1/chat/completions"
        body = {"model": "mine@-30", "messages": QUESTION, "max_tokens": 4}
        assert httpx2.post(url, json=body).status_code == 401
        answer = httpx2.post(f"{url}?api_key=qu3ry", json=body, headers={"Authorization": "Bearer s3cret"})
        assert answer.json()["usage"]["completion_tokens"] <= 4
        process.send_signal(signal.SIGTERM)
        log = "".join(process.communicate())
    finally:
        killer.cancel()
        process.kill()
    assert process.returncode == 0
    assert "s3cret" not in log
    assert '"POST /v1/chat/completions HTTP/1.1" 200' in log
    assert "qu3ry" not in log
    assert "explain fox" not in log
    assert '"POST /v1/chat/completions HTTP/1.1" 401' in log


def test_bad_options_are_said_in_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "key"
    empty.write_text("\n")
    vllm = [str(folder), "--engine", "vllm"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, said in (
            ([str(tmp_path)], "no config.json here"),
            ([str(folder), "--max-n", "99"], "--rows 64: fewer than the 99 answers"),
            ([str(folder), "--max-queue", "-1"], "--max-queue -1: at least 0"),
            ([str(folder), "--name", "a@b"], "a name without '@'"),
            ([str(folder), "--api-key-file", str(empty)], "the key must be one word"),
            ([str(folder), "--port", port], "choose another --port"),
            ([str(folder), "--reward", "r"], "give --reward-template"),
            ([str(folder), "--sampling.n", "8"], "takes no knobs of a recipe"),
            ([str(folder), "--gpu-memory", "0.5"], "--gpu-memory 0.5: a setting of vLLM's"),
            ([str(folder), "--max-model-len", "64"], "--max-model-len 64: a setting of vLLM's"),
            ([*vllm, "--tensor-parallel", "0"], "--tensor-parallel 0: "),
            ([*vllm, "--gpu-memory", "1.5"], "--gpu-memory 1.5: "),
            ([*vllm, "--max-model-len", "1"], "--max-model-len 1: at least 2"),
        ):
            with pytest.raises(SystemExit) as ended:
                main(["serve", *words])
            assert ended.value.code == 2
            assert said in capsys.readouterr().err


def stand_in_for_vllm(monkeypatch: pytest.MonkeyPatch, engine: Any, asked: dict[str, Any]) -> None:
    """An engine in vLLM's place, on a machine that seems to have a GPU; `asked` keeps what vLLM is started with."""
    from dpalign.dial.server import vllm_engine

    for name, module in {
        "vllm": SimpleNamespace(SamplingParams=SimpleNamespace),
        "vllm.sampling_params": SimpleNamespace(RequestOutputKind=SimpleNamespace(DELTA="delta")),
        "vllm.engine.arg_utils": SimpleNamespace(AsyncEngineArgs=lambda **fields: asked.update(fields)),
        "vllm.v1.engine.async_llm": SimpleNamespace(AsyncLLM=SimpleNamespace(from_engine_args=lambda _: engine)),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm_engine, "require_vllm", lambda _: None)
    monkeypatch.setattr(vllm_engine.torch.cuda, "is_available", lambda: True)


class StandIn:
    """Answers as vLLM does: answer i of a request is drawn by its seed + i, and a shutdown tells no stream of itself.

    Args:
        tokens: so many per answer, in one output; then the request ends, or hangs if `hangs`.
    """

    def __init__(self, tokens: int = 12, hangs: bool = False) -> None:
        self.model_config = SimpleNamespace(max_model_len=256)
        self.tokens, self.hangs = tokens, hangs
        self.running = 0
        self.running_at_shutdown: int | None = None

    async def generate(self, prompt: Any, params: Any, request: str) -> AsyncIterator[Any]:
        self.running += 1
        try:
            answers = []
            for i in range(params.n):
                ids = np.random.default_rng(params.seed + i).integers(40, 140, self.tokens).tolist()
                finish = None if self.hangs else "length"
                answers.append(SimpleNamespace(index=i, token_ids=ids, finish_reason=finish))
            yield SimpleNamespace(outputs=answers)
            await asyncio.Event().wait()
        finally:
            self.running -= 1

    def shutdown(self) -> None:
        self.running_at_shutdown = self.running


def test_requests_of_neighbouring_seeds_share_no_answer_from_vllm(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_for_vllm(monkeypatch, StandIn(), {})

    async def texts(n: int, seed: int) -> list[str]:
        generator = open_generator(folder, engine="vllm", rows=16)
        answers = await collect(generator.stream([1, 2, 3], Sampling(12, n=n, seed=seed, temperature=1.0)), n)
        await generator.close()
        return [answer.text for answer in answers]

    drawn = [asyncio.run(texts(4, seed)) for seed in (-1, 0, 1, 2, 3)]
    assert len({text for answers in drawn for text in answers}) == 20
    assert asyncio.run(texts(4, 1)) == drawn[2]
    assert asyncio.run(texts(1, 1)) == drawn[2][:1]


def test_streams_from_vllm_end_with_closing_when_the_engine_closes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that wait for vLLM, one whose client reads slowly, and one that comes too late."""
    engine = StandIn(hangs=True)
    stand_in_for_vllm(monkeypatch, engine, {})

    async def closed() -> int:
        generator = open_generator(folder, engine="vllm", rows=16)
        streams = [generator.stream([1, 2, 3], Sampling(12, n=2, seed=seed)) for seed in range(3)]
        for stream in streams:
            assert await anext(stream)
        waiting = [asyncio.ensure_future(collect(stream, 2)) for stream in streams[:2]]
        await asyncio.sleep(0.05)
        await generator.close()
        late = generator.stream([1, 2, 3], Sampling(12))
        ends = await asyncio.gather(*waiting, anext(streams[2]), anext(late), return_exceptions=True)
        await generator.close()  # a server does so too, if its grace is over
        return sum(isinstance(end, Closing) for end in ends)

    assert asyncio.run(asyncio.wait_for(closed(), 10)) == 4
    assert engine.running_at_shutdown is not None
    assert engine.running_at_shutdown <= 1  # only the slow client's
    assert engine.running == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], {"tensor_parallel_size": 1, "gpu_memory_utilization": 0.9, "max_model_len": None}),
        (
            ["--tensor-parallel", "2", "--gpu-memory", "0.6", "--max-model-len", "192"],
            {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.6, "max_model_len": 192},
        ),
    ],
)
def test_vllm_is_told_of_gpus_memory_and_the_longest_context(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], told: dict[str, object]
) -> None:
    asked: dict[str, Any] = {}
    length = words[-1] if words else 256
    stand_in_for_vllm(monkeypatch, SimpleNamespace(model_config=SimpleNamespace(max_model_len=length)), asked)
    arguments = parser_of("serve").parse_args([str(folder), "--engine", "vllm", "--rows", "16", *words])
    engines, longest = vllm_of(arguments)
    generator = open_generator(folder, engine="vllm", rows=16, engines=engines, max_model_len=longest)
    assert generator.context == int(length)
    assert {name: asked[name] for name in told} == told
    assert (asked["model"], asked["max_num_seqs"], asked["dtype"]) == (str(folder), 16, "float32")
    assert "enforce_eager" not in asked


def test_the_key_of_the_environment_is_not_left_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPA_API_KEY", " k3y \n")
    assert api_key(None) == "k3y"
    assert "DPA_API_KEY" not in os.environ
    assert api_key(None) is None


def test_a_runs_folder_is_served_by_its_last_policy_with_the_front_that_it_measured(micro_run: Path) -> None:
    words = [str(micro_run), "--rows", "4", "--max-n", "4", "--reward", str(micro_run / "reward")]
    arguments = parser_of("serve").parse_args(words)
    service = build(arguments, limits_of(arguments))
    evaluated = load(MICRO).evaluation.directions
    assert service.name == micro_run.name
    assert len(service.dial.front) == evaluated
    assert service.dial.to_json()["arc"] == [-45.0, 0.0]
    assert service.rewards is not None
    assert set(service.rewards.named([1.0, 2.0])) == {"helpfulness", "verbosity"}


# --- strangers at the gate ---

CHAT = "/v1/chat/completions"
HOSTILE = [
    b'{"model": "world", "messages": [' + b"0," * 500_000 + b"0]}",
    b'{"model": "world", "messages": [' + b"[]," * 300_000 + b"0]}",
    b'{"model": "world", "messages": [{"role": "user", "content": "' + b"fox, " * 200_000 + b'"}]}',
    b'{"model": "world", "messages": [], "' + b"x" * 1_000_000 + b'": 1}',
    b'{"model": "world", "text": {' + b",".join(b'"%d": 0' % i for i in range(9000)) + b"}}",
    b"[" * 1_000_000,
]


async def ask_hostile_things(host: str, port: int, statuses: list[int]) -> None:
    """One such request after the other, a few a second, until cancelled."""
    while True:
        for body in HOSTILE:
            reader, writer = await asyncio.open_connection(host, port)
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
            statuses.append(int((await reader.readline()).split()[1]))
            writer.close()
            await asyncio.sleep(0.2)


async def hold_half_open(address: tuple[str, int], held: list[socket.socket], count: int) -> None:
    """Keep so many half-sent heads open, with a new one for each that the server closes, until cancelled."""
    while True:
        for line in list(held):
            with contextlib.suppress(BlockingIOError):
                try:
                    gone = line.recv(1) == b""
                except ConnectionError:
                    gone = True
                if gone:
                    held.remove(line)
                    line.close()
        while len(held) < count:
            line = socket.socket()
            line.setblocking(False)
            held.append(line)
            line.connect_ex(address)
            with contextlib.suppress(OSError):  # not connected yet: then it is silent
                line.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Half: ")
            if len(held) % 50 == 0:
                await asyncio.sleep(0)
        await asyncio.sleep(1)


def strangers(host: str, port: int, half_open: int, says: Connection) -> None:
    """Besiege the server until told to stop; say when all lines are held, and at the end what hostile requests got."""
    os.nice(19)  # strangers have machines of their own: their work must not take the server's
    held: list[socket.socket] = []
    statuses: list[int] = []

    async def siege() -> None:
        both = [
            asyncio.create_task(hold_half_open((host, port), held, half_open)),
            asyncio.create_task(ask_hostile_things(host, port, statuses)),
        ]
        while len(held) < half_open:
            await asyncio.sleep(0.1)
        says.send("all held")
        while not says.poll():
            await asyncio.sleep(0.1)
        assert not any(task.done() for task in both)
        for task in both:
            task.cancel()

    asyncio.run(siege())
    says.send(statuses)


@contextlib.contextmanager
def besieged_by(half_open: int, host: str, port: int, statuses: list[int]) -> Iterator[None]:
    """A siege for as long as the block takes, from a process of its own: clients' clocks wait for the server alone."""
    process = multiprocessing.get_context("spawn")
    here, there = process.Pipe()
    outside = process.Process(target=strangers, args=(host, port, half_open, there), daemon=True)
    outside.start()
    there.close()  # a siege that dies ends what is read here
    try:
        assert here.recv() == "all held"
        yield
        here.send("stop")
        statuses += here.recv()
    finally:
        outside.terminate()
        outside.join()


def besieged(folder: Path, half_open: int, clients: int, seconds: float, rounds: int) -> tuple[list[float], list[int]]:
    """How p95 of the clients' latency under siege compares with peace, a round each; statuses of hostile requests."""
    import serve

    if room_for(half_open) < half_open:
        pytest.skip("this machine lets a process open too few files")
    ratios: list[float] = []
    statuses: list[int] = []
    with serve.server(serve.policy(folder)) as (host, port):
        asyncio.run(serve.load(host, port, clients, seconds))  # the first round warms up
        for _ in range(rounds):
            peace = asyncio.run(serve.load(host, port, clients, seconds))
            with besieged_by(half_open, host, port, statuses):
                war = asyncio.run(serve.load(host, port, clients, seconds))
            assert [peace.errors, war.errors] == [[], []]
            quiet, loud = (statistics.quantiles(load.latency, n=20)[-1] for load in (peace, war))
            ratios.append(loud / quiet)
    return ratios, statuses


@pytest.mark.slow
def test_sixteen_clients_go_on_while_strangers_hold_two_thousand_half_open_connections(tmp_path: Path) -> None:
    """And while hostile requests of a megabyte come a few a second. Rounds of peace and siege take turns."""
    ratios, statuses = besieged(tmp_path, half_open=2000, clients=16, seconds=8, rounds=9)
    assert statistics.median(ratios) < 2, ratios
    assert set(statuses) == {400}
    assert len(statuses) > 30
