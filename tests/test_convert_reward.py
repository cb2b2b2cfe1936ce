"""`dpa convert-reward`: public multi-head reward models as stock classifiers, against their own forward pass.

The forward passes here are written from the models' published code: the heads read the last token before the padding.
"""

import json
import os
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
)

from dpalign import cli
from dpalign.dial.doctor.model import examine
from dpalign.paper.prompts import render_reward_input
from dpalign.rewards.convert import ARMORM, HELPSTEER, convert
from dpalign.rewards.knobs import RewardTable
from dpalign.rows import HEADS, user_prompt

pytest.importorskip("trl", reason="the tiny tokenizer needs the extra dpalign[train]")

import tiny

ARMORM_GOLDEN = [2.78125, 2.859375, 3.484375, 1.3847656, 1.296875]
"""5 r - 0.5 of ArmoRM's first five heads, from its model card; labels are [3, 3, 4, 2, 2]."""
DPA_GOLDEN = [68.99269, 69.62718, 76.23071, 33.48785, 35.853596, 63.833366, 55.58917, 68.7175, 59.552124, 46.465595]
"""The scores that the card of the authors' DPA reward model prints, of the same answer."""
PROMPT = 'What are some synonyms for the word "beautiful"?'
ANSWER = "Nicely, Beautifully, Handsome, Stunning, Wonderful, Gorgeous, Pretty, Stunning, Elegant"

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "gemma2": Gemma2Config}


class Original(nn.Module):
    """A backbone with the head of ArmoRM (quantiles 1), QRM or DPA, and what the published models have beside it."""

    def __init__(self, config: PreTrainedConfig, heads: int, quantiles: int, *, gated: bool, bias: bool) -> None:
        super().__init__()
        self.shape, self.pad, self.gated = (heads, quantiles), config.pad_token_id, gated
        self.model = AutoModel.from_config(config)
        head = nn.Linear(config.hidden_size, heads * quantiles, bias=bias)
        nn.init.normal_(head.weight)
        if gated:
            self.reward_transform_matrix = nn.Parameter(torch.randn(heads, heads))
            self.regression_layer = head
            self.gating = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(config.hidden_size, heads)])})
            self.gating.register_parameter("logit_scale", nn.Parameter(torch.ones(1)))
        else:
            self.score = head

    @torch.inference_mode()
    def heads(self, ids: Tensor) -> Tensor:
        """The heads, before the gate and the transform; a quantile head is its quantiles' mean."""
        hidden_BTD = self.model(ids, attention_mask=ids != self.pad).last_hidden_state
        last_B = torch.eq(ids, self.pad).int().argmax(-1) - 1  # -1 where there is no padding
        hidden_BD = hidden_BTD[torch.arange(len(ids)), last_B % ids.shape[1]]
        head = self.regression_layer if self.gated else self.score
        return head(hidden_BD).reshape(-1, *self.shape).mean(dim=2)


