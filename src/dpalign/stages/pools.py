"""Scored answers on disk as columns of numbers, a shard in memory at a time; their texts stay where they are.

At the paper's scale an iteration has 2.45 million answers: who they are and what they are worth is a few
hundred megabytes, what they say several gigabytes. So a choice reads the former alone.

Shapes: N answers of a shard, B of its prompts, V directions of a prompt, K objectives, E members of an ensemble.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dpalign.paper.objectives import Objective, read_objectives
from dpalign.paper.selection import NO_ONE, best_of_n, members, pooled_best, scalarize
from dpalign.rewards.ensemble import member_objectives
from dpalign.rows import CANDIDATES, PROMPTS, RATED, SCORES, matrix_of, read_rows, read_table, shards

if TYPE_CHECKING:
    from dpalign.recipe import Recipe
    from dpalign.stages.select import Selection

Array = NDArray[np.float64]
Row = Mapping[str, Any]
Bools = NDArray[np.bool_]
Index = NDArray[np.int64]

KEYS: Final = ("prompt_id", "t", "condition_index", "sample")
"""What makes an answer this one and no other."""
ORIGINALS: Final = "originals"
"""The folder of an annotation that holds its own original answers, where the data have no rated ones."""
ROUNDED: Final = 1e-5
"""How far a direction on file, in 32 bits, may be from the one it stands for."""


@dataclass(frozen=True)
class Pools:
    """The scored answers of one shard, by prompt."""

    answers: Path
    """The shard of CANDIDATES."""
    prompts: list[str]
    """The ids of its prompts, in the order in which they come."""
    prompt_N: Index
    """Which of them each answer is to."""
    condition_N: Index
    finished_N: Bools
    kind: str
    """direction, target or plain."""
    condition: pa.ChunkedArray
    """What each was drawn under, as the schema has it."""
    reward_NK: Array
    member_NEK: Callable[[], Array]
    """Reads the rewards as each member of the reward model's ensemble sees them; without one E is 0."""


def scored_pools(candidates: Path, scores: Path, recipe: "Recipe") -> Iterator[Pools]:
    """The answers of each shard with their rewards by objective.

    Raises:
        ValueError: scores that are not of these answers; a NaN score; answers of several kinds in a shard.
    """
    columns = (*KEYS, "condition_kind", "condition", "finished")
    answered, rated = shards(candidates), shards(scores)
    if len(answered) != len(rated):
        raise ValueError(
            f"{scores}: {len(rated)} shards of scores for {len(answered)} of {candidates}; run the score stage on "
            "these answers again"
        )
    for answers_path, scores_path in zip(answered, rated, strict=True):
        answers = read_table(answers_path, CANDIDATES, columns)
        scored = read_table(scores_path, SCORES)
        if not all(answers[key].equals(scored[key]) for key in KEYS):
            raise ValueError(
                f"{scores_path}: not the scores of {answers_path}; run the score stage on these answers again"
            )
        if not answers.num_rows:
            continue
        kinds = answers["condition_kind"].unique().to_pylist()
        if len(kinds) > 1:
            raise ValueError(f"{answers_path}: answers under {' and '.join(kinds)} in one shard; sample them apart")
        prompts, prompt_N = numbered(answers["prompt_id"])
        yield Pools(
            answers=answers_path,
            prompts=prompts,
            prompt_N=prompt_N,
            condition_N=answers["condition_index"].to_numpy().astype(np.int64),
            finished_N=answers["finished"].to_numpy().astype(bool),
            kind=kinds[0],
            condition=answers["condition"],
            reward_NK=objective_rewards(scored["rewards"], recipe.scored_heads, recipe.objective_list, scores_path),
            member_NEK=partial(_member_rewards, scored["rewards"], recipe.scored_heads, recipe.objective_list),
        )


def numbered(ids: pa.ChunkedArray) -> tuple[list[str], Index]:
    """The distinct ids in the order in which they come, and for each row which of them it has."""
    encoded = ids.combine_chunks().dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)


