"""The engine protocol: an engine takes a prompt's tokens and streams the answers. Also limits and the reward model.

This module is light. torch and transformers are imported when an engine or a reward model is opened.

Shapes: N answers, K objectives.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dpalign.dial import TEMPERATURE
from dpalign.paper.objectives import Objective, head_indices, read_objectives
from dpalign.paper.prompts import dialogue
from dpalign.rows import Message

if TYPE_CHECKING:
    from dpalign.dial.best_of import BestOf
    from dpalign.dial.server.text import Prompts
    from dpalign.rewards.score import Scorer
    from dpalign.train.contract import Contract

Array = NDArray[np.float64]

Finish = Literal["stop", "length"]
"""Why an answer ended, in OpenAI's words. "stop": end of text or a stop string. "length": max_tokens."""


RANGES: Final[Mapping[str, tuple[float, float]]] = {
    **dict.fromkeys(("max_tokens", "max_n", "max_body", "max_concurrent"), (1, math.inf)),
    **dict.fromkeys(("max_prompt", "max_queue", "grace", "threads"), (0, math.inf)),
    "temperature": (0, 2),
    "seed": (-(2**63), 2**63 - 1),
    "port": (0, 65535),
}
"""The least and the most of the numeric options of `dpa serve` and `dpa chat`."""


def require_ranges(options: Mapping[str, Any]) -> None:
    """Check the options that have a range; None is not checked.

    Raises:
        ValueError: names the first option that is out of its range.
    """
    for name, (least, most) in RANGES.items():
        value = options.get(name)
        if value is not None and not least <= value <= most:
            allowed = f"at least {least}" if most == math.inf else f"{least} to {most}"
            raise ValueError(f"--{name.replace('_', '-')} {value}: {allowed}")


@dataclass(frozen=True)
class Limits:
    """What one server lets its clients ask for. The paper is silent on all of this."""

    max_tokens: int = 2048
    """Tokens per answer; also the default of a request. 2048 is the released policy's."""
    max_prompt: int = 0
    """Tokens per prompt; 0: what the model's context holds."""
    max_n: int = 16
    """Answers per prompt, and answers that `best_of` chooses from."""
    max_body: int = 1 << 20
    """Bytes per request."""
    head_seconds: float = 10.0
    """How long a request's head may take to arrive."""
    body_seconds: float = 30.0
    """How long a request's body may take to arrive."""
    read_seconds: float = 30.0
    """How long a client may leave a stream unread once the machine's buffers are full."""
    max_concurrent: int = 64
    """Requests answered at a time; others wait in line."""
    max_queue: int = 256
    """Requests that wait in line; others get 429."""
    grace: float = 20.0
    """Seconds that running answers have when the server is told to stop."""

    @property
    def max_bodies(self) -> int:
        """Most requests whose bodies are in memory: those that run or wait, and the same number of scorings."""
        return 2 * (self.max_concurrent + self.max_queue)

    @property
    def max_connections(self) -> int:
        """Most open connections: one a body, the same number of idle ones, and some more."""
        return 2 * self.max_bodies + 64

    def __post_init__(self) -> None:
        require_ranges(vars(self))


@dataclass(frozen=True)
class Sampling:
    """How the answers to one prompt are drawn."""

    max_tokens: int
    n: int = 1
    temperature: float = TEMPERATURE
    """0 takes the likeliest token each time. 0.7 is section 3.2's."""
    top_p: float = 1.0
    """Below 1: draw from the fewest likeliest tokens whose probabilities reach this sum."""
    seed: int = 0
    """Each draw depends only on the seed, the answer's index and the token's index, not on other requests."""
    stop: tuple[str, ...] = ()
    """An answer ends before the first of these."""


@dataclass(frozen=True)
class Delta:
    """A new piece of one answer."""

    index: int
    """Which of the n answers."""
    text: str
    """Whole characters, without text that may turn out to be a stop string."""
    tokens: int
    """Tokens drawn since the answer's last delta, the end of text included."""
    finish: Finish | None = None
    report: "BestOf | None" = None
    """How the answer was chosen, if it is the best of several."""