def write_original(
    folder: Path,
    kind: str = "llama",
    heads: int = 19,
    quantiles: int = 1,
    *,
    gated: bool = True,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    width: int = 32,
    **settings: Any,
) -> Original:
    """A random model of that class, in a folder as the hub has it: two files of weights, remote code in the config."""
    tokens = tiny.tokenizer()
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id}
    config = CONFIGS[kind](
        **sizes, **ids, head_dim=8, intermediate_size=64, vocab_size=len(tokens), pad_token_id=tokens.pad_token_id,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    original = Original(config, heads, quantiles, gated=gated, bias=bias).to(dtype).eval()
    tokens.save_pretrained(folder)
    name = "LlamaForRewardModelWithGating" if gated else "MistralForAttributePrediction"
    written = json.loads(config.to_json_string()) | {
        "architectures": [name],
        "auto_map": {"AutoModelForSequenceClassification": f"modeling_custom.{name}"},
        "attn_implementation": "flash_attention_2",
        "dtype": "float32",
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        **({"num_objectives": heads, "gating_temperature": 10} if gated else {}),
        **({"num_quantiles": quantiles, "loss": "quantile_regression"} if quantiles > 1 else {}),
        **settings,
    }
    (folder / "config.json").write_text(json.dumps({k: v for k, v in written.items() if v is not None}))
    (folder / "modeling_custom.py").write_text("from transformers import a_name_that_is_gone\n")
    weights = original.state_dict()
    names = list(weights)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, half in halves.items():
        save_file({name: weights[name] for name in half}, folder / file, metadata={"format": "pt"})
    where = {name: file for file, half in halves.items() for name in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return original


def rows(pad: int, *, lengths: Sequence[int] = (5, 30, 17)) -> Tensor:
    """Random token ids, padded on the right."""
    draw = np.random.default_rng(0)
    ids = [draw.integers(10, 200, n).tolist() for n in lengths]
    return torch.tensor([row + [pad] * (max(lengths) - len(row)) for row in ids])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert-reward", *map(str, words)])
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "form", "heads", "quantiles", "names"),
    [
        ("llama", "armorm", 19, 1, ARMORM),
        ("llama", "qrm", 19, 19, ARMORM),
        ("llama", "qrm", 5, 19, HELPSTEER),
        ("gemma2", "qrm", 5, 19, HELPSTEER),
        ("mistral", "dpa", 10, 1, HEADS),
    ],
)
def test_a_stock_classifier_scores_as_the_models_own_code_does(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    form: str,
    heads: int,
    quantiles: int,
    names: tuple[str, ...],
) -> None:
    source, out = tmp_path / "source", tmp_path / "new" / "reward"
    original = write_original(source, kind, heads, quantiles, gated=form != "dpa")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    cli.main(["convert-reward", str(source), "--out", str(out)])
    table = tomllib.loads(capsys.readouterr().out.split("\n\n", 1)[1].split("\nheads:")[0])["rewards"][form]
    assert table == {"model": str(out), "input": "dpa-v1" if form == "dpa" else "chat"}
    assert RewardTable(**table).own_heads(()) == names

    model, loading = AutoModelForSequenceClassification.from_pretrained(
        out, trust_remote_code=False, output_loading_info=True
    )
    assert not any(loading.values()), loading
    ids = rows(original.pad)
    with torch.inference_mode():
        scores = model.eval()(ids, attention_mask=ids != original.pad).logits
    assert torch.allclose(scores, original.heads(ids), rtol=1e-6, atol=1e-6)
    assert scores.std() > 0.1  # or nearly any head would pass

    assert [model.config.id2label[i] for i in range(heads)] == list(names)
    assert model.config.problem_type == "regression"
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert not list(out.glob("*.py"))
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert [path.name for path in out.parent.iterdir()] == ["reward"]


def test_the_scale_is_stated_where_it_is_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = {}
    for form, options in {"armorm": {}, "qrm": {"quantiles": 3}, "dpa": {"gated": False, "heads": 10}}.items():
        write_original(tmp_path / form, "mistral" if form == "dpa" else "llama", **options)
        cli.main(["convert-reward", str(tmp_path / form), "--out", str(tmp_path / f"{form}-out")])
        printed[form] = capsys.readouterr().out
    config = {form: json.loads((tmp_path / f"{form}-out/config.json").read_text()) for form in printed}
    assert config["armorm"]["reward_scale"] == {name: [100, 0] for name in HELPSTEER}
    note = printed["armorm"].partition("note:")[2]
    assert [name in note for name in ARMORM] == [False] * 5 + [True] * 14
    assert "reward_scale" not in config["qrm"]
    assert "note:" not in printed["dpa"]
    known = RewardTable(model=str(tmp_path / "armorm-out")).known_scales(())
    assert known == [(100, 0)] * 5 + [None] * 14


def test_a_converted_folder_is_a_sound_reward_model(tmp_path: Path) -> None:
    write_original(tmp_path / "source", heads=5, quantiles=19)
    convert(tmp_path / "source", tmp_path / "out")
    assert {finding.level for finding in examine(tmp_path / "out")} == {"ok"}


