"""Load a model whole: a missing tensor is an error, and never filled with random weights.

transformers draws a missing tensor at random, and goes on. Here that is an error. So is a tensor of another shape, or
one that the model does not have: then the weights or the configuration are another model's.

Allowed are: a missing tied output; extra tensors that transformers itself ignores, such as the rotary buffers of old
checkpoints; in a reward model, the head of another model, such as a language model's output.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from dpalign.runs.modelfolder import ADAPTER, CONFIG, HEAD, Kind, require_kind

AUTO: Final[Mapping[Kind, Any]] = {
    "policy": AutoModelForCausalLM,
    "reward model": AutoModelForSequenceClassification,
}
SHOWN: Final = 3
"""Tensors that a message names at most."""


def load_whole(
    kind: Kind, source: str, *, new_head: bool = False, trust_remote_code: bool = False, **options: Any
) -> PreTrainedModel:
    """A model whose every weight comes from its files.

    Args:
        source: a folder or hub name.
        new_head: make a reward model of any model, with a random head.
        options: for transformers' `from_pretrained`.

    Raises:
        ValueError: a model of the other kind, an adapter, a damaged file; tensors that are missing, extra, or of
            another shape than the configuration says. Names the folder and the tensors.
    """
    if (Path(source) / ADAPTER).is_file():
        raise ValueError(f"{source}: an adapter; merge it into its model first (peft's merge_and_unload)")
    if not new_head:
        config, _ = PreTrainedConfig.get_config_dict(source, trust_remote_code=trust_remote_code)
        require_kind(config, kind, source)
    try:
        model, report = AUTO[kind].from_pretrained(
            source,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with their names
            **options,
        )
    except SafetensorError as error:
        raise ValueError(f"{source}: a weights file is damaged ({error}); fetch or write the folder again") from error
    loaded: PreTrainedModel = model
    for fault in _faults(loaded, report, {HEAD} if new_head else set(), kind):
        raise ValueError(f"{source}: {fault}")
    return loaded


def require_tensors(kind: Kind, folder: str) -> None:
    """Compare a folder's tensors with its configuration, by the headers of its files: no weights are read.

    A quantized checkpoint has tensors of its own, and passes.

    Raises:
        ValueError: see `load_whole`.
    """
    if "quantization_config" in PreTrainedConfig.get_config_dict(folder)[0]:
        return
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        load_whole(kind, folder, device_map="meta")
    finally:
        transformers_logging.set_verbosity(verbosity)


def _faults(model: PreTrainedModel, report: Mapping[str, Any], new: Collection[str], kind: Kind) -> Iterator[str]:
    """Faults of the loaded tensors, from transformers' report."""
    again = "fetch or write the folder again"
    if missing := sorted(set(report["missing_keys"]) - set(new)):
        yield f"its weights lack {_named(missing)}, which {CONFIG} asks for; they would be random: {again}"
    for name, found, asked in sorted(report["mismatched_keys"]):
        if name not in new:
            yield f"{name} is of shape {list(found)}, and {CONFIG} asks for {list(asked)}; {again}"
    extra = sorted(report["unexpected_keys"])
    if kind == "reward model":
        extra = [name for name in extra if name.startswith(f"{model.base_model_prefix}.")]
    if extra:
        yield (
            f"its weights hold {_named(extra)}, which a {type(model).__name__} of its {CONFIG} does not have: they are "
            "another model's; give that model's own folder, or save it with transformers, which leaves them out"
        )


def _named(tensors: list[str]) -> str:
    more = len(tensors) - SHOWN
    return ", ".join(tensors[:SHOWN]) + (f" and {more} more" if more > 0 else "")
