"""`policy.method = "dpo"`: the policy learns from pairs of scored answers, better and worse under a direction.

Two stages: `contrast` makes the pairs; `prefer` trains on them, from the policy that drew the answers. With
`policy.dpo.turned` an answer chosen under one direction is rejected under another, so the pairs teach the dial itself.
Without it, and with two answers a direction, this is a batch form of MO-ODPO.

Shapes: B prompts, M answers to one prompt, V directions.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field

from dpalign.chat import with_system_line
from dpalign.paper.contrast import Contrast, contrasts
from dpalign.paper.selection import NO_ONE, members
from dpalign.rows import CANDIDATES, PAIRS, PROMPTS, UNFINISHED, read_rows, read_table, write_parts
from dpalign.runs.tables import Table
from dpalign.stages.cost import Costs, Load
from dpalign.stages.finetune import write_dial
from dpalign.stages.pools import Array, Pools, penalties, scored_pools, sound_pools, within_reach
from dpalign.stages.preference import directions_of, line
from dpalign.stages.sample import counted
from dpalign.stages.select import DEGENERATE
from dpalign.stages.stage import Job, Step, chat_read, model_read, objectives_read, stage
from dpalign.stages.training import context_of, model_folder, named_checkpoint, policy_tokenizer, record_training
from dpalign.train.knobs import Training


class PolicyDPO(Table):
    """DPO under directions, as a learner of the loop."""

    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the policy that drew the answers (not in the paper)."""
    betas: tuple[Annotated[float, Field(gt=0)], ...] = (0.1,)
    """The strengths among which a comparison chooses for MO-ODPO."""
    turned: bool = True
    """Also pair each direction's best answer with another direction's (not in the paper)."""
    training: Training = Training(
        learning_rate=5e-7, warmup_steps=0.1, epochs=1.0, batch=32, context=4096, packing=False, loss_on="answer"
    )
    """Its training; `batch` counts pairs (not in the paper; the learning rate and batch are Zephyr's DPO's)."""


@stage(
    reads=lambda r: (
        *(r.seed, r.preference, r.selection.reach, r.selection.caution, r.selection.degenerate, r.policy.dpo.turned),
        *(r.model.chat, *objectives_read(r)),
    ),
    inputs=("candidates", "scores", "data"),
    takes="candidates",
    law="chooses",  # an answer may be in several pairs
    heavy=False,
    asks={"t": ()},
)
def contrast(job: Job) -> None:
    """Pair scored answers, better and worse under each direction of their prompt."""
    total: Counter[str] = Counter()
    write_parts(job.out, _pairs(job, total), PAIRS)
    filtered = {
        UNFINISHED: total["cut"],
        DEGENERATE: total["degenerate"],
        "chosen in no pair": total["finished"] - total["won"],
    }
    job.work.tally.add(total["cut"] + total["degenerate"] + total["finished"], total["pairs"], filtered)
    job.work.run.log(f"{job.out.stem}: {total['worst']} pairs of best and worst, {total['turned']} turned")


