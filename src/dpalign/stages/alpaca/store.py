"""Judgements as they are made: one file that only grows, each line on the disk before the next thing happens.

A judgement is kept under a hash of all that it depends on (`judge.key_of`), so a judge that was killed,
refused or paid for half a benchmark is never asked the same thing twice, by whatever run. A failed
judgement is kept too, since it was paid for; `ask_again` forgets it.
"""

import fcntl
import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from dpalign.data.sources import shorten
from dpalign.stages.alpaca.judge import Judgement

Record = Mapping[str, Any]


class Store:
    """The judgements in a file, one JSON object a line; a line cut short by a kill is the last one, and dropped.

    Raises:
        ValueError: another line that is no judgement: it names the line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        self.again: Counter[str] = Counter()
        """How often a failed judgement was asked for anew, by key."""
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._size = self._sound = 0
        if path.exists():
            self._read()

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def keep(self, key: str, judgement: Judgement, about: Mapping[str, Any]) -> None:
        """Put a judgement on the disk; `about` says of what it is, for readers."""
        record = {
            "key": key,
            "preference": judgement.preference,
            "reason": judgement.reason,
            **about,
            **judgement.details,
        }
        self._append(record)

    def ask_again(self, keys: Iterable[str]) -> int:
        """Forget the failed judgements among these; how many there were."""
        failed = [key for key in dict.fromkeys(keys) if key in self and self.records[key]["preference"] is None]
        for key in failed:
            self._append({"key": key, "again": True})
        return len(failed)

    def _append(self, record: Record) -> None:
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with self._lock:
            self.hold()
            assert self._file is not None
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._take(record)

    def hold(self) -> None:
        """Take the file for this process alone, until `close`; what a kill cut short goes from its end.

        Raises:
            ValueError: another process writes into it, or has since it was read.
        """
        if self._file is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(f"{self.path}: another process keeps judgements in it; wait for it") from None
        if self.path.stat().st_size != self._size:
            file.close()
            raise ValueError(f"{self.path}: another process kept judgements in it meanwhile; run the command again")
        file.truncate(self._sound)
        self._file = file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._size = self._sound = self.path.stat().st_size

    def _take(self, record: Record) -> None:
        if record.get("again"):
            self.records.pop(record["key"], None)
            self.again[record["key"]] += 1
        else:
            self.records[record["key"]] = record

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole, newline, _ = content.rpartition(b"\n")
        self._size, self._sound = len(content), len(whole) + len(newline)
        for number, line in enumerate(whole.split(b"\n") if newline else [], start=1):
            try:
                record = json.loads(line)
                if not record.get("again"):
                    _check(record)
                self._take(record)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                shown = shorten(repr(line.decode(errors="replace")))
                raise ValueError(
                    f"{self.path}, line {number}: no judgement ({error}): {shown}; mend or remove the line"
                ) from error


def _check(record: Record) -> None:
    preference = record["preference"]
    if preference is None:
        if not record["reason"]:
            raise ValueError("neither a preference nor a reason")
    elif not 1 <= float(preference) <= 2:
        raise ValueError(f"preference {preference} is not in 1..2")
