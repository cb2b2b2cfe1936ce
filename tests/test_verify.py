"""Digests are read again: a swapped, altered or missing file is found before use, on export and by `dpa verify`."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dpalign import cli
from dpalign.data.sources import read_source
from dpalign.dial.doctor.model import examine
from dpalign.rows import SCORES, read_rows, read_table, take_rows, write_rows
from dpalign.runs import folder as runs
from dpalign.runs.ledger import FileHashes, read_ledger, sha256_of
from dpalign.runs.verify import require_intact

WEIGHTS = "model/model.safetensors"


def flip(path: Path, place: int = -1) -> None:
    """Alter one byte. Size and time of change stay, as where a disk errs or somebody hides it."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def policies(folder: Path, n: int = 1) -> dict[str, str | None]:
    """Two policies of one size, and answers of the first; each stage's reason to run, None where skipped."""
    reasons = {}
    with runs.Run.open(folder, "", {}) as run:
        for name in ("policy-1", "policy-2"):
            with run.stage(name, 1) as work:
                reasons[name] = work.reason
                if not work.done:
                    runs.write_text(work.folder / WEIGHTS, f"the weights of {name}")
                    runs.write_text(work.folder / "model" / "config.json", "{}")
        with run.stage("sample", 1, {"policy": "policy-1"}, {"n": n}) as work:
            reasons["sample"] = work.reason
            if not work.done:
                runs.write_text(work.folder / "answers", f"{n} by [{(folder / 'policy-1' / WEIGHTS).read_text()}]")
    return reasons


# When a stage starts


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (lambda run: flip(run / "policy-1" / WEIGHTS), "altered"),
        (lambda run: swap(run / "policy-1" / WEIGHTS, run / "policy-2" / WEIGHTS), "altered"),
    ],
    ids=["flipped", "swapped"],
)
def test_a_stage_does_not_read_a_policy_that_is_not_as_it_was_written(
    harm: Callable[[Path], None], what: str, tmp_path: Path
) -> None:
    """It names the file and the cure; the policy is then made again, and what was read of it before stays."""
    run = tmp_path / "run"
    policies(run)
    harm(run)
    policies(run)  # sizes are the same, and nothing reads it
    weights = run / "policy-1" / WEIGHTS
    with pytest.raises(ValueError, match=rf"stage sample, input policy: {weights}: {what} .*delete {run}/policy-1 "):
        policies(run, n=2)
    assert (run / "sample" / "answers").read_text() == "1 by [the weights of policy-1]"
    shutil.rmtree(run / "policy-1")
    assert policies(run) == {"policy-1": "new", "policy-2": None, "sample": None}
    assert policies(run, n=2)["sample"] == "n 1 -> 2"


def test_a_file_that_is_altered_in_the_midst_of_a_run_is_found_though_it_was_hashed_before(tmp_path: Path) -> None:
    policies(tmp_path / "run")
    with runs.Run.open(tmp_path / "run", "", {}) as run:
        for reader in ("score-1", "score-2"):
            with run.stage(reader, 1, {"policy": "policy-1"}) as work:
                runs.write_text(work.folder / "scores", "1")
        flip(run.folder / "policy-1" / WEIGHTS)
        with pytest.raises(ValueError, match=r"input policy: .*model\.safetensors: altered"):
            run.stage("score-3", 1, {"policy": "policy-1"})
        run.stage("score-1", 1, {"policy": "policy-1"})  # done, and read by nobody


def test_a_finished_stage_elsewhere_is_checked_too_and_only_in_the_part_that_is_read(tmp_path: Path) -> None:
    policies(tmp_path / "run")
    stage = tmp_path / "run" / "policy-1"
    flip(stage / WEIGHTS)
    require_intact(stage / "model" / "config.json", FileHashes())
    require_intact(tmp_path, FileHashes())  # what no stage wrote
    for read in (stage, stage / "model"):
        with (
            runs.Run.open(tmp_path / "other", "", {}) as run,
            pytest.raises(ValueError, match=r"input policy: .*model\.safetensors: altered since its stage wrote it"),
        ):
            run.stage("sample", 1, {"policy": read})


# dpa verify


