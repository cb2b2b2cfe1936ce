"""What every model's folder must have: whole weights, nothing pickled, special tokens that agree."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpalign.dial.doctor.findings import Finding
from dpalign.page.words import listed, size
from dpalign.run.modelfolder import (
    GENERATION,
    TOKENIZER,
    check_weights,
    pickles_in,
    read_object,
    special_tokens,
    vocabulary,
)


@dataclass(frozen=True)
class Folder:
    """A model's folder with its configuration."""

    path: Path
    config: dict[str, Any]


def checked(folder: Folder, **checks: Callable[[Folder], Finding | None]) -> Iterator[Finding]:
    """What each check says; one that cannot be made is a finding too, and the others are made all the same."""
    for what, check in checks.items():
        try:
            finding = check(folder)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            finding = Finding("bad", what, said, "export the model again, or fetch it again")
        if finding is not None:
            yield finding


def weights(folder: Folder) -> Finding:
    try:
        found = check_weights(folder.path)
    except ValueError as error:
        mend = "save it as safetensors: save_pretrained does" if pickles_in(folder.path) else "fetch or write it again"
        return Finding("bad", "weights", str(error), mend)
    files = found.files[0] if len(found.files) == 1 else f"{len(found.files)} files"
    said = f"{found.parameters:,} parameters, {'/'.join(found.types)}, {size(found.bytes)} in {files}, whole"
    return Finding("ok", "weights", said)


def pickles(folder: Folder) -> Finding | None:
    names = pickles_in(folder.path)
    if not names:
        return None
    return Finding(
        "bad",
        "pickles",
        f"{listed(names)}: files that run code when they are loaded; nothing needs them",
        f"rm {' '.join(str(folder.path / name) for name in names)}",
    )


def special(folder: Folder) -> Finding:
    """Special tokens that are there, agree with the configuration, and lie within the model's vocabulary."""
    tokens, config = special_tokens(folder.path), folder.config
    reward = "id2label" in config and any("Classification" in str(one) for one in config["architectures"])
    wrong: list[str] = []
    remarks: list[str] = []
    if tokens.eos is None:
        wrong.append("no eos_token, with which an answer could end")
    if (folder.path / TOKENIZER).is_file():
        ids = vocabulary(folder.path)
        for what, token in (("eos", tokens.eos), ("pad", tokens.pad)):
            if token is not None and token not in ids:
                wrong.append(f"{what}_token {token!r} is not in the vocabulary")
        if ids and max(ids.values()) >= int(config.get("vocab_size") or 0):
            wrong.append(f"token {max(ids.values())} for a model of {config.get('vocab_size')} tokens")
    ends = _ids(_generation(folder).get("eos_token_id")) or _ids(config.get("eos_token_id"))
    if tokens.eos_id is not None and ends and tokens.eos_id not in ends:
        wrong.append(f"eos_token is token {tokens.eos_id}, but the model stops at {sorted(ends)}")
    if tokens.pad is None:
        (wrong if reward else remarks).append("no pad_token: answers can be drawn one at a time only")
    elif tokens.pad == tokens.eos:
        same = "pad_token is the eos_token"
        (wrong if reward else remarks).append(
            f"{same}: the score is read at the last token that is no pad"
            if reward
            else f"{same}: fine to ask, not to train"
        )
    if reward and tokens.pad_id is not None and config.get("pad_token_id") != tokens.pad_id:
        wrong.append(f"pad_token is token {tokens.pad_id}, but pad_token_id is {config.get('pad_token_id')}")
    if wrong:
        return Finding("bad", "tokens", "; ".join(wrong), "mend tokenizer_config.json and config.json")
    said = f"an answer ends with {tokens.eos!r}" if not reward else "eos and pad differ, as scoring needs it"
    if remarks:
        return Finding("note", "tokens", "; ".join([said, *remarks]))
    return Finding("ok", "tokens", f"{said}, pad is {tokens.pad!r}")


def _ids(said: object) -> set[int]:
    return set(said) if isinstance(said, list) else {said} if isinstance(said, int) else set()


def _generation(folder: Folder) -> dict[str, Any]:
    path = folder.path / GENERATION
    return read_object(path) if path.is_file() else {}


def sampling(folder: Folder) -> Finding | None:
    settings = _generation(folder)
    if settings.get("do_sample") and settings.get("top_k") != 0:
        said = (
            f"top_k is {settings.get('top_k', 'not set, which means 50')}: fewer tokens to draw from than in training"
        )
        return Finding("note", "sampling", said, f'"top_k": 0 in {folder.path / GENERATION}')
    if not settings.get("do_sample"):
        said = "answers greedily unless it is told to sample (an export says how it was evaluated)"
        return Finding("note", "sampling", said)
    return None