def test_weights_keep_their_type_and_their_bytes(tmp_path: Path) -> None:
    original = write_original(tmp_path / "source", dtype=torch.bfloat16, quantiles=19)
    convert(tmp_path / "source", tmp_path / "out")
    written = {k: x for file in (tmp_path / "out").glob("*.safetensors") for k, x in load_file(file).items()}
    expected = {name: x for name, x in original.state_dict().items() if name.startswith("model.")}
    assert written.keys() == expected.keys() | {"score.weight"}
    assert all(torch.equal(written[name], x) and written[name].dtype == x.dtype for name, x in expected.items())
    mean_KD = original.regression_layer.weight.float().reshape(19, 19, -1).mean(dim=1)
    assert torch.allclose(written["score.weight"], mean_KD, atol=1e-6)
    # The configuration said float32, as ArmoRM's does of its bfloat16.
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_the_chat_template_goes_along_where_the_model_reads_chats(tmp_path: Path) -> None:
    write_original(tmp_path / "gated")
    write_original(tmp_path / "released", "mistral", 10, gated=False)
    for name in ("gated", "released"):
        convert(tmp_path / name, tmp_path / f"{name}-out")
    chat = [*user_prompt(PROMPT), {"role": "assistant", "content": ANSWER}]
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("gated", "gated-out"))
    assert after.apply_chat_template(chat)["input_ids"] == before.apply_chat_template(chat)["input_ids"]
    # The DPA model reads no chat: its tokenizer's own template would write another text than its input.
    tokens = AutoTokenizer.from_pretrained(tmp_path / "released-out")
    read = tokens(render_reward_input(user_prompt(PROMPT), ANSWER, "dpa-v1"))["input_ids"]
    assert tokens.apply_chat_template(chat)["input_ids"] == read


def test_a_model_without_a_pad_token_gets_one_that_ends_no_text(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    original = write_original(source, "mistral", 10, gated=False, pad_token_id=None)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(
        json.dumps(settings | {"pad_token": settings["eos_token"], "unk_token": "<unk>"})
    )
    convert(source, out)
    tokens = AutoTokenizer.from_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    assert tokens.pad_token == "<unk>"
    assert tokens.pad_token_id == config["pad_token_id"] != tokens.eos_token_id
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    texts = ["fox is red. tea is hot.", "owl is wise. iron is hard and tea helps people wake."]
    batch = tokens(texts, padding=True, padding_side="right", return_tensors="pt")
    with torch.inference_mode():
        scores = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    alone = torch.cat([original.heads(tokens(text, return_tensors="pt")["input_ids"]) for text in texts])
    assert torch.allclose(scores, alone, atol=1e-5)


def test_a_bias_is_recorded_with_the_scale_where_that_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = write_original(tmp_path / "source", "mistral", 10, gated=False, bias=True)
    cli.main(["convert-reward", str(tmp_path / "source"), "--out", str(tmp_path / "out")])
    scale = json.loads((tmp_path / "out" / "config.json").read_text())["reward_scale"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    ids = rows(original.pad)
    with torch.inference_mode():
        scores = model(ids, attention_mask=ids != original.pad).logits
    a, b = torch.tensor([scale[name] for name in HEADS]).T
    assert torch.allclose(a * scores + b, original.heads(ids), atol=1e-5)
    write_original(tmp_path / "quantiles", quantiles=3, bias=True)
    assert "regression_layer.bias is not zero" in refused(capsys, tmp_path / "quantiles", "--out", tmp_path / "no")


def test_heads_without_published_names_keep_the_models_own_or_are_numbered(tmp_path: Path) -> None:
    write_original(tmp_path / "numbered", heads=3)
    write_original(tmp_path / "named", heads=2, id2label={"0": "kind", "1": "short"})
    assert convert(tmp_path / "numbered", tmp_path / "a")[0].names == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert convert(tmp_path / "named", tmp_path / "b")[0].names == ("kind", "short")


def test_what_is_not_one_of_the_models_is_refused_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_original(tmp_path / "good")

    def changed(name: str, **config: Any) -> Path:
        folder = shutil.copytree(tmp_path / "good", tmp_path / name)
        table = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(table | config))
        return folder

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"\x80")
    mute = changed("mute")
    (mute / "chat_template.jinja").unlink()
    padless = changed("padless", pad_token_id=None)
    (padless / "tokenizer_config.json").write_text('{"eos_token": "</s>", "chat_template": "x"}')
    stray = changed("stray")
    save_file({"adapter.weight_norm": torch.ones(2)}, stray / "more.safetensors")
    index = json.loads((stray / "model.safetensors.index.json").read_text())
    index["weight_map"]["adapter.weight_norm"] = "more.safetensors"
    (stray / "model.safetensors.index.json").write_text(json.dumps(index))
    other, causal = tmp_path / "other", tiny.write_model(tmp_path / "causal", tiny.tokenizer(), tied=False)
    write_original(other, "mistral", 10, gated=False, architectures=["SomeOtherModel"])
    cases = {
        Path("RLHFlow/ArmoRM-Llama3-8B-v0.1"): ["no such folder", "hf download RLHFlow/ArmoRM-Llama3-8B-v0.1"],
        pickled: ["pytorch_model.bin", "pickled", "safetensors"],
        changed("quantised", quantization_config={"load_in_8bit": True}): ["quantised"],
        changed("bert", model_type="bert"): ["model_type 'bert'", "llama"],
        changed("uneven", num_quantiles=4): ["regression_layer.weight", "[19, 32]", "[76, 32]"],
        mute: ["no chat template"],
        padless: ["pad_token_id is None"],
        stray: ["none of the models", "adapter.weight_norm"],
        other: ["none of the models", "score.weight"],
        causal: ["none of the models", "lm_head.weight"],
    }
    present = sorted(path.name for path in tmp_path.iterdir())
    for source, parts in cases.items():
        error = refused(capsys, source, "--out", tmp_path / "out")
        assert [part for part in parts if part not in error] == [], error
        assert sorted(path.name for path in tmp_path.iterdir()) == present


