"""The benchmarks' harness: what a ratio is, what is refused, and where rows go."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import gpu
import harness
import run
from harness import Row


def row(name: str, ratio: float = 2.0, **changes: object) -> Row:
    given: dict[str, object] = {"low": 1.9, "high": 2.1, "target": None, "peer": "them", "command": "python x.py"}
    return Row(name, ratio, **(given | changes))  # type: ignore[arg-type]


def test_a_ratio_is_the_median_of_rounds_and_its_interval_holds_it() -> None:
    """Theirs takes 2, 3 and 4 seconds where ours takes 1: the median is 3, even of slow rounds."""
    assert harness.ratio_of([2, 3, 4], [1, 1, 1]) == (3.0, 2.0, 4.0)
    assert harness.ratio_of([20, 3, 40], [10, 1, 10])[0] == 3.0


def test_both_sides_run_in_every_round_and_their_order_turns() -> None:
    ran: list[str] = []
    seconds = harness.timed([lambda: ran.append("a"), lambda: ran.append("b")], rounds=3)
    assert "".join(ran) == "ab" + "ab" + "ba" + "ab"
    assert seconds.shape == (3, 2)


def test_sides_that_differ_are_not_timed() -> None:
    assert harness.equal([1.0, 2.0], [1.0, 2.5], 0.6, "rewards") == 0.5
    with pytest.raises(ValueError, match=r"rewards: the sides differ by 0.5, more than 0.1; nothing is timed"):
        harness.equal([1.0, 2.0], [1.0, 2.5], 0.1, "rewards")
    with pytest.raises(ValueError, match="rewards: the sides differ by nan"):
        harness.equal([np.nan], [1.0], 0.1, "rewards")
    with pytest.raises(ValueError, match=r"shapes \(1,\) and \(2,\)"):
        harness.equal([1.0], [1.0, 2.0], 0.1, "rewards")


def test_a_row_replaces_the_one_of_its_name_and_the_table_is_written_anew(tmp_path: Path) -> None:
    results, page = tmp_path / "results.json", tmp_path / "page.md"
    page.write_text(f"before\n{harness.BEGIN}\nold\n{harness.END}\nafter\n")
    harness.record([row("one"), row("two", target=3.0)], "first", results, page)
    harness.record([row("three", 12.0, unit="s", target=20.0, at_most=True)], "second", results, page)
    harness.record([row("one", 5.0)], "first", results, page)
    rows = json.loads(results.read_text())["rows"]
    assert [(r["name"], r["ratio"], r["script"]) for r in rows] == [
        ("one", 5.0, "first"),
        ("two", 2.0, "first"),
        ("three", 12.0, "second"),
    ]
    assert {"name", "ratio", "low", "high", "target", "peer", "command", "machine"} <= rows[0].keys()
    assert "1 thread used" in rows[0]["machine"]
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| one | 5.00x | 1.90-2.10 |  | them | `python x.py` |" in text
    assert "| two | 2.00x | 1.90-2.10 | >= 3.00x, missed | them |" in text
    assert "| three | 12.00 s | 1.90-2.10 | <= 20.00 s | them |" in text


def test_a_page_without_a_place_for_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks the lines"):
        harness.with_table("nothing here", [])


def test_every_benchmark_is_found_and_the_runner_is_none_of_them() -> None:
    assert {"run", "harness"}.isdisjoint(run.scripts())


@pytest.mark.parametrize(
    "script", ["scoring", "sampling", "refill", "pipeline", "overhead", "training", "packing", "selection"]
)
def test_a_benchmark_finds_both_sides_equal_and_gives_its_rows(script: str) -> None:
    """Small: the figures mean nothing here, but every side has run."""
    rows = list(importlib.import_module(script).rows(quick=True))
    assert len({row.name for row in rows}) == len(rows) > 0
    for row in rows:
        assert 0 < row.low <= row.ratio <= row.high < np.inf
        assert (harness.BENCH.parent / row.command.split()[1]).exists()


def test_the_rows_of_a_gpu_are_refused_without_one_and_their_code_runs_anywhere() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(harness.Unable, match="needs a CUDA device"):
            list(gpu.rows(quick=True))
    small = gpu.seven_billion(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    size = gpu.Size(small, device="cpu", prompt=24, answer=(4, 12), answers=6, n=3, new=4, rounds=2)
    assert [row.name.split(",")[0] for row in gpu.measured(size)] == ["7B scoring", "7B scoring", "7B sampling"]
