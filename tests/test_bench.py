"""The benchmarks' harness: what a ratio is, what is refused, and where rows go."""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gpu
import gpu_all
import gpu_training
import harness
import run
from conftest import RECIPES
from dpalign.recipe import load
from gpu_all import Part
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


def test_the_updates_of_a_card_run_anywhere_and_the_trainer_finds_the_bare_loops_loss() -> None:
    size = gpu.tiny()
    rows = [*gpu.kernel(size), *gpu_training.update(gpu_training.LORA, size), *gpu_training.trainer(size)]
    rows += gpu_training.update(gpu_training.FULL, size)
    assert len({row.name for row in rows}) == len(rows) == 9
    assert [row.unit for row in rows[2:5]] == ["tokens/s", "%", "GiB"]
    assert all(0 < row.low <= row.ratio <= row.high < np.inf for row in rows)


def test_packed_conversations_that_see_each_other_are_refused() -> None:
    """The mean loss would not tell: random weights find every token as unlikely."""
    size = gpu.tiny()
    (row, _), model = gpu_training.rows_of(size), gpu_training.trainable(gpu_training.FULL, size)
    assert len(list(row.apart())) > 2
    assert sum(one.ids.shape[1] for one in row.apart()) == size.context
    assert gpu_training.seeing_each_other(model, row, size) < 0.01

    def without_positions(input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool) -> Any:
        return model(input_ids=input_ids, use_cache=use_cache)

    with pytest.raises(ValueError, match=r"packed and each conversation alone: the sides differ by 0\.5"):
        gpu_training.seeing_each_other(without_positions, row, size)  # type: ignore[arg-type]


