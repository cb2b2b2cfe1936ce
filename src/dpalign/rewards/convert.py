"""`dpa convert-reward`: make a public multi-head reward model a stock sequence classifier, without its own code.

The remote code of these models no longer loads on transformers 5. All of them read the last token, so each of their
heads is a row of a stock classifier's `score.weight`:

ArmoRM       regression_layer, (K, D). Its gate, which mixes the heads by prompt, is dropped.
QRM          regression_layer, (K * Q, D): Q quantiles of each head. The mean over them is linear too.
DPA          the ten heads of section 3.1, in a class of the authors' own.

Weights keep their type, but a QRM's averaged head is float32. One file's weights are in memory at a time.

Shapes: K heads, Q quantiles of each, D the model's width.
"""

import argparse
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from dpalign.paper.prompts import RewardInput
from dpalign.rewards.knobs import STATED, Scale, numbered
from dpalign.rows import HEADS
from dpalign.runs.ledger import partial_of, write_json, write_text
from dpalign.runs.modelfolder import (
    CONFIG,
    HEAD,
    INDEX,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_SETTINGS,
    WEIGHTS,
    check_weights,
    label_names,
    read_header,
    read_object,
    require_unpickled,
    special_tokens,
    template_of,
    vocabulary,
    weights_files,
)

if TYPE_CHECKING:
    from torch import Tensor

GATED: Final = "regression_layer"
"""The head of ArmoRM and QRM."""
DROPPED: Final = re.compile(r"gating\..*|reward_transform_matrix")
"""Tensors that mix the heads into one score; none changes a head."""
RELEASED: Final = "MistralForAttributePrediction"
"""The class of the authors' DPA reward model."""
BACKBONES: Final = {"llama": "Llama", "mistral": "Mistral", "gemma2": "Gemma2"}
"""How the names of stock classes begin, by model_type. In all of them `model.` is the backbone."""

ARMORM: Final = (
    *HEADS,
    *("beavertails-is_safe", "prometheus-score", "argilla-overall_quality", "argilla-judge_lm", "code-complexity"),
    *("code-style", "code-explanation", "code-instruction-following", "code-readability"),
)
HELPSTEER: Final = HEADS[:5]

FLOATS: Final = {"F64", "F32", "F16", "BF16"}
"""Floating-point types of weights, as safetensors names them."""

COPIED: Final = (
    *(TOKENIZER, "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"),
)
"""Files copied as they are. The template of a model that reads chats is copied too."""
GONE: Final = (
    *("auto_map", "_name_or_path", "num_objectives", "num_quantiles", "loss", "torch_dtype"),
    *("attn_implementation", "_attn_implementation"),
)
"""Keys of the configuration that only the model's own code reads, or that ask for more than a stock class has."""


@dataclass(frozen=True)
class Head:
    """The head of a public reward model."""

    form: Literal["armorm", "qrm", "dpa"]
    module: str
    """Its weight is `module`.weight."""
    names: tuple[str, ...]
    quantiles: int = 1

    @property
    def input(self) -> RewardInput:
        """The form of text that the model reads."""
        return "dpa-v1" if self.form == "dpa" else "chat"

    @property
    def scale(self) -> dict[str, Scale]:
        """The published maps to points of 0 to 100, by head.

        ArmoRM's HelpSteer heads are (l + 0.5) / 5 for labels l of 0 to 4, by its model card: 100 r is the 20 l + 10
        of our own labels. The scales of its other heads and of QRM's are unpublished.
        """
        match self.form:
            case "armorm":
                return {name: (100.0, 0.0) for name in self.names if name in HELPSTEER}
            case "qrm":
                return {}
            case "dpa":
                return dict.fromkeys(self.names, (1.0, 0.0))


