"""`dpa serve` for the tests: a tiny policy with a dial, behind the real app, over real HTTP on 127.0.0.1."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM

import tiny
from conftest import answering
from dpalign.chat import chat_template
from dpalign.dial.dial import Dial
from dpalign.dial.server.app import Server, create_app
from dpalign.dial.server.engine import Generator, Limits, Rewards
from dpalign.dial.server.service import Service, open_generator
from dpalign.paper.direction import Arc
from dpalign.rewards.score import FunctionScorer
from dpalign.rows import HEADS
from dpalign.train.contract import Contract, Length, write_contract

NAMES = ("helpfulness", "verbosity")
OBJECTIVES = {"helpfulness": ("ultrafeedback-helpfulness",), "verbosity": ("helpsteer-verbosity",)}
LENGTHS = {"low": Length(-40.0, 11.5), "medium": Length(-22.5, 15.0), "high": Length(-5.0, 20.0)}
CONTRACT = Contract("world-v1", "world-v1", OBJECTIVES, HEADS, Arc(-45.0, 0.0), verbosity=LENGTHS)
QUESTION = [{"role": "user", "content": "explain fox, tea and iron."}]


def write_policy(folder: Path) -> Path:
    """A random policy with a dial, sharp enough to prefer some tokens and to end after a while."""
    tokens = tiny.tokenizer()
    tokens.chat_template = chat_template("world-v1", "world-v1", NAMES)
    tiny.write_model(folder, tokens, tied=False, scale=0.4)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        model.lm_head.weight *= 2
        model.lm_head.weight[model.config.eos_token_id] *= 1.6
    model.save_pretrained(folder)
    write_contract(folder, CONTRACT)
    return folder


def rewards() -> Rewards:
    return Rewards(FunctionScorer("api_server:lengths", CONTRACT.heads), CONTRACT)


def lengths(prompts: list[str], responses: list[str]) -> list[list[float]]:
    """A reward: every head is the number of characters, up to 100; helpfulness counts the letter e."""
    rows = [[float(min(100, len(response)))] * len(HEADS) for response in responses]
    for row, response in zip(rows, responses, strict=True):
        row[HEADS.index("ultrafeedback-helpfulness")] = float(response.count("e"))
    return rows


@dataclass
class Address:
    """A server that answers, as its clients see it."""

    url: str

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30)

    def post(self, body: Any, **options: Any) -> httpx2.Response:
        return httpx2.post(f"{self.url}/v1/chat/completions", json=body, timeout=30, **options)

    def ask(self, **fields: Any) -> httpx2.Response:
        return self.post({"model": "mine", "messages": QUESTION} | fields)

    def metric(self, name: str) -> float:
        text = httpx2.get(f"{self.url}/metrics").text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    def settles(self, name: str, value: float, seconds: float = 5.0) -> bool:
        """Whether a metric reaches a value within some seconds."""
        end = time.monotonic() + seconds
        while self.metric(name) != value:
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True


@dataclass
class Running(Address):
    """A server of this process."""

    service: Service
    server: Server

    @property
    def generator(self) -> Any:
        return self.service.generator

    @contextmanager
    def prompts_read(self) -> Iterator[list[list[int]]]:
        """The tokens of every prompt that the model reads meanwhile."""
        prompts: list[list[int]] = []
        stream = self.generator.stream
        self.generator.stream = lambda prompt, sampling: (prompts.append(list(prompt)), stream(prompt, sampling))[1]
        try:
            yield prompts
        finally:
            del self.generator.stream

    def slow_down(self, seconds: float) -> None:
        """Every step takes this long at least."""
        read = self.generator.decoder.read

        def slowly(tokens: Any) -> Any:
            time.sleep(seconds)
            return read(tokens)

        self.generator.decoder.read = slowly


@contextmanager
def serving(
    folder: Path,
    limits: Limits | None = None,
    *,
    rows: int = 16,
    reward: bool = False,
    generator: Generator | None = None,
    **options: Any,
) -> Iterator[Running]:
    """A server on a free port; it is gone afterwards."""
    generator = generator or open_generator(folder, rows=rows)
    limits = limits or Limits(max_tokens=128, max_n=8, grace=2)
    service = Service("mine", Dial.load(folder), generator, limits, rewards=rewards() if reward else None)
    server = Server(create_app(service, **options), service, log_level="error")
    with answering(server) as (host, port):
        yield Running(f"http://{host}:{port}", service, server)


@contextmanager
def process(folder: Path, log: Path, *words: str) -> Iterator[Address]:
    """`dpa serve` on a free port, as users start it; what it says on stderr is in a file."""
    command = [sys.executable, "-m", "dpalign", "serve", str(folder), "--name", "mine", "--port", "0", *words]
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=os.environ | {"PYTHONPATH": paths}
        ) as server,
    ):
        try:
            assert server.stdout is not None
            said = server.stdout.readline()
            assert said.startswith("mine at http://"), log.read_text()
            yield Address(said.split()[-1])
        finally:
            server.terminate()
