"""The benchmark's files: instructions, and outputs in AlpacaEval's own form.

An outputs file is a list of {"instruction", "output", "generator"}, JSON or a line each, one row an
instruction, in the benchmark's order and letter by letter: so the rows of two files belong together by
their place, which is checked. Nothing is fetched: every file is a path.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpalign.data.sources import Row, read_source, shorten
from dpalign.run.ledger import write_json


@dataclass(frozen=True)
class Outputs:
    """One answer to each instruction, by one system."""

    generator: str
    texts: tuple[str, ...]


def read_instructions(path: Path, limit: int | None = None) -> tuple[str, ...]:
    """The column `instruction` of a file of the benchmark, its first `limit` rows.

    Raises:
        ValueError: no rows, fewer than `limit`, or a row without an instruction.
    """
    instructions = tuple(row.text("instruction") for row in _rows(path))
    for i, instruction in enumerate(instructions):
        if not instruction.strip():
            raise ValueError(f"{path}: the instruction of row {i} is empty; there is nothing to answer")
    if limit is not None and limit > len(instructions):
        raise ValueError(f"{path}: {len(instructions)} instructions, and the first {limit} were asked for")
    return instructions[:limit]


def read_outputs(path: Path, instructions: Sequence[str], *, part: bool = False) -> Outputs:
    """A system's answers to exactly these instructions.

    An empty answer is one: the judge sees it. A missing one is an error.

    Args:
        part: the instructions are the first of more, so the file may go on after them.

    Raises:
        ValueError: a row too many or too few, an instruction that differs (its index and both texts), an answer that
            is no text, answers that are all empty, or rows of several generators.
    """
    rows = _rows(path)
    for i, (row, instruction) in enumerate(zip(rows, instructions, strict=False)):
        if (theirs := row.text("instruction")) != instruction:
            raise ValueError(
                _differs(path, i, theirs, instruction, [r.text("instruction") for r in rows], instructions)
            )
    if len(rows) < len(instructions) or (len(rows) > len(instructions) and not part):
        raise ValueError(
            f"{path}: {len(rows)} rows for {len(instructions)} instructions; one row an instruction is needed"
            + ("" if len(rows) < len(instructions) else " (--limit takes the first of them)")
        )
    rows = rows[: len(instructions)]
    texts = tuple(row.text("output") for row in rows)
    if not any(text.strip() for text in texts):
        raise ValueError(f"{path}: all {len(texts)} outputs are empty; was the model sampled at all?")
    generators = list(dict.fromkeys(row.text("generator") for row in rows if "generator" in row.values))
    if len(generators) > 1:
        raise ValueError(
            f"{path}: rows of several generators ({', '.join(generators[:3])}); give each a file of its own"
        )
    return Outputs(generators[0] if generators else path.stem, texts)


def write_outputs(path: Path, instructions: Sequence[str], texts: Sequence[str], generator: str) -> None:
    """Answers as AlpacaEval reads them (`--model_outputs`)."""
    pairs = zip(instructions, texts, strict=True)
    rows: list[dict[str, Any]] = [{"instruction": i, "output": text, "generator": generator} for i, text in pairs]
    write_json(path, rows)


def _rows(path: Path) -> list[Row]:
    rows = list(read_source(str(path), split="eval" if path.is_dir() else None))
    if not rows:
        raise ValueError(f"{path}: holds no rows")
    return rows


def _differs(
    path: Path, index: int, theirs: str, instruction: str, all_theirs: Sequence[str], instructions: Sequence[str]
) -> str:
    """Where two lists of instructions part: around the first letter that differs, if the texts begin alike."""
    at = next((k for k, (a, b) in enumerate(zip(theirs, instruction, strict=False)) if a != b), None)
    start = max(0, (min(len(theirs), len(instruction)) if at is None else at) - 40)
    cut = "..." if start else ""
    shown = [repr(cut + shorten(text[start:], 120)) for text in (theirs, instruction)]
    order = (
        "; they are the same instructions in another order: sort the rows"
        if sorted(all_theirs) == sorted(instructions)
        else "; instructions must be the benchmark's, letter by letter"
    )
    return f"{path}: the instruction at index {index} is {shown[0]}, and the benchmark's is {shown[1]}{order}"
