"""A model is loaded whole or not at all: tensors that lack, that are another model's, and models of the other kind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from conftest import MICRO
from dpalign import cli
from dpalign.dial.doctor.model import examine
from dpalign.dial.server.transformers_engine import BatchingGenerator
from dpalign.engines.knobs import Engines
from dpalign.engines.loading import load_whole, require_tensors
from dpalign.engines.transformers_engine import TransformersEngine
from dpalign.engines.vllm_engine import Vllm
from dpalign.recipe import load
from dpalign.recipe.localfiles import require_models
from dpalign.rewards.model import load_classifier
from dpalign.rewards.score import ModelScorer
from dpalign.rows import HEADS as LABELLED
from dpalign.train.sft import finetune
from test_engines import stand_in
from test_scoring import HEADS, write_classifier
from trainings import SMALL, context

Tensors = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def reward(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tiny_folder, tmp_path_factory.mktemp("reward") / "model")


def altered(folder: Path, out: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy with other tensors."""
    shutil.copytree(folder, out)
    save_file(change(load_file(folder / "model.safetensors")), out / "model.safetensors", metadata={"format": "pt"})
    return out


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: x for key, x in tensors.items() if key != name}


def renamed(tensors: Tensors) -> Tensors:
    return {f"old.{name}": x for name, x in tensors.items()}


def cut(tensors: Tensors) -> Tensors:
    return tensors | {UP: tensors[UP][:-1].contiguous()}


def with_more(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.zeros(2)}


POLICY_READERS: dict[str, Callable[[Path], object]] = {
    "sampling": lambda folder: TransformersEngine(str(folder), rows=2),
    "serving": lambda folder: BatchingGenerator(str(folder), rows=2),
    "headers": lambda folder: require_tensors("policy", str(folder)),
}
FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "renamed": (renamed, r"lack lm_head\.weight, model\.embed_tokens\.weight, .* and \d+ more"),
    "one gone": (without(UP), rf"lack {UP}, which config\.json asks for"),
    "cut": (cut, rf"{UP} is of shape \[63, 32\], and config\.json asks for \[64, 32\]"),
    "a head of others": (with_more("score.weight"), r"hold score\.weight, which a MistralForCausalLM"),
}


