"""The world's rows as files, in the forms of the real data sets, quirks included.

They pass through the same readers as the real ones: HelpSteer's integer attributes; raw UltraFeedback with its nested
annotations, text ratings and mistaken tens; ultrachat's messages; plain prompts.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from dpalign.paper.direction import rng_for
from dpalign.rows import HEADS, prompt_id, user_prompt
from dpalign.world.language import Task, say, say_prompt
from dpalign.world.people import RATED_STYLES, STYLES, Style, draw_tasks, rate, write_answer
from dpalign.world.truth import true_rewards

ANSWERS: Final = 4
"""Rated answers a prompt, as in both data sets."""

NOT_RATED: Final = 0.01
"""Share of UltraFeedback's ratings that read "N/A"."""

EMPTY: Final = 0.005
"""Share of UltraFeedback's answers that are empty."""


def write_world(folder: Path, seed: int, counts: Mapping[str, int]) -> dict[str, int]:
    """Write the world's files for one seed; returns rows by file.

    Args:
        counts: tasks of each role: helpsteer, ultrafeedback, sft, tuning, test.
    """

    def rows(role: str, make: Any) -> Iterator[dict[str, Any]]:
        for task in draw_tasks(role, counts[role], rng_for(seed, "tasks", role)):
            yield from make(task, rng_for(seed, "answers", role, say_prompt(task)))

    return {
        name: _write_jsonl(folder / name, content)
        for name, content in {
            "helpsteer.jsonl": rows("helpsteer", _helpsteer_rows),
            "ultrafeedback.jsonl": rows("ultrafeedback", _ultrafeedback_rows),
            "sft.jsonl": rows("sft", _chat_rows),
            "tuning.jsonl": rows("tuning", _prompt_rows),
            "test.jsonl": rows("test", _prompt_rows),
        }.items()
    }


def _answers(
    task: Task, count: int, rng: np.random.Generator, styles: Mapping[str, Style] = RATED_STYLES
) -> Iterator[tuple[str, str]]:
    """Distinct answers, each in a random style: (style, text)."""
    named = list(styles.items())
    texts: set[str] = set()
    while len(texts) < count:
        name, style = named[rng.integers(len(named))]
        text = say(write_answer(task, style, rng))
        if text not in texts:
            texts.add(text)
            yield name, text


def _helpsteer_rows(task: Task, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    for _, answer in _answers(task, ANSWERS, rng):
        truth = dict(zip(HEADS, true_rewards(task, answer), strict=True))
        ratings = {
            head.removeprefix("helpsteer-"): rate(truth[head], 0, 4, rng)
            for head in HEADS
            if head.startswith("helpsteer-")
        }
        yield {"prompt": say_prompt(task), "response": answer, **ratings}


def _ultrafeedback_rows(task: Task, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    completions = []
    for name, answer in _answers(task, ANSWERS, rng):
        truth = dict(zip(HEADS, true_rewards(task, answer), strict=True))
        aspects = {
            head.removeprefix("ultrafeedback-"): rate(truth[head], 1, 5, rng)
            for head in HEADS
            if head.startswith("ultrafeedback-") and head != "ultrafeedback-overall_score"
        }
        overall = rate(truth["ultrafeedback-overall_score"], 1, 10, rng)
        if overall == 1 and max(aspects.values()) <= 2:
            overall = 10  # the mistake of the older files, which the reader repairs
        completions.append(
            {
                "model": name,
                "response": "" if rng.random() < EMPTY else answer,
                "annotations": {
                    aspect: {"Rating": "N/A" if rng.random() < NOT_RATED else str(rating), "Rationale": ""}
                    for aspect, rating in aspects.items()
                },
                "overall_score": str(overall) if rng.random() < 0.5 else float(overall),
            }
        )
    yield {"source": "world", "instruction": say_prompt(task), "models": [], "completions": completions}


def _chat_rows(task: Task, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    prompt = say_prompt(task)
    for _, answer in _answers(task, 1, rng, STYLES):
        yield {
            "prompt": prompt,
            "prompt_id": prompt_id(user_prompt(prompt)),
            "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
        }


def _prompt_rows(task: Task, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    yield {"prompt": say_prompt(task)}


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return len(lines)
