"""Soups: how a direction becomes weights, and the exact mean of checkpoints that belong together."""

import json
import math
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from dpalign.train.mixtures import mixture_weights
from dpalign.train.soups import bytes_of, mix

AXES = ((1.0, 0.0), (0.0, -1.0))
ENDS = ((1.0, 0.0), (math.sqrt(0.5), -math.sqrt(0.5)))


def at(degrees: float) -> tuple[float, float]:
    return math.cos(math.radians(degrees)), math.sin(math.radians(degrees))


# From a direction to weights


THREE = (at(0), at(-22.5), at(-45))
AXES_OF_THREE = ((1, 0, 0), (0, -1, 0), (0, 0, 1))


@pytest.mark.parametrize(
    ("v_K", "experts", "expected"),
    [
        (at(0), AXES, (1.0, 0.0)),
        (at(-22.5), AXES, (0.7071068, 0.2928932)),  # of (0.9239, -0.3827): 0.9239 / 1.3066 and 0.3827 / 1.3066
        (at(-90), AXES, (0.0, 1.0)),
        (at(0), ENDS, (1.0, 0.0)),
        # v2 = -0.1951 = -a2 * 0.7071 gives a2 = 0.2759; v1 = 0.9808 = a1 + 0.2759 * 0.7071 gives a1 = 0.7857
        (at(-11.25), ENDS, (0.7401085, 0.2598915)),
        (at(-45), ENDS, (0.0, 1.0)),
        ((0.6, -0.8), [(3.0, -4.0)], (1.0,)),  # an expert alone, of any length
        (at(-45), [(5.0, 0.0), (0.0, -0.1)], (0.5, 0.5)),
        (at(-11.25), THREE, (0.5, 0.5, 0.0)),  # midway between two neighbours
        (at(-22.5), THREE, (0.0, 1.0, 0.0)),
        ((2 / 3, -1 / 3, 2 / 3), AXES_OF_THREE, (0.4, 0.2, 0.4)),
        (at(-22.5), [(1.0, 0.0), (0.924, -0.3826)], (0.0, 1.0)),  # written with few digits, 0.01 degrees short
    ],
)
def test_a_direction_becomes_weights_of_its_experts(v_K: Any, experts: Any, expected: Sequence[float]) -> None:
    w_E = mixture_weights(v_K, experts)
    np.testing.assert_allclose(w_E, expected, atol=1e-7)
    assert w_E.sum() == pytest.approx(1.0, abs=1e-11)
    assert [w == 0 for w in w_E] == [w == 0 for w in expected]  # exactly: such an expert is not read at all


def test_a_direction_outside_the_experts_is_refused_with_what_is_nearest() -> None:
    """(0, -1) is 45 degrees outside the arc: its shadow on the near end is (0.5, -0.5), 0.707 away."""
    with pytest.raises(ValueError, match="lies outside") as error:
        mixture_weights((0.0, -1.0), ENDS)
    for part in ("(0, -1)", "(1, 0), (0.7071, -0.7071)", "(0.5, -0.5), 0.707 away"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"direction \(0.7071, 0.7071\) lies outside .* nearest sum is \(0.7071, 0\)"):
        mixture_weights(at(45), AXES)
    with pytest.raises(ValueError, match=r"lies outside .* 0.00\d+ away"):  # more than a rounding of digits
        mixture_weights(at(-22.5), [(1.0, 0.0), at(-22.4)])