def _pairs(job: Job, total: Counter[str]) -> Iterator[pa.Table]:
    """PAIRS, one table for each shard of candidates; adds its counts to `total`.

    Raises:
        ValueError: no pair is left.
    """
    recipe = job.recipe
    asked = {row["prompt_id"]: row["messages"] for row in read_rows(job.inputs["data"] / "prompts", PROMPTS)}
    for pools in scored_pools(job.inputs["candidates"], job.inputs["scores"], recipe):
        wanted_BVK = np.stack(
            [directions_of(recipe.preference, len(recipe.objectives), recipe.seed, job.t, p) for p in pools.prompts]
        )
        total["cut"] += int((~pools.finished_N).sum())
        pools, degenerate = sound_pools(pools, recipe.selection)
        responses = read_table(pools.answers, CANDIDATES, ["response"])["response"]
        rows, chosen = [], set()
        for b, pair, chosen_score, rejected_score in _contrasts(pools, wanted_BVK, job):
            v_K = wanted_BVK[b, pair.direction]
            rows.append(
                {
                    "prompt_id": pools.prompts[b],
                    "messages": with_system_line(asked[pools.prompts[b]], line(recipe, v_K), recipe.model.chat),
                    "chosen": responses[pair.chosen].as_py(),
                    "rejected": responses[pair.rejected].as_py(),
                    "chosen_score": chosen_score,
                    "rejected_score": rejected_score,
                    "origin": pair.origin,
                }
            )
            chosen.add(pair.chosen)
            total[pair.origin] += 1
        total["pairs"] += len(rows)
        total["degenerate"] += degenerate
        total["won"] += len(chosen)
        total["finished"] += int(pools.finished_N.sum())
        yield pa.Table.from_pylist(rows, schema=PAIRS)
    if not total["pairs"]:
        raise ValueError(
            f"no pair is left of {total['finished']} finished answers: under no direction are two worth different "
            "amounts; raise sampling.n, or look at the scores"
        )


def _contrasts(pools: Pools, wanted_BVK: Array, job: Job) -> Iterator[tuple[int, Contrast, float, float]]:
    """(prompt number, pair, chosen score, rejected score); a pair's answers are row numbers of the shard."""
    selection = job.recipe.selection
    penalty_NV = penalties(pools, wanted_BVK, selection.caution)
    finished = np.flatnonzero(pools.finished_N)
    allowed_NV = within_reach(pools, wanted_BVK, selection.reach)
    for b, row_M in enumerate(members(pools.prompt_N[finished], len(pools.prompts))):
        row_M = finished[row_M[row_M != NO_ONE]]
        if len(row_M) < 2:
            continue
        score_VM = (pools.reward_NK[row_M] @ wanted_BVK[b].T - penalty_NV[row_M]).T
        for pair in contrasts(score_VM, allowed_NV[row_M].T, job.recipe.policy.dpo.turned):
            chosen_score, rejected_score = score_VM[pair.direction, [pair.chosen, pair.rejected]].tolist()
            rows = pair._replace(chosen=int(row_M[pair.chosen]), rejected=int(row_M[pair.rejected]))
            yield b, rows, chosen_score, rejected_score


def _cost(costs: Costs, step: Step) -> Load:
    """Each direction of a prompt has one or two pairs; the reference reads each pair once."""
    made = costs.steps[str(step.inputs["pairs"])]
    recipe = costs.of_step(made)
    prompts, _, _ = counted(costs, costs.steps[str(made.inputs["candidates"])])
    pairs = prompts * recipe.preference.directions * (2 if recipe.policy.dpo.turned else 1)
    return costs.train(step, 2 * pairs, costs.row, forwards=1 / max(1.0, recipe.policy.dpo.training.epochs))


@stage(
    reads=lambda r: (
        *(r.seed, r.policy.dpo.beta, r.policy.dpo.training, r.sft.checkpoint, r.preference, r.reward.template),
        *(r.rewards, *chat_read(r), *model_read(r), *objectives_read(r)),
    ),
    inputs=("start", "pairs"),
    takes="pairs",
    optional=("annotate",),
    several=True,
    asks={"t": ()},
    trains=lambda r: r.policy.dpo.training,
    cost=_cost,
)
def prefer(job: Job) -> None:
    """Train the policy on pairs under directions (DPO), from the policy that drew the answers."""
    from dpalign.train.dpo import optimise
    from dpalign.train.trainer import Outcome

    settings = job.recipe.policy.dpo

    def train() -> Outcome:
        start = model_folder(job.inputs["start"])
        tokenizer = policy_tokenizer(start, job.recipe, steered=True)
        context = context_of(job, start, settings.training, tokenizer)
        return optimise(context, read_rows(job.inputs["pairs"], PAIRS), settings.beta, "policy.dpo.training")

    if not named_checkpoint(job, settings.training):
        record_training(job, train)
    write_dial(job)
