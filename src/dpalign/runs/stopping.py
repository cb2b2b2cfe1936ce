"""Stop on SIGTERM, which Slurm sends before it kills: the command ends with an exit code of its own.

A stage of shards ends at once: its finished shards are kept. A training ends after the current update, and writes a
checkpoint of it.
"""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

RESUME: Final = 75
"""The exit code after SIGTERM, EX_TEMPFAIL of sysexits.h: the same command goes on where this one ended."""
INTERRUPTED_SECONDS: Final = 5.0
"""How long a child may take to end after an interruption, before it gets SIGTERM."""


class Stopped(BaseException):
    """SIGTERM has come. It is no Exception, so that code that catches errors and goes on does not catch it."""


@dataclass
class _State:
    requested: bool = False
    deferrals: int = 0
    children: set["subprocess.Popen[Any]"] = field(default_factory=set)


_state = _State()


def stop_requested() -> bool:
    """Whether SIGTERM has come."""
    return _state.requested


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM raise `Stopped` in the main thread, and pass it on to the processes that `wait_for` waits for."""
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
        _state.requested = False


@contextmanager
def deferred() -> Iterator[None]:
    """Delay SIGTERM: work that asks `stop_requested` ends itself, or `Stopped` is raised after the block."""
    _state.deferrals += 1
    try:
        yield
    finally:
        _state.deferrals -= 1
    if _state.requested:
        raise Stopped


def wait_for(child: "subprocess.Popen[Any]") -> int:
    """Wait for a child process and return its exit code; on SIGTERM or an interruption the child ends first."""
    _state.children.add(child)
    try:
        if _state.requested:
            child.terminate()
        return child.wait()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):  # at a terminal the child has been interrupted too
            with suppress(subprocess.TimeoutExpired):
                child.wait(INTERRUPTED_SECONDS)
        if not _state.requested:  # else it got SIGTERM: torchrun must not get it twice
            child.terminate()
        child.wait()
        raise
    finally:
        _state.children.discard(child)


def _stop(*_: object) -> None:
    if _state.requested:  # sent twice, by Slurm and by a parent process; the first is being handled
        return
    _state.requested = True
    for child in tuple(_state.children):
        child.terminate()
    if not _state.deferrals:
        raise Stopped
