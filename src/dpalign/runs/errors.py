"""How a command ends when something is wrong: with a line that says what, not with a traceback."""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def plain_errors(who: str) -> Iterator[None]:
    """End the process at an error that a user can mend with its message and code 2, at an interruption with 130.

    Any other error is ours: it keeps its traceback.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{who}: {without_credentials(str(error))}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write(f"{who}: interrupted; the same command goes on from here\n")
        sys.exit(130)


def without_credentials(text: str) -> str:
    """A text whose URLs show no user and no password.

    >>> without_credentials("https://me:secret@host/v1: unreachable")
    'https://***@host/v1: unreachable'
    """
    return re.sub(r"(?<=://)[^/\s]*@", "***@", text)
