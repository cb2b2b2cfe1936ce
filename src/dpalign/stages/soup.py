"""The evaluation of rewarded soups (section 2.3): a mixture of the experts for each direction.

The directions are sampled one after the other: a process has one mixture at a time on disk and in memory. The answers
wait in the stage's scratch until all are drawn. Then they are grouped by prompt and scored, so that the stage's outputs
have the form of an evaluated policy with a dial.

Shapes: V directions, E experts, K objectives.
"""

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from numpy.typing import NDArray

from dpalign.engines.engine import Engine
from dpalign.measure.points import senses_of
from dpalign.measure.system import System
from dpalign.rows import CANDIDATES, read_rows
from dpalign.runs.folder import Tally, write_json
from dpalign.runs.ledger import TIMES
from dpalign.runs.shards import make_shards
from dpalign.runs.tables import Table
from dpalign.stages.evaluate import (
    evaluation_cost,
    evaluation_prompts,
    open_scorers,
    protocol,
    shard_size,
    with_scores,
)
from dpalign.stages.preference import evaluation_directions
from dpalign.stages.rival import Rival, Vector, grid, spelled
from dpalign.stages.rsf import scalar_rejection_sampling
from dpalign.stages.sample import Condition, draw, open_engine, open_reader
from dpalign.stages.shards import ANSWERS, Output, Row, Shards, parts_of
from dpalign.stages.stage import Job, Step, stage
from dpalign.stages.training import Checkpoint, model_folder

if TYPE_CHECKING:
    from dpalign.recipe import Recipe
    from dpalign.rewards.score import Scorer

Array = NDArray[np.float64]

DRAWN: Final = "drawn-{:05d}.parquet"
"""In the stage's scratch: the answers to a part of the prompts at one direction."""
SWITCHED: Final = "switched-{:03d}.json"
"""In the stage's scratch: the seconds that the switch to a direction took."""


class Soups(Table):
    """Rewarded soups (section 2.3): experts whose weights are mixed for each direction."""

    experts: tuple[tuple[float, ...], ...] = ((1.0, 0.0), (0.0, -1.0))
    """The direction of each expert's training, in the order of the experts."""
    choices: tuple[Literal["axes", "ends"], ...] = ()
    """The sets of experts among which a comparison chooses: "axes" has one for each objective, "ends" one for each end
    of the dial. [] takes both, without those that cannot be mixed for every direction, such as two ends with three
    objectives."""


@stage(
    reads=lambda r: (r.soups.experts, *protocol(r)),
    inputs=("data", "reward"),
    optional=("judge", "annotate"),
    repeated=("expert",),
    cost=lambda costs, step: evaluation_cost(
        costs, step, costs.recipe.evaluation.directions, costs.recipe.evaluation.samples
    ),
)
def soup(job: Job) -> None:
    """Mix experts for each direction, sample the mixtures on the validation prompts and score their answers.

    `soup.json` has the mixtures' weights, the bytes of all experts and the bytes of one model. `times.json` has the
    seconds of the switch to each direction.
    """
    _describe(job)
    make_shards(job, drawing_mixtures)
    make_shards(replace(job, inputs={**job.inputs, "drawn": job.work.resume}), scoring_mixtures)
    switches = [json.loads(path.read_text("utf-8")) for path in sorted(job.work.resume.glob("switched-*.json"))]
    write_json(
        job.out / TIMES, {"switch_seconds": {str(switch["direction"]): switch["seconds"] for switch in switches}}
    )


class Mixtures:
    """The engine of one direction's mixture at a time."""

    def __init__(self, job: Job, experts: Sequence[Path], w_VE: Array) -> None:
        self.job, self.experts, self.w_VE = job, experts, w_VE
        self.mixed: int | None = None
        self.engine: Engine | None = None

    def engine_of(self, v: int) -> Engine:
        """The engine of a direction's mixture; mixes the experts first unless this direction was the last one."""
        if self.engine is None or self.mixed != v:
            self.engine = None  # frees its memory before the next model is loaded
            resume = self.job.work.resume
            mixture, began = resume / "mixture", time.monotonic()
            shutil.rmtree(mixture, ignore_errors=True)
            from dpalign.train.soups import mix

            mix(self.experts, self.w_VE[v], mixture)
            self.engine, self.mixed = open_engine(self.job.recipe, Checkpoint(str(mixture)), alone=True), v
            shutil.rmtree(mixture)
            seconds = round(time.monotonic() - began, 3)
            write_json(resume / SWITCHED.format(v), {"direction": v, "seconds": seconds})
        return self.engine


