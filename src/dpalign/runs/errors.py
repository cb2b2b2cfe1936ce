"""End a command that fails with a line that says what is wrong, not with a traceback."""

import contextlib
import errno
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dpalign.runs.stopping import RESUME, Stopped

FULL: Final = (errno.ENOSPC, errno.EDQUOT)
"""The disk is full, or the user's share of it."""
FULL_SAID: Final = ("No space left on device", "Disk quota exceeded", "unexpected pos", "PytorchStreamWriter")
"""Parts of library errors that mean a full disk; the last two are torch's for a failed write."""


@contextlib.contextmanager
def plain_errors(who: str) -> Iterator[None]:
    """End the process with the message and code 2 if a user can fix the error: a ValueError or OSError.

    After an interruption the code is 130, after SIGTERM `stopping.RESUME`. Any other error is ours: it keeps its
    traceback.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{who}: {without_credentials(_said(error))}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write(f"{who}: interrupted; the same command goes on from here\n")
        sys.exit(130)
    except Stopped:
        sys.stderr.write(f"{who}: ended by SIGTERM; the same command goes on from here\n")
        sys.exit(RESUME)


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in FULL:
        place = error.filename or "a file"
        return f"{place}: no space left on the disk; free some, and run the same command again, which goes on from here"
    return str(error)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the path that was being written when the disk is full: library errors do not.

    Raises:
        OSError: with the path as its file name.
    """
    try:
        yield
    except Exception as error:
        full = error.errno in FULL if isinstance(error, OSError) else any(said in str(error) for said in FULL_SAID)
        if not full:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), getattr(error, "filename", None) or str(path)) from error


def without_credentials(text: str) -> str:
    """A text whose URLs show no user and no password.

    >>> without_credentials("https://me:secret@host/v1: unreachable")
    'https://***@host/v1: unreachable'
    """
    return re.sub(r"(?<=://)[^/\s]*@", "***@", text)
