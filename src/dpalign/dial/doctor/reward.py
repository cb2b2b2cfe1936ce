"""A reward model's folder: a plain classifier of k scores, each with a name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dpalign.dial.doctor.files import Folder, checked, pickles, special, weights
from dpalign.dial.doctor.findings import Finding
from dpalign.run.modelfolder import label_names, read_header, weights_files

SCORE: Final = "score.weight"
"""A classifier's head, of shape (labels, width)."""


def reward_model(folder: Folder) -> Iterator[Finding]:
    yield from checked(folder, weights=weights, pickles=pickles, tokens=special, labels=_labels)


def _labels(folder: Folder) -> Finding:
    """k labels, each with a name, as many as the head has rows."""
    names = label_names(folder.config)
    rows = _score_rows(folder.path)
    mend = "train it with dpa reward, or set id2label and problem_type in config.json"
    if not names:
        return Finding("bad", "labels", "no id2label: what the scores mean is not on record", mend)
    if rows is not None and rows != len(names):
        return Finding("bad", "labels", f"{len(names)} names for {rows} scores", mend)
    kind = folder.config.get("problem_type")
    if kind != "regression":
        said = f"problem_type is {kind!r}: servers would squeeze the scores through an activation"
        return Finding("bad", "labels", said, '"problem_type": "regression" in config.json')
    if all(name.startswith("LABEL_") for name in names):
        return Finding(
            "note", "labels", f"{len(names)} scores without names of their own; objectives name them by index"
        )
    return Finding("ok", "labels", f"{len(names)}: {', '.join(names)}")


def _score_rows(folder: Path) -> int | None:
    for file in weights_files(folder):
        header = read_header(folder / file)
        if SCORE in header:
            return int(header[SCORE]["shape"][0])
    return None
