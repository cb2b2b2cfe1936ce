"""Rewarded soups (section 2.3): experts trained for a direction each, and their weights interpolated for any other.

Whole checkpoints are mixed, tensor by tensor. The mean is computed in float32 (in float64 for float64 experts) and
stored in the experts' own type. Memory holds at most a few copies of one tensor. The paper's soup takes the direction
itself for weights. That is no interpolation if an objective is minimised (v2 <= 0 on section 3.1's arc);
`mixtures.mixture_weights` makes one.

Shapes: E experts.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from dpalign.runs.modelfolder import CONFIG, INDEX, TEMPLATE, WEIGHTS, index_of, read_object, weights_files

Array = NDArray[np.float64]

COPIED: Final = (
    *(CONFIG, "generation_config.json", TEMPLATE, "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
)
"""Files that a mixture copies from the first expert."""

MIXED: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types that are interpolated; tensors of any other must be equal in all experts."""

INDIFFERENT: Final[Mapping[str, tuple[str, ...]]] = {
    CONFIG: ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype"),
    "tokenizer.json": ("truncation", "padding"),
}
"""Keys that may differ between experts: traces of their training. Types are compared tensor by tensor."""

ADVICE: Final = "only checkpoints trained from one model go together"


def mix(experts: Sequence[Path], weights: Sequence[float] | Array, output: Path) -> None:
    """Write the weighted mean of whole checkpoints, itself a plain Hugging Face checkpoint.

    An expert of weight 0 adds nothing, not even NaN, so weights (1, 0) give the first expert's own. Configuration,
    tokenizer, chat template and the division into files are the first expert's.

        mix([helpful, brief], mixture_weights((0.8, -0.6), [(1, 0), (0, -1)]), Path("soup"))

    Args:
        experts: checkpoint folders with safetensors, in one file or in several with their index.
        weights: one an expert, not negative, of sum 1 (`mixture_weights`).
        output: the folder to make; it appears whole or not at all.

    Raises:
        ValueError: weights that are no convex combination; a folder without weights; experts that differ in
            configuration, tokenizer or chat template, or in a tensor's name, shape or type (the message names the
            file, the key and both values); a weight that is no finite number; an `output` that exists.
    """
    w_E = _convex(weights, experts)
    if output.exists():
        raise ValueError(f"{output}: stands already; name a folder to make")
    with ExitStack() as stack:
        opened = [Expert.open(folder, stack) for folder in experts]
        for other in opened[1:]:
            require_alike(opened[0], other)
        beside = output.with_name(f".{output.name}.partial")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for file in opened[0].files:
            _write(beside / file, opened, w_E, file)
    for name in COPIED if (beside / WEIGHTS).is_file() else (*COPIED, INDEX):
        if (experts[0] / name).is_file():
            shutil.copyfile(experts[0] / name, beside / name)
    beside.rename(output)


def bytes_of(folder: Path) -> int:
    """The size of a checkpoint's weights on disk."""
    return sum((folder / file).stat().st_size for file in weights_files(folder))


def _convex(weights: Sequence[float] | Array, experts: Sequence[Path]) -> list[float]:
    w_E = [float(w) for w in weights]
    if len(w_E) != len(experts):
        raise ValueError(f"{len(w_E)} weights {w_E} for {len(experts)} experts; give each its own")
    if not all(w >= 0 for w in w_E) or not math.isclose(sum(w_E), 1.0, abs_tol=1e-6):
        raise ValueError(f"weights {w_E} of sum {sum(w_E):g}: a mixture needs weights of 0 or more whose sum is 1")
    return w_E


