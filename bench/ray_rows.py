"""Sampling by one Ray actor against the same work in one process: what the pipeline itself costs, a shard.

The shards of both are checked to be the same bytes first. Timed is from the first shard's file to the last one's, so
that what is paid once a stage (Ray's start, the actor's, the model's loading) stands in the note and not in the ratio.
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dpalign import recipe
from dpalign.pipeline.runner import take
from dpalign.recipe import changed
from dpalign.rows import PROMPTS, prompt_id, user_prompt, write_rows
from dpalign.runs import folder as runs
from dpalign.stages.sample import sample
from dpalign.stages.stage import Step
from harness import THREADS, Row, Unable, main, ratio_of
from models import asked, write_policy

COMMAND = ".venv-heavy/bin/python bench/ray_rows.py"
PROMPT = 64
"""Tokens a prompt."""


def write_prompts(folder: Path, policy: Path, count: int) -> Path:
    """So many prompts of the same length, each a prompt of D1."""
    rows = []
    for seed in range(count):
        messages = user_prompt(asked(policy, PROMPT, [], seed=seed).messages[-1]["content"])
        rows.append({"prompt_id": prompt_id(messages), "messages": messages, "split": "D1"})
    write_rows(folder / "prompts" / "part-00000.parquet", rows, PROMPTS)
    return folder


def sampled(read: recipe.Recipe, folder: Path, inputs: dict[str, Path]) -> tuple[float, float, str]:
    """Seconds a shard, seconds before the first one, and a hash of the shards; the folder is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    began = time.time()
    with runs.Run.open(folder, None, {}) as run:
        take(read, run, Step("sample", sample, inputs, 1, "D1", "plain"))
    files = sorted((folder / "sample").glob("*.parquet"))
    ended = sorted(file.stat().st_mtime for file in files)
    each = (ended[-1] - ended[0]) / (len(ended) - 1)
    return each, ended[0] - began - each, hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def rows(quick: bool) -> Iterator[Row]:
    try:
        import ray
    except ModuleNotFoundError:
        raise Unable("Ray is not installed: pip install -e '.[ray]'") from None
    shards, rounds, new = (3, 2, 8) if quick else (8, 5, 64)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = write_policy(folder / "policy", quick)
        inputs = {"policy": policy, "data": write_prompts(folder / "data", policy, 2 * shards)}
        knobs = {
            "launcher": "inprocess",
            "threads": THREADS,
            "model.dtype": "float32",
            "model.chat": "world-v1",
            "sampling.shard": 2,
            "sampling.n": 16,
            "sampling.max_new_tokens": new,
        }
        alone = changed(recipe.Recipe(name="bench"), knobs)
        pooled = changed(alone, {"cluster.address": "local"})
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        try:
            seconds: dict[str, list[float]] = {"here": [], "there": []}
            before = []
            for r in range(rounds):
                sides = [("here", alone), ("there", pooled)]
                hashes = set()
                for side, read in sides if r % 2 == 0 else sides[::-1]:
                    each, first, digest = sampled(read, folder / side, inputs)
                    seconds[side].append(each)
                    hashes.add(digest)
                    before += [first] if side == "there" else []
                if len(hashes) != 1:
                    raise ValueError("the actor's shards have other bytes than the process's; nothing is reported")
        finally:
            ray.shutdown()
        yield Row(
            "sampling by one Ray actor, a shard",
            *ratio_of(seconds["here"], seconds["there"]),
            None,
            "the same shards in one process",
            COMMAND,
            note=f"1.00 is no overhead; once a stage {sorted(before)[len(before) // 2]:.0f} s before the first shard",
        )


if __name__ == "__main__":
    main(rows, "ray_rows")
