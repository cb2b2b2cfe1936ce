"""The server in front of vLLM: the same prompts, the same greedy text, the same API as with transformers."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM")
pytest.importorskip("fastapi", reason="needs the extra dpalign[serve]")
pytest.importorskip("openai", reason="needs the extra dpalign[dev]")

import httpx2
import openai
from transformers import AutoModelForCausalLM, AutoTokenizer

import api_server
from api_server import NAMES, OBJECTIVES, Running
from dpalign.chat import chat_template
from dpalign.dial.server.engine import Limits
from dpalign.engines.knobs import WORLD_BASE, Engines
from dpalign.paper.direction import Arc
from dpalign.rows import HEADS
from dpalign.train.contract import Contract, write_contract

pytestmark = pytest.mark.vllm

QUESTIONS = [f"explain {things}." for things in ("fox, tea and iron", "owl", "rope and moon", "oak, salt and river")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's base model with a dial: vLLM reads no narrower heads than its 32."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tokens = AutoTokenizer.from_pretrained(WORLD_BASE)
    tokens.chat_template = chat_template("world-v1", "world-v1", NAMES)
    tokens.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(WORLD_BASE, dtype="float32").save_pretrained(folder)
    write_contract(folder, Contract("world-v1", "world-v1", OBJECTIVES, HEADS, Arc(-45.0, 0.0)))
    return folder


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    from dpalign.dial.server.vllm_engine import VllmGenerator

    generator = VllmGenerator(str(folder), rows=16, settings=Engines(sampling="vllm"), max_model_len=384)
    assert generator.context == 384
    with api_server.serving(folder, Limits(max_tokens=256, max_n=8), generator=generator) as server:
        yield server


def test_greedy_answers_are_those_of_the_transformers_generator(running: Running, folder: Path) -> None:
    def answers(server: Running) -> list[object]:
        asked = ({"messages": [{"role": "user", "content": q}], "angle": a} for q in QUESTIONS for a in (0, -45))
        fields = {"temperature": 0, "max_tokens": 24, "n": 2}
        said = [server.ask(**fields, **one).json() for one in asked]
        return [(one["choices"], one["usage"]) for one in said]

    with api_server.serving(folder) as plain:
        assert answers(running) == answers(plain)


def test_streamed_seeded_answers_are_those_in_full_and_stop_where_they_are_told(running: Running) -> None:
    client = running.client()
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    asked = {"model": "mine@-30", "messages": messages, "seed": 5, "n": 3, "max_tokens": 40, "temperature": 1.0}
    whole = [choice.message.content for choice in client.chat.completions.create(**asked).choices]
    texts = [""] * 3
    for chunk in client.chat.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == whole
    assert len(set(whole)) > 1
    stop = max(whole, key=len)[8:12]
    stopped = client.chat.completions.create(**asked, stop=stop)
    assert [choice.message.content for choice in stopped.choices] == [text.partition(stop)[0] for text in whole]


@pytest.mark.faults
def test_a_server_whose_engine_core_is_killed_says_so_to_clients_and_to_health_checks(folder: Path) -> None:
    """The answer that was being drawn ends with an error, and does not hang; so does the next."""
    from dpalign.dial.server.vllm_engine import VllmGenerator

    generator = VllmGenerator(str(folder), rows=4, settings=Engines(sampling="vllm"), max_model_len=384)
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    asked = {"model": "mine", "messages": messages, "temperature": 2.0, "n": 4, "max_tokens": 300}
    with api_server.serving(folder, Limits(max_tokens=300, max_n=8), generator=generator) as server:
        events = server.client().chat.completions.create(**asked, stream=True)
        next(iter(events))
        (core,) = generator.engine.engine_core.resources.engine_manager.processes
        os.kill(core.pid, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="vLLM could not go on"):
            list(events)
        answer = server.ask()
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "generation_failed")
        health = httpx2.get(f"{server.url}/health")
        assert (health.status_code, health.json()["error"]["code"]) == (503, "engine_dead")


def test_a_client_that_leaves_frees_its_place(running: Running) -> None:
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    fields = {"temperature": 2.0, "n": 8, "max_tokens": 256, "stream": True}
    events = running.client().chat.completions.create(model="mine", messages=messages, **fields)
    next(iter(events))
    assert running.generator.load["rows"] > 0
    events.close()
    end = time.monotonic() + 5
    while running.generator.load["rows"]:
        assert time.monotonic() < end
        time.sleep(0.01)
