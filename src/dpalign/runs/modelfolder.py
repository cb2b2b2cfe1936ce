"""A model's folder as files, read without torch: its weights' headers, its special tokens, files that run code."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
TEMPLATE: Final = "chat_template.jinja"
GENERATION: Final = "generation_config.json"
TOKENIZER: Final = "tokenizer.json"
TOKENIZER_SETTINGS: Final = "tokenizer_config.json"
ADAPTER: Final = "adapter_config.json"

Kind = Literal["policy", "reward model"]
_ENDS: Final[Mapping[Kind, tuple[str, ...]]] = {
    "policy": ("ForCausalLM", "LMHeadModel"),
    "reward model": ("ForSequenceClassification",),
}
"""Endings of the architecture names of each kind."""

EMBEDDINGS: Final = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""Endings of the names of tensors with one row per token, by architecture."""
HEAD: Final = "score.weight"
"""A classifier's head, of shape (labels, width)."""
PICKLES: Final = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"})
"""Suffixes of files that may run code when they are loaded."""


@dataclass(frozen=True)
class Weights:
    """A checkpoint's weights, from their headers."""

    files: tuple[str, ...]
    tensors: int
    parameters: int
    bytes: int
    types: tuple[str, ...]
    """As the format names them: F32, BF16."""


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens that end an answer, fill a batch and start a text; None where the folder names none."""

    eos: str | None
    pad: str | None
    eos_id: int | None
    pad_id: int | None
    bos: str | None = None


@dataclass(frozen=True)
class Marks:
    """The tokens that a chat template may write, as text."""

    named: Mapping[str, str]
    """Those that a template knows by name, such as eos_token."""
    added: frozenset[str]
    """Each is one token, anywhere in a text."""
    special: frozenset[str]
    """Those among them that decoding leaves out."""

    @property
    def eos(self) -> str | None:
        return self.named.get("eos_token")


NAMED_TOKENS: Final = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""The names of the special tokens that a chat template gets."""


def require_weights(folder: Path) -> None:
    """Raise ValueError unless a folder holds a model's configuration and safetensors, with all files of its index."""
    if not (folder / CONFIG).is_file() or not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: a checkpoint folder needs config.json and *.safetensors; it holds no weights")
    if (folder / INDEX).is_file():
        weights_files(folder)


def require_kind(config: Mapping[str, Any], kind: Kind, source: object) -> None:
    """Refuse a model of the other kind, by the architectures that its configuration names.

    Raises:
        ValueError: names them.
    """
    named = [str(name) for name in config.get("architectures") or []]
    found = {one for one, ends in _ENDS.items() for name in named if name.endswith(ends)}
    if found and kind not in found:
        (other,) = found
        raise ValueError(
            f"{source}: a {other} ({', '.join(named)} in {CONFIG}), where a {kind} is needed; give another folder"
        )


def weights_files(folder: Path) -> list[str]:
    """The names of a checkpoint's weights files, as transformers finds them.

    Raises:
        ValueError: no whole checkpoint, or a file that the index names is missing.
    """
    if not (folder / CONFIG).is_file() or not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        raise ValueError(
            f"{folder}: no folder with {CONFIG} and {WEIGHTS} (or {INDEX}); merge an adapter into its model first, "
            "and download what a hub holds"
        )
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    files = sorted(set(index_of(folder).values()))
    for file in files:
        if Path(file).name != file or not (folder / file).is_file():
            raise ValueError(f"{folder / INDEX}: names {file!r}, which is not in its folder")
    return files


def index_of(folder: Path) -> dict[str, str]:
    """The file of each tensor in a divided checkpoint; empty for an undivided one."""
    if (folder / WEIGHTS).is_file():
        return {}
    named: dict[str, str] = read_object(folder / INDEX).get("weight_map", {})
    return named


def check_weights(folder: Path) -> Weights:
    """Check that every file is whole and every tensor is where the index says; returns what the headers say.

    Raises:
        ValueError: no weights; a file that is no safetensors, cut short or too long; an index that does not fit.
    """
    headers = _headers(folder)
    tensors = [tensor for header in headers.values() for tensor in header.values()]
    return Weights(
        tuple(headers),
        len(tensors),
        sum(math.prod(shape) for _, shape in tensors),
        sum((folder / file).stat().st_size for file in headers),
        tuple(sorted({kind for kind, _ in tensors})),
    )


def _headers(folder: Path) -> dict[str, dict[str, tuple[str, list[int]]]]:
    """The headers of a checkpoint's weights, by file; see `check_weights`."""
    headers = {file: read_header(folder / file) for file in weights_files(folder)}
    for name, file in index_of(folder).items():
        if name not in headers[file]:
            raise ValueError(f"{folder / INDEX}: says that {file} holds {name}; it does not")
    return headers


