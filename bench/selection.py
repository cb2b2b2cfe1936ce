"""Scored answers of the paper's scale, ranked anew for other directions: `dpa select` on files, against a data frame.

An iteration of the paper has 30,720 prompts by 80 answers: 2.46 million, each with ten rewards. Each side is a process
of its own, timed from its start to its end; its memory is the most that the process held.
"""

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa

from dpalign.paper.direction import rng_for
from dpalign.recipe import Recipe
from dpalign.rows import CANDIDATES, CONVERSATIONS, HEADS, PROMPTS, RATED, SCORES, read_table, write_table
from dpalign.stages.preference import Steering
from dpalign.stages.select import Selection
from harness import BENCH, Row, equal, main, ratio_of

COMMAND = "python bench/selection.py"
ANSWERS = 80
SHARD = 256
LETTERS = 1200
"""Of an answer of 300 tokens."""


@dataclass(frozen=True)
class Took:
    seconds: float
    cpu_seconds: float
    """Of all its threads: what the same would take on a machine with nothing else to do, or less."""
    gigabytes: float


def rows(quick: bool) -> Iterator[Row]:
    shards, part, rounds = (4, 2, 1) if quick else (120, 16, 3)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        recipe = asked_anew(root)
        for shard in range(shards):
            write_shard(root / "whole", shard)
            if shard < part:
                write_shard(root / "part", shard)
        for name, prompts in (("whole", shards * SHARD), ("part", part * SHARD)):
            write_data(root / name, prompts)
        answers = shards * SHARD * ANSWERS
        runs = [select(root / "whole", recipe, f"anew-{i}") for i in range(rounds)]
        seconds, gigabytes = ([getattr(run, what) for run in runs] for what in ("seconds", "gigabytes"))
        what = f"{answers / 1e6:.2f} million answers x {len(HEADS)} heads ranked anew"
        cpu = float(np.median([run.cpu_seconds for run in runs]))
        note = f"answers of {LETTERS} letters, {size(root / 'whole') / 1e9:.1f} GB on disk; from start to written rows"
        yield _figure(f"{what}, seconds", seconds, 20.0, "s", f"{note}; {cpu:.1f} s of one processor")
        yield _figure(f"{what}, most memory", gigabytes, 1.0, "GB", "")
        if find_spec("pandas"):
            yield against_a_data_frame(root / "part", recipe, rounds, part * SHARD * ANSWERS)


def _figure(name: str, measured: list[float], target: float, unit: str, note: str) -> Row:
    return Row(
        name,
        float(np.median(measured)),
        min(measured),
        max(measured),
        target,
        "no peer: a limit",
        COMMAND,
        note,
        unit,
        True,
    )


def against_a_data_frame(root: Path, recipe: Path, rounds: int, answers: int) -> Row:
    """The same choice by pandas, on fewer answers: of all of them it needs more memory than most machines have."""
    ours, theirs = [], []
    for i in range(rounds):
        out = root / f"plain-{i}.parquet"
        ours.append(select(root, recipe, f"anew-{i}", "--replay", "0"))
        theirs.append(process(root, "plain_selection", str(recipe), str(root), str(out)))
        chosen = read_table(root / f"anew-{i}", CONVERSATIONS, ["response"])["response"].to_pylist()
        plain = pa.parquet.read_table(out)["response"].to_pylist()
        equal([a == b for a, b in zip(chosen, plain, strict=True)], [True] * len(plain), 0, "chosen answers")
    ratio, low, high = ratio_of([run.seconds for run in theirs], [run.seconds for run in ours])
    note = f"memory {theirs[0].gigabytes:.2f} GB against {ours[0].gigabytes:.2f} GB"
    name = f"{answers / 1e6:.2f} million answers ranked anew"
    return Row(name, ratio, low, high, None, "pandas: read, merge, group by prompt", COMMAND, note)


def select(root: Path, recipe: Path, name: str, *words: str) -> Took:
    """`dpa select`, the whole command."""
    inputs = {"candidates": "sample", "scores": "score", "data": "data", "annotate": "annotate"}
    given = [word for key, folder in inputs.items() for word in (f"--{key}", str(root / folder))]
    asked = ["--out", str(root / name), "--t", "2", "--half", "D1"]
    return process(root, "dpalign", "select", str(recipe), *asked, *given, *words)


