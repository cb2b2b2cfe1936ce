"""Names on the hub: pinned by a revision, fetched as that, and recorded by the commit that they stood for."""

from pathlib import Path
from typing import Any

import pytest

from conftest import MICRO
from dpalign.data.sources import located, read_source
from dpalign.dial.export.source import hub_name
from dpalign.pipeline.runner import take
from dpalign.recipe import load
from dpalign.recipe.localfiles import hub_commits
from dpalign.runs.folder import Run
from dpalign.runs.hub import commit_of, local_model, revised
from dpalign.runs.ledger import read_ledger
from dpalign.stages.stage import Job, Step, stage

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "89abcdef0123456789abcdef0123456789abcdef"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache of one model and one data set."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for repository in ("models--lab--policy", "datasets--lab--rows"):
        stand_for(tmp_path / "hub", repository, "main", COMMIT)
    return tmp_path / "hub"


def stand_for(cache: Path, repository: str, revision: str, commit: str) -> None:
    path = cache / repository / "refs" / revision
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(commit)


def test_a_revision_stands_behind_an_at_sign_and_paths_have_none(tmp_path: Path) -> None:
    assert revised("lab/policy@v1.0") == ("lab/policy", "v1.0")
    assert revised("lab/policy@refs/pr/2") == ("lab/policy", "refs/pr/2")
    assert revised("lab/policy") == ("lab/policy", None)
    (tmp_path / "model@2").mkdir()
    assert revised(f"{tmp_path}/model@2") == (f"{tmp_path}/model@2", None)
    assert revised("/nowhere/model@2") == ("/nowhere/model@2", None)
    assert hub_name("lab/policy@v1.0") == "lab/policy"


def test_a_pinned_model_is_loaded_from_its_snapshot(cache: Path) -> None:
    """The hub is not reached: the cache has the snapshot of one revision, and no other."""
    snapshot = cache / "models--lab--policy" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert Path(local_model(f"lab/policy@{COMMIT}")) == snapshot
    assert local_model("lab/policy") == "lab/policy"
    with pytest.raises(ValueError, match=r"lab/policy@v9: not fetched from the hub"):
        local_model("lab/policy@v9")


def test_a_pinned_data_set_is_asked_for_at_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def splits(name: str, revision: str | None = None) -> list[str]:
        asked.append((name, revision))
        return ["train", "test"]

    def rows(name: str, split: str, revision: str | None = None) -> list[dict[str, str]]:
        asked.append((name, revision, split))
        return [{"prompt": "Why?"}]

    monkeypatch.setattr(datasets, "get_dataset_split_names", splits)
    monkeypatch.setattr(datasets, "load_dataset", rows)
    assert located("lab/rows@v2", ("test",)) == ("lab/rows@v2", "test")
    assert located("lab/rows@v2:train", ("test",)) == ("lab/rows@v2", "train")
    assert [row.values for row in read_source("lab/rows@v2", "test")] == [{"prompt": "Why?"}]
    assert asked == [("lab/rows", "v2"), ("lab/rows", "v2", "test")]


def test_a_name_stands_for_the_commit_in_the_cache(cache: Path, tmp_path: Path) -> None:
    stand_for(cache, "models--lab--policy", "v2", OTHER)
    assert commit_of("lab/policy", "model") == COMMIT
    assert commit_of("lab/policy@v2", "model") == OTHER
    assert commit_of(f"lab/policy@{OTHER}", "model") == OTHER
    assert commit_of("lab/rows", "dataset") == COMMIT
    assert commit_of("lab/rows", "model") is None
    assert commit_of(str(tmp_path), "model") is None
    knobs = {"model.base": "lab/policy@v2", "data.rows": ["lab/rows:train", "mine.jsonl"], "sft.checkpoint": ""}
    assert hub_commits(knobs) == {"model.base": OTHER, "data.rows[0]": COMMIT}


def test_a_ledger_names_the_commits_and_a_name_that_has_moved_is_said_but_redoes_nothing(
    cache: Path, tmp_path: Path
) -> None:
    @stage(reads=lambda r: (r.model.base,), heavy=False)
    def reading(job: Job) -> None:
        (job.out / "made.txt").write_text("made")

    recipe = load(MICRO, ["--model.base", "lab/policy"])
    for commit in (COMMIT, OTHER):
        stand_for(cache, "models--lab--policy", "main", commit)
        with Run.open(tmp_path / "run", None, {"git_commit": None}) as run:
            take(recipe, run, Step("reading", reading))
        assert read_ledger(tmp_path / "run" / "reading")["hub"] == {"model.base": COMMIT}
        assert (OTHER in (tmp_path / "run" / "log.txt").read_text()) == (commit == OTHER)
