"""Step 1 of section 2.2 on files: scalarize, keep the best of n for each direction, add the replay.

At t >= 2 the n answers of a direction were drawn under that direction, and its best is kept. At t = 1 they were drawn
under reward targets, so none belongs to a direction: each direction of a prompt takes the best of the whole pool.
Models without a dial also use the whole pool; they answer and learn without a line. `selection.reach` lets answers
serve directions near their own, or all directions. With the rule "hindsight" an answer is kept under the direction
that it serves best. An answer that was cut at the longest allowed length, or is empty, is never kept: no rater has
seen one, so its reward is chance.

Only the texts of chosen answers are read (`pools.py`); memory holds the numbers of one shard.

Shapes: B prompts, M answers to a prompt, N answers of a shard, C chosen answers, V directions, K objectives.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from dpalign.chat import with_system_line
from dpalign.measure.degeneracy import MOST_REPEATED, faults
from dpalign.paper.direction import rng_for
from dpalign.paper.selection import NO_ONE, best_of_n, members
from dpalign.rows import (
    CANDIDATES,
    CONVERSATIONS,
    HALVES,
    PROMPTS,
    RATED,
    UNFINISHED,
    Message,
    read_table,
    take_rows,
    write_parts,
)
from dpalign.runs.tables import Table
from dpalign.stages.pools import (
    ALL_ROUND,
    Pools,
    annotation,
    answers_in_hindsight,
    best_answers,
    numbered,
    originals_at,
    scored_pools,
    sound_pools,
)
from dpalign.stages.preference import directions_of, even_directions, line
from dpalign.stages.stage import Job, objectives_read, stage

if TYPE_CHECKING:
    from dpalign.recipe import Recipe

Array = NDArray[np.float64]
Index = NDArray[np.int64]

CONSIDERED: Final = "considered"
CUT: Final = "cut"
WON: Final = "won"
WITHOUT: Final = "without"
CHOSEN: Final = "chosen"
REPLAYED: Final = "replayed"
DEGENERATE: Final = "degenerate"
LEFT_OUT: Final = "degenerate, left out"
COMPARED: Final = "compared"

DEGENERATE_SHARE: Final = 0.1
"""Above this share of degenerate chosen answers (`measure/degeneracy.py`) the stage warns."""
EQUAL_SHARE: Final = 0.5
"""Above this share of prompts whose answers all earn the same on an objective the stage warns."""


class Selection(Table):
    """Which scored answers the next policy learns, and under which direction."""

    gone = {  # noqa: RUF012  # a class variable of the base
        "pool": 'is gone: write reach = 0.0 for "direction", reach = 180.0 for "prompt"'
    }

    rule: Literal["best", "hindsight"] = "best"
    """best: each drawn direction keeps its best answer (section 2.2, step 1). hindsight: each answer that is its
    prompt's best somewhere on P_v is kept once, under the middle of the directions where it is the best (not in the
    paper)."""
    reach: float = Field(0.0, ge=0, le=ALL_ROUND)
    """Degrees. An answer may serve the directions this near to its own. 0: only its own (section 2.2, step 1). 180: all
    directions of its prompt."""
    distinct: bool = False
    """No answer is kept for two directions of its prompt (paper silent: at t = 1 it may be)."""
    degenerate: bool = True
    """Whether an answer that repeats itself may be kept (paper silent: the best is). With false all texts are read, and
    under GRPO such an answer earns the least."""
    caution: float = Field(0.0, ge=0, le=100)
    """Rank answers by v . r minus this many standard deviations of v . r over the members of `reward.ensemble`; without
    an ensemble, over the [rewards] that an objective averages. 0 is the paper's rule."""

    def sound(self, text: str) -> bool:
        """Whether a finished answer may be kept: a degenerate one only if `degenerate` is true."""
        return self.degenerate or not faults(text, True, MOST_REPEATED)

    @model_validator(mode="after")
    def _hindsight_has_competitors(self) -> Self:
        if self.rule != "hindsight":
            return self
        if not self.reach:
            raise ValueError(
                "rule is hindsight, and at reach 0 answers drawn under different directions do not compete; set "
                "reach = 180, or the degrees within which they do"
            )
        if self.distinct:
            raise ValueError("rule is hindsight, which keeps no answer twice: leave distinct out")
        return self


