"""The ledger of a stage: it decides whether the stage is done, and records the finished stage.

A stage's fingerprint is the hash of its name, its version, the knobs it read and the digests of its inputs. The
digest of an input is the hash of its files' hashes, so an upstream stage redone to the same bytes redoes nothing
below it. Figures that a training leaves beside its model (`FIGURES`) redo only the report. Nothing else decides: not
the time, the host, the git commit, versions of packages or the rest of the recipe.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NotRequired, TypedDict, cast

from dpalign.runs.errors import naming
from dpalign.runs.tables import changes

LEDGER: Final = "ledger.json"
SCRATCH: Final = ("resume", ".stage")
"""Folders of a stage that are no outputs: the trainer's checkpoints, and our own notes on a stage at work."""
TIMES: Final = "times.json"
"""Clock times of a stage: kept beside its outputs, in no digest, since they differ from run to run."""
FIGURES: Final = ("curve.json", "quality.json")
"""Figures of a training: its loss, and how well its model rates. The report shows them."""
STAGE_NAME: Final = r"[a-z0-9][a-z0-9_-]*"


class Ledger(TypedDict):
    """The record of a finished stage."""

    name: str
    version: int
    fingerprint: str
    knobs: dict[str, Any]
    inputs: dict[str, dict[str, str]]  # by name: path, digest
    outputs: dict[str, str]  # sha256 by relative path
    sizes: dict[str, int]  # bytes: a file cut short is noticed without hashing it again
    digest: str  # of all outputs: two runs made the same bytes if it is the same
    counts: dict[str, Any]  # in, out, filtered (rows by reason)
    tokens: dict[str, int]  # sampled, scored, trained
    seconds: float  # of work, over all resumes
    git_commit: str | None
    started: str
    finished: str
    packages: NotRequired[dict[str, str]]  # versions; earlier ledgers lack this and the next two
    hub: NotRequired[dict[str, str]]  # by knob, the commit that its name stood for
    warnings: NotRequired[list[str]]


@dataclass(frozen=True)
class Stage:
    """What decides whether a stage must run. An input is an earlier stage's name ("sft", "data/d1"), or a path."""

    name: str
    version: int
    inputs: Mapping[str, str | Path] = field(default_factory=dict)
    knobs: Mapping[str, Any] = field(default_factory=dict)
    figures: bool = False
    """Reads the figures of its inputs too."""

    def __post_init__(self) -> None:
        assert re.fullmatch(STAGE_NAME, self.name), f"{self.name!r} is no stage name"


def plan(folder: Path, stages: Sequence[Stage]) -> dict[str, str]:
    """What a run would do, by stage: "done", or "to do: " and why; touches nothing.

    A stage below a redone one counts as to do, though it is skipped if that one ends with the same bytes.
    """
    folder = folder.resolve()
    hashes = FileHashes(folder)
    status: dict[str, str] = {}
    for stage in stages:
        digests: dict[str, str | None] = {}
        missing = []
        for key, value in stage.inputs.items():
            if status.get(_stage_of(folder, value) or "", "done") != "done":
                digests[key] = None
                continue
            try:
                digests[key] = input_digest(folder, value, hashes, stage.figures)
            except ValueError as error:
                digests[key] = "missing"
                missing.append(f"; input {key}: {error}")
        reason = why(folder / stage.name, identity_of(stage, digests))
        status[stage.name] = "done" if reason is None else f"to do: {reason}{''.join(missing)}"
    return status


def read_ledger(folder: Path) -> Ledger:
    """The ledger of a finished stage's folder.

    Raises:
        ValueError: there is none, or it is damaged: it must agree with its own hashes.
    """
    path = folder / LEDGER
    try:
        ledger = cast(Ledger, json.loads(path.read_text(encoding="utf-8")))
        missing = Ledger.__required_keys__ - set(ledger)
        sound = (
            not missing
            and ledger["fingerprint"] == hash_of(_ledger_identity(ledger))
            and ledger["digest"] == hash_of(ledger["outputs"])
            and set(ledger["sizes"]) == set(ledger["outputs"])
        )
    except FileNotFoundError:
        raise ValueError(f"{path}: no ledger; the stage is not finished") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ledger ({error}); delete {folder} to redo the stage") from error
    if not sound:
        raise ValueError(f"{path}: damaged ledger (it disagrees with its hashes); delete {folder} to redo the stage")
    return ledger


