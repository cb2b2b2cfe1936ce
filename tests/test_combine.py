"""`dpa combine`: a t-interval over seeds is of one recipe."""

import json
from pathlib import Path
from typing import Any

import pytest

import fake_run
from dpalign.page.combine import combine, require_one_recipe
from dpalign.recipe import load
from dpalign.recipe.config import changed, to_toml


def finished(folder: Path, **changes: Any) -> Path:
    """A run folder with the recipe that its report keeps, and no more."""
    (folder / "report").mkdir(parents=True)
    text = to_toml(changed(load(fake_run.RECIPE), changes))
    (folder / "report" / "page.json").write_text(json.dumps({"recipe_text": text}))
    return folder


def test_runs_of_two_recipes_are_not_combined(tmp_path: Path) -> None:
    runs = [finished(tmp_path / "a"), finished(tmp_path / "b", seed=2), finished(tmp_path / "c", **{"sampling.n": 8})]
    with pytest.raises(
        ValueError, match=r"two recipes: sampling\.n is 4 in .*a/report/page\.json and 8 in .*c/rep.*json;"
    ):
        combine(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_seeds_of_one_recipe_may_differ_in_where_they_ran_and_in_what_stands_beside_them(tmp_path: Path) -> None:
    alike = {
        "seed": 2, "name": "elsewhere", "threads": 2, "jobs": 2, "launcher": "process", "engines.sampling": "vllm",
        "sampling.rows": 8, "finetune.micro_batch": 4, "compare.systems": ["dpo"], "kernels.liger": True,
    }  # fmt: skip
    require_one_recipe([finished(tmp_path / "a"), finished(tmp_path / "b", **alike)])


def test_a_knob_that_an_older_run_did_not_know_counts_with_its_default(tmp_path: Path) -> None:
    older, newer = finished(tmp_path / "a"), finished(tmp_path / "b", seed=2)
    page = older / "report" / "page.json"
    text = json.loads(page.read_text())["recipe_text"]
    assert "\nmargin = 0.0\n" in text
    page.write_text(json.dumps({"recipe_text": text.replace("\nmargin = 0.0\n", "\n")}))
    require_one_recipe([older, newer])
    stated = finished(tmp_path / "c", **{"preference.margin": 10.0})
    with pytest.raises(ValueError, match=r"preference\.margin is 0\.0 in .* and 10\.0 in"):
        require_one_recipe([older, stated])
