"""Who answers in a chat: a model of ours in this process (`local.py`), or a server of OpenAI's kind (`remote.py`)."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dpalign.dial.best_of import BestOf
from dpalign.dial.dial import Dial
from dpalign.paper.direction import Preference
from dpalign.rows import Message


@dataclass(frozen=True)
class Ask:
    """One answer to draw."""

    messages: Sequence[Message]
    """The chat, ending with the user's turn; the user's own system message first, if any."""
    preference: Preference | None
    """None: the plain model."""
    temperature: float
    seed: int
    max_tokens: int | None
    """None: as long as the model's context, or the server, allows."""
    best_of: int | None = None
    """Draw so many answers around the direction, and take the one that the reward model rates best at it."""
    spread: float | None = None
    """Degrees around the direction for best_of; None: as the server has it."""


@dataclass(frozen=True)
class Piece:
    """What is new of an answer."""

    text: str = ""
    finish: str | None = None
    """At its end: stop, or length where it was cut."""
    warnings: Sequence[str] = ()
    chosen: BestOf | None = None
    """At its end, how it was chosen: of an answer that was asked for as the best of several."""


Pieces = Generator[Piece, None, None]
"""An answer as it is drawn; closing it stops it."""


class Speaker(Protocol):
    """Answers one chat; asked from several threads at a time when two directions are compared."""

    @property
    def name(self) -> str: ...

    @property
    def dial(self) -> Dial | None:
        """None: the model takes no directions, as far as is known."""
        ...

    @property
    def scores(self) -> bool:
        """Whether there is a reward model."""
        ...

    @property
    def max_best_of(self) -> int:
        """Answers that the best may be chosen from; 0 without a reward model, which would choose."""
        ...

    def stream(self, ask: Ask) -> Pieces:
        """An answer, from a speaker that may be drawing another.

        Raises:
            ValueError: the model, or the server, refuses; says why.
        """
        ...

    def rewards(self, messages: Sequence[Message], answer: str) -> Mapping[str, float]:
        """What an answer earns on each objective, 0-100.

        Raises:
            ValueError: it cannot be scored; says why.
        """
        ...

    def close(self) -> None: ...