def identity_of(stage: Stage, digests: Mapping[str, str | None]) -> dict[str, Any]:
    """The fingerprinted values, as JSON returns them (lists for tuples). Digest None: an input still to be made."""
    identity = {"name": stage.name, "version": stage.version, "knobs": dict(stage.knobs), "inputs": dict(digests)}
    plain: dict[str, Any] = json.loads(_canonical(identity))
    return plain


def _ledger_identity(ledger: Ledger) -> dict[str, Any]:
    digests = {name: entry["digest"] for name, entry in ledger["inputs"].items()}
    return {"name": ledger["name"], "version": ledger["version"], "knobs": ledger["knobs"], "inputs": digests}


def identity_at_work(partial: Path) -> dict[str, Any] | None:
    """The identity with which the work in a partial folder was begun; None if the folder does not say."""
    try:
        state = json.loads((partial / ".stage" / "state.json").read_text(encoding="utf-8"))
        identity: dict[str, Any] = state["identity"]
        return identity
    except (OSError, ValueError, TypeError, KeyError):
        return None


def why(output: Path, identity: dict[str, Any]) -> str | None:
    """Why a stage must be done; None if it is done."""
    reason = _why_unfinished(output, identity)
    if reason is not None and identity_at_work(partial_of(output)) == identity:
        return f"{reason}; goes on from where it was stopped"
    return reason


def _why_unfinished(output: Path, identity: dict[str, Any]) -> str | None:
    if not output.exists():
        return "new"
    try:
        ledger = read_ledger(output)
    except ValueError as error:
        return str(error)
    # Compare only sizes: hashing a whole model again at every run would take minutes.
    for file, size in ledger["sizes"].items():
        path = output / file
        if not path.is_file() or path.stat().st_size != size:
            return f"output {file} is {'cut short or altered' if path.is_file() else 'missing'}"
    old = _ledger_identity(ledger)
    if old == identity:
        return None
    reasons = changes(
        {"version": old["version"], **old["knobs"]}, {"version": identity["version"], **identity["knobs"]}
    )
    for name in dict.fromkeys([*old["inputs"], *identity["inputs"]]):
        if name not in identity["inputs"]:
            reasons.append(f"input {name} is gone")
        elif name not in old["inputs"]:
            reasons.append(f"input {name} is new")
        elif identity["inputs"][name] is None:
            reasons.append(f"input {name} is to be made again")
        elif identity["inputs"][name] != old["inputs"][name]:
            reasons.append(f"input {name} changed")
    return "; ".join(reasons)


def other_versions(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The packages whose versions changed, or hub names whose commits did, as text; empty if none did.

    A change redoes no stage: that would cost many GPU-hours for what is often the same result.
    """
    both = sorted(before.keys() & now.keys())
    return ", ".join(changes({name: before[name] for name in both}, {name: now[name] for name in both}))


def partial_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def is_of_stage(folder: Path) -> bool:
    """Whether we may delete a folder: it is a stage's, at work or finished, or empty. A user's own is neither."""
    if not folder.is_dir():
        return False
    if (folder / ".stage").is_dir() or not any(folder.iterdir()):
        return True
    try:
        return bool(read_ledger(folder))
    except ValueError:
        return False


def scratch_of(output: Path, kind: str) -> Path:
    """A hidden path beside `output` that only we use: we may delete it."""
    return output.with_name(f".{output.name}.dpalign.{kind}")


def adopt(output: Path, identity: dict[str, Any]) -> None:
    """Finish a rename that a kill interrupted after the ledger was written, and delete outdated folders."""
    partial = partial_of(output)
    if (partial / LEDGER).is_file() and _why_unfinished(partial, identity) is None:
        into_place(output)
    for folder in (output, partial):
        shutil.rmtree(scratch_of(folder, "old"), ignore_errors=True)


def into_place(output: Path, partial: Path | None = None) -> None:
    """Rename the finished partial folder to `output`; an outdated `output` is moved away first."""
    partial = partial or partial_of(output)
    for name in SCRATCH:
        shutil.rmtree(partial / name, ignore_errors=True)
    for path in partial.rglob(".*.partial"):
        path.unlink()
    for folder in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
        sync(folder)
    away = move_away(output)
    os.rename(partial, output)
    sync(output.parent)
    shutil.rmtree(away, ignore_errors=True)


def move_away(folder: Path) -> Path:
    """Rename a folder before it is deleted, so that a kill leaves no half of it where it would be read."""
    away = scratch_of(folder, "old")
    shutil.rmtree(away, ignore_errors=True)
    if folder.exists():
        os.rename(folder, away)
    return away


def output_files(folder: Path) -> list[str]:
    """The relative paths of a stage's outputs: all but ledger, times, scratch folders and half-written files."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        file.as_posix()
        for file in files
        if file.parts[0] not in (*SCRATCH, LEDGER, TIMES) and not re.fullmatch(r"\..*\.partial", file.name)
    )