@pytest.mark.parametrize(
    ("v_K", "experts", "message"),
    [
        ((1.0, 0.0, 0.0), AXES, r"direction \(1, 0, 0\) of 3 objectives, for experts of 2"),
        ((0.0, 0.0), AXES, r"the direction: \[\[0.0, 0.0\]\]; each needs finite weights"),
        ((1.0, 0.0), ((1.0, 0.0), (0.0, math.nan)), r"the experts' directions: .*nan"),
        ((1.0, 0.0), (), r"the experts' directions: \[\]; give at least one"),
        ((1.0, 0.0), ((1.0, 0.0), (0.0, -1.0, 0.0)), r"the experts' directions: \[\[1.0, 0.0\], \[0.0, -1.0, 0.0\]\]"),
    ],
)
def test_directions_without_finite_weights_by_objective_are_refused(v_K: Any, experts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture_weights(v_K, experts)


# From weights to a checkpoint


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three experts of one architecture and tokenizer, in float32."""
    folder, tokens = tmp_path_factory.mktemp("experts"), tiny.tokenizer()
    return [tiny.write_model(folder / f"expert-{seed}", tokens, seed=seed) for seed in (1, 2, 3)]


@pytest.fixture
def pair(family: Sequence[Path], tmp_path: Path) -> list[Path]:
    """Two experts, to change."""
    return [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in family[:2]]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def cast(folder: Path, dtype: torch.dtype, output: Path) -> Path:
    """The same checkpoint in another type."""
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(output)
    AutoTokenizer.from_pretrained(folder).save_pretrained(output)
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mixture_is_the_mean_in_float32_of_every_tensor_in_the_experts_type(
    family: Sequence[Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    experts = [cast(folder, dtype, tmp_path / folder.name) for folder in family]
    weights = (0.5, 0.3, 0.2)
    mix(experts, weights, tmp_path / "soup")
    mixed, read = tensors(tmp_path / "soup"), [tensors(folder) for folder in experts]
    assert mixed.keys() == read[0].keys()
    assert len(mixed) > 10
    for name, tensor in mixed.items():
        first, second, third = (one[name].float() for one in read)
        expected = (first * 0.5 + second * 0.3 + third * 0.2).to(dtype)
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected), name
    if dtype != torch.float32:  # the test could tell a mean that is computed in the experts' type
        in_type = [one["model.embed_tokens.weight"] for one in read]
        rounded = in_type[0] * 0.5 + in_type[1] * 0.3 + in_type[2] * 0.2
        assert not torch.equal(mixed["model.embed_tokens.weight"], rounded)


def test_all_weight_on_one_expert_gives_its_own_bytes(family: Sequence[Path], tmp_path: Path) -> None:
    for e, weights in enumerate(np.eye(3)):
        mix(family, weights, tmp_path / f"soup-{e}")
        assert tiny.weights(tmp_path / f"soup-{e}") == tiny.weights(family[e])


def test_a_mixture_is_a_plain_checkpoint_that_answers_between_its_experts(pair: list[Path], tmp_path: Path) -> None:
    """Nothing else of the first expert comes along: neither code, nor a contract of directions it was trained on."""
    (pair[0] / "modeling_own.py").write_text("raise SystemExit\n")
    (pair[0] / "dpa.json").write_text("{}\n")
    mix(pair, (0.25, 0.75), tmp_path / "soup")
    plain = {"config.json", "generation_config.json", "model.safetensors"}
    reader = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "soup").iterdir()} == plain | reader
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "soup", dtype="float32")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "soup")
    ids = tokens.apply_chat_template([{"role": "user", "content": "name fox."}], return_dict=False)
    one, two = (AutoModelForCausalLM.from_pretrained(folder, dtype="float32") for folder in pair)
    with torch.no_grad():
        for (name, weight), first, second in zip(
            model.named_parameters(), one.parameters(), two.parameters(), strict=True
        ):
            assert torch.equal(weight, first * 0.25 + second * 0.75), name
        assert torch.isfinite(model(torch.tensor([ids])).logits).all()
    assert bytes_of(tmp_path / "soup") == bytes_of(pair[0]) == len(tiny.weights(pair[0]))


def in_parts(folder: Path, output: Path, size: str) -> Path:
    """The same checkpoint divided into files of at most `size`."""
    AutoModelForCausalLM.from_pretrained(folder, dtype="float32").save_pretrained(output, max_shard_size=size)
    AutoTokenizer.from_pretrained(folder).save_pretrained(output)
    return output


def test_experts_in_several_files_are_mixed_however_they_are_divided(pair: list[Path], tmp_path: Path) -> None:
    divided = [in_parts(pair[0], tmp_path / "a", "40KB"), in_parts(pair[1], tmp_path / "b", "70KB")]
    count = len(list(divided[0].glob("*.safetensors")))
    assert count > len(list(divided[1].glob("*.safetensors"))) > 1
    for experts, files in ((divided, count), ([pair[0], divided[1]], 1), ([divided[0], pair[1]], count)):
        output = tmp_path / f"soup-{experts[0].name}-{experts[1].name}"
        mix(experts, (0.5, 0.5), output)
        assert len(list(output.glob("*.safetensors"))) == files
        read = AutoModelForCausalLM.from_pretrained(output, dtype="float32").state_dict()
        one, two = tensors(pair[0]), tensors(pair[1])
        assert all(torch.equal(read[name], one[name] * 0.5 + two[name] * 0.5) for name in one)
        assert bytes_of(output) == bytes_of(experts[0])


def test_whole_numbers_are_kept_where_equal_and_refused_where_not(pair: list[Path], tmp_path: Path) -> None:
    for folder in pair:
        extra = {"count": torch.tensor([7]), "one": torch.tensor(2.0)}
        save_file(tensors(folder) | extra, folder / "model.safetensors")
    mix(pair, (0.3, 0.7), tmp_path / "soup")
    assert tensors(tmp_path / "soup")["count"].tolist() == [7]
    assert tensors(tmp_path / "soup")["one"].shape == ()
    save_file(tensors(pair[1]) | {"count": torch.tensor([8])}, pair[1] / "model.safetensors")
    with pytest.raises(ValueError, match=r"count of type torch.int64 differs from .*expert-1/model.safetensors") as e:
        mix(pair, (0.3, 0.7), tmp_path / "other")
    assert str(pair[1] / "model.safetensors") in str(e.value)
    assert not (tmp_path / "other").exists()


# What does not go together


def change_json(file: str, key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        told = json.loads((folder / file).read_text())
        table = told
        *above, last = key.split(".")
        for part in above:
            table = table[part]
        if value is None:
            del table[last]
        else:
            table[last] = value
        (folder / file).write_text(json.dumps(told))

    return change


def change_tensor(name: str, made: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        read = tensors(folder)
        new = made(read.pop(name))
        save_file(read | ({} if new is None else {name: new}), folder / "model.safetensors")

    return change


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "file", "told"),
    [
        (change_json("config.json", "rms_norm_eps", 0.5), "config.json", "rms_norm_eps is 0.5, but 1e-06 in"),
        (change_json("config.json", "vocab_size", None), "config.json", "vocab_size is missing, but 400 in"),
        (
            change_json("tokenizer.json", "model.vocab.fox", 3),
            "tokenizer.json",
            "model.vocab.fox is 3, but missing in",
        ),
        (
            change_json("tokenizer_config.json", "eos_token", "<end>"),
            "tokenizer_config.json",
            'eos_token is "<end>", but "</s>" in',
        ),
        (
            lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
            "chat_template.jinja",
            'the text is "{{ messages }}", but "',
        ),
        (
            change_tensor(NORM, lambda old: torch.cat([old, old])),
            "model.safetensors",
            f"the shape of {NORM} is [64], but [32] in",
        ),
        (
            change_tensor(NORM, lambda old: old.bfloat16()),
            "model.safetensors",
            f'the type of {NORM} is "BF16", but "F32" in',
        ),
    ],
)
def test_experts_that_differ_are_refused_with_file_key_and_both_values(
    pair: list[Path], tmp_path: Path, change: Callable[[Path], object], file: str, told: str
) -> None:
    change(pair[1])
    with pytest.raises(ValueError, match="only checkpoints trained from one model go together") as error:
        mix(pair, (0.5, 0.5), tmp_path / "soup")
    assert str(error.value).startswith(f"{pair[1] / file}: {told}")
    assert str(pair[0] / file) in str(error.value)
    assert not (tmp_path / "soup").exists()


@pytest.mark.parametrize("e", [0, 1])
def test_a_tensor_that_one_expert_lacks_is_named_with_both_places(pair: list[Path], tmp_path: Path, e: int) -> None:
    change_tensor(NORM, lambda old: None)(pair[e])
    with pytest.raises(ValueError, match=f"holds {NORM}, which {pair[e]} lacks") as error:
        mix(pair, (0.5, 0.5), tmp_path / "soup")
    assert str(error.value).startswith(str(pair[1 - e]))


def test_traces_of_training_are_no_difference(pair: list[Path], tmp_path: Path) -> None:
    change_json("config.json", "use_cache", False)(pair[1])
    change_json("config.json", "_name_or_path", "elsewhere")(pair[1])
    change_json("tokenizer.json", "truncation", {"max_length": 9})(pair[1])
    mix(pair, (0.5, 0.5), tmp_path / "soup")
    assert (tmp_path / "soup" / "config.json").read_text() == (pair[0] / "config.json").read_text()


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ((0.5,), r"1 weights \[0.5\] for 2 experts"),
        ((0.5, 0.6), r"weights \[0.5, 0.6\] of sum 1.1: a mixture needs weights of 0 or more whose sum is 1"),
        ((1.5, -0.5), r"weights \[1.5, -0.5\] of sum 1"),
        ((math.nan, 1.0), r"weights \[nan, 1.0\]"),
    ],
)
def test_weights_that_are_no_mixture_are_refused(
    family: Sequence[Path], tmp_path: Path, weights: Sequence[float], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        mix(family[:2], weights, tmp_path / "soup")


def test_what_is_no_checkpoint_is_refused_and_nothing_is_overwritten(pair: list[Path], tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    with pytest.raises(ValueError, match="stands already; name a folder to make") as error:
        mix(pair, (0.5, 0.5), kept)
    assert str(kept) in str(error.value)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no folder with config.json and model.safetensors .* merge an adapter") as e:
        mix([pair[0], adapter], (0.5, 0.5), tmp_path / "soup")
    assert str(adapter) in str(e.value)
    whole = pair[1] / "model.safetensors"
    whole.write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable safetensors file") as e:
        mix(pair, (0.5, 0.5), tmp_path / "soup")
    assert str(whole) in str(e.value)


def test_an_index_must_fit_its_files(pair: list[Path], tmp_path: Path) -> None:
    divided = in_parts(pair[0], tmp_path / "a", "40KB")
    index = divided / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    files = sorted(set(told["weight_map"].values()))
    told["weight_map"][NORM] = next(file for file in files if file != told["weight_map"][NORM])
    index.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=f"says that .* holds {NORM}; it does not") as error:
        mix([divided, pair[1]], (0.5, 0.5), tmp_path / "soup")
    assert str(index) in str(error.value)
    told["weight_map"][NORM] = "../model.safetensors"
    index.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"names '../model.safetensors', which is not in its folder"):
        mix([divided, pair[1]], (0.5, 0.5), tmp_path / "soup")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads this process's own memory from /proc")
def test_mixing_holds_a_few_tensors_and_not_the_models(pair: list[Path], tmp_path: Path) -> None:
    """Three experts of 12 tensors of 4 MB: 144 MB to read, and less than 40 MB of memory of its own."""
    experts = [pair[0], pair[1], Path(shutil.copytree(pair[0], tmp_path / "third"))]
    for seed, folder in enumerate(experts):
        made = torch.Generator().manual_seed(seed)
        rows = {f"layer-{i:02d}": torch.rand(1024, 1024, generator=made) for i in range(12)}
        save_file(rows, folder / "model.safetensors", metadata={"format": "pt"})
        del rows

    def own() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) // 1024

    before, peak, done = own(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], own())

    watcher = threading.Thread(target=watch)
    watcher.start()
    mix(experts, (0.2, 0.3, 0.5), tmp_path / "soup")
    done.set()
    watcher.join()
    assert peak[0] > 0
    assert peak[0] - before < 40