def process(root: Path, module: str, *words: str) -> Took:
    """A module in a process of its own: how long it took, and the most memory that it held."""
    peak = root / "peak"
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(BENCH / "watched.py"), str(peak), module, *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise ValueError(f"{module} ended with code {ended.returncode}: {ended.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Took(time.perf_counter() - start, cpu_seconds, int(peak.read_text()) * 1024 / 1e9)


def asked_anew(root: Path) -> Path:
    """A recipe whose directions are others than those of the answers: all of a prompt's answers serve them."""
    recipe = Recipe(
        name="anew", preference=Steering(low=-60.0, high=10.0, stratified=True), selection=Selection(reach=180.0)
    )
    path = root / "anew.toml"
    path.write_text(recipe.to_toml())
    return path


def prompt_ids(first: int, count: int) -> list[str]:
    return [f"{i:016x}" for i in range(first, first + count)]


def texts(rng: np.random.Generator, count: int, letters: int) -> list[str]:
    """Stretches of one long random text: all differ, and take little room on disk."""
    whole = rng_for(0, "text").integers(97, 123, size=1_000_000, dtype=np.uint8).tobytes().decode()
    return [whole[i : i + letters] for i in rng.integers(0, len(whole) - letters, size=count).tolist()]


def write_shard(root: Path, shard: int) -> None:
    """CANDIDATES and SCORES of 256 prompts by 80 answers, 1 in 50 of them cut."""
    rng = rng_for(0, "shard", shard)
    count = SHARD * ANSWERS
    ids = np.repeat(prompt_ids(shard * SHARD, SHARD), ANSWERS)
    number = np.tile(np.arange(ANSWERS, dtype=np.int32), SHARD)
    keys = {"prompt_id": ids, "t": np.full(count, 2, np.int32), "condition_index": number // 16, "sample": number % 16}
    condition = pa.FixedSizeListArray.from_arrays(pa.array(rng.random(2 * count, np.float32)), 2)
    candidates = keys | {
        "condition_kind": ["direction"] * count,
        "condition": condition.cast(CANDIDATES.field("condition").type),
        "messages": pa.nulls(count, CANDIDATES.field("messages").type),  # not read
        "response": texts(rng, count, LETTERS),
        "tokens": np.full(count, 300, np.int32),
        "finished": rng.random(count) > 0.02,
    }
    rewards = pa.FixedSizeListArray.from_arrays(
        pa.array(rng.uniform(0, 100, len(HEADS) * count).astype(np.float32)), len(HEADS)
    )
    scores = keys | {"rewards": rewards.cast(SCORES.field("rewards").type)}
    write_table(root / "sample" / f"part-{shard:05d}.parquet", pa.table(candidates, schema=CANDIDATES))
    write_table(root / "score" / f"part-{shard:05d}.parquet", pa.table(scores, schema=SCORES))


def write_data(root: Path, prompts: int) -> None:
    """The prompts, each with four rated answers to replay."""
    rng = rng_for(0, "data")
    ids = prompt_ids(0, prompts)
    messages = [[{"role": "user", "content": text}] for text in texts(rng, prompts, 900)]
    write_table(
        root / "data" / "prompts" / "part-00000.parquet",
        pa.table({"prompt_id": ids, "messages": messages, "split": ["D1"] * prompts}, schema=PROMPTS),
    )
    for fourth in range(4):
        rated = {
            "prompt_id": ids,
            "messages": messages,
            "response": texts(rng, prompts, LETTERS),
            "source": ["ultrafeedback"] * prompts,
            "labels": [dict.fromkeys(HEADS, 50.0)] * prompts,
        }
        scored = {
            "prompt_id": ids,
            "t": [0] * prompts,
            "condition_index": [0] * prompts,
            "sample": [fourth] * prompts,
            "rewards": rng.uniform(0, 100, (prompts, len(HEADS))).astype(np.float32).tolist(),
        }
        write_table(root / "data" / "train" / f"part-{fourth:05d}.parquet", pa.table(rated, schema=RATED))
        write_table(root / "annotate" / f"part-{fourth:05d}.parquet", pa.table(scored, schema=SCORES))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.parquet"))


if __name__ == "__main__":
    main(rows, "selection")
