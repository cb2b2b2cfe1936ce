"""One process at a time works in a run folder: its lock, and who has it."""

import fcntl
import os
import platform
import time
from pathlib import Path
from typing import Final

ORPHAN_SECONDS: Final = 10.0
"""How long a new run waits for the worker processes of a killed one to end."""


def hold(folder: Path) -> int:
    """Hold a run folder for this process; the kernel lets go of it whenever the process ends, however it ends.

    Returns:
        The lock's file descriptor: the folder is held until all that have it have closed it.

    Raises:
        ValueError: another process holds the folder.
    """
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    patience = time.monotonic() + ORPHAN_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            pid, host = _holder(lock)
            gone = pid is not None and host == platform.node() and not _alive(pid)
            if gone and time.monotonic() < patience:  # killed: its worker processes end a little later
                time.sleep(0.2)
                continue
            os.close(lock)
            who = f"a process left by the ended run {pid}" if gone else f"process {pid or '(unknown)'} on {host}"
            what_to_do = "wait for it, end it, or name another folder"
            raise ValueError(f"{folder}: two runs into one folder: {who} is at work in it; {what_to_do}") from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()} {platform.node()}".encode(), 0)
    return lock


def holder(folder: Path) -> int | None:
    """The process that took the folder last; None if none ever did."""
    path = folder / ".lock"
    if not path.is_file():
        return None
    lock = os.open(path, os.O_RDONLY)
    try:
        return _holder(lock)[0]
    finally:
        os.close(lock)


def _holder(lock: int) -> tuple[int | None, str]:
    """The process that took the lock last, and its machine; None, "" before the first."""
    pid, _, host = os.pread(lock, 1000, 0).decode().partition(" ")
    return (int(pid) if pid.isdecimal() else None), host


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
