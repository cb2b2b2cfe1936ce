"""The judging of one system at one direction, as a stage of the folder; and what is still to be paid for."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from dpalign.run.folder import Run
from dpalign.run.ledger import hash_of, write_text
from dpalign.stages.alpaca.benchmark import Outputs, read_instructions, read_outputs
from dpalign.stages.alpaca.judge import Judge, Pair, key_of
from dpalign.stages.alpaca.judging import judge_pairs, judged_rows, pending
from dpalign.stages.alpaca.store import Store
from dpalign.stages.alpaca.systems import OUTPUTS, Point
from dpalign.stages.alpaca.winrate import Answers

VERSION: Final = 1
JUDGEMENTS: Final = "judgements.jsonl"
TOKEN: Final = 4
"""Characters a token, roughly, of English text."""


@dataclass(frozen=True)
class Task:
    """The answers of one point, and what they are compared with."""

    point: Point
    source: Path
    """Where the instructions are read."""
    reference: Path
    limit: int | None

    @property
    def stage(self) -> str:
        return f"judge-{self.point.slug}"

    def pairs(self) -> list[Pair]:
        """The point's answers beside the reference's.

        Raises:
            ValueError: files that do not belong together.
        """
        assert self.point.outputs is not None
        instructions = read_instructions(self.source, self.limit)
        part = self.limit is not None
        return pairs_of(
            instructions,
            read_outputs(self.point.outputs, instructions, part=part),
            read_outputs(self.reference, instructions, part=part),
        )


def pairs_of(instructions: Sequence[str], outputs: Outputs, reference: Outputs) -> list[Pair]:
    texts = zip(instructions, outputs.texts, reference.texts, strict=True)
    return [Pair(i, *row) for i, row in enumerate(texts)]


def open_store(folder: Path, judge: Judge) -> Store:
    """The judgements of a judge in a folder: a file by its name, and by all that its judgements depend on."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", judge.name).strip("-.") or "judge"
    return Store(folder / f"{name}-{hash_of(dict(judge.identity))[:8]}.jsonl")


def judge_point(run: Run, task: Task, judge: Judge, store: Store, *, retry_failed: bool = False) -> None:
    """Take a point's stage unless it is done: ask for what the store lacks, and write what came of it.

    Raises:
        ValueError: files that do not belong together, or a judge that cannot be asked; the store keeps what there is.
    """
    assert task.point.outputs is not None
    pairs = task.pairs()
    keys = [key_of(judge.identity, pair) for pair in pairs]
    if retry_failed and (again := store.ask_again(keys)):
        run.log(f"{task.stage}: {again} failed judgements are asked for again")
    knobs: dict[str, Any] = {"judge": dict(judge.identity), "instructions": len(pairs)}
    if asked_again := sum(store.again[key] for key in dict.fromkeys(keys)):
        knobs["asked_again"] = asked_again
    inputs = {"outputs": task.point.outputs, "reference": task.reference, "instructions": task.source}
    with run.stage(task.stage, VERSION, {name: path.resolve() for name, path in inputs.items()}, knobs) as work:
        if work.done:
            return
        asked = judge_pairs(pairs, judge, store, task.point.name)
        rows = judged_rows(pairs, judge.identity, store)
        write_text(work.folder / JUDGEMENTS, "".join(f"{json.dumps(row.to_json())}\n" for row in rows))
        failed = Counter(kind_of(row.reason) for row in rows if row.preference is None)
        work.tally.add(len(rows), len(rows) - failed.total(), failed, scored=asked)


def kind_of(reason: str) -> str:
    """A failure's reason without its particulars, so that equal ones are counted together."""
    return reason.partition(":")[0]


def read_answers(path: Path, name: str) -> Answers:
    """What a point's judging left.

    Raises:
        ValueError: nothing was judged, or a preference or a length that is none.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return Answers(
        name,
        np.array([np.nan if row["preference"] is None else row["preference"] for row in rows], dtype=np.float64),
        np.array([row["length"] for row in rows], dtype=np.float64),
        np.array([row["reference_length"] for row in rows], dtype=np.float64),
        Counter(kind_of(row["reason"]) for row in rows if row["preference"] is None),
    )


def read_failures(path: Path) -> list[tuple[int, str]]:
    """(index of the instruction, reason) of every judgement that failed."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(row["index"], row["reason"]) for row in rows if row["preference"] is None]


def forecast(
    out: Path,
    points: Sequence[Point],
    instructions: Sequence[str],
    reference: Outputs | None,
    judge: Judge | None,
    judgements: Path,
) -> str:
    """What is still to be drawn and to be asked, and how long the judge's prompts are; touches nothing."""
    store = None if judge is None else open_store(judgements, judge)
    lines, to_ask, characters = [], 0, 0
    for point in points:
        outputs = _outputs_of(point, out, instructions)
        said = f"{len(instructions)} answers to draw" if outputs is None else "answers are there"
        if judge is not None and store is not None and reference is not None:
            pairs = pairs_of(instructions, outputs or reference, reference)
            todo = pairs if outputs is None else pending(pairs, judge.identity, store)
            to_ask += len(todo)
            characters += sum(len(pair.instruction) + len(pair.output) + len(pair.reference) for pair in todo)
            said += f", {len(todo)} judgements to ask for"
        lines.append(f"{point.name}: {said}")
    if judge is not None:
        lines.append(
            f"judge {judge.name}: {to_ask} requests, about {characters // TOKEN:,} tokens of instructions and answers "
            f"({TOKEN} characters a token; answers not drawn yet counted as long as the reference's), beside "
            "the prompt's own and one token each of answer"
        )
    return "\n".join(lines)


def _outputs_of(point: Point, out: Path, instructions: Sequence[str]) -> Outputs | None:
    """The point's answers to these instructions; None where they are yet to be drawn."""
    if point.outputs is not None:
        return read_outputs(point.outputs, instructions, part=True)
    try:
        return read_outputs(out / f"outputs-{point.slug}" / OUTPUTS, instructions)
    except ValueError:
        return None