@dataclass(frozen=True)
class Expert:
    """A checkpoint's tensors, each read when it is needed."""

    folder: Path
    files: Mapping[str, Any]
    """The opened files, by name."""
    file_of: Mapping[str, str]
    """The file that holds a tensor."""

    @classmethod
    def open(cls, folder: Path, stack: ExitStack) -> "Expert":
        """Open a checkpoint until the stack closes.

        Raises:
            ValueError: no weights, an index that does not fit the files, or a file that is no safetensors.
        """
        files: dict[str, Any] = {}
        file_of: dict[str, str] = {}
        for file in weights_files(folder):
            try:
                files[file] = stack.enter_context(safe_open(folder / file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{folder / file}: not a readable safetensors file ({error})") from error
            file_of |= dict.fromkeys(files[file].offset_keys(), file)
        for name, file in index_of(folder).items():
            if file_of.get(name) != file:
                raise ValueError(f"{folder / INDEX}: says that {file} holds {name}; it does not")
        return cls(folder, files, file_of)

    def path(self, name: str) -> Path:
        return self.folder / self.file_of[name]

    def tensor(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self.files[self.file_of[name]].get_tensor(name)
        return tensor

    def form(self, name: str) -> dict[str, object]:
        """Shape and type of a tensor, by its file's header."""
        header = self.files[self.file_of[name]].get_slice(name)
        return {"shape": list(header.get_shape()), "type": str(header.get_dtype())}


def _write(path: Path, experts: Sequence[Expert], w_E: Sequence[float], file: str) -> None:
    """Write one of the mixture's files: the first expert's header, then the mixed tensors in the same places.

    The library's own writer is not used, since it wants all of a file's tensors at once. A safetensors file is the
    length of a JSON header in 8 bytes, the header, and the tensors' bytes.
    """
    with path.open("wb") as out:
        with (experts[0].folder / file).open("rb") as first:
            length = first.read(8)
            out.write(length + first.read(int.from_bytes(length, "little")))
        for name in experts[0].files[file].offset_keys():
            out.write(_mixed(experts, w_E, name).reshape(-1).view(torch.uint8).numpy().data)


def _mixed(experts: Sequence[Expert], w_E: Sequence[float], name: str) -> torch.Tensor:
    first = experts[0].tensor(name)
    if first.dtype not in MIXED:
        for other in experts[1:]:
            if not torch.equal(first, other.tensor(name)):
                raise ValueError(
                    f"{other.path(name)}: {name} of type {first.dtype} differs from the one in "
                    f"{experts[0].path(name)}; only floating-point weights can be mixed"
                )
        return first
    computed = torch.promote_types(first.dtype, torch.float32)
    parts = (expert.tensor(name).to(computed, copy=True).mul_(w) for expert, w in zip(experts, w_E, strict=True) if w)
    total = next(parts)
    for part in parts:
        total += part
    mixed = total.to(first.dtype)
    if not mixed.isfinite().all():
        bad = next((e for e, w in zip(experts, w_E, strict=True) if w and not e.tensor(name).isfinite().all()), None)
        where = f"the mean of {len(experts)} experts" if bad is None else str(bad.path(name))
        raise ValueError(f"{where}: {name} holds NaN or infinite weights; train that expert again")
    return mixed


# Whether two experts are of one family


def require_alike(first: Expert, other: Expert) -> None:
    """Check that two checkpoints have one architecture, one tokenizer and corresponding tensors.

    Raises:
        ValueError: names the first file and key in which they differ, and both values.
    """
    settings = [dict(_settings(expert.folder)) for expert in (first, other)]
    for file, key in dict.fromkeys([*settings[0], *settings[1]]):
        _require_equal(first.folder / file, other.folder / file, key, *(one.get((file, key)) for one in settings))
    for name in dict.fromkeys([*first.file_of, *other.file_of]):
        if name not in first.file_of or name not in other.file_of:
            has, lacks = (first, other) if name in first.file_of else (other, first)
            raise ValueError(f"{has.path(name)}: holds {name}, which {lacks.folder} lacks; {ADVICE}")
        form, other_form = first.form(name), other.form(name)
        for key in form:
            _require_equal(first.path(name), other.path(name), f"the {key} of {name}", form[key], other_form[key])


def _require_equal(first: Path, other: Path, key: str, value: object, other_value: object) -> None:
    if value != other_value:
        raise ValueError(f"{other}: {key} is {_brief(other_value)}, but {_brief(value)} in {first}; {ADVICE}")


def _brief(value: object) -> str:
    """A value for a message. A long value becomes its beginning, and a hash that tells it from others."""
    if value is None:
        return "missing"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:60]}... (sha256 {hashlib.sha256(text.encode()).hexdigest()[:8]})"


def _settings(folder: Path) -> Iterator[tuple[tuple[str, str], object]]:
    """A checkpoint's architecture and the way it reads text: values by file and dotted key."""
    for file in (CONFIG, "tokenizer.json", "vocab.json"):
        if (folder / file).is_file():
            entries = {k: v for k, v in read_object(folder / file).items() if k not in INDIFFERENT.get(file, ())}
            yield from (((file, key), value) for key, value in _leaves(entries))
    for file in ("tokenizer.model", "merges.txt"):
        if (folder / file).is_file():
            yield (file, "its sha256"), hashlib.sha256((folder / file).read_bytes()).hexdigest()
    settings, template = folder / "tokenizer_config.json", folder / TEMPLATE
    read = read_object(settings) if settings.is_file() else {}
    yield from (((settings.name, key), value) for key, value in read.items() if key.endswith("_token"))
    yield (TEMPLATE, "the text"), template.read_text("utf-8") if template.is_file() else read.get("chat_template")


def _leaves(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield above + key, value
