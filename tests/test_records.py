"""Rows on disk, read in part: some rows of many shards, and lists of numbers as tables."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dpalign import rows as records
from dpalign.rows import SCORES, matrix_of, read_rows, read_table, shards, take_rows, write_rows


def three_shards(folder: Path) -> Path:
    """Ten rows, samples 0 to 9, in shards of 4, 0 and 6."""
    for shard, samples in enumerate((range(4), range(0), range(4, 10))):
        rows = [
            {"prompt_id": f"p{i}", "t": 1, "condition_index": 0, "sample": i, "rewards": [i, 2 * i]} for i in samples
        ]
        write_rows(folder / f"part-{shard:05d}.parquet", rows, SCORES)
    return folder


@pytest.mark.parametrize("batch", [1, 3, 4096])
def test_rows_are_taken_in_the_order_asked_for_and_as_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(records, "BATCH", batch)
    folder = three_shards(tmp_path)
    for wanted in ([9, 0, 4, 3, 9], [5], []):
        taken = take_rows(folder, SCORES, ["sample", "rewards"], np.array(wanted, dtype=np.int64))
        assert taken["sample"].to_pylist() == wanted
        assert taken["rewards"].to_pylist() == [[i, 2 * i] for i in wanted]
    assert taken.schema.names == ["sample", "rewards"]


def test_a_shard_without_a_column_that_is_read_is_named(tmp_path: Path) -> None:
    folder = three_shards(tmp_path)
    with pytest.raises(ValueError, match=r"part-00000.parquet: no column 'response' \(it has prompt_id, .*\)"):
        take_rows(folder, records.CANDIDATES, ["response"], np.array([1]))


def test_the_files_that_a_ledger_names_are_read_and_no_others(tmp_path: Path) -> None:
    stage = three_shards(tmp_path / "sample")
    answers = three_shards(tmp_path / "evaluate" / "answers")
    for folder, prefix in ((stage, ""), (answers.parent, "answers/")):
        outputs = {f"{prefix}part-{shard:05d}.parquet": "0" * 64 for shard in range(3)}
        (folder / "ledger.json").write_text(json.dumps({"outputs": outputs}))
    for folder in (stage, answers):
        assert read_table(folder, SCORES).num_rows == 10
        added = folder / "part-00003.parquet"
        shutil.copy(folder / "part-00002.parquet", added)
        for read in (lambda f: read_table(f, SCORES), lambda f: list(read_rows(f, SCORES))):
            with pytest.raises(ValueError, match=r"part-00003\.parquet: .*ledger\.json does not name it"):
                read(folder)
        added.unlink()
        (folder / "part-00001.parquet").unlink()
        with pytest.raises(ValueError, match=r"part-00001\.parquet: missing, and .*ledger\.json names it"):
            take_rows(folder, SCORES, ["sample"], np.array([0]))
    (stage / "ledger.json").write_text('{"what": "of somebody else"}')
    assert len(shards(stage)) == 2


def test_a_list_column_is_read_as_a_table_of_numbers(tmp_path: Path) -> None:
    column = read_table(three_shards(tmp_path), SCORES)["rewards"]
    assert matrix_of(column).tolist() == [[i, 2 * i] for i in range(10)]
    halves = pa.chunked_array([pa.array([[1.5, None]], SCORES.field("rewards").type)])
    np.testing.assert_array_equal(matrix_of(halves), [[1.5, np.nan]])


@pytest.mark.parametrize("odd", [[1.0], None, [1.0, 2.0, 3.0]])
def test_lists_of_unequal_length_are_refused_with_their_row(odd: list[float] | None) -> None:
    column = pa.chunked_array([pa.array([[1.0, 2.0], odd], SCORES.field("rewards").type)])
    with pytest.raises(ValueError, match=rf"row 1: {len(odd or [])} numbers, where row 0 has 2"):
        matrix_of(column)
