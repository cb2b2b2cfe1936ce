"""How soon `dpa taste` finds a person's direction: simulated people choose among a run's own answers.

    python bench/people.py runs/demo

A person has a direction v of the trained range, and chooses by v . r: r are the rewards that the run selected by, or
with `--felt` its judge's or the truth. The estimate reads the former alone, as for a real person. A person is as
sharp as to take the better answer of a pair in a stated share of all pairs.

Shapes: N pairs, K objectives, R answers.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpalign.dial.export.source import find_source
from dpalign.dial.taste import Pairs, ask, pairs_of
from dpalign.measure.reading import Reading, answer_rows, rewards, true_rewards
from dpalign.measure.taste import Taste
from dpalign.paper.direction import Sphere, draw_directions, rng_for

COUNTS = (3, 6, 12, 24)
Missed = dict[int, list[float]]
"""Angle errors by the number of choices."""


@dataclass(frozen=True)
class Person:
    """Somebody with a direction, who does not always look closely."""

    v_K: np.ndarray
    sharpness: float
    """Logits per point."""
    rng: np.random.Generator

    def choose(self, reward_RK: np.ndarray, first: int, second: int, _: Taste) -> int:
        """0 or 1: the place of the preferred answer."""
        lead = float((reward_RK[first] - reward_RK[second]) @ self.v_K)
        return int(self.rng.random() > 1 / (1 + np.exp(-self.sharpness * lead)))


def sharpness_of(lead_N: np.ndarray, share: float) -> float:
    """The sharpness at which the better answer is taken in this share of pairs.

    Args:
        lead_N: of each pair's better answer, in points of v . r.
    """
    tried = np.geomspace(1e-3, 10, 400)
    taken = [float(np.mean(1 / (1 + np.exp(-sharpness * lead_N)))) for sharpness in tried]
    return float(tried[min(np.searchsorted(taken, share), len(tried) - 1)])


def any_pair(pairs: Pairs, rng: np.random.Generator) -> Pairs:
    """One pair of each question, whichever: what a list of questions without a choice of pairs would ask."""
    kept = [int(rng.choice(np.flatnonzero(pairs.prompt_N == prompt))) for prompt in np.unique(pairs.prompt_N)]
    return Pairs(*(column[kept] for column in (pairs.prompt_N, pairs.first_N, pairs.second_N, pairs.gain_NK)))


def main(argv: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Print a table, and return its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--people", type=int, default=100)
    parser.add_argument("--felt", choices=("scores", "judged", "truth"), default="scores", help="what people go by")
    parser.add_argument("--agree", type=float, nargs="+", default=[0.7, 0.8, 0.9])
    given = parser.parse_args(argv)
    source = find_source(given.run)
    assert source.evaluation is not None, f"{given.run} has no evaluation"
    assert source.recipe is not None
    reading = Reading(tuple(source.recipe.scored_heads), tuple(source.recipe.objective_list))
    known_RK = rewards(source.evaluation / "scores", reading)
    if given.felt == "truth":
        felt_RK = true_rewards(source.evaluation / "truth", reading)
    else:
        felt_RK = rewards(source.evaluation / given.felt, reading)
    assert felt_RK is not None, f"{given.run} knows no truth"
    rows = answer_rows(source.evaluation, ["prompt_id", "response", "finished"])
    whole = [row["finished"] and bool(row["response"].strip()) for row in rows]
    pairs = pairs_of([row["prompt_id"] for row in rows], [row["response"] for row in rows], whole, known_RK)
    population = source.contract.population or Sphere(len(reading.names))
    table = []
    for share in given.agree:
        for chosen in (True, False):
            missed: Missed = {n: [] for n in COUNTS}
            for number in range(given.people):
                rng = rng_for("person", number)
                v_K = draw_directions(population, 1, rng)[0]
                lead_N = np.abs((felt_RK[pairs.first_N] - felt_RK[pairs.second_N]) @ v_K)
                person = Person(v_K, sharpness_of(lead_N, share), rng)

                def choose(
                    first: int, second: int, taste: Taste, *, person: Person = person, missed: Missed = missed
                ) -> int:
                    if taste.choices in missed:
                        missed[taste.choices].append(angle(taste.v_K, person.v_K))
                    return person.choose(felt_RK, first, second, taste)

                asked = pairs if chosen else any_pair(pairs, rng)
                last = ask(asked, Taste.of_anyone(population), COUNTS[-1], choose, seed=number)
                missed[COUNTS[-1]].append(angle(last.v_K, v_K))
            row = {"agree": share, "chosen": float(chosen)}
            row |= {str(n): float(np.mean(degrees)) for n, degrees in missed.items()}
            row |= {f"{n} se": float(np.std(degrees) / len(degrees) ** 0.5) for n, degrees in missed.items()}
            table.append(row)
            figures = "  ".join(f"{n}: {row[str(n)]:.1f} ({1.96 * row[f'{n} se']:.1f})" for n in COUNTS)
            what = "the pair that says most" if chosen else "any pair"
            sys.stdout.write(f"agree {share:.0%}, {what}: degrees missed after choices (95%): {figures}\n")
            sys.stdout.flush()
    return table


def angle(a_K: np.ndarray, b_K: np.ndarray) -> float:
    """Degrees between two unit vectors."""
    return float(np.degrees(np.arccos(np.clip(a_K @ b_K, -1, 1))))


if __name__ == "__main__":
    main()
