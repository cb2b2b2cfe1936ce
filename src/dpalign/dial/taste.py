"""`dpa taste`: estimate a person's own direction from choices between answers that a run has already scored.

Each question is asked once, with the two answers whose comparison is most informative. The same estimate sets the
dial of the page and of the chat (`/prefer`), from answers to a person's own questions.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np
from rich.text import Text

from dpalign.dial.chat.terminal import STYLES, Terminal, harmless, terminal_of_process
from dpalign.dial.dial import Dial
from dpalign.dial.export.source import find_source
from dpalign.measure.bootstrap import Array
from dpalign.measure.reading import Reading, answer_rows, rewards
from dpalign.measure.taste import Taste
from dpalign.page.words import degrees
from dpalign.paper.direction import Preference, Sphere, rng_for

KEYS: Final[Mapping[str, int]] = {"a": 0, "1": 0, "b": 1, "2": 1}
GUESSED: Final = 40.0
"""Points along a direction. Without a measured front, mean rewards are assumed to lie on a circle or sphere."""
CANDIDATES: Final = 12
"""Directions to compare without a measured front."""
Choice = tuple[Mapping[str, float], Mapping[str, float]]
"""The rewards by objective of the preferred answer, and of the other."""


# --- the estimate ---


@dataclass(frozen=True)
class Estimate:
    """A person's own direction, estimated from their choices."""

    direction: Preference
    within: float
    """Degrees around the direction that hold 90% of the posterior."""
    next: tuple[Preference, Preference] | None
    """The two directions whose comparison is most informative; None if only one direction is trained."""
    words: str
    """`helpfulness*0.86 - verbosity*0.51, at -31°; 90% sure within 9°`."""

    @classmethod
    def of(cls, dial: Dial, choices: Iterable[Choice] = ()) -> Self:
        """Estimate a person's direction on a dial from their choices.

        Raises:
            ValueError: rewards that are not those of the dial's objectives.
        """
        taste = _taste_of(dial, choices)
        direction = Preference.from_vector(taste.v_K, dial.objectives)
        return cls(direction, taste.within(), next_directions(dial, taste), estimate_in_words(dial, taste))


def _taste_of(dial: Dial, choices: Iterable[Choice] = ()) -> Taste:
    """Return the posterior of a person's direction on a dial, given their choices.

    Raises:
        ValueError: rewards that are not those of the dial's objectives.
    """
    taste = Taste.of_anyone(dial.population or Sphere(len(dial.objectives)))
    for i, (preferred, other) in enumerate(choices):
        for rewarded in (preferred, other):
            if sorted(rewarded) != sorted(dial.objectives):
                named = ", ".join(map(str, rewarded)) or "nothing"
                raise ValueError(f"choice {i}: rewards of {named}; give those of {', '.join(dial.objectives)}")
        taste = taste.after(np.array([preferred[name] - other[name] for name in dial.objectives]))
    return taste


def next_directions(dial: Dial, taste: Taste) -> tuple[Preference, Preference] | None:
    """Return the two directions whose comparison is expected to be most informative, in random order.

    They are measured directions if there is a front. None if only one direction is trained.
    """
    if len(dial.front) > 1:
        directions = [point.direction for point in dial.front]
        point_VK = np.array([[point.rewards[name] for name in dial.objectives] for point in dial.front])
    else:
        evenly = np.linspace(0, len(taste.v_PK) - 1, CANDIDATES).round().astype(int)
        v_VK = np.unique(taste.v_PK[evenly], axis=0)
        directions = [Preference.from_vector(v_K, dial.objectives) for v_K in v_VK]
        point_VK = GUESSED * v_VK
    if len(directions) < 2:
        return None
    first_N, second_N = np.triu_indices(len(point_VK), 1)
    best = int(taste.information(point_VK[first_N] - point_VK[second_N]).argmax())
    first, second = directions[first_N[best]], directions[second_N[best]]
    # a person who always takes the left answer must not seem to have a direction
    return (second, first) if rng_for("taste", taste.choices).integers(2) else (first, second)


def estimate_in_words(dial: Dial, taste: Taste) -> str:
    """Return the estimate in words, as in `Estimate.words`."""
    preference = Preference.from_vector(taste.v_K, dial.objectives)
    angle = dial.angle_of(preference)
    at = "" if angle is None else f", at {degrees(round(angle, 1))}"
    return f"{Dial.formula(preference)}{at}; 90% sure within {degrees(round(taste.within(), 1))}"


# --- the verb ---


@dataclass(frozen=True, eq=False)
class Pairs:
    """All pairs of answers to one question, over all questions. Shapes: N pairs, K objectives."""

    prompt_N: Array
    first_N: Array
    """Row of an answer."""
    second_N: Array
    gain_NK: Array
    """The first answer's rewards less the second's."""


def pairs_of(prompt_ids: Sequence[str], answers: Sequence[str], whole: Sequence[bool], reward_NK: Array) -> Pairs:
    """Return all pairs of whole and different answers to one question.

    Raises:
        ValueError: there are none.
    """
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompt_ids):
        if whole[row]:
            rows.setdefault(prompt, []).append(row)
    table = [
        (number, first, second)
        for number, of_one in enumerate(rows.values())
        for i, first in enumerate(of_one)
        for second in of_one[i + 1 :]
        if answers[first] != answers[second]
    ]
    if not table:
        raise ValueError("no question has two whole answers that differ")
    prompt_N, first_N, second_N = np.array(table).T
    return Pairs(prompt_N, first_N, second_N, reward_NK[first_N] - reward_NK[second_N])


