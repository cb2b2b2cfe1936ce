"""One model, four ways: the same prompts at five directions by all that can serve an export.

    dpa export RUN --out MODEL --reward
    python bench/four_ways.py MODEL --vllm PYTHON [--questions FILE]

asks the world's model, or with questions of its own any other, in four ways: transformers' `apply_chat_template`,
vLLM's own server, our server by OpenAI's client, and the page in a Chromium. It fails unless all four have the model
read the same tokens and the page shows what the client got with the same seed. It prints the table of docs/results.md.
PYTHON is one that has vLLM.
"""

import argparse
import asyncio
import contextlib
import json
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import httpx2
import numpy as np
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpalign.data.sources import read_source
from dpalign.dial.server.app import Server, create_app
from dpalign.dial.server.command import build, declare
from dpalign.dial.server.engine import Limits
from dpalign.dial.server.service import Service
from dpalign.paper.direction import rng_for
from dpalign.world.language import DEPTHS, THINGS, Task, say_prompt
from vllm_server import vllm_server

ANGLES: Final = (0.0, -11.25, -22.5, -33.75, -45.0)
LONGEST: Final = 128
"""Tokens of an answer; the world's are shorter."""

Asked = tuple[int, float]
"""The number of a prompt, which is also its seed, and an angle."""
Read = dict[Asked, list[int]]
Answers = dict[Asked, str]


def questions(n: int) -> list[str]:
    """Prompts of the world, always the same."""
    rng = rng_for("four ways", 0)
    tasks = [Task(list(DEPTHS)[i % len(DEPTHS)], tuple(rng.choice(list(THINGS), 3, replace=False))) for i in range(n)]
    return [say_prompt(task) for task in tasks]


def chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def by_transformers(model: Path, asked: Sequence[str]) -> tuple[Read, Answers]:
    """`generate`, as the folder's generation config says."""
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype="float32", trust_remote_code=False).eval()
    read, answers = {}, {}
    for i, question in enumerate(asked):
        for angle in ANGLES:
            said = tokenizer.apply_chat_template(
                chat(question), angle=angle, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            ids = said["input_ids"]
            torch.manual_seed(i)
            drawn = policy.generate(**said, max_new_tokens=LONGEST)[0, ids.shape[1] :]
            read[i, angle], answers[i, angle] = ids[0].tolist(), tokenizer.decode(drawn, skip_special_tokens=True)
    return read, answers


def by_vllm(model: Path, asked: Sequence[str], python: str) -> tuple[Read, Answers]:
    """`chat_template_kwargs` over HTTP."""
    read, answers = {}, {}
    with vllm_server(model, "world", python) as url:
        for i, question in enumerate(asked):
            for angle in ANGLES:
                body = {"model": "world", "messages": chat(question), "chat_template_kwargs": {"angle": angle}}
                body |= {"seed": i, "max_tokens": LONGEST, "return_token_ids": True}
                said = httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=120).raise_for_status().json()
                read[i, angle] = said["prompt_token_ids"]
                answers[i, angle] = said["choices"][0]["message"]["content"]
    return read, answers


