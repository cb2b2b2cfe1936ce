"""The server under load: many streaming clients at a time against one request at a time, on the same server.

    python bench/serve.py

starts `dpa serve` on the world's model (DPA_BENCH_POLICY names another policy folder), checks that answers are the
same streamed, in full and in company, lets 64 clients ask without a pause, and then times both sides in turns. The
clients speak HTTP/1.1 over kept connections, in this process; the server has its own.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dpalign.chat import chat_template
from dpalign.engines.knobs import WORLD_BASE
from dpalign.paper.direction import Arc
from dpalign.rows import HEADS
from dpalign.train.contract import Contract, write_contract
from dpalign.world.language import DEPTHS, THINGS, Task, say_prompt
from harness import THREADS, Row, Unable, main, ratio_of, say

CLIENTS = 64
COMMAND = "python bench/serve.py"


@dataclass
class Load:
    """What some clients saw."""

    seconds: float = 0.0
    tokens: int = 0
    latency: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def rows(quick: bool) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder, server(policy(Path(folder))) as (host, port):
        check(host, port)
        seconds = 5 if quick else 60
        crowd = asyncio.run(load(host, port, CLIENTS, seconds))
        latency = np.percentile(crowd.latency, [50, 95, 100])
        first = np.percentile(crowd.first, [50, 95])
        told = (
            f"{len(crowd.latency)} answers, {crowd.rate:.0f} tokens/s; latency p50 {latency[0]:.2f} s, p95 "
            f"{latency[1]:.2f} s, longest {latency[2]:.2f} s; first token p50 {first[0]:.2f} s, p95 {first[1]:.2f} s"
        )
        for error in crowd.errors[:5]:
            say(f"error: {error}")
        name = f"{CLIENTS} streaming clients for {seconds} s"
        failed = float(len(crowd.errors))
        yield Row(
            f"serve: {name}: failed requests",
            failed,
            failed,
            failed,
            0.0,
            "none",
            COMMAND,
            told,
            "failed",
            at_most=True,
        )
        fair = float(latency[1] / latency[0])
        yield Row(f"serve: {name}: p95 over p50 of latency", fair, fair, fair, None, "", COMMAND)
        both = [
            (asyncio.run(load(host, port, CLIENTS, 4)), asyncio.run(load(host, port, 1, 4)))
            for _ in range(2 if quick else 6)
        ]
        ratio, low, high = ratio_of([a.rate for a, _ in both], [b.rate for _, b in both])
        peer = "the same server asked one request at a time"
        note = f"{np.median([b.rate for _, b in both]):.0f} tokens/s one at a time"
        yield Row(f"serve: tokens/s of {CLIENTS} clients", ratio, low, high, 5.0, peer, COMMAND, note)


def policy(folder: Path) -> Path:
    """The world's base model with a dial: untrained, and as fast as one that is trained."""
    if named := os.environ.get("DPA_BENCH_POLICY"):
        return Path(named)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = ("helpfulness", "verbosity")
    tokenizer = AutoTokenizer.from_pretrained(WORLD_BASE)
    tokenizer.chat_template = chat_template("world-v1", "world-v1", names)
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(WORLD_BASE, dtype="float32").save_pretrained(folder)
    heads = {"helpfulness": ("ultrafeedback-helpfulness",), "verbosity": ("helpsteer-verbosity",)}
    write_contract(folder, Contract("world-v1", "world-v1", heads, HEADS, Arc(-45.0, 0.0)))
    return folder


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, int]]:
    """`dpa serve` on a free port: (host, port)."""
    words = ["serve", str(folder), "--name", "world", "--port", "0", "--threads", str(THREADS), "--rows", str(CLIENTS)]
    process = subprocess.Popen([sys.executable, "-m", "dpalign", *words], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        if not said:
            raise Unable("dpa serve did not start; is dpalign[serve] installed?")
        host, _, port = said.split("//")[1].strip().rpartition(":")
        yield host, int(port)
    finally:
        process.terminate()
        process.wait()


def request(number: int, stream: bool = True) -> dict[str, Any]:
    """One of many requests: three things at a direction of the arc, seeded."""
    things = list(THINGS)
    chosen = tuple(things[(number * step + step) % len(things)] for step in (1, 5, 11))
    prompt = say_prompt(Task(list(DEPTHS)[number % len(DEPTHS)], chosen))
    asked = {"model": "world", "messages": [{"role": "user", "content": prompt}], "angle": -45 * (number % 10) / 9}
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    return asked | {"seed": number, "max_tokens": 64} | options


async def send(
    line: tuple[asyncio.StreamReader, asyncio.StreamWriter], body: dict[str, Any]
) -> tuple[int, bytes, float]:
    """(status, body, when the first of it came) over a connection that is kept."""
    reader, writer = line
    data = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    answer = (await reader.readuntil(b"\r\n\r\n")).lower()
    status, first = int(answer.split()[1]), 0.0
    if b"content-length:" in answer:
        length = int(answer.split(b"content-length:")[1].split()[0])
        return status, await reader.readexactly(length), time.perf_counter()
    chunks = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        first = first or time.perf_counter()
        chunks.append((await reader.readexactly(size + 2))[:-2])
    await reader.readexactly(2)
    return status, b"".join(chunks), first


async def load(host: str, port: int, clients: int, seconds: float) -> Load:
    """What so many clients see who ask without a pause for so long; each ends with the answer that it has begun."""
    seen = Load()
    start = time.perf_counter()

    async def client(index: int) -> None:
        line = await asyncio.open_connection(host, port)
        number = index
        while time.perf_counter() < start + seconds:
            asked = time.perf_counter()
            status, body, first = await send(line, request(number))
            if status != 200 or not body.endswith(b"data: [DONE]\n\n"):
                seen.errors.append(f"{status} {body[-200:]!r}")
            else:
                seen.tokens += json.loads(body.split(b"data: ")[-2])["usage"]["completion_tokens"]
                seen.latency.append(time.perf_counter() - asked)
                seen.first.append(first - asked)
            number += clients
        line[1].close()

    await asyncio.gather(*(client(i) for i in range(clients)))
    seen.seconds = time.perf_counter() - start
    return seen


def check(host: str, port: int) -> None:
    """Answers are the same in full, streamed, and all at once.

    Raises:
        ValueError: they are not, and nothing is timed.
    """

    async def ask(numbers: Sequence[int], stream: bool, together: bool) -> list[str]:
        async def one(number: int) -> str:
            line = await asyncio.open_connection(host, port)
            _, body, _ = await send(line, request(number, stream))
            line[1].close()
            return text_of(body, stream)

        if together:
            return list(await asyncio.gather(*map(one, numbers)))
        return [await one(number) for number in numbers]

    numbers = range(CLIENTS)
    alone = asyncio.run(ask(numbers, False, False))
    if asyncio.run(ask(numbers, True, True)) != alone:
        raise ValueError("answers in company differ from answers alone; nothing is timed")


def text_of(body: bytes, stream: bool) -> str:
    if not stream:
        return str(json.loads(body)["choices"][0]["message"]["content"])
    events = [json.loads(part) for part in body.split(b"data: ")[1:-1]]
    return "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])


if __name__ == "__main__":
    main(rows, "serve")
