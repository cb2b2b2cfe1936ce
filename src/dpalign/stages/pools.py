"""Scored answers on disk as columns of numbers, with one shard in memory at a time; their texts stay on disk.

At the paper's scale an iteration has 2.45 million answers. Their keys and rewards are a few hundred megabytes, their
texts several gigabytes. So selection reads only keys and rewards, unless `selection.degenerate` is false: then it also
reads the texts of a shard.

Shapes: N answers of a shard, B prompts of a shard, M answers to one prompt, V directions of a prompt, G evenly spread
directions, C chosen answers, K objectives, E members of an ensemble.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dpalign.paper.ensemble import member_objectives, value_spread
from dpalign.paper.objectives import Objective, read_objectives
from dpalign.paper.selection import NO_ONE, hindsight, members, pooled_best
from dpalign.rows import CANDIDATES, HALVES, PROMPTS, RATED, SCORES, matrix_of, read_rows, read_table, shards, take_rows

if TYPE_CHECKING:
    from dpalign.recipe import Recipe
    from dpalign.stages.select import Selection

Array = NDArray[np.float64]
Row = Mapping[str, Any]
Bools = NDArray[np.bool_]
Index = NDArray[np.int64]

KEYS: Final = ("prompt_id", "t", "condition_index", "sample")
"""The columns that identify an answer."""
ORIGINALS: Final = "originals"
"""The annotation's folder with its own original answers, if the data have no rated ones."""
ROUNDED: Final = 1e-5
"""The largest difference of a direction on file, stored in 32 bits, from its exact value."""
ALL_ROUND: Final = 180.0
"""Degrees between opposite directions, the largest angle there is."""
ADVICE: Final = "to choose for other directions among all of a prompt's answers, set selection.reach to 180"


@dataclass(frozen=True)
class Pools:
    """The scored answers of one shard, by prompt."""

    answers: Path
    """The shard of CANDIDATES."""
    prompts: list[str]
    """The ids of its prompts, in order of occurrence."""
    prompt_N: Index
    """The prompt of each answer, as an index into `prompts`."""
    condition_N: Index
    finished_N: Bools
    kind: str
    """direction, target or plain."""
    condition: pa.ChunkedArray
    """The condition of each answer, as stored: a direction or a reward target."""
    reward_NK: Array
    member_NEK: Callable[[], Array]
    """Reads the objectives by each member (`paper.ensemble.readings`); E is 0 without members."""


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
    """The distinct ids in order of occurrence, and each row's index among them."""
    encoded = ids.combine_chunks().dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)


def objective_rewards(
    rewards: pa.ChunkedArray | Sequence[Sequence[float]] | Array,
    heads: Sequence[str],
    objectives: Sequence[Objective],
    source: Path,
) -> Array:
    """The objectives of rows of rewards: (N, K); an error names the rewards' file."""
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
    """row_BV: the row of the best finished answer for each direction of each prompt, `NO_ONE` if it has none.

    Raises:
        ValueError: the answers were drawn under other directions or other objectives, and `selection.reach` needs the
            directions.
    """
    row_BM, index_BV = _best_of_pools(pools, wanted_BVK, selection)
    if not row_BM.size:
        return index_BV
    return np.where(index_BV == NO_ONE, NO_ONE, np.take_along_axis(row_BM, np.maximum(index_BV, 0), axis=1))


def answers_in_hindsight(pools: Pools, even_GK: Array, selection: "Selection") -> tuple[Index, Array]:
    """row_C and v_CK: each finished answer that is its prompt's best somewhere, and the direction that it serves best.

    Args:
        even_GK: directions evenly spread over P_v, at which the answers compete.

    Raises:
        ValueError: as `best_answers`.
    """
    wanted_BGK = np.broadcast_to(even_GK, (len(pools.prompts), *even_GK.shape))
    row_BM, index_BG = _best_of_pools(pools, wanted_BGK, selection)
    label_BMK = hindsight(index_BG, even_GK, row_BM.shape[1])
    served_BM = ~np.isnan(label_BMK).any(axis=2)
    return row_BM[served_BM], label_BMK[served_BM]


def _best_of_pools(pools: Pools, wanted_BVK: Array, selection: "Selection") -> tuple[Index, Index]:
    """row_BM, the finished answers of each prompt, and index_BV, the index in row_BM of the best for each direction."""
    prompts, directions = wanted_BVK.shape[:2]
    kept = np.flatnonzero(pools.finished_N)
    member_BM = members(pools.prompt_N[kept], prompts)
    if not member_BM.size:
        return member_BM, np.full((prompts, directions), NO_ONE)
    row_BM = np.where(member_BM == NO_ONE, NO_ONE, kept[member_BM])
    allowed_BMV = (row_BM != NO_ONE)[:, :, None] & within_reach(pools, wanted_BVK, selection.reach)[row_BM]
    penalty_BMV = penalties(pools, wanted_BVK, selection.caution)[row_BM]
    return row_BM, pooled_best(pools.reward_NK[row_BM], wanted_BVK, selection.distinct, allowed_BMV, penalty_BMV)


