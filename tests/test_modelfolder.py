"""A model's folder read without torch: headers of safetensors, special tokens, what must not lie in it."""

import json
from pathlib import Path

import numpy as np
import pytest

from dpalign.run.modelfolder import check_weights, pickles_in, read_header, special_tokens, template_of, vocabulary


def safetensors(path: Path, tensors: dict[str, tuple[str, list[int], int]]) -> Path:
    """A file written by hand: name -> (type, shape, bytes)."""
    header, place = {}, 0
    for name, (kind, shape, size) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * place)
    return path


def test_parameters_bytes_and_types_are_read_from_the_header(tmp_path: Path) -> None:
    """3 x 4 floats and 5 half floats: 17 parameters in 58 bytes of tensors."""
    path = safetensors(tmp_path / "model.safetensors", {"a": ("F32", [3, 4], 48), "b": ("BF16", [5], 10)})
    (tmp_path / "config.json").write_text("{}")
    found = check_weights(tmp_path)
    assert (found.tensors, found.parameters, found.types) == (2, 17, ("BF16", "F32"))
    assert found.bytes == path.stat().st_size
    assert found.files == ("model.safetensors",)


def test_the_header_agrees_with_the_library_that_wrote_it(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    tensors = {"x": np.zeros((2, 3), np.float32), "y": np.zeros(7, np.int64), "z": np.zeros((), np.float16)}
    numpy.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "a.safetensors")
    assert {name: (one["dtype"], one["shape"]) for name, one in header.items()} == {
        "x": ("F32", [2, 3]),
        "y": ("I64", [7]),
        "z": ("F16", []),
    }


@pytest.mark.parametrize("change", [-1, -60, 1])
def test_a_file_of_another_length_than_its_header_says_is_refused(change: int, tmp_path: Path) -> None:
    path = safetensors(tmp_path / "a.safetensors", {"a": ("F32", [4, 4], 64)})
    whole = path.read_bytes()
    path.write_bytes(whole[:change] if change < 0 else whole + b"\0")
    with pytest.raises(ValueError, match=rf"a.safetensors: {len(whole) + change} bytes, where its header says"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 8 + b"{}", (2).to_bytes(8, "little") + b"[]", b"\x80\x04"])
def test_what_is_no_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a.safetensors: not a (whole|readable) safetensors file"):
        read_header(path)


def test_a_tensor_whose_bytes_do_not_fit_its_shape_is_refused(tmp_path: Path) -> None:
    path = safetensors(tmp_path / "a.safetensors", {"a": ("F32", [4, 4], 60)})
    with pytest.raises(ValueError, match=r"a: 60 bytes for F32 of shape \[4, 4\]"):
        read_header(path)


def test_an_index_must_fit_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    safetensors(tmp_path / "one.safetensors", {"a": ("F32", [1], 4)})
    safetensors(tmp_path / "two.safetensors", {"b": ("F32", [2], 8)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert check_weights(tmp_path).parameters == 3
    index.write_text(json.dumps({"weight_map": {"a": "two.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(ValueError, match=r"says that two.safetensors holds a; it does not"):
        check_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "three.safetensors"}}))
    with pytest.raises(ValueError, match=r"names 'three.safetensors', which is not in its folder"):
        check_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../one.safetensors"}}))
    with pytest.raises(ValueError, match=r"names '../one.safetensors'"):
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
