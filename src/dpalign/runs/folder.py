"""The run folder: one process at a time, stage by stage; finished stages are skipped (`ledger.py` decides).

RUN/recipe.toml, environment.json, log.txt     the recipe, the machine, the messages of the run
RUN/<stage>/...                                a finished stage's outputs, beside its ledger.json
RUN/<stage>/times.json                         clock times of some stages: no output, in no digest
RUN/<stage>.partial/...                        a stage at work, or killed at work: its finished shards are kept
RUN/.<stage>.dpalign.old/...                   an outdated stage that is being deleted
RUN/.lock                                      the process at work; the lock's mark identifies a run folder
RUN/<stage>[.partial]/resume/                  trainer checkpoints: no output, deleted when the stage finishes
"""

import contextlib
import json
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from dpalign.runs.environment import describe_environment
from dpalign.runs.errors import naming
from dpalign.runs.ledger import (
    LEDGER,
    SCRATCH,
    FileHashes,
    Ledger,
    Stage,
    adopt,
    hash_of,
    identity_at_work,
    identity_of,
    input_digest,
    into_place,
    is_of_stage,
    move_away,
    other_versions,
    output_files,
    partial_of,
    read_ledger,
    sha256_of,
    sync,
    why,
)
from dpalign.runs.ledger import write_json as write_json
from dpalign.runs.ledger import write_text as write_text
from dpalign.runs.lock import MARK, WHOLE, hold, require_ours
from dpalign.runs.progress import Progress, spell_seconds
from dpalign.runs.stopping import Stopped, stop_requested
from dpalign.runs.verify import require_intact

OWN: Final = ".own"
"""The name of the tally in which a stage's own process keeps its counts beside the shards'."""


@dataclass
class Tally:
    """Rows read, written and left out (by reason), tokens and warnings, of a shard or of a stage."""

    rows_in: int = 0
    rows_out: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    sampled: int = 0
    scored: int = 0
    trained: int = 0
    halved: int = 0
    """How often a batch ran out of memory and was halved."""
    warnings: list[str] = field(default_factory=list)
    """Messages that stop no stage but may mean a spoiled result: in its ledger, and on the report's page."""

    def add(
        self,
        rows_in: int = 0,
        rows_out: int = 0,
        filtered: Mapping[str, int] | None = None,
        *,
        scored: int = 0,
        trained: int = 0,
    ) -> None:
        """Count rows read, written and left out, answers scored and tokens trained on."""
        self.rows_in += rows_in
        self.rows_out += rows_out
        self.filtered.update(filtered or {})
        self.scored += scored
        self.trained += trained


@dataclass(frozen=True)
class Shard:
    """One unit of a stage's work: write `path` whole, and count rows and tokens in `tally`."""

    index: int
    path: Path
    tally: Tally


def unfinished(folder: Path, count: int, name: str, log: Callable[[str], None]) -> list[int]:
    """Indices of the shards to make: those without a file or tally, and those whose files are damaged.

    Args:
        log: called with one line for each damaged file.
    """
    todo = []
    for index in range(count):
        shard = name.format(index)
        made = _digests(_tally_path(folder, shard))
        damaged = [file for file, digest in (made or {}).items() if not _is_file_of(folder / file, digest)]
        for file in damaged:
            log(f"{folder.stem}: {file} is lost or damaged; its shard is made again")
        if made is None or damaged or not (folder / shard).is_file():
            _tally_path(folder, shard).unlink(missing_ok=True)
            todo.append(index)
    return todo


def keep_tally(folder: Path, shard: str, tally: Tally) -> None:
    """Write a shard's tally with the digests of its files. This finishes the shard; its files are synced first."""
    assert (folder / shard).is_file(), f"{folder / shard} was not written"
    files = sorted(folder.glob(beside(shard)))
    digests = {path.relative_to(folder).as_posix(): sha256_of(path, sync=True) for path in files}
    for parent in {path.parent for path in files}:
        sync(parent)
    write_json(_tally_path(folder, shard), vars(tally) | {"files": digests})


