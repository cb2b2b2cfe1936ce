"""Step 1 of section 2.2 on files: scalarize, keep the best of n for each direction, add the replay.

At t >= 2 the n answers of a direction were drawn under that direction, and its best is kept. At t = 1
they were drawn under reward targets, so none belongs to a direction: each of the prompt's directions
takes the best of all of them. So it is for a model without a dial, which answers plainly and learns
so. With `selection.pool = "prompt"` it is so at every t, and answers that are scored already serve
directions that they were not drawn under. An answer that was cut at the longest allowed length, or
says nothing, is never kept: no rater has seen one, and what a reward model makes of it is chance.

Texts are read for the chosen alone (`pools.py`): what is in memory at once is a shard's numbers.

Shapes: B prompts, M answers a prompt, N answers of a shard, V directions, K objectives.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from dpalign.chat import with_system_line
from dpalign.measure.degeneracy import MOST_REPEATED, faults
from dpalign.paper.direction import rng_for
from dpalign.paper.selection import NO_ONE, best_of_n, members
from dpalign.rows import (
    CANDIDATES,
    CONVERSATIONS,
    PROMPTS,
    RATED,
    UNFINISHED,
    Message,
    read_table,
    take_rows,
    write_parts,
)
from dpalign.runs.tables import Table
from dpalign.stages.pools import Pools, annotation, best_answers, numbered, originals_at, scored_pools
from dpalign.stages.preference import directions_of, line
from dpalign.stages.stage import D1_D2, Job, objectives_read, stage

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
COMPARED: Final = "compared"

DEGENERATE_SHARE: Final = 0.1
"""The share of chosen answers that may be degenerate (`measure/degeneracy.py`) without a warning."""
EQUAL_SHARE: Final = 0.5
"""The share of prompts whose answers may all earn the same on an objective without a warning."""


class Selection(Table):
    """Among which answers a direction's best is sought."""

    pool: Literal["direction", "prompt"] = "direction"
    """Those drawn under the direction itself (section 2.2, step 1), or all of the prompt's, whatever they were drawn
    under: so answers that are scored already serve other directions than their own."""
    distinct: bool = False
    """From a prompt's pool no answer is kept for two directions (paper silent: at t = 1 it may be)."""
    caution: float = Field(0.0, ge=0, le=100)
    """An answer is ranked by v . r less this many standard deviations of v . r over the members of `reward.ensemble`.
    0 is the paper's rule."""


@stage(
    reads=lambda r: (r.seed, r.replay, r.preference, r.selection, r.model.chat, *objectives_read(r)),
    inputs=("candidates", "scores", "data", "annotate"),
    takes="candidates",
    law="chooses",  # an answer may be the best for several directions, and replayed ones are added
    heavy=False,
    asks={"t": (), "half": D1_D2},
)
def select(job: Job) -> None:
    """Keep the best answer for each direction, and replay original ones."""
    count: Counter[str] = Counter()
    write_parts(job.out, _learned(job, count), CONVERSATIONS)
    filtered = {
        UNFINISHED: count[CUT],
        "not the best": count[CONSIDERED] - count[CUT] - count[WON],
    }
    job.work.tally.add(rows_in=count[CONSIDERED], rows_out=count[CHOSEN], filtered=filtered)
    if count[WITHOUT]:
        job.work.run.log(f"{count[WITHOUT]} directions of a prompt have no finished answer to learn from")
    job.work.tally.add(rows_out=count[REPLAYED])
    _warn(job, count)


def _warn(job: Job, count: Counter[str]) -> None:
    """Say what spoils a choice: degenerate answers among the chosen, or an objective that tells no answers apart."""
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
    """The count of prompts whose answers all earn the same on an objective."""
    return f"equal on {objective}"


def _learned(job: Job, count: Counter[str]) -> Iterator[pa.Table]:
    """CONVERSATIONS, a shard of candidates at a time and the replay after them; counts what it meets."""
    recipe = job.recipe
    prompts = read_table(job.inputs["data"] / "prompts", PROMPTS, ["prompt_id", "messages"])
    place = {name: i for i, name in enumerate(prompts["prompt_id"].to_pylist())}
    for pools in scored_pools(job.inputs["candidates"], job.inputs["scores"], recipe):
        wanted_BVK = np.stack(
            [directions_of(recipe.preference, len(recipe.objectives), recipe.seed, job.t, p) for p in pools.prompts]
        )
        row_BV = best_answers(pools, wanted_BVK, recipe.selection)
        asked = prompts["messages"].take([place[name] for name in pools.prompts]).to_pylist()
        selected = _selected(recipe, pools, asked, wanted_BVK, row_BV)
        yield pa.Table.from_pylist(selected, schema=CONVERSATIONS)
        count[DEGENERATE] += sum(bool(faults(row["response"], True, MOST_REPEATED)) for row in selected)
        count.update(_compared(pools, list(recipe.objectives)))
        kept = row_BV[row_BV != NO_ONE]
        count[CONSIDERED] += len(pools.prompt_N)
        count[CUT] += int((~pools.finished_N).sum())
        count[WON] += len(np.unique(kept))
        count[CHOSEN] += len(kept)
        count[WITHOUT] += row_BV.size - len(kept)
    if not count[CHOSEN]:
        raise ValueError(
            f"no answer of {count[CONSIDERED]} is left to learn from: {count[CUT]} are empty or were cut at "
            "sampling.max_new_tokens; look at them, or raise it"
        )
    replayed = replay(job, count[CHOSEN])
    count[REPLAYED] = len(replayed)
    yield pa.Table.from_pylist(replayed, schema=CONVERSATIONS)


def _compared(pools: Pools, names: Sequence[str]) -> Counter[str]:
    """The prompts with several finished answers, and by objective those whose answers all earn the same."""
    kept = np.flatnonzero(pools.finished_N)
    row_BM = members(pools.prompt_N[kept], len(pools.prompts))
    row_BM = row_BM[(row_BM != NO_ONE).sum(axis=1) > 1]
    if not len(row_BM):
        return Counter()
    reward_BMK = pools.reward_NK[kept][row_BM]
    first_B1K = reward_BMK[:, :1]  # `members` fills up a prompt's row at its end
    equal_BK = ((reward_BMK == first_B1K) | (row_BM == NO_ONE)[:, :, None]).all(axis=1)
    counts = {_equal(name): int(total) for name, total in zip(names, equal_BK.sum(axis=0), strict=True)}
    return Counter({COMPARED: len(row_BM), **counts})


def _selected(
    recipe: "Recipe", pools: Pools, asked: Sequence[Sequence[Message]], wanted_BVK: Array, row_BV: Index
) -> list[dict[str, Any]]:
    """The conversations of the chosen answers of a shard, whose texts are read here."""
    chosen = np.argwhere(row_BV != NO_ONE)
    responses = take_rows(pools.answers, CANDIDATES, ["response"], row_BV[row_BV != NO_ONE])["response"].to_pylist()
    rows = []
    for (b, v), response in zip(chosen.tolist(), responses, strict=True):
        messages = list(asked[b])
        if pools.kind != "plain":  # what answered without a direction learns without one
            messages = with_system_line(messages, line(recipe, wanted_BVK[b, v]), recipe.model.chat)
        rows.append(_conversation(pools.prompts[b], messages, response, "selected"))
    return rows


def replay(job: Job, selected: int) -> list[dict[str, Any]]:
    """Original answers of the current half, without a system line, as the recipe's share of all rows (section 3.1).

    The paper does not say which answers: for each of the prompts drawn, the one that the reward model
    rates highest on the first objective. Prompts are drawn once each until they run out.
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
