"""A linear probe as a file of a few kilobytes: the heads alone, without the backbone whose hidden states they read.

`reward.freeze` fits such heads. With the file, others can use them who have the backbone but no ratings.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from dpalign.runs.modelfolder import HEAD

FILE: Final = "probe.safetensors"
KEY: Final = "probe"


@dataclass(frozen=True)
class Probe:
    """What a probe's weights mean.

    Attributes:
        heads: the outputs, in order.
        layers: how many of the backbone's layers it reads; 0 is all.
        template: the text that the backbone reads (`paper.prompts.RewardTemplate`).
    """

    heads: tuple[str, ...]
    layers: int
    template: str


def write_probe(path: Path, model: PreTrainedModel, probe: Probe) -> None:
    """Write a classifier's head, in float32."""
    weight = model.score.weight.detach().float().cpu().contiguous()
    save_file({HEAD: weight}, path, metadata={KEY: json.dumps(asdict(probe))})


def take_probe(path: Path, model: PreTrainedModel, asked: Probe) -> None:
    """Set a classifier's head to a probe's weights.

    Args:
        asked: the recipe's settings of the reward model.

    Raises:
        ValueError: no such file, or one that is no probe; other heads, layers or text; another width.
    """
    try:
        with safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {})[KEY])
            weight_HD = file.get_tensor(HEAD)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: no linear probe can be read from it ({error}); give a {FILE} of a reward") from error
    for name, value in json.loads(json.dumps(asdict(asked))).items():
        if found.get(name) != value:
            key = "heads" if name == "heads" else f"reward.{name}"
            raise ValueError(f"{path}: fitted with {key} = {found.get(name)}, and the recipe has {value}; set {key} so")
    if weight_HD.shape != model.score.weight.shape:
        raise ValueError(
            f"{path}: reads states of width {weight_HD.shape[1]}, and {model.config.name_or_path} has "
            f"{model.score.weight.shape[1]}; take the model that it was fitted on"
        )
    if not torch.isfinite(weight_HD).all():
        raise ValueError(f"{path}: a weight is no finite number; fit the probe again")
    with torch.no_grad():
        model.score.weight.copy_(weight_HD.to(model.score.weight))