class TakenBack(Exception):
    """The person takes the last choice back."""


def ask(
    pairs: Pairs, taste: Taste, choices: int, choose: Callable[[int, int, Taste], int | None], seed: int = 0
) -> Taste:
    """Ask a person the most informative question left, again and again, and learn from every choice.

    Args:
        choices: how many to make.
        choose: called with the rows of two answers and the estimate so far. It returns the index of the preferred one,
            or None to skip the question. It raises TakenBack to undo the last choice, StopIteration to end.
        seed: decides which of the two answers comes first.
    """
    left_N = np.ones(len(pairs.prompt_N), dtype=bool)
    earlier: list[tuple[Taste, Array]] = []  # before each choice: what was known, and which pairs were left
    while taste.choices < choices and left_N.any():
        number_L = np.flatnonzero(left_N)
        pair = int(number_L[taste.information(pairs.gain_NK[number_L]).argmax()])
        before = taste, left_N
        left_N = left_N & (pairs.prompt_N != pairs.prompt_N[pair])
        first, second = int(pairs.first_N[pair]), int(pairs.second_N[pair])
        turned = bool(rng_for(seed, "taste", pair).integers(2))
        try:
            chosen = choose(second, first, taste) if turned else choose(first, second, taste)
        except StopIteration:
            break
        except TakenBack:
            taste, left_N = earlier.pop() if earlier else before
            continue
        if chosen is not None:
            earlier.append(before)
            taste = taste.after(pairs.gain_NK[pair] * (1 if (chosen == 0) != turned else -1))
    return taste


def declare(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run's folder, or that of one of its policies: its evaluation is read")
    add("--iteration", type=int, metavar="N", help="the policy of this iteration (default: the last)")
    add("--choices", type=int, default=12, metavar="N", help="how many to make (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="which answer is shown first (default: %(default)s)")


def execute(arguments: argparse.Namespace, _: Sequence[str]) -> str:
    """Ask which answers a person prefers; return the direction, and how to use it.

    Raises:
        ValueError: fewer than 1 choice, no evaluated policy, or no two answers to choose between.
    """
    if arguments.choices < 1:
        raise ValueError(f"--choices {arguments.choices}: at least 1")
    source = find_source(arguments.run, arguments.iteration)
    if source.evaluation is None or source.recipe is None:
        why = "; ".join(source.notes) if source.recipe is None else ""
        raise ValueError(f"{arguments.run}: no finished evaluation of this policy: {why or '`dpa run` makes one'}")
    reading = Reading(tuple(source.recipe.scored_heads), tuple(source.recipe.objective_list))
    rows = answer_rows(source.evaluation, ["prompt_id", "messages", "response", "finished"])
    answers = [row["response"].strip() for row in rows]
    try:
        pairs = pairs_of(
            [row["prompt_id"] for row in rows],
            answers,
            [row["finished"] and bool(answer) for row, answer in zip(rows, answers, strict=True)],
            rewards(source.evaluation / "scores", reading),
        )
    except ValueError as error:
        raise ValueError(f"{source.evaluation}: {error}") from None
    dial = Dial.of(source.contract)
    screen = terminal_of_process(quiet=not sys.stdout.isatty())

    def choose(first: int, second: int, taste: Taste) -> int | None:
        known = f"   {estimate_in_words(dial, taste)}" if taste.choices else ""
        screen.say(f"\n{taste.choices + 1} of {arguments.choices}{known}", "dim")
        say_pair(screen, rows[first]["messages"][-1]["content"], (answers[first], answers[second]))
        return _read(screen)

    taste = ask(pairs, _taste_of(dial), arguments.choices, choose, arguments.seed)
    if not taste.choices:
        return "nothing was chosen"
    wish = ",".join(f"{name}={w:.3g}" for name, w in zip(dial.objectives, taste.v_K.tolist(), strict=True))
    return f"{made(taste.choices)}: {estimate_in_words(dial, taste)}\ndpa chat {arguments.run} --dial {wish}"


def made(choices: int) -> str:
    """`1 choice`, `2 choices`."""
    return f"{choices} choice{'' if choices == 1 else 's'}"


def say_pair(screen: Terminal, question: str, answers: tuple[str, str]) -> None:
    """Print a question with two answers, side by side if there is room."""
    console = screen.console
    console.print(Text(harmless(question), "bold"))
    screen.show(
        *(Text(f"{name}  {harmless(text)}", style) for name, text, style in zip("AB", answers, STYLES, strict=True))
    )


def _read(screen: Terminal) -> int | None:
    """Read a choice: 0 or 1, or None for neither.

    Raises:
        StopIteration: the person has chosen enough.
        TakenBack: the person takes the last choice back.
    """
    while True:
        try:
            word = screen.read("Which do you prefer? A, B, s to skip, u to undo, q to end: ").strip().lower()
        except EOFError:
            raise StopIteration from None
        if word in ("q", "quit"):
            raise StopIteration
        if word in ("u", "undo"):
            raise TakenBack
        if word in ("s", "skip"):
            return None
        if word in KEYS:
            return KEYS[word]
        screen.say(f"{word!r} is none of A, B, s, u, q", "yellow")
