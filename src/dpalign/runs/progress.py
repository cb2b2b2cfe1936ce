"""The progress of long work: a bar on a terminal, elsewhere a line now and then. Both go to stderr."""

import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Final, Self

from dpalign.runs.environment import first_process

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

LINE_EVERY: Final = 10.0
"""Seconds between two lines, where stderr is no terminal."""
AS_LINES: Final = {"DPALIGN_PROGRESS": "lines"}
"""The environment of processes that share a terminal: their bars would overwrite each other."""

SILENT: Final = {"DPALIGN_PROGRESS": "none"}
"""The environment of processes that show no progress: in a notebook each line would stay."""

_lock = threading.Lock()
_bars: "Bars | None" = None
"""The one live display of this process; it holds a bar for each piece of work."""


class Progress:
    """The progress of one piece of work.

        with Progress("sft: update", total=300) as progress:
            progress.update(264)  # in a pipe: "sft: update 264 of 300, 5 s left"

    A bar disappears when it is closed. Of a training's processes only the first shows progress.

    Args:
        what: names the work and the unit that is counted.
        total: the amount of work; None if it is not known.
        done: the amount that an earlier call did.
    """

    def __init__(self, what: str, total: int | None = None, done: int = 0) -> None:
        self.what, self.total, self.start, self.done = what, total, done, done
        self.silent = not first_process() or SILENT.items() <= os.environ.items()
        self.began = self.last_line = time.monotonic()
        on_terminal = sys.stderr.isatty() and not AS_LINES.items() <= os.environ.items()
        self.bar = _add_bar(what, total, done) if on_terminal and not self.silent else None
        if total is None and not on_terminal:
            self._line(what)

    def update(self, done: int) -> None:
        """Show that `done` of the total is done."""
        self.done = done
        if self.bar is not None and _bars is not None:
            _bars.update(self.bar, completed=done, count=_count(done, self.total))
        elif self.bar is None and (now := time.monotonic()) - self.last_line >= LINE_EVERY:
            left = (now - self.began) / max(1, done - self.start) * ((self.total or done) - done)
            self._line(f"{self.what} {_count(done, self.total)}" + (f", {spell_seconds(left)} left" if left else ""))
            self.last_line = now

    def advance(self, by: int = 1) -> None:
        """Show that `by` more is done."""
        self.update(self.done + by)

    def close(self) -> None:
        """Take the bar away; a second call does nothing."""
        if self.bar is not None:
            _remove_bar(self.bar)
            self.bar, self.silent = None, True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, text: str) -> None:
        if not self.silent:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


def _count(done: int, total: int | None) -> str:
    return "" if total is None else f"{done:,} of {total:,}"


def _add_bar(what: str, total: int | None, done: int) -> "TaskID":
    global _bars
    from rich import progress
    from rich.console import Console

    with _lock:
        if _bars is None:
            text = progress.TextColumn("{task.description} {task.fields[count]}")
            left = progress.TimeRemainingColumn(elapsed_when_finished=True)
            console = Console(file=sys.stderr)  # this stderr, also while a library's output is redirected
            _bars = progress.Progress(text, progress.BarColumn(), left, console=console, transient=True)
            _bars.start()
            console.show_cursor(True)  # or it stays hidden when the process is killed
        return _bars.add_task(what, total=total, completed=done, count=_count(done, total))


def _remove_bar(bar: "TaskID") -> None:
    global _bars
    with _lock:
        assert _bars is not None
        _bars.refresh()  # the last update, however short the work was
        _bars.remove_task(bar)
        if not _bars.task_ids:
            _bars.stop()
            _bars = None


def spell_seconds(seconds: float) -> str:
    """45 s, 3 min, 2 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
