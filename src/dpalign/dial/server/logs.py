"""The log of a server: strangers cannot fill a disk with it, and it holds no query strings."""

import logging
from time import monotonic
from typing import Final

log = logging.getLogger("dpalign.dial")

LOGGERS: Final = ("asyncio", "dpalign.dial", "uvicorn.access", "uvicorn.error")
"""The loggers whose lines any client can cause."""
SECONDS: Final = 1.0
"""Least time between two lines of one kind."""

Kind = tuple[str, int, object]
"""File, line of code, and the status of a refused request."""


class Sparing(logging.Filter):
    """Lets through one line of each kind a second, and counts the others for `tell`.

    An access line with a status below 400 always passes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[Kind, float] = {}
        self.held: dict[Kind, tuple[int, logging.LogRecord]] = {}
        """How many lines were held back, and the last of them."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.pathname == __file__:
            return True
        status: object = None
        if record.name == "uvicorn.access" and isinstance(record.args, tuple):
            client, method, path, version, status = record.args
            record.args = (client, method, str(path).partition("?")[0], version, status)
            if isinstance(status, int) and status < 400:
                return True
        kind = (record.pathname, record.lineno, status)
        if monotonic() - self.last.get(kind, -SECONDS) < SECONDS:
            self.held[kind] = self.held.get(kind, (0, record))[0] + 1, record
            return False
        self.last[kind] = monotonic()
        return True

    def tell(self) -> None:
        """Log how many lines of each kind were held back, and the last of them."""
        for kind, (lines, record) in list(self.held.items()):
            if monotonic() - self.last[kind] >= SECONDS:
                del self.held[kind]
                self.last[kind] = monotonic()
                log.warning("%d more such lines; the last: %s", lines, record.getMessage()[:300])


SPARING: Final = Sparing()
"""One for the process, which shares its loggers too."""


def spare_the_log() -> None:
    """Limit the lines that clients can cause."""
    for name in LOGGERS:
        logging.getLogger(name).addFilter(SPARING)