async def collect(stream: AsyncGenerator[list[Delta], None], n: int) -> list[Delta]:
    """Read a stream to its end; returns its n answers, each in one piece."""
    answers = [Delta(i, "", 0) for i in range(n)]
    async for deltas in stream:
        for new in deltas:
            old = answers[new.index]
            answers[new.index] = replace(new, text=old.text + new.text, tokens=old.tokens + new.tokens)
    return answers


class GenerationError(RuntimeError):
    """The engine failed or is closing; the request is not at fault."""


class Closing(GenerationError):
    """The engine takes no more prompts and gives up those that it has."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class Generator(Protocol):
    """Answers many prompts at a time."""

    prompts: "Prompts"
    """Writes prompts as the model reads them."""
    context: int
    """Tokens that a prompt and its answer may have together."""

    @property
    def load(self) -> Mapping[str, float]:
        """Current work by name: `rows`, the answers in work, and what else the engine counts."""
        ...

    @property
    def failed(self) -> bool:
        """The engine has died and will answer nothing."""
        ...

    async def start(self) -> None: ...

    async def close(self) -> None:
        """Stop the engine; running streams end with a `Closing`."""
        ...

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[list[Delta], None]:
        """The n answers in pieces as they come; closing the stream frees their places at once.

        Raises:
            GenerationError: the engine could not go on.
        """
        ...


def require_embedded(folder: str, vocabulary: Mapping[str, int], rows: int) -> None:
    """Check that a model's embedding has a row for every token of its tokenizer.

    Raises:
        ValueError: it lacks one; a chat with that token would fail, and so would all answers of its batch.
    """
    token = max(vocabulary, key=lambda name: vocabulary[name])
    if vocabulary[token] >= rows:
        raise ValueError(
            f"{folder}: its tokenizer numbers the token {token!r} {vocabulary[token]}, and the model's embedding has "
            f"{rows} rows; take the tokenizer that the model was trained with, or resize the embedding"
        )


def require_known(prompt: Sequence[int], rows: int) -> None:
    """Check a prompt before it joins a batch, which would fail with it.

    Raises:
        GenerationError: it has a token without a row in the model's embedding.
    """
    if (last := max(prompt, default=0)) >= rows:
        raise GenerationError(f"the prompt has the token {last}, and the model's embedding has {rows} rows")


def engine_of(name: str) -> str:
    """Return the engine's name. "auto" means vLLM if it is installed, else transformers."""
    from importlib.util import find_spec

    return name if name != "auto" else "vllm" if find_spec("vllm") else "transformers"


class Rewards:
    """Scores answers on the objectives of a policy's contract, one batch at a time, in its own thread.

    Raises:
        ValueError: an objective reads a head that the scorer lacks, or the contract names no heads.
    """

    def __init__(self, scorer: "Scorer", contract: "Contract") -> None:
        unnamed = [name for name, heads in contract.objectives.items() if not heads]
        if unnamed:
            raise ValueError(f"dpa.json does not say which reward heads {unnamed[0]!r} reads; no --reward can score it")
        self.objectives = [Objective(name, heads) for name, heads in contract.objectives.items()]
        self.scorer = scorer
        for objective in self.objectives:
            head_indices(objective, scorer.heads)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="rewards")

    async def score(self, messages: Sequence[Message], answers: Sequence[str]) -> Array:
        """Score answers to a chat; returns reward_NK, in points.

        Raises:
            TooLong: the chat with one of the answers exceeds a reward model's context.
            ValueError: the chat does not alternate between user and assistant.
        """
        return await asyncio.get_running_loop().run_in_executor(self.thread, self._score, messages, answers)

    def _score(self, messages: Sequence[Message], answers: Sequence[str]) -> Array:
        dialogue(messages)  # raises if the turns are out of order
        reward_NH = self.scorer.score([(messages, answer) for answer in answers])
        return read_objectives(reward_NH, self.scorer.heads, self.objectives)

    def named(self, reward_K: Sequence[float]) -> dict[str, float]:
        return {o.name: round(float(r), 3) for o, r in zip(self.objectives, reward_K, strict=True)}

    def close(self) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)