def verified(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """The exit code of `dpa verify`, and its lines."""
    capsys.readouterr()
    code = 0
    try:
        cli.main(["verify", str(folder)])
    except SystemExit as ended:
        code = int(str(ended.code))
    return code, capsys.readouterr().out.splitlines()


def test_verify_goes_through_a_run_stage_by_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    policies(run)
    code, lines = verified(run, capsys)
    assert (code, [line.partition(":")[0] for line in lines]) == (0, ["policy-1", "policy-2", "sample"])
    swap(run / "policy-1" / WEIGHTS, run / "policy-2" / WEIGHTS)
    (run / "policy-2" / "model" / "config.json").unlink()
    (run / "policy-2" / "model" / "more").write_text("x")
    flip(run / "sample" / "ledger.json", 60)
    code, lines = verified(run, capsys)
    assert code == 2
    for file, what in (
        (f"policy-1/{WEIGHTS}", "altered"),
        (f"policy-2/{WEIGHTS}", "altered"),
        ("policy-2/model/config.json", "missing"),
        ("policy-2/model/more", "unknown"),
        ("sample/ledger.json", "damaged"),
    ):
        (told,) = (line for line in lines if f"{run / file}: {what}" in line)
        lines.remove(told)
    assert [line.partition(":")[0] for line in lines] == ["policy-1", "policy-2", "sample"]
    code, lines = verified(run / "policy-1", capsys)
    assert (code, len(lines)) == (2, 2)
    assert verified(tmp_path, capsys)[0] == 2  # none of what it knows


# Exports


def policy_stage(tiny_folder: Path, run: Path) -> Path:
    """A finished policy of a tiny model with a dial."""
    pytest.importorskip("trl", reason="training needs the extra dpalign[train]")
    import api_server
    from dpalign.train.contract import write_contract

    with runs.Run.open(run, None, {}) as opened, opened.stage("policy-1", 1) as work:
        shutil.copytree(tiny_folder, work.folder / "model")
        write_contract(work.folder / "model", api_server.CONTRACT)
    return run / "policy-1"


def test_a_flipped_byte_of_a_policy_is_not_exported_and_one_of_an_export_is_found(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, out = policy_stage(tiny_folder, tmp_path / "run"), tmp_path / "mine"
    cli.main(["export", str(stage), "--out", str(out)])
    told = json.loads((out / "dpa.json").read_text())
    assert told["sha256"] == {name: sha256_of(out / name) for name in told["files"]}
    assert told["sha256"]["model.safetensors"] == read_ledger(stage)["outputs"][WEIGHTS]
    assert verified(out, capsys)[0] == 0
    assert {one.level for one in examine(out) if one.check == "files"} == {"ok"}

    flip(stage / WEIGHTS)
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(stage), "--out", str(tmp_path / "again")])
    assert ended.value.code == 2
    assert f"{stage / WEIGHTS}: altered since its stage wrote it" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()

    flip(out / "model.safetensors")
    (out / "more.safetensors").write_bytes(b"")
    code, lines = verified(out, capsys)
    assert (code, len(lines)) == (2, 3)
    assert f"{out / 'model.safetensors'}: altered" in lines[1]
    assert f"{out / 'more.safetensors'}: unknown" in lines[2]
    (files,) = (one for one in examine(out) if one.check == "files")
    assert (files.level, "model.safetensors" in files.text) == ("bad", True)


def test_an_export_from_before_the_digests_is_compared_by_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").write_text("abc")
    (tmp_path / "dpa.json").write_text(json.dumps({"files": {"a": 3}}))
    code, (line,) = verified(tmp_path, capsys)
    assert (code, "no digests" in line) == (0, True)
    (tmp_path / "a").write_text("ab")
    assert verified(tmp_path, capsys)[0] == 2


# Pages of Parquet

ROWS: list[dict[str, Any]] = [
    {"prompt_id": f"{i:016x}", "t": 1, "condition_index": i % 3, "sample": 0, "rewards": [i / 7, 50.0]}
    for i in range(60)
]


def flipped(content: bytes, places: Sequence[int]) -> bytes:
    altered = bytearray(content)
    for place in places:
        altered[place] ^= 1 << place % 8
    return bytes(altered)


def test_no_flipped_bit_of_a_shard_changes_a_row(tmp_path: Path) -> None:
    """In every ninth byte, and wherever the footer may count rows: the rows are the same, or the error names the file.

    60 is written as 0x78 there.
    """
    shard = tmp_path / "part-00000.parquet"
    write_rows(shard, ROWS, SCORES)
    content, rows = shard.read_bytes(), read_table(shard, SCORES)
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    places = {*range(0, len(content), 9), *(i for i in range(footer, len(content)) if content[i] == 0x78)}
    refused = 0
    for place in places:
        shard.write_bytes(flipped(content, [place]))
        told = ""
        try:
            assert read_table(tmp_path, SCORES).equals(rows), f"byte {place} of {len(content)}"
        except ValueError as error:
            told = str(error)
        assert not told or told.startswith(f"{shard}: "), f"byte {place}: {told}"
        refused += bool(told)
    assert refused > len(places) / 2


def test_a_flipped_bit_in_a_page_is_found_however_it_is_read(tmp_path: Path) -> None:
    shard = tmp_path / "part-00000.parquet"
    write_rows(shard, ROWS, SCORES)
    column = pq.ParquetFile(shard).metadata.row_group(0).column(4)  # the rewards themselves
    end = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size
    shard.write_bytes(flipped(shard.read_bytes(), [end - 9]))
    readers: dict[str, Callable[[], object]] = {
        "table": lambda: read_table(shard, SCORES),
        "rows": lambda: list(read_rows(shard, SCORES)),
        "some": lambda: take_rows(shard, SCORES, ["rewards"], np.array([3])),
        "users' own": lambda: list(read_source(str(shard))),
    }
    for name, read in readers.items():
        with pytest.raises(ValueError, match="CRC") as error:
            read()
        assert str(shard) in str(error.value), name
