"""A model's folder read without torch: headers of safetensors, special tokens, what must not lie in it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dpalign.runs.modelfolder import check_weights, pickles_in, special_tokens, template_of, vocabulary

safetensors = pytest.importorskip("safetensors.numpy")


def write(folder: Path, name: str = "model.safetensors", **tensors: np.ndarray) -> Path:
    (folder / "config.json").write_text("{}")
    safetensors.save_file(tensors, folder / name)
    return folder / name


def test_parameters_bytes_and_types_are_read_from_the_header(tmp_path: Path) -> None:
    """3 x 4 floats and 5 half floats: 17 parameters."""
    path = write(tmp_path, a=np.zeros((3, 4), np.float32), b=np.zeros(5, np.float16))
    weights = check_weights(tmp_path)
    assert (weights.tensors, weights.parameters, weights.types) == (2, 17, ("F16", "F32"))
    assert (weights.bytes, weights.files) == (path.stat().st_size, ("model.safetensors",))


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-1],
        lambda whole: whole + b"\0",
        lambda whole: whole[:20],
        lambda _: b"",
        lambda _: b"\x80\x04",
    ],
    ids=["cut", "too long", "header cut", "empty", "a pickle"],
)
def test_what_is_no_whole_safetensors_is_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = write(tmp_path, a=np.zeros((4, 4), np.float32))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors: "):
        check_weights(tmp_path)


def test_an_index_must_fit_its_files(tmp_path: Path) -> None:
    write(tmp_path, "one.safetensors", a=np.zeros(1, np.float32))
    write(tmp_path, "two.safetensors", b=np.zeros(2, np.float32))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert check_weights(tmp_path).parameters == 3
    for file, problem in (
        ("two.safetensors", r"two.safetensors holds a"),
        ("three.safetensors", r"'three.safetensors'"),
        ("../one.safetensors", r"'../one.safetensors'"),
    ):
        index.write_text(json.dumps({"weight_map": {"a": file, "b": "two.safetensors"}}))
        with pytest.raises(ValueError, match=problem):
            check_weights(tmp_path)


def test_pickles_are_told_by_their_suffix(tmp_path: Path) -> None:
    for name in ("training_args.bin", "optimizer.PT", "model.safetensors", "merges.txt"):
        (tmp_path / name).write_bytes(b"")
    assert pickles_in(tmp_path) == ["optimizer.PT", "training_args.bin"]


def test_special_tokens_are_found_in_every_form_that_tokenizers_write(tmp_path: Path) -> None:
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None}))
    found = special_tokens(tmp_path)
    assert (found.eos, found.pad, found.eos_id) == ("</s>", None, None)
    tokenizer = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 7, "content": "</s>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert special_tokens(tmp_path).eos_id == 7
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer | {"model": {"vocab": [["x", -1.0], ["y", -2.0]]}}))
    assert vocabulary(tmp_path) == {"x": 0, "y": 1, "</s>": 7}


def test_a_chat_template_is_found_where_transformers_finds_it(tmp_path: Path) -> None:
    settings = tmp_path / "tokenizer_config.json"
    assert template_of(tmp_path) is None
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    settings.write_text(json.dumps({"chat_template": named}))
    assert template_of(tmp_path) == "d"
    settings.write_text(json.dumps({"chat_template": "s"}))
    assert template_of(tmp_path) == "s"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert template_of(tmp_path) == "file"
