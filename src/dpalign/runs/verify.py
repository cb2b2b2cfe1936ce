"""Check finished files against the digests in their stage's ledger.

A stage hashes its inputs when it starts, since swapped or damaged weights look like others. Within a process a file is
hashed once (`FileHashes`), and again if its inode, size or times have changed. No user can set back the time of a
file's last change.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dpalign.runs.ledger import LEDGER, FileHashes, read_ledger


@dataclass(frozen=True)
class Fault:
    """A file that is not as it was written."""

    file: Path
    what: Literal["missing", "altered"]


def faults(folder: Path, digests: Mapping[str, str], hashes: FileHashes) -> Iterator[Fault]:
    """The files of a folder that are missing, or whose digest is not the recorded one."""
    for name, sha256 in digests.items():
        file = folder / name
        if not file.is_file():
            yield Fault(file, "missing")
        elif hashes.of(file) != sha256:
            yield Fault(file, "altered")


def stage_at(path: Path) -> Path | None:
    """The finished stage that a path is or lies in; None if there is none."""
    return next((folder for folder in (path, *path.parents) if (folder / LEDGER).is_file()), None)


def require_intact(path: Path, hashes: FileHashes) -> None:
    """Refuse a path whose files are no longer as a finished stage wrote them; files that no stage wrote pass.

    Raises:
        ValueError: names the first file that is missing or altered, and the cure.
    """
    stage = stage_at(path)
    if stage is None:
        return
    written = read_ledger(stage)["outputs"]
    read = {name: sha256 for name, sha256 in written.items() if (stage / name).is_relative_to(path)}
    for fault in faults(stage, read, hashes):
        raise ValueError(
            f"{fault.file}: {fault.what} since its stage wrote it ({LEDGER}); delete {stage} and run again: the stage "
            "is made again, and what reads it stays where the bytes are the same"
        )
