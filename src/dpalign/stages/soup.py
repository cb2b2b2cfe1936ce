"""The evaluation of rewarded soups (section 2.3): a mixture of the experts for each direction.

The directions are taken one after the other, each process with one mixture at a time on disk and in memory: their
answers lie in the stage's scratch until all are drawn. Then they are put together by prompt and scored, so that the
stage's outputs are those of an evaluated policy with a dial.

Shapes: V directions, E experts, K objectives.
"""

import json
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dpalign.engines.engine import Engine
from dpalign.recipe import Recipe
from dpalign.rows import CANDIDATES, read_rows, write_rows
from dpalign.run.folder import Shard, Tally, write_json
from dpalign.run.ledger import TIMES
from dpalign.run.shards import Id, make_shards, named
from dpalign.stages.evaluate import (
    ANSWERS,
    evaluation_directions,
    evaluation_prompts,
    open_scorers,
    part_of,
    shards_of,
    write_scored,
)
from dpalign.stages.reward import scored_rows
from dpalign.stages.sample import Condition, draw, open_engine, open_reader
from dpalign.stages.stage import Job
from dpalign.stages.training import model_folder
from dpalign.train.mixtures import mixture_weights
from dpalign.train.soups import bytes_of, mix

Array = NDArray[np.float64]
Row = dict[str, Any]

DRAWN: Final = "drawn-{:05d}.parquet"
"""The answers of a part of the prompts for a direction, in the stage's scratch."""
SWITCHED: Final = "switched-{:03d}.json"
"""Beside them: the seconds that a switch to a direction took."""


def evaluate_soup(job: Job) -> None:
    """Mix the experts for each direction, sample the mixtures plainly on the validation prompts, score the answers.

    `soup.json` says the mixtures' weights, and the bytes of all experts against those of one model; `times.json` the
    seconds of a switch to each direction.
    """
    _describe(job)
    make_shards(job, DrawingMixtures)
    make_shards(replace(job, inputs={**job.inputs, "drawn": job.work.resume}), ScoringMixtures)
    switches = [json.loads(path.read_text()) for path in sorted(job.work.resume.glob("switched-*.json"))]
    write_json(
        job.out / TIMES, {"switch_seconds": {str(switch["direction"]): switch["seconds"] for switch in switches}}
    )


class DrawingMixtures:
    """The answers for all directions as shards: all parts of the prompts for the first of them, then for the next."""

    name = f"resume/{DRAWN}"

    def __init__(self, job: Job) -> None:
        self.job, self.experts = job, experts_of(job)
        self.v_VK, self.w_VE = mixtures_of(job.recipe)
        self.prompts = evaluation_prompts(job, open_reader(job.recipe, str(self.experts[0])))
        self.parts = shards_of(job.recipe, self.prompts)
        self.count = len(self.v_VK) * self.parts
        self.mixed: int | None = None
        self.engine: Engine | None = None

    def open(self) -> None:
        """Nothing yet: a shard says of which mixture."""

    def make(self, shard: Shard) -> None:
        v, prompts = self._asked(shard.index)
        write_rows(shard.path, self._rows(v, prompts, shard.tally), CANDIDATES)

    def one_by_one(self, index: int) -> Iterator[str]:
        v, prompts = self._asked(index)
        for prompt in prompts:
            yield named(prompt)
            deque(self._rows(v, [prompt], Tally()), maxlen=0)

    def ids(self, index: int) -> list[Id]:
        v, prompts = self._asked(index)
        return [(p["prompt_id"], v, sample) for p in prompts for sample in range(self.job.recipe.evaluation.samples)]

    def _asked(self, index: int) -> tuple[int, Sequence[Row]]:
        """The direction of a shard, and its prompts."""
        v, part = divmod(index, self.parts)
        return v, part_of(self.job.recipe, self.prompts, part)

    def _rows(self, v: int, prompts: Sequence[Row], tally: Tally) -> Iterator[Row]:
        job, recipe = self.job, self.job.recipe
        v_K = tuple(self.v_VK[v].tolist())
        condition = Condition("direction", v_K, None)  # asked of the weights, not of the prompt
        return draw(
            self._engine(v),
            recipe,
            [(prompt, [condition]) for prompt in prompts],
            recipe.evaluation.samples,
            recipe.evaluation.temperature,
            key=(recipe.seed, "evaluate"),
            t=job.t,
            tally=tally,
            first=v,
        )

    def _engine(self, v: int) -> Engine:
        """The engine of a direction's mixture, which is made where the last one was of another."""
        if self.engine is None or self.mixed != v:
            self.engine = None  # its memory is given back before the next is read
            mixture, began = self.job.work.resume / "mixture", time.monotonic()
            shutil.rmtree(mixture, ignore_errors=True)
            mix(self.experts, self.w_VE[v], mixture)
            self.engine, self.mixed = open_engine(self.job.recipe, str(mixture), alone=True), v
            shutil.rmtree(mixture)
            seconds = round(time.monotonic() - began, 3)
            write_json(self.job.work.resume / SWITCHED.format(v), {"direction": v, "seconds": seconds})
        return self.engine


