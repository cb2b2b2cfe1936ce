"""The protocol of a streaming generator: a prompt's tokens in, pieces of its answers out as they are drawn."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from dpalign.rows import Message

Finish = Literal["stop", "length"]
"""Why an answer ended, in OpenAI's words: its end of text or a stop string; or max_tokens."""


@dataclass(frozen=True)
class Sampling:
    """How the answers to one prompt are drawn."""

    max_tokens: int
    n: int = 1
    temperature: float = 0.7
    """0 takes the likeliest token each time. 0.7 is section 3.2's."""
    top_p: float = 1.0
    """Below 1, draw from the likeliest tokens alone whose probabilities reach this sum."""
    seed: int = 0
    """With the index of the answer and of the token it decides every draw, whatever else is being answered."""
    stop: tuple[str, ...] = ()
    """An answer ends before the first of these."""


@dataclass(frozen=True)
class Delta:
    """What is new of one answer."""

    index: int
    """Which of the n."""
    text: str
    """Whole characters, and nothing that may yet turn out to be a stop string."""
    tokens: int
    """Drawn since the answer's last delta, the end of text included."""
    finish: Finish | None = None


class Drawn(NamedTuple):
    """A whole answer."""

    text: str
    finish: Finish
    tokens: int


async def collect(stream: AsyncGenerator[list[Delta], None], n: int) -> list[Drawn]:
    """The n answers of a stream, when all are whole."""
    texts, finishes, tokens = [""] * n, ["length"] * n, [0] * n
    async for news in stream:
        for delta in news:
            texts[delta.index] += delta.text
            tokens[delta.index] += delta.tokens
            finishes[delta.index] = delta.finish or finishes[delta.index]
    return [Drawn(*one) for one in zip(texts, finishes, tokens, strict=True)]  # type: ignore[arg-type]


class GenerationError(RuntimeError):
    """The generator failed, or is closing; the request is not at fault."""


class Closing(GenerationError):
    """The generator takes no more prompts, and gives up those that it has."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class Generator(Protocol):
    """Answers many prompts at a time."""

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        ...

    @property
    def load(self) -> Mapping[str, float]:
        """What it is at: `rows` decoding, `waiting` prompts, `steps` taken so far."""
        ...

    @property
    def failed(self) -> bool:
        """It has died, and will draw nothing any more."""
        ...

    async def start(self) -> None: ...

    async def close(self) -> None:
        """End what is running with a `Closing`."""
        ...

    async def prompt_ids(self, messages: Sequence[Message], preference: Mapping[str, float] | None) -> list[int]:
        """A prompt as the model reads it: its own chat template, with the direction if any.

        Raises:
            ValueError: the template refuses it.
        """
        ...

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[list[Delta], None]:
        """The n answers in pieces as they come; closing the stream frees their places at once.

        Raises:
            GenerationError: it could not go on.
        """
        ...
