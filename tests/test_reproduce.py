"""`dpa reproduce`: a run made again from its recipe has the same bytes, and what differs is said in numbers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import MICRO
from dpalign import cli
from dpalign.pipeline.runner import execute
from dpalign.pipeline.steps import steps
from dpalign.recipe import load
from dpalign.runs.differences import difference
from dpalign.runs.ledger import read_ledger


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the world's data alone; read it, do not write into it."""
    return execute(load(MICRO), tmp_path_factory.mktemp("prepared") / "run", until="data")


def test_the_same_recipe_and_seed_give_the_same_bytes(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledgers = [(prepared / name / "ledger.json").read_bytes() for name in ("world", "data")]
    cli.main(["reproduce", str(prepared)])
    assert "2 of 2 stages are identical" in capsys.readouterr().out
    again = prepared.with_name("run-reproduced")
    for name in ("world", "data"):
        assert read_ledger(again / name)["digest"] == read_ledger(prepared / name)["digest"]
    assert [(prepared / name / "ledger.json").read_bytes() for name in ("world", "data")] == ledgers
    assert not (again / "base").exists()


def test_one_stage_is_made_again_from_the_runs_own(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["reproduce", str(prepared), "--stage", "data", "--out", str(tmp_path / "alone")])
    assert "1 of 1 stages are identical" in capsys.readouterr().out
    assert not (tmp_path / "alone" / "world").exists()


def test_what_differs_is_said_by_stage_and_file_and_the_code_is_1(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe that lies in the run is not the one that it was made with."""
    run = Path(shutil.copytree(prepared, tmp_path / "run"))
    recipe = (run / "recipe.toml").read_text()
    assert "\nseed = 1\n" in recipe
    (run / "recipe.toml").write_text(recipe.replace("\nseed = 1\n", "\nseed = 2\n"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["reproduce", str(run), "--until", "data"])
    assert ended.value.code == 1
    said = capsys.readouterr().out
    for words in ("seed 1 -> 2", "input world differs", "ultrafeedback.jsonl", "prompts/part-00000.parquet", "0 of 2"):
        assert words in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}", "--until", "base"], "has not finished base"),
        (["{run}", "--until", "nothing"], "no step is called 'nothing'"),
        (["{run}", "--out", "{run}/again"], "lies in the run itself"),
        (["{run}/data"], "no run; it has no recipe.toml"),
        (["{run}", "--until", "data", "--stage", "data"], "not allowed with"),
    ],
)
def test_what_cannot_be_made_again_is_refused_with_code_2(
    prepared: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    before = sorted(prepared.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["reproduce", *(word.format(run=prepared) for word in words)])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(prepared.rglob("*")) == before


@pytest.mark.slow
def test_the_whole_loop_gives_the_same_bytes_twice(micro_run: Path, tmp_path: Path) -> None:
    cli.main(["reproduce", str(micro_run), "--out", str(tmp_path / "again")])
    compared = [step.name for step in steps(load(MICRO)) if step.name != "report"]
    digests = [[read_ledger(run / name)["digest"] for name in compared] for run in (micro_run, tmp_path / "again")]
    assert digests[0] == digests[1]


# Two files


def tables(folder: Path, *rewards: list[list[float]]) -> list[Path]:
    paths = [folder / f"{n}.parquet" for n in range(len(rewards))]
    for path, of_file in zip(paths, rewards, strict=True):
        names = [f"p{i}" for i in range(len(of_file))]
        pq.write_table(pa.table({"prompt_id": names, "rewards": of_file}), path)
    return paths


def test_parquet_files_differ_by_rows_and_by_the_largest_number(tmp_path: Path) -> None:
    one, two, more = tables(tmp_path, [[1.0, 2.0], [3.0]], [[1.0, 2.0], [3.5]], [[1.0], [2.0], [3.0]])
    assert difference(one, two) == "rewards: 1 of 2 rows, by at most 0.5"
    assert difference(one, more) == "3 rows for 2"


def test_json_differs_by_values_and_not_by_the_clock(tmp_path: Path) -> None:
    one = {"figures": [1.0, {"x": 2}], "name": "a", "seconds": 3.5}
    other = {"figures": [1.25, {"x": 2}], "name": "b", "seconds": 9.0}
    for path, content in ((tmp_path / "one.json", one), (tmp_path / "two.json", other)):
        path.write_text(json.dumps(content))
    assert difference(tmp_path / "one.json", tmp_path / "two.json") == (
        "2 of 3 values, numbers by at most 0.25; the first is figures[0]"
    )
    (tmp_path / "two.json").write_text(json.dumps(one | {"seconds": 4.0}))
    assert difference(tmp_path / "one.json", tmp_path / "two.json") == ""


def safetensors(path: Path, **tensors: tuple[str, list[int], bytes]) -> Path:
    """A file of tensors, each with its type, shape and bytes."""
    header, start = {}, 0
    for name, (kind, shape, content) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, start + len(content)]}
        start += len(content)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(content for *_, content in tensors.values()))
    return path


def test_weights_differ_by_their_numbers_in_bfloat16_too(tmp_path: Path) -> None:
    """One float32 tensor, and one of two bfloat16 numbers: 1.0, and 2.0 or 3.0."""
    files = [
        safetensors(
            tmp_path / f"{high}.safetensors",
            a=("F32", [2], np.float32([1, 2]).tobytes()),
            b=("BF16", [2], np.uint16([0x3F80, high]).tobytes()),
        )
        for high in (0x4000, 0x4040)
    ]
    assert difference(*files) == "1 of 2 tensors, by at most 1"


@pytest.mark.parametrize(
    ("one", "two", "said"),
    [
        (("I16", [2], [1, 256]), ("I16", [2], [1, 259]), "1 of 1 tensors, by at most 3"),
        (("I16", [2, 3], [0] * 6), ("I16", [3, 2], [0] * 6), "1 tensors for 1, or other shapes or types"),
        (("I16", [2], [0, 1]), ("F16", [2], [0, 1]), "1 tensors for 1, or other shapes or types"),
        (("F8_E4M3", [4], [0, 1]), ("F8_E4M3", [4], [0, 2]), "1 of 1 tensors"),
    ],
)
def test_tensors_differ_by_shape_type_and_number(one: tuple, two: tuple, said: str, tmp_path: Path) -> None:
    files = [
        safetensors(tmp_path / f"{n}.safetensors", a=(kind, shape, np.int16(numbers).tobytes()))
        for n, (kind, shape, numbers) in enumerate((one, two))
    ]
    assert difference(*files) == said


@pytest.mark.parametrize(("one", "two"), [([], {}), ({"a": []}, {}), ({"a": {}}, {"a": []}), ({"a": 1}, {"a": True})])
def test_json_differs_by_what_is_empty_and_by_type(one: object, two: object, tmp_path: Path) -> None:
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for path, content in zip(files, (one, two), strict=True):
        path.write_text(json.dumps(content))
    assert difference(*files) != ""
    assert difference(files[0], files[0]) == ""


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (one,) = tables(tmp_path, [[1.0]])
    (tmp_path / "cut.parquet").write_bytes(one.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"cut\.parquet"):
        difference(one, tmp_path / "cut.parquet")