def beside(name: str) -> str:
    """A glob of a shard's file, and of files of its name in folders beside its own: an answer file's scores."""
    return f"*/{Path(name).name}" if "/" in name else name


def _digests(tally: Path) -> dict[str, str] | None:
    """The digests of a shard's files from its tally; empty for an earlier version's tally. None without a tally."""
    try:
        files: dict[str, str] = dict(json.loads(tally.read_text(encoding="utf-8")).get("files", {}))
        return files
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _is_file_of(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_of(path) == digest


def _tally_path(folder: Path, shard: str) -> Path:
    return folder / ".stage" / "tallies" / f"{shard}.json"


class Run:
    """An open run folder, held by this process alone until `close`."""

    def __init__(self, folder: Path, lock: int, git_commit: str | None) -> None:
        self.folder = folder
        self.lock = lock
        """File descriptor. A stage's own process inherits it (`pass_fds`), so its orphan still holds the folder."""
        self.git_commit = git_commit
        self.packages: dict[str, str] = {}
        """Package versions on this machine: in every ledger."""
        self.hashed = FileHashes()
        """Hashes of the files that stages read: each is hashed once in this process."""
        self.in_process = threading.Lock()
        """A lock, held by the one step, of several side by side, that works in this process."""

    @classmethod
    def open(cls, folder: Path, recipe_text: str | None, environment: Mapping[str, Any] | None = None) -> Self:
        """Take the folder, and write the recipe and the environment (`describe_environment()`) into it.

        Args:
            recipe_text: None for a stage taken alone: a recipe in the folder is another run's, and stays.

        Raises:
            ValueError: another process holds the folder; it is no folder, or holds other things than a run.
        """
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder}: a file, where a run folder was asked for; name another place")
        kind = require_ours(folder, alone=recipe_text is None)
        folder.mkdir(parents=True, exist_ok=True)
        run_folder = folder.resolve()
        lock = hold(run_folder, mark=WHOLE if recipe_text is not None or kind == "run" else MARK)
        facts = describe_environment() if environment is None else environment
        if recipe_text is not None:
            write_text(run_folder / "recipe.toml", recipe_text)
        if recipe_text is not None or not (run_folder / "environment.json").exists():
            write_json(run_folder / "environment.json", facts)
        run = cls(run_folder, lock, facts.get("git_commit"))
        run.packages = dict(facts.get("packages", {}))
        return run

    def close(self) -> None:
        os.close(self.lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, text: str) -> None:
        """Write a line to stderr and, with the time, to log.txt."""
        sys.stderr.write(("\r\033[K" if sys.stderr.isatty() else "") + text + "\n")
        self.note(text)

    def note(self, text: str) -> None:
        """Write a line, with the time, to log.txt."""
        path = self.folder / "log.txt"
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write(f"{_now()} {text}\n")

    def stage(
        self,
        name: str,
        version: int,
        inputs: Mapping[str, str | Path] | None = None,
        knobs: Mapping[str, Any] | None = None,
        figures: bool = False,
    ) -> "Work":
        """Decide whether a stage must run; `with run.stage(...) as work: if not work.done: ...` runs it.

        Args:
            figures: whether it reads the figures of its inputs too.

        Raises:
            ValueError: an input is missing, or its stage is not finished; if this stage must run, an input file differs
                from what its own stage wrote.
        """
        stage = Stage(name, version, inputs or {}, knobs or {}, figures)
        digests: dict[str, str | None] = {}
        with self.in_process:
            hashes = FileHashes(self.folder)
            for key, value in stage.inputs.items():
                try:
                    digests[key] = input_digest(self.folder, value, hashes, figures)
                except ValueError as error:
                    raise ValueError(f"stage {name}, input {key}: {error}") from error
            hashes.save()
        identity = identity_of(stage, digests)
        adopt(self.folder / name, identity)
        reason = why(self.folder / name, identity)
        if reason is not None:
            for key, value in stage.inputs.items():
                try:
                    require_intact((self.folder / value if isinstance(value, str) else value).resolve(), self.hashed)
                except ValueError as error:
                    raise ValueError(f"stage {name}, input {key}: {error}") from error
        self.log(f"{name}: done before, nothing changed" if reason is None else f"{name}: {reason}")
        if reason is None:
            made_with = read_ledger(self.folder / name).get("packages", {})
            if other := other_versions(made_with, self.packages):
                self.log(f"{name}: kept, though made under other versions: {other}; delete its folder to make it again")
        return Work(self, stage, identity, reason)

    def stage_at_work(self, name: str) -> "Work":
        """A stage that the holder of this folder has begun, for the stage's own process, which never finishes it."""
        stage = Stage(name, version=0)
        return Work(self, stage, identity_of(stage, {}), "begun by the holder of the folder")