def within_reach(pools: Pools, wanted_BVK: Array, reach: float) -> Bools:
    """Whether each answer may serve each direction of its prompt: (N, V).

    An answer may serve the directions within `reach` degrees of its own. At 0 it serves only its own direction, by
    number. Answers drawn under reward targets or plainly have no direction, so they may serve all.

    Raises:
        ValueError: `reach` is 0 and the answers were drawn under other directions; or under other objectives.
    """
    directions = wanted_BVK.shape[1]
    if pools.kind != "direction" or reach >= ALL_ROUND:
        return np.ones((len(pools.prompt_N), directions), dtype=bool)
    if not reach:
        _require_own_directions(pools, wanted_BVK)
        return np.asarray(pools.condition_N[:, None] == np.arange(directions))
    drawn_NK = _drawn_under(pools, wanted_BVK.shape[2])
    chord_NV = np.linalg.norm(wanted_BVK[pools.prompt_N] - drawn_NK[:, None], axis=2)
    return np.asarray(chord_NV <= 2 * np.sin(np.radians(reach) / 2) + ROUNDED)


def sound_pools(pools: Pools, selection: "Selection") -> tuple[Pools, int]:
    """The pools without the answers that `selection.degenerate` excludes, and the number of these; reads the texts."""
    if selection.degenerate:
        return pools, 0
    finished = np.flatnonzero(pools.finished_N)
    texts = take_rows(pools.answers, CANDIDATES, ["response"], finished)["response"].to_pylist()
    sound = finished[[selection.sound(text) for text in texts]]
    sound_N = np.zeros(len(pools.finished_N), dtype=bool)
    sound_N[sound] = True
    return replace(pools, finished_N=sound_N), len(finished) - len(sound)


def penalties(pools: Pools, wanted_BVK: Array, caution: float) -> Array:
    """Points to subtract from each answer's v . r, for each direction of its prompt: (N, V). See `value_spread`."""
    if not caution:
        return np.zeros((len(pools.prompt_N), wanted_BVK.shape[1]))
    return caution * value_spread(pools.member_NEK(), wanted_BVK[pools.prompt_N])


def _require_own_directions(pools: Pools, wanted_BVK: Array) -> None:
    """Raise ValueError unless each answer's direction is the wanted direction of its number."""
    directions = wanted_BVK.shape[1]
    drawn = np.unique(pools.condition_N)
    if len(drawn) != directions or drawn[-1] >= directions:
        raise ValueError(
            f"{pools.answers}: drawn under {len(drawn)} directions a prompt, and {directions} are wanted; {ADVICE}"
        )
    drawn_NK = _drawn_under(pools, wanted_BVK.shape[2])
    wanted_NK = wanted_BVK[pools.prompt_N, pools.condition_N]
    other = np.flatnonzero(np.abs(drawn_NK - wanted_NK).max(axis=1) > ROUNDED)
    if len(other):
        row = other[0]
        raise ValueError(
            f"{pools.answers}: row {row} was drawn under {drawn_NK[row].round(4).tolist()}, and direction "
            f"{pools.condition_N[row]} of its prompt is {wanted_NK[row].round(4).tolist()}; {ADVICE}"
        )


def _drawn_under(pools: Pools, objectives: int) -> Array:
    """The direction that each answer was drawn under: (N, K)."""
    try:
        drawn_NK = matrix_of(pools.condition)
    except ValueError as error:
        raise ValueError(f"{pools.answers}: condition: {error}") from error
    if drawn_NK.shape[1] != objectives:
        raise ValueError(
            f"{pools.answers}: drawn under directions of {drawn_NK.shape[1]} objectives, and the recipe has "
            f"{objectives}; {ADVICE}"
        )
    return drawn_NK


def scored_prompts(candidates: Path, scores: Path, recipe: "Recipe") -> Iterator[tuple[str, list[Row], Array]]:
    """Each prompt's id, its answers with their texts, and their rewards by objective (M, K), shard by shard.

    Raises:
        ValueError: as `scored_pools`.
    """
    for pools in scored_pools(candidates, scores, recipe):
        rows = list(read_rows(pools.answers, CANDIDATES))
        for prompt_id, row_M in zip(pools.prompts, members(pools.prompt_N, len(pools.prompts)), strict=True):
            indices = row_M[row_M != NO_ONE]
            yield prompt_id, [rows[i] for i in indices], pools.reward_NK[indices]


def originals_at(data: Path, annotate: Path) -> Path:
    """The folder of the original answers: the data's, or the annotation's own if the data have none."""
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
    """The original answers of a half (or of both): prompt ids, row numbers among all rated rows, rewards by objective.

    Raises:
        ValueError: the annotation is of other data.
    """
    prompts = read_table(data / "prompts", PROMPTS, ["prompt_id", "split"])
    halves = HALVES if half == "both" else (half,)
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