def objective_rewards(
    rewards: pa.ChunkedArray | Sequence[Sequence[float]] | Array,
    heads: Sequence[str],
    objectives: Sequence[Objective],
    source: Path,
) -> Array:
    """Objectives read from rows of rewards (N, K); an error names the file that they came from."""
    try:
        if isinstance(rewards, pa.ChunkedArray):
            reward_NH = matrix_of(rewards)
        else:
            reward_NH = np.array(rewards, dtype=np.float64).reshape(len(rewards), -1)
        return read_objectives(reward_NH, heads, objectives)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _member_rewards(rewards: pa.ChunkedArray, heads: Sequence[str], objectives: Sequence[Objective]) -> Array:
    return member_objectives(matrix_of(rewards), heads, objectives)


def best_answers(pools: Pools, wanted_BVK: Array, selection: "Selection") -> Index:
    """row_BV: for each direction of each prompt the row of its best finished answer, `NO_ONE` where it has none.

    Answers that were drawn under reward targets or plainly belong to no direction: each takes the best of all.

    Raises:
        ValueError: the best is sought among a direction's own answers, and they were drawn under other directions.
    """
    finished = np.flatnonzero(pools.finished_N)
    prompts, directions = wanted_BVK.shape[:2]
    penalty_NV = penalties(pools, wanted_BVK, selection.caution)
    if pools.kind != "direction" or selection.pool == "prompt":
        row_BM = _rows(finished, pools.prompt_N, prompts)
        if not row_BM.size:
            return np.full((prompts, directions), NO_ONE)
        allowed_BM = row_BM != NO_ONE
        index_BV = pooled_best(pools.reward_NK[row_BM], wanted_BVK, selection.distinct, allowed_BM, penalty_NV[row_BM])
        return np.where(index_BV == NO_ONE, NO_ONE, np.take_along_axis(row_BM, np.maximum(index_BV, 0), axis=1))
    _require_own_directions(pools, wanted_BVK)
    row_DN = _rows(finished, pools.prompt_N * directions + pools.condition_N, prompts * directions)
    if not row_DN.size:
        return np.full((prompts, directions), NO_ONE)
    score_DN = scalarize(pools.reward_NK[row_DN], wanted_BVK.reshape(len(row_DN), -1))
    score_DN -= penalty_NV[row_DN, np.tile(np.arange(directions), prompts)[:, None]]
    pick_B = best_of_n(np.where(row_DN == NO_ONE, -np.inf, score_DN))
    return np.take_along_axis(row_DN, pick_B[:, None], axis=1).reshape(prompts, directions)


def penalties(pools: Pools, wanted_BVK: Array, caution: float) -> Array:
    """Points taken off each answer's v . r, for each direction of its prompt: (N, V).

    They are `caution` standard deviations of v . r over the members of the ensemble. The spread is of the whole sum:
    errors of two objectives that cancel in it cost nothing.
    """
    if not caution:
        return np.zeros((len(pools.prompt_N), wanted_BVK.shape[1]))
    member_NEV = np.einsum("nek,nvk->nev", pools.member_NEK(), wanted_BVK[pools.prompt_N])
    return np.asarray(caution * member_NEV.std(axis=1, ddof=1))


def _rows(kept: Index, group_N: Index, groups: int) -> Index:
    """The rows of each group that are among those kept, filled up with `NO_ONE`."""
    member_GM = members(group_N[kept], groups)
    return np.where(member_GM == NO_ONE, NO_ONE, kept[member_GM]) if len(kept) else member_GM


