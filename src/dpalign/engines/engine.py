"""The protocol of a sampling engine: prompts in, n answers each out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from dpalign.rows import Message


@dataclass(frozen=True)
class Request:
    """One prompt under one condition, and how many answers to draw for it."""

    messages: tuple[Message, ...]
    """The chat, system line included, ending with the user's turn."""
    n: int
    key: tuple[int | str, ...]
    """What this draw means, such as (seed, t, prompt_id, condition): it decides the randomness."""


@dataclass(frozen=True)
class Answer:
    """One sampled answer."""

    text: str
    tokens: int
    """Generated, the end-of-text token included."""
    finished: bool
    """False: cut at max_new_tokens."""

    @property
    def whole(self) -> bool:
        """Finished, and not empty: it may be chosen."""
        return self.finished and bool(self.text.strip())


class Reader(Protocol):
    """Knows how long a prompt is."""

    def prompt_tokens(self, messages: Sequence[Message]) -> int:
        """Length of a prompt as a policy reads it."""
        ...


class Engine(Reader, Protocol):
    """Draws answers from one policy."""

    def sample(self, requests: Sequence[Request], *, temperature: float, max_new_tokens: int) -> Iterator[list[Answer]]:
        """The n answers of each request, in the order of the requests."""
        ...


def require_room(
    requests: Sequence[Request], prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int | None
) -> None:
    """Refuse a prompt that leaves no room for an answer of full length; None for a model without a limit.

    Raises:
        ValueError: names the request and both lengths.
    """
    for request, ids in zip(requests, prompts, strict=True):
        if context and len(ids) + max_new_tokens > context:
            raise ValueError(
                f"prompt {request.key}: {len(ids)} tokens and {max_new_tokens} new ones exceed the model's context "
                f"of {context}; filter by prompt_tokens, or lower max_new_tokens"
            )