class ScoringMixtures:
    """The answers for all directions put together and scored, as shards of prompts."""

    name = ANSWERS

    def __init__(self, job: Job) -> None:
        self.job = job
        self.directions = len(evaluation_directions(job.recipe))
        self.count = len(list(job.inputs["drawn"].glob("drawn-*.parquet"))) // self.directions

    def open(self) -> None:
        self.scorers = open_scorers(self.job)

    def make(self, shard: Shard) -> None:
        write_scored(self.job, shard, self._rows(shard.index), self.scorers)

    def one_by_one(self, index: int) -> Iterator[str]:
        for _, answers in groupby(self._rows(index), key=lambda row: row["prompt_id"]):
            rows = list(answers)
            yield named(rows[0])
            for scorer in self.scorers.values():
                scored_rows(scorer, rows)

    def ids(self, index: int) -> list[Id]:
        return [(row["prompt_id"], row["condition_index"], row["sample"]) for row in self._rows(index)]

    def _rows(self, index: int) -> list[Row]:
        """A prompt's answers together, in the order of direction and sample."""
        files = [self.job.inputs["drawn"] / DRAWN.format(v * self.count + index) for v in range(self.directions)]
        drawn = [list(read_rows(file, CANDIDATES)) for file in files]
        samples = self.job.recipe.evaluation.samples
        starts = range(0, len(drawn[0]), samples)
        return [row for start in starts for rows in drawn for row in rows[start : start + samples]]


def experts_of(job: Job) -> list[Path]:
    """The experts' checkpoints, in the order of `soups.experts`: expert-1 is its first direction.

    Raises:
        ValueError: other experts than expert-1 to expert-N for N directions; a folder without weights.
    """
    given = [name for name in job.inputs if name.startswith("expert-")]
    wanted = [f"expert-{e}" for e in range(1, len(job.recipe.soups.experts) + 1)]
    if set(given) != set(wanted):
        raise ValueError(
            f"soups.experts has {len(wanted)} directions, which are those of {', '.join(wanted)}; given are "
            f"{', '.join(given) or 'none'}"
        )
    return [Path(model_folder(job.inputs[name])) for name in wanted]


def mixtures_of(recipe: Recipe) -> tuple[Array, Array]:
    """The evaluated directions (V, K), and how much of each expert they take (V, E)."""
    v_VK = evaluation_directions(recipe)
    return v_VK, np.array([mixture_weights(v_K, recipe.soups.experts) for v_K in v_VK])


def _describe(job: Job) -> None:
    sizes = [bytes_of(expert) for expert in experts_of(job)]
    v_VK, w_VE = mixtures_of(job.recipe)
    write_json(
        job.out / "soup.json",
        {
            "objectives": list(job.recipe.objectives),
            "experts": [list(v_K) for v_K in job.recipe.soups.experts],
            "mixtures": [
                {"direction": v_K, "weights": w_E} for v_K, w_E in zip(v_VK.tolist(), w_VE.tolist(), strict=True)
            ],
            "bytes": {"experts": sum(sizes), "one_model": sizes[0]},
        },
    )