def declare(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    what = "the folder of ArmoRM-Llama3-8B, a QRM, or RewardModel-Mistral-7B-for-DPA-v1, as the hub has it"
    parser.add_argument("source", type=Path, metavar="SOURCE", help=what)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write: new, or empty")


def execute(given: argparse.Namespace, _: Sequence[str]) -> str:
    """Convert what the command line names; return the message for the user.

    Raises:
        ValueError: no such folder, none of the known models, or a place that is taken.
    """
    head, scale = convert(given.source, given.out)
    return f"{given.out}\n\n{table_of(head, scale, given.out)}"


def convert(source: Path, out: Path) -> tuple[Head, dict[str, Scale]]:
    """Write the stock classifier; return its head, and the maps to points that are known.

    The folder appears whole or not at all.

    Args:
        source: a folder as the hub has it; it stays as it is.
        out: a new folder, or an empty one.

    Raises:
        ValueError: no whole safetensors, none of the known models, or a place that is taken.
    """
    require_free(out)
    config = read_source(source)
    tensors = {name: tensor for file in weights_files(source) for name, tensor in read_header(source / file).items()}
    head = find_head(source, config, tensors)
    scale = _with_bias(source, head)
    partial = partial_of(out)
    partial.mkdir(parents=True)
    try:
        dtype = _write_weights(source, partial, head)
        settings = _tokenizer_settings(source, head)
        pad = _pad(source, config, settings)
        write_json(partial / CONFIG, _stock_config(config, head, scale, pad, dtype))
        write_json(partial / TOKENIZER_SETTINGS, settings)
        for name in (*COPIED, *([TEMPLATE] if head.input == "chat" else [])):
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        if head.input != "chat":
            _write_template(partial, head)
        check_weights(partial)
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return head, scale


def require_free(out: Path) -> None:
    """Raise ValueError unless the place is free, and the place beside it where the folder is made."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"--out {out}: stands already; name a new folder, or an empty one")
    if partial_of(out).exists():
        raise ValueError(f"{partial_of(out)}: stands already, from an interrupted conversion perhaps; delete it")


def read_source(source: Path) -> dict[str, Any]:
    """Read the configuration of a folder with whole safetensors of a known backbone.

    Raises:
        ValueError: there is none, its weights are pickled or quantised, or it is stock already.
    """
    if not source.is_dir():
        name = str(source)
        fetch = f"hf download {name} --local-dir FOLDER" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else ""
        raise ValueError(f"{name}: no such folder" + (f"; fetch a model of the hub first: {fetch}" if fetch else ""))
    require_unpickled(source)
    types = check_weights(source).types
    config = read_object(source / CONFIG)
    if "quantization_config" in config or not set(types) & FLOATS:
        raise ValueError(f"{source / CONFIG}: quantised weights; fetch the model itself, in bfloat16 or float32")
    if config.get("model_type") not in BACKBONES:
        known = ", ".join(BACKBONES)
        raise ValueError(f"{source / CONFIG}: model_type {config.get('model_type')!r}; known here: {known}")
    if config.get("architectures") == [_stock(config)] and "auto_map" not in config:
        raise ValueError(f"{source}: a stock classifier already; a recipe can name it as it is")
    return config


def find_head(source: Path, config: Mapping[str, Any], tensors: Mapping[str, tuple[str, list[int]]]) -> Head:
    """Find which known model a checkpoint is, by its tensors (type and shape) and its configuration.

    Raises:
        ValueError: no known model, unknown tensors, or shapes that differ from the configuration's.
    """
    other = [name for name in tensors if not name.startswith("model.") and not DROPPED.fullmatch(name)]
    modules = sorted({name.rpartition(".")[0] for name in other if name.endswith(".weight")})
    stray = sorted(set(other) - {f"{module}.{part}" for module in modules for part in ("weight", "bias")})
    released = config.get("architectures") == [RELEASED]
    if stray or len(modules) != 1 or not (released or modules == [GATED]):
        listed = ", ".join(other) or "none"
        raise ValueError(
            f"{source}: none of the models known here: ArmoRM and QRM have {GATED}.weight alone beside their gate, "
            f"the DPA reward model is a {RELEASED} with one linear head. Tensors outside the backbone: {listed}"
        )
    (module,) = modules
    (kind, shape), width = tensors[f"{module}.weight"], config.get("hidden_size")
    quantiles = 1 if released else int(config.get("num_quantiles") or 1)
    rows = shape[0]
    heads = rows if released else int(config.get("num_objectives") or rows // quantiles)
    if shape != [heads * quantiles, width] or kind not in FLOATS:
        raise ValueError(
            f"{source}: {module}.weight is {kind} {shape}; {heads} heads of {quantiles} "
            f"quantiles at hidden_size {width} take {[heads * quantiles, width]} floating-point numbers"
        )
    form: Literal["armorm", "qrm", "dpa"] = "dpa" if released else "armorm" if quantiles == 1 else "qrm"
    return Head(form, module, _names(form, heads, config), quantiles)


def _names(form: str, heads: int, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the model's own names, else those on its card, else numbers."""
    own = label_names(config)
    if len(own) == heads and not numbered(own):
        return own
    match form, heads:
        case (("armorm" | "qrm"), 19):
            return ARMORM
        case "qrm", 5:
            return HELPSTEER
        case "dpa", 10:
            return HEADS
    return tuple(f"LABEL_{i}" for i in range(heads))


def _with_bias(source: Path, head: Head) -> dict[str, Scale]:
    """Return the maps to points with the head's bias added: a stock classifier's head has no bias."""
    from safetensors import safe_open

    name, scale, biases = f"{head.module}.bias", head.scale, [0.0]
    for path in weights_files(source):
        with safe_open(source / path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118  # it is no mapping
                biases = file.get_tensor(name).tolist()
    if not any(biases):
        return scale
    if set(scale) != set(head.names) or head.quantiles > 1:
        raise ValueError(
            f"{source}: {head.module}.bias is not zero. A stock classifier has no bias, and the scale of these heads "
            "is not known, to add it there"
        )
    return {name: (a, a * b + c) for (name, (a, c)), b in zip(scale.items(), biases, strict=True)}


def _score(weight: "Tensor", quantiles: int) -> "Tensor":
    """Return the stock head: the model's own rows, or each head's mean over its quantiles in float32."""
    if quantiles == 1:
        return weight
    return weight.double().reshape(-1, quantiles, weight.shape[-1]).mean(dim=1).float()


def _write_weights(source: Path, out: Path, head: Head) -> str:
    """Write the backbone and the head alone, in the source's division into files; return the backbone's commonest type.

    One file's weights are in memory at a time.
    """
    from safetensors.torch import load_file, save_file

    index: dict[str, str] = {}
    sizes: Counter[str] = Counter()
    files = weights_files(source)
    for file in files:
        weights = load_file(source / file)
        kept = {name: weight for name, weight in weights.items() if name.startswith("model.")}
        for weight in kept.values():
            sizes[str(weight.dtype).removeprefix("torch.")] += weight.nbytes
        if f"{head.module}.weight" in weights:
            kept[HEAD] = _score(weights[f"{head.module}.weight"], head.quantiles)
            sizes[""] += kept[HEAD].nbytes
        if kept:
            save_file(kept, out / file, metadata={"format": "pt"})
        index |= dict.fromkeys(kept, file)
    if list(files) != [WEIGHTS]:
        write_json(out / INDEX, {"metadata": {"total_size": sizes.total()}, "weight_map": dict(sorted(index.items()))})
    del sizes[""]
    return sizes.most_common(1)[0][0]


def _stock(config: Mapping[str, Any]) -> str:
    return f"{BACKBONES[config['model_type']]}ForSequenceClassification"


def _stock_config(
    config: Mapping[str, Any], head: Head, scale: Mapping[str, Scale], pad: int, dtype: str
) -> dict[str, Any]:
    """Return the configuration with named heads, without the keys that only the model's own code reads."""
    kept = {key: value for key, value in config.items() if key not in GONE and not key.startswith("gating_")}
    written = kept | {
        "architectures": [_stock(config)],
        "dtype": dtype,  # ArmoRM's says float32, but its weights are bfloat16
        "id2label": {str(i): name for i, name in enumerate(head.names)},
        "label2id": {name: i for i, name in enumerate(head.names)},
        "num_labels": len(head.names),
        "pad_token_id": pad,
        "problem_type": "regression",
    }
    return written | ({STATED: {name: list(pair) for name, pair in scale.items()}} if scale else {})


def _pad(source: Path, config: Mapping[str, Any], settings: dict[str, Any]) -> int:
    """Return a pad token that ends no text, since a classifier reads the last token that is no padding.

    If the configuration names none, it is the tokenizer's pad or unknown token, and is written to `settings`.
    """
    tokens = special_tokens(source)
    eos = config.get("eos_token_id")
    ends = {tokens.eos_id, *(eos if isinstance(eos, list) else [eos])}
    pad = config.get("pad_token_id")
    if pad is not None and pad not in ends:
        return int(pad)
    ids = vocabulary(source) if (source / TOKENIZER).is_file() else {}
    for key in ("pad_token", "unk_token"):
        token = settings.get(key)
        text = token.get("content") if isinstance(token, Mapping) else token
        if (number := ids.get(text or "")) is not None and number not in ends:
            settings["pad_token"] = text
            return number
    raise ValueError(
        f"{source / CONFIG}: pad_token_id is {pad}, and the tokenizer has no pad or unknown token that differs from "
        "the end of text; set pad_token_id to a token that no text contains"
    )


def _tokenizer_settings(source: Path, head: Head) -> dict[str, Any]:
    """Read tokenizer_config.json without remote code, and without a chat template if the model reads none."""
    if head.input == "chat" and template_of(source) is None:
        raise ValueError(f"{source}: no chat template, in which these heads read a chat; fetch the tokenizer's files")
    path = source / TOKENIZER_SETTINGS
    settings = read_object(path) if path.is_file() else {}
    settings.pop("auto_map", None)
    if head.input != "chat":
        settings.pop("chat_template", None)
    return settings


def _write_template(folder: Path, head: Head) -> None:
    """Write the chat template of our form that the model reads."""
    from transformers import AutoTokenizer

    from dpalign.rewards.inputs import template_for

    template = template_for(AutoTokenizer.from_pretrained(folder), head.input)
    assert template is not None
    write_text(folder / TEMPLATE, template)


def table_of(head: Head, scale: Mapping[str, Scale], folder: Path) -> str:
    """Return the table for a recipe, and notes on what is unknown. The folder itself has its heads and their scales."""
    lines = [f"[rewards.{head.form}]", f"model = {json.dumps(str(folder))}", f'input = "{head.input}"']
    lines.append(f"heads: {', '.join(head.names)}")
    if unknown := [name for name in head.names if name not in scale]:
        cure = "a run fits it to its own annotated answers, or give scale = [slope, offset]"
        lines.append(f"note: unpublished scale of {', '.join(unknown)}: {cure}")
    if numbered(head.names):
        lines.append("note: the names of these heads are unpublished; name them in heads, in this order")
    return "\n".join(lines)