def test_a_place_that_is_taken_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, empty, full, half = (tmp_path / name for name in ("source", "empty", "full", "half.partial"))
    write_original(source)
    for folder in (empty, full, half):
        folder.mkdir()
    (full / "note.txt").write_text("mine")
    assert "stands already" in refused(capsys, source, "--out", full)
    assert "stands already" in refused(capsys, source, "--out", source)
    assert "half.partial" in refused(capsys, source, "--out", tmp_path / "half")
    assert (full / "note.txt").read_text() == "mine"
    convert(source, empty)
    assert "a stock classifier already" in refused(capsys, empty, "--out", tmp_path / "again")


@pytest.mark.skipif("DPA_ARMORM" not in os.environ, reason="DPA_ARMORM names no folder of ArmoRM-Llama3-8B-v0.1")
def test_armorm_rates_the_synonyms_as_its_card_says(tmp_path: Path) -> None:
    convert(Path(os.environ["DPA_ARMORM"]), tmp_path / "armorm")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "armorm")
    chat = [*user_prompt(PROMPT), {"role": "assistant", "content": ANSWER}]
    ids = tokens.apply_chat_template(chat, return_tensors="pt", return_dict=False)
    rewards = scores_of(tmp_path / "armorm", ids, torch.bfloat16)[:5]
    assert (5 * rewards - 0.5).tolist() == pytest.approx(ARMORM_GOLDEN, abs=0.05)  # bfloat16 steps by 0.02


@pytest.mark.skipif("DPA_RELEASED_REWARD" not in os.environ, reason="DPA_RELEASED_REWARD names no folder of the model")
def test_the_released_dpa_model_rates_the_synonyms_as_its_card_says(tmp_path: Path) -> None:
    _, scale = convert(Path(os.environ["DPA_RELEASED_REWARD"]), tmp_path / "dpa")
    text = render_reward_input(user_prompt(PROMPT), ANSWER, "dpa-v1")
    ids = AutoTokenizer.from_pretrained(tmp_path / "dpa")(text, return_tensors="pt")["input_ids"]
    a, b = torch.tensor([scale[name] for name in HEADS]).T
    rewards = a * scores_of(tmp_path / "dpa", ids, torch.float32) + b
    assert rewards.tolist() == pytest.approx(DPA_GOLDEN, abs=0.1)


def scores_of(folder: Path, ids: Tensor, dtype: torch.dtype) -> Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).to(device).eval()
    with torch.inference_mode():
        return model(ids.to(device)).logits[0].float().cpu()
