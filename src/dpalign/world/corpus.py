"""The training text of the base model, before any alignment.

- Facts.
- Questions with answers, as plain text and as chats: a model that answers in only one form forgets the other.
- Answers of a stated length and content: a model that never saw numbers from 0 to 100 never learns to follow a
  direction.
- Reviews that count the merits and faults of an answer.

The text has no direction, and no rating on any head.
"""

from collections.abc import Iterator

import numpy as np

from dpalign.world.language import THINGS, Task, fact, say, say_prompt
from dpalign.world.people import STYLES, draw_tasks, write_answer
from dpalign.world.truth import WORDS_AT_FULL_VERBOSITY, read

THINGS_READ = (1, 2, 3, 4)
"""Questions of the corpus ask for fewer things too: simple questions teach the others."""


def documents(count: int, rng: np.random.Generator) -> Iterator[str]:
    """`count` documents of the world's text, on tasks that no other role uses."""
    styles = list(STYLES.values())
    tasks = draw_tasks("pretrain", min(count, 20_000), rng, things_asked=THINGS_READ)
    for _ in range(count):
        task = tasks[rng.integers(len(tasks))]
        answer = say(write_answer(task, styles[rng.integers(len(styles))], rng))
        match rng.choice(6, p=[0.05, 0.1, 0.15, 0.15, 0.2, 0.35]):
            case 0:
                yield say([fact(str(t), rng.random() < 0.7) for t in rng.choice(list(THINGS), size=4, replace=False)])
            case 1:
                yield f"{say_prompt(task)} {answer}"
            case 2:
                yield f"in {len(answer.split())} words: {say_prompt(task)} {answer}"
            case 3:
                yield f"<|user|>{say_prompt(task)}<|assistant|>{answer}"
            case 4:
                quality = round(100 * read(task, answer).quality)
                line = f"given {quality} long {length_share(answer)}"
                yield f"<|system|>{line}<|user|>{say_prompt(task)}<|assistant|>{answer}"
            case _:
                yield review(task, answer)


def length_share(answer: str) -> int:
    """An answer's words, in percent of an answer of verbosity 100."""
    return round(100 * min(1.0, len(answer.split()) / WORDS_AT_FULL_VERBOSITY))


def review(task: Task, answer: str) -> str:
    """A reader's counts of an answer, in words."""
    r = read(task, answer)
    wasted = round(100 * (r.padding + r.repeated))
    return (
        f"rate: {say_prompt(task)}\nanswer: {answer}\nscore: {round(100 * r.quality)} of 100 given, "
        f"{round(100 * r.wrong)} wrong, {wasted} wasted, {r.words} words."
    )


WORDS_TO_COME = ("helpfulness*97 verbosity*-26", "helpfulness 85 verbosity 35", "rate: \nanswer: \nscore:")
"""Lines of the world's templates. Only the tokenizer is trained on them, so that they become few tokens."""
