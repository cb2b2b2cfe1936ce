"""Whose a run folder is: of one process at a time, and never a folder with files of a user.

The lock's file says which process took the folder last, and its mark that the folder is ours.
"""

import fcntl
import os
import platform
import time
from pathlib import Path
from typing import Final, Literal

from dpalign.runs.ledger import is_of_stage

LOCK: Final = ".lock"
MARK: Final = " dpalign"
WHOLE: Final = f"{MARK} run"
"""Ends of a lock's text, after the process and the machine that took it last. A run with a recipe has WHOLE."""
OUR_FILES: Final = (LOCK, ".digests.json", "log.txt", "environment.json")
"""Files that are written beside a stage taken alone."""
ORPHAN_SECONDS: Final = 10.0
"""How long a new run waits for the worker processes of a killed one to end."""

FolderKind = Literal["run", "alone", "no run"]


def kind_of(folder: Path) -> FolderKind:
    """Whether a folder is a run, or has stages taken alone: the mark in its lock tells."""
    try:
        text = (folder / LOCK).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return "no run"
    if MARK not in text:
        return "no run"
    return "run" if WHOLE in text else "alone"


def require_ours(folder: Path, alone: bool) -> FolderKind:
    """The kind of a folder; raises ValueError if it holds something that is not ours and could be overwritten.

    Args:
        alone: a stage is taken alone in it, which writes `OUR_FILES` and touches nothing else.
    """
    kind = kind_of(folder)
    if not folder.exists() or kind == "run" or (alone and kind == "alone"):
        return kind
    left = [path for path in sorted(folder.iterdir()) if path.name != LOCK or path.stat().st_size]
    if kind == "alone":
        left = [path for path in left if path.name not in OUR_FILES and not is_of_stage(path)]
    if left and not alone:
        raise ValueError(f"{folder}: holds other things than a run, which could be overwritten; name another place")
    for path in left:
        if path.name in OUR_FILES:
            raise ValueError(f"{path}: no run wrote it, and it would be overwritten; name a place in another folder")
    return kind


def hold(folder: Path, path: Path | None = None, mark: str = MARK) -> int:
    """Hold a run folder for this process; the kernel releases it when the process ends, even by a kill.

    Args:
        path: the lock's file, if not the folder's own.
        mark: the end of its text.

    Returns:
        The lock's file descriptor: the folder is held until all processes that have it close it.

    Raises:
        ValueError: another process holds the folder.
    """
    path = path or folder / LOCK
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
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
    if not path.exists() or not os.path.samestat(os.fstat(lock), path.stat()):  # removed by its holder
        os.close(lock)
        return hold(folder, path, mark)
    text = f"{os.getpid()} {platform.node()}{mark}".encode()
    os.pwrite(lock, text, 0)  # before the old text goes: a kill must not leave a run without its mark
    os.ftruncate(lock, len(text))
    return lock


def holder(folder: Path) -> int | None:
    """The process that took the folder last; None if none ever did."""
    path = folder / LOCK
    if not path.is_file():
        return None
    lock = os.open(path, os.O_RDONLY)
    try:
        return _holder(lock)[0]
    finally:
        os.close(lock)


def _holder(lock: int) -> tuple[int | None, str]:
    """The process that took the lock last, and its machine; None, "" before the first."""
    pid, _, host = os.pread(lock, 1000, 0).decode().partition(MARK)[0].partition(" ")
    return (int(pid) if pid.isdecimal() else None), host


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