def _require_own_directions(pools: Pools, wanted_BVK: Array) -> None:
    """ValueError unless each answer was drawn under the direction of its number among those wanted."""
    directions = wanted_BVK.shape[1]
    advice = "to choose for other directions among all of a prompt's answers, set selection.pool to prompt"
    drawn = np.unique(pools.condition_N)
    if len(drawn) != directions or drawn[-1] >= directions:
        raise ValueError(
            f"{pools.answers}: drawn under {len(drawn)} directions a prompt, and {directions} are wanted; {advice}"
        )
    try:
        asked_NK = matrix_of(pools.condition)
    except ValueError as error:
        raise ValueError(f"{pools.answers}: condition: {error}") from error
    wanted_NK = wanted_BVK[pools.prompt_N, pools.condition_N]
    if asked_NK.shape != wanted_NK.shape:
        raise ValueError(
            f"{pools.answers}: drawn under directions of {asked_NK.shape[1]} objectives, and the recipe has "
            f"{wanted_NK.shape[1]}; {advice}"
        )
    other = np.flatnonzero(np.abs(asked_NK - wanted_NK).max(axis=1) > ROUNDED)
    if len(other):
        row = other[0]
        raise ValueError(
            f"{pools.answers}: row {row} was drawn under {asked_NK[row].round(4).tolist()}, and direction "
            f"{pools.condition_N[row]} of its prompt is {wanted_NK[row].round(4).tolist()}; {advice}"
        )


def scored_prompts(candidates: Path, scores: Path, recipe: "Recipe") -> Iterator[tuple[str, list[Row], Array]]:
    """Each prompt's answers, texts and all, with their rewards by objective (M, K), shard by shard.

    Raises:
        ValueError: scores that are not of these answers; a NaN score.
    """
    for pools in scored_pools(candidates, scores, recipe):
        rows = list(read_rows(pools.answers, CANDIDATES))
        for prompt_id, row_M in zip(pools.prompts, members(pools.prompt_N, len(pools.prompts)), strict=True):
            indices = row_M[row_M != NO_ONE]
            yield prompt_id, [rows[i] for i in indices], pools.reward_NK[indices]


def originals_at(data: Path, annotate: Path) -> Path:
    """Where the original answers lie: the rated ones; or the annotation's own, where the data have none."""
    own = annotate / ORIGINALS
    return own if own.is_dir() else data / "train"


def annotated(data: Path, annotate: Path, recipe: "Recipe", half: str) -> Iterator[tuple[Row, Array]]:
    """The original answers of a half (or of both) with the reward model's rewards by objective."""
    _, place_N, reward_NK = annotation(data, annotate, recipe, half)
    reward_of = dict(zip(place_N.tolist(), reward_NK, strict=True))
    for i, row in enumerate(read_rows(originals_at(data, annotate), RATED)):
        if i in reward_of:
            yield row, reward_of[i]


def annotation(data: Path, annotate: Path, recipe: "Recipe", half: str) -> tuple[pa.ChunkedArray, Index, Array]:
    """Of the original answers of a half (or of both): their prompts' ids, their places among all rated rows, and the
    reward model's rewards by objective."""
    prompts = read_table(data / "prompts", PROMPTS, ["prompt_id", "split"])
    halves = ("D1", "D2") if half == "both" else (half,)
    theirs = prompts["prompt_id"].filter(pc.is_in(prompts["split"], pa.array(halves)))
    rated = read_table(originals_at(data, annotate), RATED, ["prompt_id", "source"])
    place_N = np.flatnonzero(pc.not_equal(rated["source"], "helpsteer").to_numpy())
    ids = rated["prompt_id"].take(pa.array(place_N))
    rewards = read_table(annotate, SCORES, ["prompt_id", "rewards"])
    if not rewards["prompt_id"].equals(ids):
        raise ValueError(f"{annotate}: not the annotation of {data}; run the annotate stage again")
    reward_NK = objective_rewards(rewards["rewards"], recipe.scored_heads, recipe.objective_list, annotate)
    inside = np.flatnonzero(pc.is_in(ids, theirs.combine_chunks()).to_numpy())
    return ids.take(pa.array(inside)), place_N[inside], reward_NK[inside]