@stage(
    reads=lambda r: (r.seed, r.replay, r.preference, r.selection, r.model.chat, *objectives_read(r)),
    inputs=("candidates", "scores", "data", "annotate"),
    takes="candidates",
    law="chooses",  # an answer may be the best for several directions, and replayed ones are added
    heavy=False,
    asks={"t": (), "half": HALVES},
)
def select(job: Job) -> None:
    """Keep the best answer for each direction, and replay original ones."""
    count: Counter[str] = Counter()
    write_parts(job.out, _learned(job, count), CONVERSATIONS)
    filtered = {
        UNFINISHED: count[CUT],
        DEGENERATE: count[LEFT_OUT],
        "not the best": count[CONSIDERED] - count[CUT] - count[LEFT_OUT] - count[WON],
    }
    job.work.tally.add(rows_in=count[CONSIDERED], rows_out=count[CHOSEN], filtered=filtered)
    if count[WITHOUT]:
        job.work.run.log(f"{count[WITHOUT]} directions of a prompt have no finished answer to learn from")
    job.work.tally.add(rows_out=count[REPLAYED])
    _warn(job, count)


def _warn(job: Job, count: Counter[str]) -> None:
    """Warn of degenerate chosen answers, and of an objective that cannot tell answers apart."""
    if count[DEGENERATE] > DEGENERATE_SHARE * count[CHOSEN]:
        job.warn(
            f"{count[DEGENERATE]} of {count[CHOSEN]} chosen answers are degenerate (empty, or they repeat themselves), "
            f"more than {DEGENERATE_SHARE:.0%}; read some before training on them"
        )
    for name in job.recipe.objectives:
        if count[_equal(name)] > EQUAL_SHARE * count[COMPARED]:
            job.warn(
                f"all answers to a prompt earn the same on {name} for {count[_equal(name)]} of {count[COMPARED]} "
                f"prompts, more than {EQUAL_SHARE:.0%}; its reward cannot tell them apart"
            )


def _equal(objective: str) -> str:
    """The key that counts prompts whose answers all earn the same on an objective."""
    return f"equal on {objective}"


def _learned(job: Job, count: Counter[str]) -> Iterator[pa.Table]:
    """CONVERSATIONS, one table for each shard of candidates, then the replay; adds its counts to `count`.

    Raises:
        ValueError: no answer is left.
    """
    recipe = job.recipe
    prompts = read_table(job.inputs["data"] / "prompts", PROMPTS, ["prompt_id", "messages"])
    place = {name: i for i, name in enumerate(prompts["prompt_id"].to_pylist())}
    for pools in scored_pools(job.inputs["candidates"], job.inputs["scores"], recipe):
        count[CONSIDERED] += len(pools.prompt_N)
        count[CUT] += int((~pools.finished_N).sum())
        pools, left_out = sound_pools(pools, recipe.selection)
        count[LEFT_OUT] += left_out
        row_C, v_CK, without = _chosen(recipe, job.t, pools)
        asked = prompts["messages"].take([place[name] for name in pools.prompts]).to_pylist()
        selected = _selected(recipe, pools, asked, row_C, v_CK)
        yield pa.Table.from_pylist(selected, schema=CONVERSATIONS)
        count[DEGENERATE] += sum(bool(faults(row["response"], True, MOST_REPEATED)) for row in selected)
        count.update(_compared(pools, list(recipe.objectives)))
        count[WON] += len(np.unique(row_C))
        count[CHOSEN] += len(row_C)
        count[WITHOUT] += without
    if not count[CHOSEN]:
        repeated = f", {count[LEFT_OUT]} are degenerate" if count[LEFT_OUT] else ""
        raise ValueError(
            f"no answer of {count[CONSIDERED]} is left to learn from: {count[CUT]} are empty or were cut at "
            f"sampling.max_new_tokens{repeated}; look at them, or raise it"
        )
    replayed = replay(job, count[CHOSEN])
    count[REPLAYED] = len(replayed)
    yield pa.Table.from_pylist(replayed, schema=CONVERSATIONS)


