"""What one server lets its clients ask for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of a server. The paper is silent on all of them."""

    max_tokens: int = 2048
    """Tokens of an answer, and what a request gets that does not say; the released policy's."""
    max_prompt: int = 0
    """Tokens of a prompt; 0: what the model's context holds."""
    max_n: int = 16
    """Answers to a prompt, and answers that `best_of` chooses from."""
    max_body: int = 1 << 20
    """Bytes of a request."""
    body_seconds: float = 30.0
    """How long a request's body may take to come in."""
    read_seconds: float = 30.0
    """How long a client may leave a stream unread once the machine's buffers for it are full."""
    max_concurrent: int = 64
    """Requests that are answered at a time; others wait in line."""
    max_queue: int = 256
    """Requests that wait in line; others are sent away with 429."""
    grace: float = 20.0
    """Seconds that running answers have when the server is told to stop."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_n", "max_body", "max_concurrent"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1")
        for name in ("max_prompt", "max_queue", "grace"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 0")

    @property
    def max_held(self) -> int:
        """Requests whose bodies are held at a time: as many chats as may be answered or wait, and as many scorings."""
        return 2 * (self.max_concurrent + self.max_queue)
