"""Best of n at inference: a model without a dial answers plainly, and the reward model chooses for each direction.

Shapes: N answers in all, V directions, K objectives.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dpalign.measure.system import System
from dpalign.paper.selection import pooled_best
from dpalign.rows import UNFINISHED
from dpalign.runs.folder import Tally
from dpalign.runs.shards import make_shards
from dpalign.stages.cost import Costs, Load
from dpalign.stages.evaluate import Answers, evaluated_shards, evaluation_cost, evaluation_prompts, protocol
from dpalign.stages.pools import objective_rewards
from dpalign.stages.preference import evaluation_directions
from dpalign.stages.rival import Rival
from dpalign.stages.sample import PLAIN, draw, open_reader
from dpalign.stages.score import scored_rows
from dpalign.stages.shards import Row, Shards
from dpalign.stages.stage import Job, Step, stage
from dpalign.stages.training import checkpoint_of

if TYPE_CHECKING:
    from dpalign.recipe import Recipe
    from dpalign.stages.evaluate import Evaluators

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]


def rivals(recipe: "Recipe") -> Iterator[Rival]:
    """The SFT model, whose answers the reward model chooses among."""
    system = System(f"SFT, best of {recipe.evaluation.best_of}")
    yield Rival("sft-best-of-n", system, {"policy": "sft"}, "best-of-n", evaluation=best_of_n)


def _cost(costs: Costs, step: Step) -> Load:
    asked = costs.of_step(step).evaluation
    drawn = asked.samples * asked.best_of
    return evaluation_cost(costs, step, 1, drawn, judged=asked.directions * asked.samples)  # the judge sees the choice


@stage(
    reads=lambda r: (*protocol(r), r.evaluation.best_of),
    inputs=("policy", "data", "reward"),
    optional=("judge", "annotate"),
    law="chooses",  # an answer may be the best for several directions
    cost=_cost,
)
def best_of_n(job: Job) -> None:
    """Let the reward model choose among a system's plain answers for each direction, and score its choice."""
    make_shards(job, choosing)


def choosing(job: Job) -> "Shards[Evaluators]":
    """The prompts in shards, with `evaluation.samples` answers at each direction."""
    policy, directions = checkpoint_of(job.inputs["policy"]), len(evaluation_directions(job.recipe))
    prompts = evaluation_prompts(job, open_reader(job.recipe, policy))
    asked = dict.fromkeys(range(directions), job.recipe.evaluation.samples)
    return evaluated_shards(job, policy, prompts, asked, partial(best_of_groups, job))


def best_of_groups(job: Job, evaluators: "Evaluators", prompts: Sequence[Row], tally: Tally) -> Answers:
    """CANDIDATES rows and their SCORES rows: `evaluation.samples` answers for each prompt and direction.

    Each is the best by v . r (Eq. 2) of a group of `evaluation.best_of` plain answers. An unfinished answer is chosen
    only if its whole group is unfinished. All directions choose from the same groups. The tally counts all drawn
    answers as sampled and scored, not only the kept ones.
    """
    engine, scorers = evaluators
    recipe, settings, v_VK = job.recipe, job.recipe.evaluation, evaluation_directions(job.recipe)
    asked = [(prompt, [PLAIN] * settings.samples) for prompt in prompts]  # a condition stands for a group
    key = (recipe.seed, "best-of-n")
    drawn = list(draw(engine, recipe, asked, settings.best_of, settings.temperature, key=key, t=job.t, tally=tally))
    scored = scored_rows(scorers["scores"], drawn)
    tally.add(scored=len(drawn))
    rewards = [row["rewards"] for row in scored]
    reward_NK = objective_rewards(rewards, recipe.scored_heads, recipe.objective_list, job.inputs["reward"])
    finished_N = np.array([row["finished"] for row in drawn])
    chosen = list(_chosen(reward_NK, finished_N, v_VK, settings.samples, settings.best_of))
    _count_kept(tally, finished_N, [i for i, _, _ in chosen])
    rows, scores = [], []
    for i, v, sample in chosen:
        place = {"condition_index": v, "sample": sample}
        rows.append(drawn[i] | place | {"condition_kind": "direction", "condition": v_VK[v].tolist()})
        scores.append(scored[i] | place)
    return rows, {"scores": scores}


def _chosen(
    reward_NK: Array, finished_N: Bools, v_VK: Array, samples: int, best_of: int
) -> Iterator[tuple[int, int, int]]:
    """(index, direction, sample) of the kept answers, by prompt, direction and sample; a group gives one sample."""
    for start in range(0, len(reward_NK), samples * best_of):
        best_SV = []
        for group in range(start, start + samples * best_of, best_of):
            members = range(group, group + best_of)
            among = [i for i in members if finished_N[i]] or list(members)
            best_SV.append([among[best] for best in pooled_best(reward_NK[among][None], v_VK[None])[0]])
        for v in range(len(v_VK)):
            for sample in range(samples):
                yield best_SV[sample][v], v, sample


def _count_kept(tally: Tally, finished_N: Bools, chosen: Sequence[int]) -> None:
    """Turn a tally's count of drawn answers into one of written answers; an answer may be written several times."""
    kept = set(chosen)
    cut = sum(not finished for i, finished in enumerate(finished_N) if i not in kept)
    filtered = {UNFINISHED: cut, "not the best": len(finished_N) - len(kept) - cut}
    tally.filtered.update({reason: count for reason, count in filtered.items() if count})
    tally.rows_out += len(chosen) - len(finished_N)
