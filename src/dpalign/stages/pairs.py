"""Preference pairs for DPO, of the data's rated answers, as Zephyr made them, or of the run's own scored candidates.

A prompt has at most one pair. A pair with equal scores says nothing, and is left out. For a prompt with fewer than two
rated answers, the data's own preference pair is taken, if any.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from dpalign.data.ratings import labels_for
from dpalign.paper.direction import rng_for
from dpalign.paper.objectives import head_indices, own_name, read_objectives
from dpalign.rows import PAIRS, PROMPTS, RATED, Message, read_rows, write_rows
from dpalign.stages.pools import scored_prompts
from dpalign.stages.stage import Job, objectives_read, stage

OVERALL: Final = "ultrafeedback-overall_score"

Answers = tuple[str, Sequence[Message], Sequence[str], Sequence[float]]
"""A prompt's id and messages, and its answers with a score each."""


@stage(
    reads=lambda r: (r.seed, r.dpo.pairs, *objectives_read(r)),
    inputs=("data",),
    optional=("candidates", "scores"),
    heavy=False,
)
def pairs(job: Job) -> None:
    """Make preference pairs of rated answers, or of scored candidates.

    Raises:
        ValueError: no prompt has a pair; or `dpo.pairs` is "candidates" and the stage has no candidates or scores.
    """
    recipe = job.recipe
    of_ratings = recipe.dpo.pairs == "ratings"
    rows: list[dict[str, Any]] = []
    few = ties = 0
    preferred = preferences(job.inputs["data"]) if of_ratings else {}
    for prompt_id, messages, answers, scores in rated_prompts(job) if of_ratings else candidate_prompts(job):
        if len(answers) < 2 and prompt_id in preferred:
            rows.append(preferred[prompt_id])
            continue
        if len(answers) < 2:
            few += 1
            continue
        best, other = int(np.argmax(scores)), int(np.argmin(scores))
        if of_ratings:  # a random other answer, as in Zephyr's pairs
            others = [i for i in range(len(scores)) if i != best]
            other = others[rng_for(recipe.seed, "rejected", prompt_id).integers(len(others))]
        if scores[best] == scores[other]:
            ties += 1
            continue
        rows.append(
            {
                "prompt_id": prompt_id,
                "messages": messages,
                "chosen": answers[best],
                "rejected": answers[other],
                "chosen_score": scores[best],
                "rejected_score": scores[other],
                "origin": recipe.dpo.pairs,
            }
        )
    if not rows:
        raise ValueError(
            f"no pair is left of {few + ties} prompts: {few} have fewer than two answers to compare, and the two of "
            f"{ties} score alike; dpo.pairs is {recipe.dpo.pairs!r}, the other choice may have some"
        )
    write_rows(job.out / "part-00000.parquet", rows, PAIRS)
    filtered = {"fewer than two answers": few, "the two score alike": ties}
    job.work.tally.add(rows_in=len(rows) + few + ties, rows_out=len(rows), filtered=filtered)


def preferences(data: Path) -> dict[str, dict[str, Any]]:
    """The first of the data's own pairs for each prompt."""
    if not (data / "pairs").exists():
        return {}
    first: dict[str, dict[str, Any]] = {}
    for row in read_rows(data / "pairs", PAIRS):
        first.setdefault(row["prompt_id"], row)
    return first


def rated_prompts(job: Job) -> Iterator[Answers]:
    """The prompts of D1 and D2 with their rated answers, in the order of the data.

    Answers are compared by the overall score if two of the prompt's answers have one, else by the mean label of the
    heads that the first objective reads. The two have different scales. An answer without the label is left out.
    """
    recipe, data = job.recipe, job.inputs["data"]
    first = recipe.objective_list[0]
    heads = recipe.scored_heads
    own, read = [own_name(head) for head in heads], head_indices(first, heads)
    prompts: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(data / "train", RATED):
        if row["source"] != "helpsteer":
            prompts.setdefault(row["prompt_id"], []).append(row)
    for prompt_id, rows in prompts.items():
        overall = [row for row in rows if OVERALL in row["labels"]]
        if len(overall) > 1:
            rated, scores = overall, [float(row["labels"][OVERALL]) for row in overall]
        else:
            labels = [labels_for(row["labels"], own) for row in rows]
            kept = [n for n, row_labels in enumerate(labels) if all(row_labels[i] is not None for i in read)]
            rated = [rows[n] for n in kept]
            label_NH = np.array([labels[n] for n in kept], dtype=np.float64).reshape(len(kept), len(heads))
            scores = read_objectives(label_NH, heads, [first])[:, 0].tolist()
        yield prompt_id, rows[0]["messages"], [row["response"] for row in rated], scores


def candidate_prompts(job: Job) -> Iterator[Answers]:
    """The sampled prompts with their finished candidates, without the candidates' system lines.

    Raises:
        ValueError: the stage has no candidates or no scores.
    """
    missing = {"candidates", "scores"} - job.inputs.keys()
    if missing:
        raise ValueError(
            f'dpo.pairs is "candidates", and the stage was given no {" and no ".join(sorted(missing))}; give both, '
            'or take "ratings"'
        )
    asked = {p["prompt_id"]: p["messages"] for p in read_rows(job.inputs["data"] / "prompts", PROMPTS)}
    for prompt_id, rows, reward_MK in scored_prompts(job.inputs["candidates"], job.inputs["scores"], job.recipe):
        finished = [i for i, row in enumerate(rows) if row["finished"]]
        yield prompt_id, asked[prompt_id], [rows[i]["response"] for i in finished], reward_MK[finished, 0].tolist()
