"""`dpa verify`: does a run, a finished stage or an export still hold the bytes that were written?

Every file is hashed and compared with the stage's ledger, or with the export's `dpa.json`.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from dpalign.page.words import size
from dpalign.runs.ledger import LEDGER, FileHashes, output_files, read_ledger, sha256_of
from dpalign.runs.modelfolder import read_object, walk
from dpalign.runs.progress import Progress
from dpalign.runs.verify import Fault, faults
from dpalign.train.contract import DIGESTS, FILE

WRONG: Final = 2
"""The exit code if a file is not as it was written."""


def declare(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a run, a finished stage's folder, or an export")


def execute(given: argparse.Namespace, _: Sequence[str]) -> str:
    """Return a line per folder, and one per missing, altered or unknown file; if there is one, exit with code 2.

    Raises:
        ValueError: the folder is none of these.
    """
    lines: list[str] = []
    count, folders = 0, checked_folders(given.folder)
    with Progress("hashing the files of folder", len(folders)) as progress:
        for folder in folders:
            wrong = list(stage_faults(folder) if (folder / LEDGER).is_file() else _export_faults(folder))
            found = f"{len(wrong)} wrong" if wrong else summary(folder)
            lines += [f"{folder.name}: {found}", *wrong]
            count += len(wrong)
            progress.advance()
    text = "\n".join(lines)
    if count:
        sys.stdout.write(f"{text}\n")
        sys.exit(WRONG)
    return text


def checked_folders(folder: Path) -> list[Path]:
    """Return the folder itself if it is a finished stage or an export; else the finished stages of the run.

    Raises:
        ValueError: none of these.
    """
    if (folder / LEDGER).is_file():
        return [folder.resolve()]
    if (folder / FILE).is_file() and "files" in read_object(folder / FILE):
        return [folder.resolve()]
    if stages := sorted(path.parent for path in folder.glob(f"*/{LEDGER}")):
        return stages
    raise ValueError(
        f"{folder}: neither a run with finished stages, nor such a stage's folder ({LEDGER}), nor an export"
    )


def stage_faults(stage: Path) -> Iterator[str]:
    """Yield one line per fault in a finished stage's files, with the cure."""
    try:
        written = read_ledger(stage)["outputs"]
    except ValueError as error:
        yield f"  {error}"
        return
    cure = f"delete {stage} and run again"
    for fault in faults(stage, written, FileHashes()):
        yield f"  {fault.file}: {fault.what} since it was written; {cure}"
    for name in output_files(stage):
        if name not in written:
            yield f"  {stage / name}: unknown to {LEDGER}; move it away"


def _export_faults(export: Path) -> Iterator[str]:
    """Yield one line per fault in an export's files, with the cure."""
    for fault in changed_files(export):
        yield f"  {fault.file}: {fault.what} since it was exported; export it or fetch it again"
    known = {*read_object(export / FILE)["files"], FILE}
    for file in walk(export):
        inside = file.relative_to(export)
        if inside.as_posix() not in known and not any(part.startswith(".") for part in inside.parts):
            yield f"  {file}: unknown to {FILE}; move it away"


def changed_files(export: Path) -> Iterator[Fault]:
    """The files of an export that are missing, or of another size or digest. Old exports record no digests."""
    contract = read_object(export / FILE)
    digests = contract.get(DIGESTS) or {}
    for name, bytes_ in sorted(contract["files"].items()):
        file = export / name
        if not file.is_file():
            yield Fault(file, "missing")
        elif file.stat().st_size != bytes_ or (name in digests and sha256_of(file) != digests[name]):
            yield Fault(file, "altered")


def summary(folder: Path) -> str:
    """Say how many files and bytes of a sound folder were compared, and with which record."""
    if (folder / LEDGER).is_file():
        ledger = read_ledger(folder)
        return f"{len(ledger['outputs'])} files, {size(sum(ledger['sizes'].values()))}, as {LEDGER} says"
    contract = read_object(folder / FILE)
    how = f"as {FILE} says" if contract.get(DIGESTS) else f"of the sizes in {FILE}, which has no digests"
    return f"{len(contract['files'])} files, {size(sum(contract['files'].values()))}, {how}"
