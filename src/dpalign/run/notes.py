"""What outlives an actor's process: how often each shard was begun, and what it was at when it died."""


class Notes:
    """Kept in a small actor of its own, which does no work that could end it.

    Args:
        actors: of the pool.
        retries: `cluster.retries`.
    """

    def __init__(self, actors: int, retries: int) -> None:
        # While nothing gets done: every actor once, and once more for each attempt at a shard that kills its process.
        self.births_allowed = actors * (retries + 4)
        self.births = 0
        self.begun: dict[int, int] = {}
        self.prompt: dict[int, str] = {}
        self.said: dict[int, str] = {}

    def born(self) -> str:
        """An actor's process begins; returns what is wrong, if too many have begun since a shard was last done."""
        self.births += 1
        if self.births <= self.births_allowed:
            return ""
        return f"the actors' processes died {self.births - 1} times with no shard done; out of memory?"

    def begin(self, shard: int) -> tuple[int, str, str]:
        """An attempt at a shard begins.

        Returns:
            How many have, this one included; the prompt at which the last one ended, and the error it ended with, ""
            where that is not known.
        """
        self.begun[shard] = self.begun.get(shard, 0) + 1
        return self.begun[shard], self.prompt.get(shard, ""), self.said.pop(shard, "")

    def at(self, shard: int, prompt: str) -> None:
        """An attempt is at one prompt alone; "" when it is through with them."""
        self.prompt[shard] = prompt

    def say(self, shard: int, error: str) -> None:
        """The error that ends an attempt and its process."""
        self.said[shard] = error

    def done(self, shard: int) -> None:
        """A shard is made, or given up."""
        self.births = 0
        self.prompt.pop(shard, None)
