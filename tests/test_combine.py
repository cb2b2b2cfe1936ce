"""`dpa combine`: a t-interval over seeds is of one recipe."""

from pathlib import Path
from typing import Any

import pytest

import fake_run
from dpalign.measure.summary import Summary
from dpalign.page.combine import combine, read_summary, require_one_recipe
from dpalign.recipe import changed, load
from test_report_page import one_run


def finished(folder: Path, seed: int = 1, **changes: Any) -> Path:
    """A run folder with a small report of a recipe, and no more."""
    (folder / "report").mkdir(parents=True)
    text = changed(load(fake_run.RECIPE), {"seed": seed, **changes}).to_toml()
    summary = one_run(12, 300, seed).model_copy(update={"recipe_text": text, "title": folder.name})
    (folder / "report" / "summary.json").write_text(summary.model_dump_json())
    return folder


def test_seeds_of_one_recipe_come_on_one_page(tmp_path: Path) -> None:
    page = combine([finished(tmp_path / "a"), finished(tmp_path / "b", seed=2)], tmp_path / "out")
    assert page.read_text().lower().startswith("<!doctype html>")
    summary = Summary.model_validate_json((tmp_path / "out" / "summary.json").read_text())
    seeds = summary.seeds
    assert seeds is not None
    assert (summary.title, seeds.seeds) == ("a", (1, 2))
    each = [read_summary(tmp_path / name).systems["t=2"].figures.objective.value for name in "ab"]
    assert seeds.systems["t=2"]["objective"].values == pytest.approx(each)
    assert [(row.a, row.b) for row in seeds.differences][:2] == [("t=2", "SFT"), ("t=2", "SteerLM")]


def test_runs_of_two_recipes_are_not_combined(tmp_path: Path) -> None:
    runs = [
        finished(tmp_path / "a"),
        finished(tmp_path / "b", seed=2),
        finished(tmp_path / "c", 3, **{"sampling.n": 8}),
    ]
    with pytest.raises(ValueError, match=r"sampling\.n is 4 in .*a/report/summary\.json and 8 in .*c/rep.*json;"):
        combine(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_seed_counts_once_and_a_run_without_a_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed 1 a second time"):
        combine([finished(tmp_path / "a"), finished(tmp_path / "b")], tmp_path / "out")
    with pytest.raises(ValueError, match=r"c/report/summary\.json: missing"):
        combine([tmp_path / "a", tmp_path / "c"], tmp_path / "out")
    with pytest.raises(ValueError, match="at least two seeds"):
        combine([tmp_path / "a"], tmp_path / "out")


def test_only_a_page_of_its_own_is_written_anew(tmp_path: Path) -> None:
    seeds = [finished(tmp_path / "a"), finished(tmp_path / "b", seed=2)]
    page = combine(seeds, tmp_path / "out")
    assert combine(seeds, tmp_path / "out") == page
    for name, text in (("index.html", "my site"), ("summary.json", "{}"), ("figures", None)):
        place = tmp_path / name.partition(".")[0]
        place.mkdir()
        (place / "notes.txt").write_text("may lie there")
        (place / name).mkdir() if text is None else (place / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name}: stands already, and is not of a page that dpa combine wrote"):
            combine(seeds, place)
        assert text is None or (place / name).read_text() == text
        assert sorted(path.name for path in place.iterdir()) == sorted([name, "notes.txt"])
    with pytest.raises(ValueError, match=r"a/report/summary\.json: stands already"):
        combine(seeds, tmp_path / "a" / "report")  # a run's own page is no combined one


def test_seeds_of_one_recipe_may_differ_in_where_they_ran_and_in_what_stands_beside_them(tmp_path: Path) -> None:
    alike = {
        "name": "elsewhere", "threads": 2, "jobs": 2, "launcher": "process", "engines.sampling": "vllm",
        "sampling.rows": 8, "finetune.micro_batch": 4, "compare.systems": ["dpo"], "kernels.liger": True,
    }  # fmt: skip
    runs = [finished(tmp_path / "a"), finished(tmp_path / "b", 2, **alike)]
    require_one_recipe({run: read_summary(run) for run in runs})