def _stage_of(folder: Path, value: str | Path) -> str | None:
    """The stage of this run that an input names or lies in; None for files that no stage of it made."""
    path = (folder / value if isinstance(value, str) else value).resolve()
    if not path.is_relative_to(folder) or path == folder:
        return None
    name = path.relative_to(folder).parts[0]
    return name if isinstance(value, str) or (folder / name / LEDGER).is_file() else None


def input_digest(folder: Path, value: str | Path, hashes: "FileHashes", figures: bool = False) -> str:
    """The digest of an input: of an earlier stage's outputs by its ledger, or of the files at a path.

    Args:
        figures: include `FIGURES`.
    """
    path = (folder / value if isinstance(value, str) else value).resolve()
    stage = _stage_of(folder, value)
    if stage is not None:
        outputs = outputs_as_read(folder / stage, figures)
        require_named(folder / stage)
        files = {str(folder / stage / file): sha256 for file, sha256 in outputs.items()}
    elif path.is_dir():
        require_named(path)
        files = {str(file): hashes.of(file) for file in path.rglob("*") if file.is_file()}
    else:
        files = {str(path): hashes.of(path)} if path.is_file() else {}
    inside = {os.path.relpath(file, path): sha for file, sha in files.items() if Path(file).is_relative_to(path)}
    if not inside:
        raise ValueError(f"{path} is missing or empty")
    return hash_of(inside)


def outputs_as_read(stage: Path, figures: bool = False) -> dict[str, str]:
    """The outputs of a finished stage that an input consists of: sha256 by relative path; `FIGURES` if `figures`."""
    outputs = read_ledger(stage)["outputs"]
    return {file: sha256 for file, sha256 in outputs.items() if figures or file not in FIGURES}


def require_named(stage: Path) -> None:
    """Raise ValueError if a finished stage's folder has a file that its ledger does not name; hidden files pass."""
    try:
        outputs = read_ledger(stage)["outputs"]
    except ValueError:  # a folder that no stage made
        return
    for file in output_files(stage):
        if file not in outputs and not Path(file).name.startswith("."):
            raise ValueError(f"{stage / file}: {LEDGER} does not name it, so its stage did not write it; move it away")


class FileHashes:
    """sha256 of files, kept by inode, size and times so that large ones are read once.

    Args:
        folder: the run folder that keeps the hashes of files outside it; None keeps them in memory only.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.path = folder / ".digests.json" if folder else None
        self.known: dict[str, Any] = {}
        if self.path:
            with contextlib.suppress(OSError, ValueError):
                self.known = dict(json.loads(self.path.read_text(encoding="utf-8")))

    def of(self, file: Path) -> str:
        stat = file.stat()
        state = [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        entry = self.known.get(str(file))
        if not isinstance(entry, list) or entry[:-1] != state:
            entry = self.known[str(file)] = [*state, sha256_of(file)]
        return str(entry[-1])

    def save(self) -> None:
        if self.path:
            write_json(self.path, self.known)


def write_text(path: Path, text: str) -> None:
    """Write beside, flush to disk, then rename: the file appears whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """`write_text` of bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    with naming(path), beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_json(path: Path, value: Any) -> None:
    """`write_text` as indented JSON.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot hold; write None for a missing number.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; write null where there is no number") from error
    write_text(path, text + "\n")


def _canonical(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))


def hash_of(value: Any) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()


def sha256_of(path: Path, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file to disk; or a folder, for the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything in it to disk, except files that another process removes meanwhile."""
    for path in (*folder.rglob("*"), folder):
        with contextlib.suppress(FileNotFoundError):
            sync(path)