def drawing_mixtures(job: Job) -> Shards[Mixtures]:
    """The answers for all directions as shards: all parts of the prompts at one direction, then at the next."""
    recipe, experts = job.recipe, experts_of(job)
    key, samples, temperature = (recipe.seed, "evaluate"), recipe.evaluation.samples, recipe.evaluation.temperature
    v_VK, w_VE = mixtures_of(recipe)
    prompts = evaluation_prompts(job, open_reader(recipe, Checkpoint(str(experts[0]))))
    parts = parts_of(prompts, shard_size(recipe, len(prompts)))

    def work(mixtures: Mixtures, index: int, prompts: Sequence[Row], tally: Tally) -> Iterator[Output]:
        v = index // len(parts)
        condition = Condition("direction", tuple(v_VK[v].tolist()), None)  # in the weights, not in the prompt
        asked, engine = [(prompt, [condition]) for prompt in prompts], mixtures.engine_of(v)
        rows = draw(engine, recipe, asked, samples, temperature, key=key, t=job.t, tally=tally, first=v)
        yield "resume", CANDIDATES, rows

    return Shards(
        job,
        f"resume/{DRAWN}",
        len(v_VK) * len(parts),
        lambda index: parts[index % len(parts)],
        lambda: Mixtures(job, experts, w_VE),
        work,
        lambda index: {index // len(parts): samples},
    )


def scoring_mixtures(job: Job) -> "Shards[Mapping[str, Scorer]]":
    """The answers for all directions, grouped by prompt and scored, as shards of prompts."""
    directions, samples = len(evaluation_directions(job.recipe)), job.recipe.evaluation.samples
    count = len(list(job.inputs["drawn"].glob("drawn-*.parquet"))) // directions

    def part(index: int) -> list[Row]:
        """The answers of a part, by prompt, direction and sample."""
        files = [job.inputs["drawn"] / DRAWN.format(v * count + index) for v in range(directions)]
        drawn = [list(read_rows(file, CANDIDATES)) for file in files]
        starts = range(0, len(drawn[0]), samples)
        return [row for start in starts for rows in drawn for row in rows[start : start + samples]]

    def work(scorers: "Mapping[str, Scorer]", _: int, rows: Sequence[Row], tally: Tally) -> Iterator[Output]:
        return with_scores(job, rows, rows, scorers, tally)  # mixtures are asked without a line

    return Shards(job, ANSWERS, count, part, partial(open_scorers, job), work)


def experts_of(job: Job) -> list[Path]:
    """The experts' checkpoints, in the order of `soups.experts`: expert-1 has the first direction.

    Raises:
        ValueError: the inputs are not expert-1 to expert-N for N directions; a folder without weights.
    """
    given = [name for name in job.inputs if name.startswith("expert-")]
    wanted = [f"expert-{e}" for e in range(1, len(job.recipe.soups.experts) + 1)]
    if set(given) != set(wanted):
        raise ValueError(
            f"soups.experts has {len(wanted)} directions, which are those of {', '.join(wanted)}; given are "
            f"{', '.join(given) or 'none'}"
        )
    return [Path(model_folder(job.inputs[name])) for name in wanted]


def mixtures_of(recipe: "Recipe") -> tuple[Array, Array]:
    """The evaluated directions (V, K), and each expert's weight in their mixtures (V, E)."""
    from dpalign.train.mixtures import mixture_weights  # scipy takes a while to import

    v_VK = evaluation_directions(recipe)
    return v_VK, np.array([mixture_weights(v_K, recipe.soups.experts) for v_K in v_VK])


def _describe(job: Job) -> None:
    from dpalign.train.soups import bytes_of

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


def rivals(recipe: "Recipe") -> Iterator[Rival]:
    """A soup for each choice of experts; experts are specialists of scalar rejection sampling."""
    for i, choice in enumerate(soups_mixed(recipe), start=1):
        experts = experts_for(recipe, choice)
        steps: list[Step] = []
        inputs: dict[str, str] = {}
        for j, v_K in enumerate(experts, start=1):
            own = list(scalar_rejection_sampling(recipe, f"soup-{i}-expert-{j}", v_K))
            steps += own
            inputs[f"expert-{j}"] = own[-1].name
        system = System("rewarded soups", "soup", " and ".join(spelled(recipe, v_K) for v_K in experts))
        knobs = {"soups.experts": [list(v_K) for v_K in experts]}
        yield Rival(f"soup-{i}", system, inputs, knobs=knobs, steps=tuple(steps), evaluation=soup)


CHOICES: Final = ("axes", "ends")
"""All values of `soups.choices`."""


def soups_mixed(recipe: "Recipe") -> list[str]:
    """The recipe's choices of experts; if it names none, all choices that serve every direction."""
    return list(recipe.soups.choices) or [choice for choice in CHOICES if not unserved(recipe, choice)]


def experts_for(recipe: "Recipe", choice: str) -> tuple[Vector, ...]:
    """The directions of the experts for a choice."""
    grid_UK = grid(recipe, recipe.evaluation.directions)
    return axes(grid_UK) if choice == "axes" else (grid_UK[0], grid_UK[-1])


def unserved(recipe: "Recipe", choice: str) -> str:
    """Why the experts cannot be mixed for some evaluation direction; "" if they serve all."""
    from dpalign.train.mixtures import spanned

    experts = experts_for(recipe, choice)
    for v_K in grid(recipe, recipe.evaluation.directions):
        try:
            spanned(v_K, experts)
        except ValueError as error:
            return str(error)
    return ""


def axes(grid_UK: Sequence[Vector]) -> tuple[Vector, ...]:
    """One direction for each objective, with the population's sense (more or less); both if the directions disagree."""
    senses_K = senses_of(np.array(grid_UK)).tolist()
    signs = [(k, sign) for k, sense in enumerate(senses_K) for sign in ((sense,) if sense else (1.0, -1.0))]
    return tuple(tuple(sign if i == k else 0.0 for i in range(len(senses_K))) for k, sign in signs)
