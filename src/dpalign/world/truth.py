"""The true rewards of an answer, by rule.

Quality is the share of the task that the answer fulfils. For each thing, weighted by its importance, covering it earns
(1 - detail weight) and its detail the rest. UltraFeedback's instruction following is that quality. Each of the other
three aspects is the quality reduced by one kind of fault. The helpfulness objective is the mean of the four, as in the
paper. Verbosity is length alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpalign.rows import HEADS
from dpalign.world.language import Claim, Task, read_answer, read_prompt, say_claim

WORDS_AT_FULL_VERBOSITY = 28
"""An answer of this many words, or more, has verbosity 100."""


@dataclass(frozen=True)
class Counts:
    """A careful reader's counts of an answer to a task; every share lies in 0..1."""

    quality: float  # of the task, weighted
    wrong: float  # of the claims
    padding: float  # of the words: fillers, things outside the task, broken sentences
    repeated: float  # of the words
    detailed: float  # of the things of the task
    words: int

    @property
    def verbosity(self) -> float:
        """True verbosity, 0-100."""
        return 100 * min(1.0, self.words / WORDS_AT_FULL_VERBOSITY)

    @property
    def helpfulness(self) -> float:
        """True helpfulness, 0-100: the mean of the four aspects (section 3.1)."""
        return 25 * self.quality * (1 + (1 - self.wrong) + (1 - self.padding) + (1 - self.repeated))


def read(task: Task, answer: str) -> Counts:
    """Count the merits and faults of an answer."""
    covered: set[str] = set()
    detailed: set[str] = set()
    earlier: set[str] = set()
    words = padding = repeated = claims = wrong = 0
    for sentence in read_answer(answer):
        text = say_claim(sentence) if isinstance(sentence, Claim) else sentence
        length = len(text.split())
        words += length
        if not isinstance(sentence, Claim) or sentence.thing not in task.things:
            padding += length
        elif text in earlier:
            repeated += length
        else:
            claims += 1
            wrong += not sentence.right
            if sentence.right:
                covered.add(sentence.thing)
                if sentence.detail:
                    detailed.add(sentence.thing)
        earlier.add(text)
    detail = task.detail_weight
    quality = sum(
        w * ((1 - detail) * (thing in covered) + detail * (thing in detailed))
        for thing, w in zip(task.things, task.weights, strict=True)
    )
    return Counts(
        quality=quality,
        wrong=wrong / max(1, claims),
        padding=padding / max(1, words),
        repeated=repeated / max(1, words),
        detailed=len(detailed) / len(task.things),
        words=words,
    )


def true_rewards(task: Task, answer: str) -> tuple[float, ...]:
    """The ten true rewards of an answer, 0-100, in the order of `rows.HEADS`."""
    r = read(task, answer)
    aspects = {
        "instruction_following": r.quality,
        "truthfulness": r.quality * (1 - r.wrong),
        "honesty": r.quality * (1 - r.padding),
        "helpfulness": r.quality * (1 - r.repeated),
    }
    by_head = {f"ultrafeedback-{aspect}": 100 * value for aspect, value in aspects.items()} | {
        "ultrafeedback-overall_score": r.helpfulness,
        "helpsteer-helpfulness": r.helpfulness,
        "helpsteer-correctness": 100 * (1 - r.wrong) * (r.words > 0),
        "helpsteer-coherence": 100 * (1 - r.repeated) * (r.words > 0),
        "helpsteer-complexity": 100 * r.detailed,
        "helpsteer-verbosity": r.verbosity,
    }
    return tuple(by_head[head] for head in HEADS)


def score(prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float32]:
    """The true rewards of answers, as a reward function: `dpalign.world.truth:score`."""
    rows = [true_rewards(read_prompt(p), a) for p, a in zip(prompts, responses, strict=True)]
    return np.array(rows, dtype=np.float32).reshape(len(rows), len(HEADS))
