"""How far long work is, said on stderr."""

import sys
import time


class Progress:
    """What, how far, how long still, on stderr: a living line on a terminal, elsewhere a line every 30 seconds."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.what, self.total, self.start, self.done = what, total, done, done
        self.tty = sys.stderr.isatty()
        self.began = self.said = time.monotonic()

    def update(self, done: int) -> None:
        self.done, now = done, time.monotonic()
        last = done == self.total
        if now - self.said < (0.2 if self.tty else 30.0) and not last:
            return
        self.said = now
        still = (now - self.began) / max(1, done - self.start) * (self.total - done)
        line = f"{self.what}: {done} of {self.total}" + ("" if last else f", {spell_seconds(still)} left")
        sys.stderr.write(f"\r\033[K{line}" + ("\n" if last else "") if self.tty else f"{line}\n")
        sys.stderr.flush()


def spell_seconds(seconds: float) -> str:
    """45 s, 3 min, 2 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