def test_a_model_has_as_many_layers_as_fit_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral-7B takes 18 bytes a weight when all are trained: 31 layers on 140 GiB, 16 on 79, none on 8."""
    size = gpu.Size(gpu.seven_billion())
    for gib, kind, layers in (
        (139.8, gpu_training.FULL, 31),
        (79.2, gpu_training.FULL, 16),
        (79.2, gpu_training.LORA, 32),
        (22.1, gpu_training.LORA, 19),
    ):
        card = type("Card", (), {"total_memory": gib * 2**30})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, card=card: card)
        assert gpu_training.fitted(size, kind).config.num_hidden_layers == layers
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Card", (), {"total_memory": 8 * 2**30}))
    with pytest.raises(harness.Unable, match="8 GiB"):
        gpu_training.fitted(size, gpu_training.FULL)


def test_rows_of_another_machine_are_taken_over_and_those_of_a_test_are_not(tmp_path: Path) -> None:
    results, page, file = tmp_path / "results.json", tmp_path / "page.md", tmp_path / "gpu.json"
    page.write_text(f"{harness.BEGIN}\n{harness.END}\n")
    harness.record([row("one")], "first", results, page)
    measured = {**vars(row("7B scoring", 3.0)), "script": "gpu", "machine": "NVIDIA H200"}
    file.write_text(json.dumps({"small": False, "rows": [measured]}))
    assert harness.take(file, results, page) == ["7B scoring"]
    assert [one["name"] for one in json.loads(results.read_text())["rows"]] == ["one", "7B scoring"]
    assert "\nNVIDIA H200.\n" in page.read_text()
    file.write_text(json.dumps({"small": True, "rows": [measured | {"ratio": 9.0}]}))
    with pytest.raises(ValueError, match="--small"):
        harness.take(file, results, page)
    assert "9.00x" not in page.read_text()


def test_a_part_that_lacks_something_breaks_or_takes_too_long_says_so_and_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "torch.py").write_text("import time; time.sleep(1); raise RuntimeError('no kernel image')\n")
    monkeypatch.setenv("PYTHONPATH", f"{broken}{os.pathsep}{Path(gpu_all.ROOT) / 'src'}")
    parts = [
        Part("attention", 60, ("numpy", "no_such_package")),
        Part("scoring", 60),
        Part("sampling", 0.02),
        Part(gpu_all.RUN, 3),
    ]
    results = gpu_all.measure(parts, small=True, out=tmp_path)
    assert [result.state for result in results] == ["missing", "failed", "out of time", "skipped"]
    assert results[0].reason == "no_such_package"
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["machine"]["torch"] == "RuntimeError: no kernel image"
    assert [part["name"] for part in content["parts"]] == ["attention", "scoring", "sampling", "smol"]


def test_a_run_on_a_card_is_broken_off_in_time_and_says_where_it_goes_on(tmp_path: Path) -> None:
    end = time.monotonic() + gpu_all.SPARED + 1
    folder = tmp_path / "run"
    with pytest.raises(TimeoutError) as late:
        list(gpu_all.run(True, tmp_path, end))
    assert time.monotonic() < end
    done = ", ".join(sorted(path.parent.name for path in folder.glob("*/ledger.json"))) or "none"  # as fast as it is
    assert "report" not in done
    assert f"finished: {done}; {folder} goes on" in str(late.value)


def test_weights_that_are_not_here_are_named_and_not_fetched(tmp_path: Path) -> None:
    gpu_all.require_weights(str(tmp_path))
    with pytest.raises(harness.Unable, match="HuggingFaceTB/no-such-model"):
        gpu_all.require_weights("HuggingFaceTB/no-such-model")


def test_what_makes_a_cards_run_larger_are_knobs() -> None:
    assert load(RECIPES / "one-gpu.toml", gpu_all.LARGER).sampling.rows > load(RECIPES / "demo.toml").sampling.rows


def gpu_script(out: Path, *words: str, path: Sequence[Path] = ()) -> tuple[int, dict[str, Any]]:
    """bench/gpu_all.sh at the tiny size: its exit status and gpu.json."""
    surroundings = {"PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    command = ["sh", str(harness.BENCH / "gpu_all.sh"), "--small", "--out", str(out), *words]
    done = subprocess.run(command, env=os.environ | surroundings, check=False)
    return done.returncode, json.loads((out / "gpu.json").read_text())


@pytest.mark.slow
def test_the_script_for_a_card_runs_every_part_small(tmp_path: Path) -> None:
    status, content = gpu_script(tmp_path)
    states = {part["name"]: part["state"] for part in content["parts"]}
    assert list(states) == [part.name for part in gpu_all.PARTS]
    assert states.pop("vllm") == "missing"
    assert set(states.values()) == {"measured"}, content["parts"]
    assert status == 0
    assert len(content["rows"]) == 2 + 2 + 1 + 3 + 3 + 1 + 4
    assert all(row["machine"].endswith(content["machine"]["python"]) for row in content["rows"])
    assert json.loads((tmp_path / "micro-summary.json").read_text())["systems"]
    assert (tmp_path / "micro-index.html").stat().st_size > 10_000


WITHOUT = """
import sys

MISSING = {"datasets", "moocore", "prompt_toolkit", "pydantic", "rich", "trl"}

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in MISSING else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
"""Hides what a lent card's machine has not: as if it were not installed, also to who asks whether it is."""


@pytest.mark.slow
def test_a_machine_without_trl_datasets_and_pydantic_gives_the_parts_that_need_none(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    status, content = gpu_script(tmp_path / "out", "attention", "scoring", "lora", "trainer", "smol", path=[tmp_path])
    assert status == 0, content["parts"]
    states = {part["name"]: part["state"] for part in content["parts"]}
    assert states == {
        **dict.fromkeys(("attention", "scoring", "lora"), "measured"),
        **dict.fromkeys(("trainer", "smol"), "missing"),
    }
    reasons = {part["name"]: part["reason"] for part in content["parts"] if part["state"] == "missing"}
    assert reasons == {
        "trainer": "datasets, pydantic, trl",
        "smol": "moocore, prompt_toolkit, pydantic, rich, datasets, trl",
    }
    assert content["machine"]["packages"]["trl"] == "missing"
    assert content["machine"]["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert len(content["rows"]) == 2 + 2 + 3