def require_fit(folder: Path) -> None:
    """Check that weights are whole, and of the sizes that the folder's configuration and tokenizer say.

    Raises:
        ValueError: names the file, both sizes and the cure.
    """
    tensors = {name: shape for header in _headers(folder).values() for name, (_, shape) in header.items()}
    config = read_object(folder / CONFIG)
    size, labels = config.get("vocab_size"), label_names(config)
    if not isinstance(size, int):  # a model of several parts, each with a configuration of its own
        return
    cure = "write the model again, or fetch it again"
    for name, shape in tensors.items():
        if name.endswith(EMBEDDINGS) and shape[0] != size:
            raise ValueError(f"{folder / CONFIG}: vocab_size is {size}, and {name} has {shape[0]} rows; {cure}")
        if name == HEAD and labels and shape[0] != len(labels):
            raise ValueError(f"{folder / CONFIG}: id2label names {len(labels)}, and {name} has {shape[0]} rows; {cure}")
    if not (folder / TOKENIZER).is_file():
        return
    # An added token may lie beyond the vocabulary if no text has it, as Gemma's soft image token does.
    ids, own = vocabulary(folder), vocabulary(folder, added=False)
    for token in (*own, *_named_tokens(folder).values()):
        if ids.get(token, 0) >= size:
            raise ValueError(f"{folder / TOKENIZER}: {token!r} is token {ids[token]} of a model of {size}; {cure}")


def read_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """A safetensors file's tensors by name: (type, shape). The tensors themselves are not read.

    Raises:
        ValueError: it is not a safetensors file, or its size is not what its header says.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            return {name: (tensor.get_dtype(), tensor.get_shape()) for name, tensor in tensors.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}): fetch or write it again") from error


def pickles_in(folder: Path) -> list[str]:
    """The names of the folder's files that may run code when they are loaded."""
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix.lower() in PICKLES)


def require_unpickled(folder: Path) -> None:
    """Raise ValueError if all weights of a folder are pickled."""
    pickles = pickles_in(folder)
    if pickles and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder / pickles[0]}: pickled weights, which run code when they are loaded; fetch or save the model as "
            "safetensors (save_pretrained does)"
        )


def special_tokens(folder: Path) -> SpecialTokens:
    """The special tokens that the tokenizer's files name; ids by its tokenizer.json, None without one."""
    named = _named_tokens(folder)
    eos, pad = named.get("eos_token"), named.get("pad_token")
    ids = vocabulary(folder) if (folder / TOKENIZER).is_file() else {}
    return SpecialTokens(eos, pad, ids.get(eos or ""), ids.get(pad or ""), named.get("bos_token"))


def read_marks(folder: Path) -> Marks:
    """The tokens of a folder's tokenizer that a chat template may write."""
    listed: list[Mapping[str, Any]] = []
    if (folder / TOKENIZER).is_file():
        listed = read_object(folder / TOKENIZER).get("added_tokens") or []
    elif (folder / TOKENIZER_SETTINGS).is_file():
        listed = list((read_object(folder / TOKENIZER_SETTINGS).get("added_tokens_decoder") or {}).values())
    named = _named_tokens(folder)
    special = {str(token["content"]) for token in listed if token.get("special")} | set(named.values())
    return Marks(named, frozenset({str(token["content"]) for token in listed} | special), frozenset(special))


def _named_tokens(folder: Path) -> dict[str, str]:
    path, more = folder / TOKENIZER_SETTINGS, folder / "special_tokens_map.json"
    settings: dict[str, Any] = {}
    for file in (more, path):
        settings |= read_object(file) if file.is_file() else {}
    named = {name: _text_of(settings.get(name)) for name in NAMED_TOKENS}
    return {name: token for name, token in named.items() if token is not None}


def vocabulary(folder: Path, added: bool = True) -> dict[str, int]:
    """The ids of a tokenizer.json's tokens, with its added tokens unless `added` is false."""
    tokenizer = read_object(folder / TOKENIZER)
    tokens = (tokenizer.get("model") or {}).get("vocab") or {}
    ids = dict(tokens) if isinstance(tokens, Mapping) else {token: i for i, (token, *_) in enumerate(tokens)}
    more = tokenizer.get("added_tokens") or [] if added else []
    return ids | {token["content"]: token["id"] for token in more}


def template_of(folder: Path) -> str | None:
    """The text of the folder's chat template, as transformers finds it; None where there is none."""
    path = folder / TEMPLATE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    settings = folder / TOKENIZER_SETTINGS
    template = read_object(settings).get("chat_template") if settings.is_file() else None
    if isinstance(template, list):
        template = next((one.get("template") for one in template if one.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(read, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return read


def label_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a classifier's labels in its config.json, in order: a reward model's heads."""
    named = config.get("id2label") or {}
    try:
        return tuple(str(named[key]) for key in sorted(named, key=int))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{CONFIG}: id2label is {named!r}; give each label its number") from error


def _text_of(token: object) -> str | None:
    """The text of a special token, which is a string or an object with its content."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def walk(folder: Path) -> Iterator[Path]:
    """All files of a folder, at any depth, in order."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
