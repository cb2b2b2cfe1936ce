"""Names on the model hub: a revision after an @, and the commit of a name when it was read."""

import re
from pathlib import Path
from typing import Final, Literal

_NAMED: Final = re.compile(r"(?P<name>(?:\w[\w.-]*/)?\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
NOT_READ: Final = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "original/*", "consolidated*"]
"""Weights in formats that are not read."""


def may_be_named(source: str) -> bool:
    """Whether a text can be a name on the hub: OWNER/NAME, or NAME for the oldest models; a revision may follow."""
    return _NAMED.fullmatch(source) is not None


def revised(source: str) -> tuple[str, str | None]:
    """The name and the revision of NAME@REVISION: a branch, a tag or a commit. Paths and plain names have none."""
    named = _NAMED.fullmatch(source)
    if named is None or Path(source).exists():
        return source, None
    return named["name"], named["revision"]


def local_model(source: str) -> str:
    """The source to load a model from: for NAME@REVISION its fetched folder in the hub's cache, else unchanged.

    Raises:
        ValueError: the hub has no such revision, or cannot be reached.
    """
    name, revision = revised(source)
    if revision is None:
        return source
    try:
        from huggingface_hub import snapshot_download

        return str(snapshot_download(name, revision=revision, ignore_patterns=NOT_READ))
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"{source}: not fetched from the hub, nor in its cache ({error}); check both names") from error


def commit_of(source: str, kind: Literal["model", "dataset"]) -> str | None:
    """The commit of a name on the hub, by the local cache; None for paths, and for names that the cache lacks."""
    name, revision = revised(source)
    if not _NAMED.fullmatch(source) or Path(source).exists():
        return None
    if revision and _COMMIT.fullmatch(revision):
        return revision
    try:
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name
    except ImportError:
        return None
    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)
    path = cache / "refs" / (revision or "main")
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None
