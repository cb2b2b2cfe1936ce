"""Step 1 of section 2.2 on files: scalarize, keep the best of n for each direction, add the replay.

At t >= 2 the n answers of a direction were drawn under that direction, and its best is kept. At t = 1
they were drawn under reward targets, so none belongs to a direction: each of the prompt's directions
takes the best of all of them. So it is for a model without a dial, which answers plainly and learns
so. An answer that was cut at the longest allowed length is never kept.

Shapes: B prompts, M answers a prompt, N answers a direction, V directions, K objectives.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpalign.objectives import Objective, read_objectives
from dpalign.preference import Preference, draw_directions, rng_for
from dpalign.recipe import Recipe, Steering
from dpalign.records import (
    CANDIDATES,
    CONVERSATIONS,
    PROMPTS,
    RATED,
    SCORES,
    Message,
    read_rows,
    read_table,
    write_rows,
)
from dpalign.selection import best_of_n, pooled_best, scalarize
from dpalign.stages import Job
from dpalign.templates import render_preference, with_system_line

Array = NDArray[np.float64]
Row = Mapping[str, Any]


def directions_of(steering: Steering, objectives: int, seed: int, t: int, prompt_id: str) -> Array:
    """The directions that a prompt is sampled at in iteration t: (V, K); the same wherever they are asked for."""
    rng = rng_for(seed, "directions", t, prompt_id)
    return draw_directions(steering.trained(objectives), steering.directions, rng)


def select(job: Job) -> None:
    """Write the conversations that the next policy learns, selected and replayed."""
    recipe = job.recipe
    chosen: list[dict[str, Any]] = []
    considered = cut = won = without = 0
    asked = {p["prompt_id"]: p["messages"] for p in read_rows(job.inputs["data"] / "prompts", PROMPTS)}
    for prompt_id, rows, reward_MK in scored_prompts(job.inputs["candidates"], job.inputs["scores"], recipe):
        considered += len(rows)
        finished = [i for i, row in enumerate(rows) if row["finished"]]
        cut += len(rows) - len(finished)
        wanted_VK = directions_of(recipe.preference, len(recipe.objectives), recipe.seed, job.t, prompt_id)
        best_of = list(winners(rows, finished, reward_MK, wanted_VK))
        won += len({best for _, best in best_of if best is not None})
        for v_K, best in best_of:
            if best is None:
                without += 1
                continue
            messages = asked[prompt_id]
            if rows[best]["condition_kind"] != "plain":  # what answered without a direction learns without one
                messages = with_system_line(messages, line(recipe, v_K), recipe.model.chat)
            chosen.append(_conversation(prompt_id, messages, rows[best]["response"], "selected"))
    if not chosen:
        raise ValueError(
            f"no answer of {considered} is left to learn from: {cut} were cut at sampling.max_new_tokens; raise it"
        )
    kept = replay(job, len(chosen))
    write_rows(job.out / "part-00000.parquet", chosen + kept, CONVERSATIONS)
    filtered = {"cut at max_new_tokens": cut, "not the best": considered - cut - won}
    job.work.tally.add(rows_in=considered, rows_out=len(chosen), filtered=filtered)
    if without:
        job.work.run.log(f"{without} directions of a prompt have no finished answer to learn from")
    job.work.tally.add(rows_in=len(kept), rows_out=len(kept))


def scored_prompts(candidates: Path, scores: Path, recipe: Recipe) -> Iterator[tuple[str, list[Row], Array]]:
    """Each prompt's answers with their rewards by objective (M, K), shard by shard.

    Raises:
        ValueError: scores that are not of these answers; a NaN score.
    """
    pairs = zip(sorted(candidates.glob("*.parquet")), sorted(scores.glob("*.parquet")), strict=True)
    for answers_path, scores_path in pairs:
        rows = list(read_rows(answers_path, CANDIDATES))
        scored = read_table(scores_path, SCORES)
        keys = ("prompt_id", "t", "condition_index", "sample")
        listed = [tuple(row[k] for k in keys) for row in rows]
        if listed != list(zip(*(scored[k].to_pylist() for k in keys), strict=True)):
            raise ValueError(
                f"{scores_path}: not the scores of {answers_path}; run the score stage on these answers again"
            )
        reward_NK = objective_rewards(scored["rewards"].to_pylist(), recipe.heads, recipe.objective_list, scores_path)
        groups: dict[str, list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            groups[row["prompt_id"]].append(i)
        for prompt_id, indices in groups.items():
            yield prompt_id, [rows[i] for i in indices], reward_NK[indices]


def objective_rewards(
    rewards: Sequence[Sequence[float]], heads: Sequence[str], objectives: Sequence[Objective], source: Path
) -> Array:
    """Objectives read from rows of rewards (N, K); an error names the file that they came from."""
    try:
        return read_objectives(np.array(rewards, dtype=np.float64).reshape(len(rewards), -1), heads, objectives)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def winners(
    rows: Sequence[Row], finished: Sequence[int], reward_MK: Array, wanted_VK: Array
) -> Iterator[tuple[Array, int | None]]:
    """For each direction of a prompt, the index of its best finished answer, if it has one."""
    if rows[0]["condition_kind"] != "direction":
        best_V = pooled_best(reward_MK[finished][None], wanted_VK[None])[0] if finished else None
        for v, v_K in enumerate(wanted_VK):
            yield v_K, None if best_V is None else finished[best_V[v]]
        return
    for v, v_K in enumerate(wanted_VK):
        mine = [i for i in finished if rows[i]["condition_index"] == v]
        score_1N = scalarize(reward_MK[mine][None], v_K[None]) if mine else None
        yield v_K, None if score_1N is None else mine[best_of_n(score_1N).index_B[0]]


def line(recipe: Recipe, v_K: Sequence[float] | Array) -> str:
    """The system line of a direction."""
    return render_preference(Preference.from_vector(v_K, tuple(recipe.objectives)), recipe.preference.template)


def replay(job: Job, selected: int) -> list[dict[str, Any]]:
    """Original answers of the current half, without a system line, as the recipe's share of all rows (section 3.1).

    The paper does not say which answers: for each of the prompts drawn, the one that the reward model
    rates highest on the first objective. Prompts are drawn once each until they run out.
    """
    recipe = job.recipe
    count = round(selected * recipe.replay / (1 - recipe.replay))
    if not count:
        return []
    best: dict[str, tuple[float, Row]] = {}
    for row, reward_K in annotated(job.inputs["data"], job.inputs["annotate"], recipe, job.half):
        if row["prompt_id"] not in best or reward_K[0] > best[row["prompt_id"]][0]:
            best[row["prompt_id"]] = (reward_K[0], row)
    ids = sorted(best)
    rounds = [
        rng_for(recipe.seed, "replay", job.t, i).permutation(len(ids)) for i in range(math.ceil(count / len(ids)))
    ]
    drawn = [best[ids[i]][1] for i in np.concatenate(rounds)[:count]]
    return [_conversation(row["prompt_id"], row["messages"], row["response"], "replay") for row in drawn]


def annotated(data: Path, annotate: Path, recipe: Recipe, half: str) -> Iterator[tuple[Row, Array]]:
    """The original answers of a half (or of both) with the reward model's rewards by objective."""
    split_of = {
        p["prompt_id"]: p["split"] for p in read_table(data / "prompts", PROMPTS, ["prompt_id", "split"]).to_pylist()
    }
    halves = ("D1", "D2") if half == "both" else (half,)
    rows = [row for row in read_rows(data / "train", RATED) if row["source"] != "helpsteer"]
    rewards = read_table(annotate, SCORES)
    if rewards["prompt_id"].to_pylist() != [row["prompt_id"] for row in rows]:
        raise ValueError(f"{annotate}: not the annotation of {data}; run the annotate stage again")
    reward_NK = objective_rewards(rewards["rewards"].to_pylist(), recipe.heads, recipe.objective_list, annotate)
    for row, reward_K in zip(rows, reward_NK, strict=True):
        if split_of[row["prompt_id"]] in halves:
            yield row, reward_K


def _conversation(prompt_id: str, messages: Sequence[Message], response: str, origin: str) -> dict[str, Any]:
    return {"prompt_id": prompt_id, "messages": list(messages), "response": response, "origin": origin}