class OurServer:
    """`dpa serve` in this process, so that the tokens which the model reads can be seen."""

    def __init__(self, model: Path) -> None:
        parser = argparse.ArgumentParser()
        declare(parser)
        self.read: list[list[int]] = []
        self.service: Service = build(parser.parse_args([str(model), "--name", "world"]), Limits())
        stream = self.service.generator.stream
        generator: Any = self.service.generator
        generator.stream = lambda prompt, sampling: (self.read.append(list(prompt)), stream(prompt, sampling))[1]

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        server = Server(create_app(self.service), self.service, log_level="error")
        listening = socket.create_server(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)

    def by_client(self, url: str, asked: Sequence[str]) -> tuple[Read, Answers]:
        read, answers = {}, {}
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        for i, question in enumerate(asked):
            for angle in ANGLES:
                said = client.chat.completions.create(
                    model="world", messages=chat(question), seed=i, max_tokens=LONGEST, extra_body={"angle": angle}
                )  # type: ignore[call-overload]
                read[i, angle], answers[i, angle] = self.read[-1], said.choices[0].message.content
        return read, answers

    def by_page(self, url: str, asked: Sequence[str]) -> tuple[Read, Answers]:
        """A new page for each prompt, on which the dial is turned; the address sets the seed."""
        from playwright.sync_api import sync_playwright

        read, answers = {}, {}
        found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
        with sync_playwright() as started:
            browser = started.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
            for i, question in enumerate(asked):
                page = browser.new_page()
                page.goto(f"{url}/#sides=1&seed={i}&max={LONGEST}")
                page.wait_for_selector("#send:enabled")
                page.evaluate("document.getElementById('memory').checked = false")  # each question alone
                for turn, angle in enumerate(ANGLES):
                    page.get_by_label("Direction A in degrees").fill(str(angle))
                    page.locator("#question").fill(question)
                    page.keyboard.press("Enter")
                    page.locator('article.A[aria-busy="false"]').nth(turn).wait_for()
                    page.locator("#send:visible").wait_for()  # until the answer is scored, nothing can be asked
                    read[i, angle] = self.read[-1]
                    answers[i, angle] = page.locator("article.A .text").last.inner_text()
                page.close()
            browser.close()
        return read, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an export of the world's policy with its reward model")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--questions", metavar="FILE", help="rows with a prompt; the last are asked")
    parser.add_argument("--vllm", metavar="PYTHON", help="a Python that has vLLM; without it that way is left out")
    given = parser.parse_args()
    asked = questions(given.prompts)
    if given.questions:
        asked = [row.text("prompt") for row in read_source(given.questions)][-given.prompts :]
    ways = {"transformers, `apply_chat_template`": by_transformers(given.model, asked)}
    _say(f"transformers: {len(asked)} prompts at {len(ANGLES)} directions")
    if given.vllm:
        ways["vLLM's own server, `chat_template_kwargs`"] = by_vllm(given.model, asked, given.vllm)
        _say("vLLM's server")
    ours = OurServer(given.model)
    with ours.running() as url:
        ways["`dpa serve`, the `openai` client"] = client = ours.by_client(url, asked)
        _say("our server")
        ways["the page, in Chromium"] = page = ours.by_page(url, asked)
        _say("the page")
        means = asyncio.run(_means(ours.service, asked, [answers for _, answers in ways.values()]))
    (first, _), *others = ways.values()
    if any(read != first for read, _ in others):
        raise SystemExit("the model did not read the same tokens in all ways")
    if any(page[1][key].split() != client[1][key].split() for key in page[1]):
        raise SystemExit("the page does not show what the client got with the same seed")
    _say(f"same tokens in all {len(ways)} ways at {len(first)} prompts and directions")
    heads = " | ".join(f"{angle:g}" for angle in ANGLES)
    _say(f"| way | {heads} |\n|{'---|' * (len(ANGLES) + 1)}")
    for name, (score_V, words_V) in zip(ways, means, strict=True):
        _say(f"| {name} | {' | '.join(f'{s:.1f} ({w:.1f})' for s, w in zip(score_V, words_V, strict=True))} |")
        if not given.questions and not (np.all(np.diff(score_V) < 0) and np.all(np.diff(words_V) < 0)):
            raise SystemExit(f"{name}: not monotone: {json.dumps([score_V, words_V])}")


async def _means(
    service: Service, asked: Sequence[str], ways: Sequence[Answers]
) -> list[tuple[list[float], list[float]]]:
    """Mean verbosity by the reward model, and mean words, at each direction; for each way."""
    score_NWV, words_NWV = [], []
    for i, question in enumerate(asked):
        said = [answers[i, angle] for answers in ways for angle in ANGLES]
        reward_NK = await service.scores(chat(question), said)  # type: ignore[arg-type]
        verbosity = reward_NK[:, service.dial.objectives.index("verbosity")]
        score_NWV.append(verbosity.reshape(len(ways), -1))
        words_NWV.append(np.array([len(answer.split()) for answer in said]).reshape(len(ways), -1))
    return list(zip(np.mean(score_NWV, axis=0).tolist(), np.mean(words_NWV, axis=0).tolist(), strict=True))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
