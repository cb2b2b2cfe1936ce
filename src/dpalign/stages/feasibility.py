"""Requests for what a system cannot give: Table 1's last column, measured (section 2.3).

SteerLM is asked for the rewards of the paper's rule. It is also asked for more helpfulness than any annotated answer
of similar verbosity had: part of the way to the top of the scale, or all of it. A policy with a dial is asked for
directions over its whole arc and beyond both ends. A direction states no rewards, so none is out of reach, but the
policy may never have seen it.

For both systems: how often is an answer degenerate (`degeneracy.py`)? For SteerLM: how far is an answer from the
target? For the policy: does the answer still follow the dial, and what does asking there lose (regret)?

Shapes: P prompts, V conditions, S samples, K objectives, N annotated answers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from dpalign.measure.bootstrap import Array, Bootstrap
from dpalign.measure.degeneracy import MOST_REPEATED
from dpalign.measure.feasibility import AS_ANNOTATED, TRAINED, Wish, figures, read_answers
from dpalign.measure.reading import Reading
from dpalign.measure.setting import true_front
from dpalign.paper.direction import Arc, Preference
from dpalign.paper.prompts import parse_condition, render_condition
from dpalign.runs.folder import write_json
from dpalign.runs.shards import make_shards
from dpalign.runs.tables import Table
from dpalign.stages.cost import Costs, Load
from dpalign.stages.evaluate import asking, evaluation_cost, evaluation_prompts
from dpalign.stages.pools import annotation
from dpalign.stages.preference import line
from dpalign.stages.sample import Condition, asked_policy, open_reader
from dpalign.stages.shards import Shards
from dpalign.stages.stage import Job, Step, model_read, objectives_read, sampler_read, scorer_read, stage
from dpalign.stages.steerlm import condition_line, reward_targets

if TYPE_CHECKING:
    from dpalign.recipe import Recipe
    from dpalign.stages.evaluate import Evaluators


class Feasibility(Table):
    """Requests for what a system cannot give (section 2.3; Table 1's last column): `dpa compare` measures the paper's
    claim."""

    prompts: int = Field(200, ge=0)
    """Evaluation prompts, the first by hash; 0 takes all."""
    samples: int = Field(1, ge=1)
    """Answers a prompt and condition."""
    angles: tuple[float, ...] = (15.0, 7.5, 0.0, -15.0, -30.0, -45.0, -52.5, -60.0, -75.0)
    """Angles in degrees that the last policy is asked for, over its arc and beyond both ends."""
    reach: tuple[float, ...] = (0.0, 0.5, 1.0)
    """How far SteerLM's targets raise the first objective: this share of the way from the highest annotated value near
    each target to the top of the scale. 0 asks for section 3.2's targets."""
    repetition: float = Field(MOST_REPEATED, ge=0, le=1)
    """An answer is degenerate if more than this share of its runs of four words occurred in it before."""


def _cost(costs: Costs, step: Step) -> Load:
    recipe = costs.of_step(step)
    asked = recipe.feasibility
    conditions = recipe.steerlm.targets * len(asked.reach) if step.condition == "targets" else len(asked.angles)
    return evaluation_cost(costs, step, float(conditions), float(asked.samples), at_most=asked.prompts)


@stage(
    reads=lambda r: (
        *(r.seed, r.feasibility, r.evaluation.split, r.evaluation.temperature, r.evaluation.bootstrap, r.preference),
        *(r.data.world, r.steerlm.template, r.steerlm.targets, r.evaluation.shards),
        *(*sampler_read(r), *scorer_read(r), *model_read(r), *objectives_read(r)),
    ),
    inputs=("policy", "data", "reward"),
    optional=("annotate",),
    asks={"t": (), "condition": ("directions", "targets")},
    cost=_cost,
)
def feasibility(job: Job) -> None:
    """Ask a system for what it can give and for more, and count degenerate answers."""
    make_shards(job, asking_beyond)
    recipe, wishes = job.recipe, wishes_of(job)
    reading = Reading(tuple(recipe.scored_heads), tuple(recipe.objective_list))
    system, fault_PVS = read_answers(job.out, reading, wishes, recipe.feasibility.repetition)
    bootstrap = Bootstrap(seed=recipe.seed, replicates=recipe.evaluation.bootstrap)
    optimum_VK = _optimum(reading, job.out, wishes) if system.true_reward_PVSK is not None else None
    outcome = figures(system, fault_PVS, wishes, recipe.feasibility.repetition, bootstrap, optimum_VK)
    write_json(job.out / "feasibility.json", outcome.model_dump(mode="json"))


def asking_beyond(job: Job) -> "Shards[Evaluators]":
    """The answers to `feasibility.prompts` prompts under every wish, as shards."""
    recipe, settings = job.recipe, job.recipe.feasibility
    conditions = [Condition(wish.kind, wish.value, wish.line) for wish in wishes_of(job)]
    policy = asked_policy(job)
    prompts = evaluation_prompts(job, open_reader(recipe, policy))
    prompts = sorted(prompts, key=lambda prompt: str(prompt["prompt_id"]))[: settings.prompts or None]
    return asking(job, policy, prompts, conditions, settings.samples, "feasibility")


def wishes_of(job: Job) -> list[Wish]:
    """All conditions: directions from the highest angle down, or targets from the lowest share up."""
    if job.condition == "directions":
        return directions_beyond(job.recipe)
    *_, reward_NK = annotation(job.inputs["data"], job.inputs["annotate"], job.recipe, "both")
    return targets_beyond(job.recipe, reward_NK)


def directions_beyond(recipe: "Recipe") -> list[Wish]:
    """A wish for each of the recipe's angles, grouped by the users' arc; `read_feasibility` adds the margin's groups.

    Raises:
        ValueError: the users' directions are no arc, an angle lies outside -90..90 degrees, or none is on the arc.
    """
    population = recipe.preference.population(len(recipe.objectives))
    if not isinstance(population, Arc):
        raise ValueError(
            f'preference.distribution is "{recipe.preference.distribution}": feasibility asks beyond the ends of an arc'
        )
    wishes = []
    for angle in recipe.feasibility.angles:
        if not -90 <= angle <= 90:
            raise ValueError(f"feasibility.angles has {angle}; an angle beyond -90..90 asks for less of the first")
        v_K = Preference.from_angle(angle, tuple(recipe.objectives)).v
        group = TRAINED
        if angle < population.low:
            group = f"below {population.low:g} degrees"
        elif angle > population.high:
            group = f"above {population.high:g} degrees"
        wishes.append(Wish("direction", v_K, line(recipe, v_K), group, tuple(recipe.objectives), {"angle": angle}))
    if not any(wish.group == TRAINED for wish in wishes):
        raise ValueError(f"feasibility.angles {recipe.feasibility.angles} has none within the trained arc; give some")
    return sorted(wishes, key=lambda wish: -wish.about["angle"])


def targets_beyond(recipe: "Recipe", reward_NK: Array) -> list[Wish]:
    """For each of section 3.2's targets, a wish at each of the recipe's shares of the way to the top of the scale.

    A wish's value is what its line states: a template rounds, and its scale has a highest value.
    """
    names, template = list(recipe.objectives), recipe.steerlm.template
    highest_VK = reward_targets(recipe, reward_NK, recipe.steerlm.targets, 1.0)
    wishes: dict[str, Wish] = {}
    for share in sorted(recipe.feasibility.reach):
        for highest_K in highest_VK.tolist():
            asked = dict(zip(names, highest_K, strict=True))
            asked[names[0]] += share * (100 - asked[names[0]])
            stated = parse_condition(render_condition(asked, template), template)
            text = condition_line(recipe, asked.values())
            group = AS_ANNOTATED if share == 0 else f"{100 * share:g}% of the way beyond"
            value = tuple(stated[name] for name in names)
            about = {"highest": highest_K[0], "share": share}
            wishes.setdefault(
                text, Wish("target", value, text, group, tuple(names), about)
            )  # rounding may make two lines the same
    return list(wishes.values())


def _optimum(reading: Reading, folder: Path, wishes: Sequence[Wish]) -> Array | None:
    """The best rewards of the world's faultless answers at each direction: (V, K).

    Within the trained range no answer earns more. Beyond the range's end of most words a padded answer may. None for
    targets, and if faults may pay within the range.
    """
    if wishes[0].kind != "direction":
        return None
    asked_VK = np.array([wish.value for wish in wishes])
    trained_IK = np.array([wish.value for wish in wishes if wish.group == TRAINED])
    front = true_front(folder, reading, asked_VK, trained_IK)
    return None if front is None else front.point_VK
