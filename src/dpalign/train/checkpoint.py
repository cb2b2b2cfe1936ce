"""A checkpoint's weights read tensor by tensor, and whether two checkpoints are of one family."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from dpalign.run.modelfolder import CONFIG, INDEX, TEMPLATE, index_of, read_object, weights_files

INDIFFERENT: Final[Mapping[str, tuple[str, ...]]] = {
    CONFIG: ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype"),
    "tokenizer.json": ("truncation", "padding"),
}
"""What may differ within a family: traces of how its members were trained. Types are told by the tensors."""


@dataclass(frozen=True)
class Weights:
    """A checkpoint's tensors, each read when it is asked for."""

    folder: Path
    files: Mapping[str, Any]
    """The opened files, by name."""
    file_of: Mapping[str, str]
    """The file that holds a tensor."""

    @classmethod
    def open(cls, folder: Path, stack: ExitStack) -> "Weights":
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

    def dtype(self, name: str) -> str:
        """In the words of the format: F32, BF16."""
        return str(self.files[self.file_of[name]].get_slice(name).get_dtype())

    def shape(self, name: str) -> list[int]:
        return list(self.files[self.file_of[name]].get_slice(name).get_shape())


def require_alike(first: Weights, other: Weights) -> None:
    """Two checkpoints of one architecture and one tokenizer, whose tensors correspond.

    Raises:
        ValueError: naming the first file and key in which they differ, and both values.
    """
    told, told_too = _told(first.folder), _told(other.folder)
    for file in dict.fromkeys([*told, *told_too]):
        one, two = told.get(file, {}), told_too.get(file, {})
        for key in dict.fromkeys([*one, *two]):
            if one.get(key) != two.get(key):
                raise _differ(first.folder / file, other.folder / file, key, one.get(key), two.get(key))
    for name in dict.fromkeys([*first.file_of, *other.file_of]):
        if name not in first.file_of or name not in other.file_of:
            has, lacks = (first, other) if name in first.file_of else (other, first)
            raise ValueError(f"{has.path(name)}: holds {name}, which {lacks.folder} lacks; {ADVICE}")
        paths = first.path(name), other.path(name)
        if first.shape(name) != other.shape(name):
            raise _differ(*paths, f"the shape of {name}", first.shape(name), other.shape(name))
        if first.dtype(name) != other.dtype(name):
            raise _differ(*paths, f"the type of {name}", first.dtype(name), other.dtype(name))


ADVICE: Final = "only checkpoints trained from one model go together"


def _differ(first: Path, other: Path, key: str, one: object, two: object) -> ValueError:
    return ValueError(f"{other}: {key} is {_brief(two)}, but {_brief(one)} in {first}; {ADVICE}")


def _brief(value: object) -> str:
    """A value as a message can show it: of a long one the beginning, and a hash that tells it from another."""
    if value is None:
        return "missing"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:60]}... (sha256 {hashlib.sha256(text.encode()).hexdigest()[:8]})"


def _told(folder: Path) -> dict[str, dict[str, Any]]:
    """What a checkpoint says of its architecture and of how it reads text: by file and dotted key."""
    told: dict[str, dict[str, Any]] = {}
    for file in (CONFIG, "tokenizer.json", "vocab.json"):
        if (folder / file).is_file():
            kept = {k: v for k, v in read_object(folder / file).items() if k not in INDIFFERENT.get(file, ())}
            told[file] = dict(_leaves(kept))
    for file in ("tokenizer.model", "merges.txt"):
        if (folder / file).is_file():
            told[file] = {"its sha256": hashlib.sha256((folder / file).read_bytes()).hexdigest()}
    settings, template = folder / "tokenizer_config.json", folder / TEMPLATE
    read = read_object(settings) if settings.is_file() else {}
    told[settings.name] = {key: value for key, value in read.items() if key.endswith("_token")}
    told[TEMPLATE] = {"the text": template.read_text("utf-8") if template.is_file() else read.get("chat_template")}
    return told


def _leaves(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield above + key, value