@pytest.mark.parametrize("reader", POLICY_READERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_policy_with_other_tensors_than_its_configuration_says_is_refused(
    fault: str, reader: str, tiny_folder: Path, tmp_path: Path
) -> None:
    change, told = FAULTS[fault]
    folder = altered(tiny_folder, tmp_path / "policy", change)
    with pytest.raises(ValueError, match=told) as error:
        POLICY_READERS[reader](folder)
    assert str(error.value).startswith(f"{folder}: ")
    assert {one.check for one in examine(folder) if one.level == "bad"} >= {"weights"}


def test_a_policy_is_not_trained_from_weights_that_are_not_all_there(
    tiny_folder: Path, tmp_path: Path, tokens: Any
) -> None:
    folder = altered(tiny_folder, tmp_path / "start", without(UP))
    with pytest.raises(ValueError, match=rf"start: its weights lack {UP}"):
        finetune(context(tmp_path, SMALL, folder, tokens), tiny.CHATS)
    assert not (tmp_path / "model").exists()


def test_an_output_that_is_tied_may_lack_and_rotary_buffers_may_be_there(tiny_folder: Path, tmp_path: Path) -> None:
    assert "lm_head.weight" not in load_file(tiny_folder / "model.safetensors")
    folder = altered(tiny_folder, tmp_path / "old", with_more("model.layers.0.self_attn.rotary_emb.inv_freq"))
    require_tensors("policy", str(folder))
    assert load_whole("policy", str(folder)).num_parameters() == load_whole("policy", str(tiny_folder)).num_parameters()


def open_reward(folder: Path) -> ModelScorer:
    return ModelScorer(str(folder), HEADS, template="world-v1", batch_tokens=100, dtype="float32")


def test_a_reward_model_without_its_head_is_refused_and_doctor_says_so(reward: Path, tmp_path: Path) -> None:
    folder = altered(reward, tmp_path / "headless", without("score.weight"))
    with pytest.raises(ValueError, match=r"headless: its weights lack score\.weight"):
        open_reward(folder)
    (found,) = (one for one in examine(folder) if one.level == "bad")
    assert found.check == "weights"
    assert "score.weight" in found.text
    assert all(one.level == "ok" for one in examine(reward))


def test_a_reward_model_may_hold_an_output_that_it_does_not_read_but_no_more_layers(
    reward: Path, tmp_path: Path
) -> None:
    open_reward(altered(reward, tmp_path / "with-output", with_more("lm_head.weight")))
    more = altered(reward, tmp_path / "deeper", with_more("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"deeper: its weights hold model\.layers\.2\.mlp\.up_proj\.weight"):
        open_reward(more)


def test_only_a_reward_model_in_training_gets_a_new_head(tiny_folder: Path, tmp_path: Path, tokens: Any) -> None:
    model = load_classifier(context(tmp_path, SMALL, tiny_folder, tokens), HEADS)
    assert model.score.weight.shape == (2, 32)
    start = altered(tiny_folder, tmp_path / "start", without(UP))
    with pytest.raises(ValueError, match=rf"start: its weights lack {UP}, which"):
        load_classifier(context(tmp_path, SMALL, start, tokens), HEADS)


def test_a_reward_model_is_no_policy_and_a_policy_no_reward_model(reward: Path, tiny_folder: Path) -> None:
    for read in POLICY_READERS.values():
        with pytest.raises(
            ValueError, match=r"a reward model \(MistralForSequenceClassification in config\.json\)"
        ) as e:
            read(reward)
        assert str(reward) in str(e.value)
    with pytest.raises(ValueError, match=r"a policy \(MistralForCausalLM in config\.json\), where a reward model"):
        open_reward(tiny_folder)


def test_a_policy_is_not_exported_as_a_reward_model(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    form = ("--form", "RLHFlow/DPA-v1-Mistral-7B", "--reward-model", str(tiny_folder))
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(tiny_folder), "--out", str(tmp_path / "out"), *form])
    assert ended.value.code == 2
    assert f"{tiny_folder}: a policy (MistralForCausalLM in config.json)" in capsys.readouterr().err


def test_a_recipe_that_names_a_model_of_the_other_kind_is_refused_before_any_work(
    reward: Path, tiny_folder: Path
) -> None:
    heads = ["--rewards.rm.heads", json.dumps(LABELLED)]
    for knob, folder, more in (
        ("sft.checkpoint", reward, []),
        ("model.base", reward, []),
        ("rewards.rm.model", tiny_folder, heads),
    ):
        recipe = load(MICRO, [f"--{knob}", str(folder), *more])
        with pytest.raises(ValueError, match=rf"{knob} is .*{folder}: a (policy|reward model) \(Mistral"):
            require_models(recipe)


def test_vllm_is_not_started_on_weights_that_are_not_all_there(
    reward: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(**_: object) -> None:
        raise AssertionError("it was started")

    stand_in(monkeypatch, start)
    policy = altered(tiny_folder, tmp_path / "policy", without(UP))
    headless = altered(reward, tmp_path / "headless", without("score.weight"))
    for folder, classifies, told in ((policy, False, f"lack {UP}"), (headless, True, r"lack score\.weight")):
        with pytest.raises(ValueError, match=f"{folder}: its weights {told}"):
            Vllm(str(folder), Engines(), rows=1, prompt_tokens=64, max_new_tokens=32, classifies=classifies)


def test_an_adapter_and_a_damaged_file_are_named(tiny_folder: Path, tmp_path: Path) -> None:
    adapter, short = (Path(shutil.copytree(tiny_folder, tmp_path / name)) for name in ("adapter", "short"))
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_folder)}))
    (short / "model.safetensors").write_bytes(tiny.weights(tiny_folder)[:-8])
    for folder, told in ((adapter, "an adapter; merge it"), (short, "a weights file is damaged")):
        with pytest.raises(ValueError, match=f"{folder}: {told}"):
            TransformersEngine(str(folder), rows=2)
