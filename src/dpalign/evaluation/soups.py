"""The evaluation of rewarded soups (section 2.3): a mixture of the experts for each direction.

One mixture at a time is on disk and in memory, and the directions are taken one after the other: their answers lie in
the stage's scratch until each shard has those of all directions. So the stage's outputs are those of an evaluated
policy with a dial.

Shapes: V directions, E experts, K objectives.
"""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpalign.evaluation.stages import (
    evaluation_directions,
    evaluation_prompts,
    open_scorers,
    part_of,
    shards_of,
    write_scored,
)
from dpalign.ledger import TIMES
from dpalign.records import CANDIDATES, read_rows, write_rows
from dpalign.runs import write_json
from dpalign.sampling.engine import Engine
from dpalign.sampling.stages import Condition, draw, open_engine, open_reader
from dpalign.stages import Job
from dpalign.training.soups import bytes_of, mix, mixture_weights
from dpalign.training.stages import model_folder

Array = NDArray[np.float64]
Row = dict[str, Any]


def evaluate_soup(job: Job) -> None:
    """Mix the experts for each direction, sample the mixtures plainly on the validation prompts, score the answers.

    `soup.json` says the mixtures' weights, and the bytes of all experts against those of one model; `times.json` the
    seconds of each switch to a direction.
    """
    recipe = job.recipe
    experts = experts_of(job)
    v_VK = evaluation_directions(recipe)
    w_VE = np.array([mixture_weights(v_K, recipe.soups.experts) for v_K in v_VK])
    prompts = evaluation_prompts(job, open_reader(recipe, str(experts[0])))
    _describe(job, experts, v_VK, w_VE)
    for v in range(len(v_VK)):
        _draw_mixture(job, experts, v, v_VK[v], w_VE[v], prompts)
    scorers = open_scorers(job)
    for shard in job.work.shards(shards_of(recipe, prompts), "answers/part-{:05d}.parquet"):
        drawn = [list(read_rows(job.out / _drawn(v).format(shard.index), CANDIDATES)) for v in range(len(v_VK))]
        write_scored(job, shard, list(_by_prompt(drawn, recipe.evaluation.samples)), scorers)


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


def _describe(job: Job, experts: Sequence[Path], v_VK: Array, w_VE: Array) -> None:
    experts_EK = job.recipe.soups.experts
    sizes = [bytes_of(expert) for expert in experts]
    write_json(
        job.out / "soup.json",
        {
            "objectives": list(job.recipe.objectives),
            "experts": [list(v_K) for v_K in experts_EK],
            "mixtures": [
                {"direction": v_K, "weights": w_E} for v_K, w_E in zip(v_VK.tolist(), w_VE.tolist(), strict=True)
            ],
            "bytes": {"experts": sum(sizes), "one_model": sizes[0]},
        },
    )


def _drawn(v: int) -> str:
    """Where the answers for a direction wait, by shard."""
    return f"resume/direction-{v:03d}/part-{{:05d}}.parquet"


def _draw_mixture(job: Job, experts: Sequence[Path], v: int, v_K: Array, w_E: Array, prompts: Sequence[Row]) -> None:
    """Draw all answers for a direction, from a mixture that is made when the first of them is still to be drawn."""
    recipe, settings = job.recipe, job.recipe.evaluation
    condition = Condition("direction", tuple(v_K.tolist()), None)  # asked of the weights, not of the prompt
    engine: Engine | None = None
    for shard in job.work.shards(shards_of(recipe, prompts), _drawn(v)):
        if engine is None:
            engine = _switch(job, experts, v, w_E)
        rows = draw(
            engine,
            recipe,
            [(prompt, [condition]) for prompt in part_of(recipe, prompts, shard.index)],
            settings.samples,
            settings.temperature,
            key=(recipe.seed, "evaluate"),
            t=job.t,
            tally=shard.tally,
            first=v,
        )
        write_rows(shard.path, rows, CANDIDATES)
    shutil.rmtree(job.work.resume / "mixture", ignore_errors=True)


def _switch(job: Job, experts: Sequence[Path], v: int, w_E: Array) -> Engine:
    """The engine of a direction's mixture, and the seconds it took to make and load it."""
    mixture = job.work.resume / "mixture"
    shutil.rmtree(mixture, ignore_errors=True)
    began = time.monotonic()
    mix(experts, w_E, mixture)
    engine = open_engine(job.recipe, str(mixture))
    times = job.out / TIMES
    known = json.loads(times.read_text())["switch_seconds"] if times.is_file() else {}
    known[str(v)] = round(time.monotonic() - began, 3)
    write_json(times, {"switch_seconds": known})
    return engine


def _by_prompt(drawn: Sequence[Sequence[Row]], samples: int) -> Iterator[Row]:
    """The answers of all directions, a prompt's together, in the order of direction and sample."""
    for start in range(0, len(drawn[0]), samples):
        for rows in drawn:
            yield from rows[start : start + samples]