def _chosen(recipe: "Recipe", t: int, pools: Pools) -> tuple[Index, Array, int]:
    """row_C and v_CK, the chosen answers by prompt and their directions; and the number of directions without one."""
    preference, objectives = recipe.preference, len(recipe.objectives)
    if recipe.selection.rule == "hindsight":
        return *answers_in_hindsight(pools, even_directions(preference, objectives), recipe.selection), 0
    wanted_BVK = np.stack([directions_of(preference, objectives, recipe.seed, t, p) for p in pools.prompts])
    row_BV = best_answers(pools, wanted_BVK, recipe.selection)
    served_BV = row_BV != NO_ONE
    return row_BV[served_BV], wanted_BVK[served_BV], int((~served_BV).sum())


def _compared(pools: Pools, names: Sequence[str]) -> Counter[str]:
    """The numbers of prompts with several finished answers, and by objective of those whose answers earn the same."""
    kept = np.flatnonzero(pools.finished_N)
    row_BM = members(pools.prompt_N[kept], len(pools.prompts))
    row_BM = row_BM[(row_BM != NO_ONE).sum(axis=1) > 1]
    if not len(row_BM):
        return Counter()
    reward_BMK = pools.reward_NK[kept][row_BM]
    first_B1K = reward_BMK[:, :1]  # `members` pads a row at its end
    equal_BK = ((reward_BMK == first_B1K) | (row_BM == NO_ONE)[:, :, None]).all(axis=1)
    counts = {_equal(name): int(total) for name, total in zip(names, equal_BK.sum(axis=0), strict=True)}
    return Counter({COMPARED: len(row_BM), **counts})


def _selected(
    recipe: "Recipe", pools: Pools, asked: Sequence[Sequence[Message]], row_C: Index, v_CK: Array
) -> list[dict[str, Any]]:
    """The conversations of a shard's chosen answers; reads their texts."""
    responses = take_rows(pools.answers, CANDIDATES, ["response"], row_C)["response"].to_pylist()
    rows = []
    for b, v_K, response in zip(pools.prompt_N[row_C].tolist(), v_CK, responses, strict=True):
        messages = list(asked[b])
        if pools.kind != "plain":  # a model without a dial learns without a line
            messages = with_system_line(messages, line(recipe, v_K), recipe.model.chat)
        rows.append(_conversation(pools.prompts[b], messages, response, "selected"))
    return rows


def replay(job: Job, selected: int) -> list[dict[str, Any]]:
    """Original answers of the current half, without a system line, as the recipe's share of all rows (section 3.1).

    The paper does not say which answers. Here prompts are drawn at random, all once before any again. Each gives the
    answer that the reward model rates highest on the first objective.
    """
    recipe = job.recipe
    count = round(selected * recipe.replay / (1 - recipe.replay))
    if not count:
        return []
    prompts, place_N, reward_NK = annotation(job.inputs["data"], job.inputs["annotate"], recipe, job.half)
    names, prompt_N = numbered(prompts)
    row_BM = members(prompt_N, len(names))
    pick_B = best_of_n(np.where(row_BM == NO_ONE, -np.inf, reward_NK[row_BM, 0]))
    best_B = place_N[np.take_along_axis(row_BM, pick_B[:, None], axis=1)[:, 0]]
    order = np.array(sorted(range(len(names)), key=names.__getitem__))
    rounds = [
        rng_for(recipe.seed, "replay", job.t, i).permutation(len(names)) for i in range(math.ceil(count / len(names)))
    ]
    original = originals_at(job.inputs["data"], job.inputs["annotate"])
    drawn = best_B[order[np.concatenate(rounds)[:count]]]
    rows = take_rows(original, RATED, ["prompt_id", "messages", "response"], drawn).to_pylist()
    return [_conversation(row["prompt_id"], row["messages"], row["response"], "replay") for row in rows]


def _conversation(prompt_id: str, messages: Sequence[Message], response: str, origin: str) -> dict[str, Any]:
    return {"prompt_id": prompt_id, "messages": list(messages), "response": response, "origin": origin}
