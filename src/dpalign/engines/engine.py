"""The protocol of a sampling engine: prompts in, n answers to each out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from dpalign.rows import Message

BROKEN: Final = "its weights are broken: train it again at a lower learning rate, or fetch it again"
"""The cure that messages give for a model whose logits are NaN or infinite."""


@dataclass(frozen=True)
class Request:
    """One prompt under one condition, and the number of answers to draw."""

    messages: tuple[Message, ...]
    """The chat, system line included, ending with the user's turn."""
    n: int
    key: tuple[int | str, ...]
    """The meaning of this draw, such as (seed, t, prompt_id, condition): it decides the randomness."""


@dataclass(frozen=True)
class Answer:
    """One sampled answer."""

    text: str
    tokens: int
    """Generated tokens, the end-of-text token included."""
    finished: bool
    """False: cut at max_new_tokens."""

    @property
    def whole(self) -> bool:
        """Finished, and not empty: it may be chosen."""
        return self.finished and bool(self.text.strip())


class Engine(Protocol):
    """Draws answers from one policy."""

    def sample(self, requests: Sequence[Request], *, temperature: float, max_new_tokens: int) -> Iterator[list[Answer]]:
        """The n answers to each request, in the order of the requests."""


def require_room(
    names: Sequence[object], prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int | None
) -> None:
    """Refuse a prompt that leaves no room for an answer of full length; `context` None means no limit.

    Raises:
        ValueError: names the prompt and both lengths.
    """
    for name, ids in zip(names, prompts, strict=True):
        if context and len(ids) + max_new_tokens > context:
            raise ValueError(
                f"prompt {name}: {len(ids)} tokens and {max_new_tokens} new ones exceed the model's context "
                f"of {context}; lower sampling.prompt_tokens or sampling.max_new_tokens"
            )