class Work:
    """A stage of an open run: `done`, or to be worked on in `folder` inside a `with`, which finishes it.

    `output` is the folder of the finished stage. `folder` is the same if the stage is done, else the partial folder.
    `tally` counts everything outside shards.
    """

    def __init__(self, run: Run, stage: Stage, identity: dict[str, Any], reason: str | None) -> None:
        self.run, self.stage, self.identity = run, stage, identity
        self.done, self.reason = reason is None, reason
        self.output = run.folder / stage.name
        self.folder = self.output if self.done else partial_of(self.output)
        self.resume = self.folder / "resume"
        self.tally = Tally()
        self.check: Callable[[Tally], None] = lambda total: None
        """Called with the stage's total before its ledger is written; raises ValueError if rows are lost."""
        self.hub: dict[str, str] = {}
        """The commits of what the stage read from the hub, by knob."""

    def __enter__(self) -> Self:
        if not self.done:
            # Shards of other knobs or inputs must not mix with new ones.
            if self.folder.exists() and identity_at_work(self.folder) != self.identity:
                if not is_of_stage(self.folder):
                    raise ValueError(
                        f"{self.folder}: no stage made it, and {self.stage.name} needs its name; move it away"
                    )
                self.run.log(f"{self.stage.name}: unfinished work of other knobs or inputs is dropped")
                shutil.rmtree(move_away(self.folder))
            _tally_path(self.folder, OWN).unlink(missing_ok=True)
            self.clock = _Clock(self.folder / ".stage" / "state.json", self.identity, self.run.packages)
            if other := other_versions(self.clock.packages, self.run.packages):
                self.run.log(f"{self.stage.name}: warning: begun under other versions: {other}")
                self.tally.warnings.append(f"begun under other versions than it was finished with: {other}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.done:
            return
        if error is None:
            self.clock.stop()
            self._finish()
            return
        with contextlib.suppress(OSError):  # of a full disk; the error at hand says more
            self.clock.stop()
        with contextlib.suppress(OSError):
            self.run.log(
                f"{self.stage.name}: stopped after {spell_seconds(self.clock.seconds)} ({type(error).__name__})"
            )

    def shards(self, count: int, name: str, todo: Sequence[int] | None = None) -> Iterator[Shard]:
        """Yield the shards still to be made, in order, with a line of progress.

        A shard is finished once its file and its tally exist. Its tally is written when the caller asks for the next.

        Args:
            todo: their indices, if `unfinished` has looked at the files; reading them all takes a while.
        """
        if todo is None:
            todo = unfinished(self.folder, count, name, self.run.log)
        with Progress(f"{self.folder.stem}: shard", count, count - len(todo)) as progress:
            for index in todo:
                shard = Shard(index, self.folder / name.format(index), Tally())
                shard.path.parent.mkdir(parents=True, exist_ok=True)
                yield shard
                keep_tally(self.folder, name.format(index), shard.tally)
                progress.advance()
                if stop_requested():
                    raise Stopped

    def leave_tally(self) -> None:
        """At the end of a stage's own process, write `tally`; the holder of the folder adds it up."""
        write_json(_tally_path(self.folder, OWN), vars(self.tally))

    def require_left(self) -> None:
        """Check the tally and outputs of a stage's own process that ended with code 0.

        Raises:
            ValueError: no tally, which it leaves last, or no outputs.
        """
        if not _tally_path(self.folder, OWN).is_file():
            raise ValueError(
                f"stage {self.stage.name}: its process ended with code 0 before its work was done; something that it "
                "called ended it, such as sys.exit in a function of yours. Mend that, and run again to go on"
            )
        if not output_files(self.folder):
            raise ValueError(f"stage {self.stage.name}: its process left no file in {self.folder}")

    def _finish(self) -> None:
        outputs = {file: sha256_of(self.folder / file, sync=True) for file in output_files(self.folder)}
        _require_as_made(self.folder, outputs)
        total = _total(self.folder, self.tally)
        self.check(total)
        paths = {name: str(value) for name, value in self.stage.inputs.items()}
        inputs = {name: {"path": paths[name], "digest": digest} for name, digest in self.identity["inputs"].items()}
        ledger = Ledger(
            name=self.stage.name,
            version=self.stage.version,
            fingerprint=hash_of(self.identity),
            knobs=self.identity["knobs"],
            inputs=inputs,
            outputs=outputs,
            sizes={file: (self.folder / file).stat().st_size for file in outputs},
            digest=hash_of(outputs),
            counts={"in": total.rows_in, "out": total.rows_out, "filtered": dict(total.filtered)}
            | ({"halved": total.halved} if total.halved else {}),
            tokens={"sampled": total.sampled, "scored": total.scored, "trained": total.trained},
            seconds=round(self.clock.seconds, 3),
            git_commit=self.run.git_commit,
            started=self.clock.started,
            finished=_now(),
            packages=self.run.packages,
            hub=self.hub,
            warnings=list(dict.fromkeys(total.warnings)),
        )
        write_json(self.folder / LEDGER, ledger)
        into_place(self.output)
        self.folder = self.output
        left_out = "".join(f", {rows} {reason}" for reason, rows in total.filtered.items())
        rows = f" ({total.rows_in} rows in, {total.rows_out} out{left_out})" if total.rows_in or total.rows_out else ""
        self.run.log(f"{self.stage.name}: finished in {spell_seconds(self.clock.seconds)}{rows}")


class _Clock:
    """Adds up a stage's seconds over its resumes. It saves them every 5 seconds; a kill loses no more."""

    def __init__(self, path: Path, identity: dict[str, Any], packages: dict[str, str]) -> None:
        state: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"seconds": 0.0, "started": _now()}
        self.path, self.identity, self.before = path, identity, state["seconds"]
        self.started: str = state["started"]
        self.packages: dict[str, str] = state.get("packages", packages)
        """Package versions when the stage was begun."""
        self.began = time.monotonic()
        self._save()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._tick, daemon=True)
        self.thread.start()

    @property
    def seconds(self) -> float:
        return float(self.before + time.monotonic() - self.began)

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join()
        self._save()

    def _tick(self) -> None:
        while not self.stopped.wait(5.0):
            with contextlib.suppress(OSError):  # a full disk: the work itself will say so
                self._save()

    def _save(self) -> None:
        state = {"identity": self.identity, "seconds": self.seconds, "started": self.started}
        write_json(self.path, state | {"packages": self.packages})


def _total(folder: Path, tally: Tally) -> Tally:
    """The sum of the stage's tally, that of its own process, and its shards'."""
    total = replace(tally, filtered=Counter(tally.filtered))
    for path in sorted((folder / ".stage" / "tallies").rglob("*.json")):
        shard = json.loads(path.read_text(encoding="utf-8"))
        shard.pop("files", None)
        total.filtered.update(shard.pop("filtered"))
        total = replace(total, **{name: getattr(total, name) + number for name, number in shard.items()})
    return total


def _require_as_made(folder: Path, outputs: Mapping[str, str]) -> None:
    """Raise ValueError if a shard's file does not have its tally's digest; the next run makes it again."""
    for tally in sorted((folder / ".stage" / "tallies").rglob("*.json")):
        for file, digest in (_digests(tally) or {}).items():
            if Path(file).parts[0] not in SCRATCH and outputs.get(file) != digest:
                raise ValueError(f"{folder / file}: lost or damaged since it was made; run again to make it again")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
