"""Robust inference: which directions are drawn at around the one asked, and which answer is returned."""

import asyncio
import math
from collections.abc import Sequence

import numpy as np
import pytest

from dpalign.dial.best_of import best_answer, draw_best, neighbours
from dpalign.dial.dial import Dial
from dpalign.dial.server.engine import Delta
from dpalign.paper.direction import Arc, Preference

NAMES = ("helpfulness", "verbosity")


def angles(asked: float, n: int, spread: float, arc: tuple[float, float] | None = None) -> list[float]:
    around = neighbours(Preference.from_angle(asked, NAMES), n, spread, arc)
    return [round(near.angle, 6) for near in around]


def test_neighbours_are_the_middles_of_even_slices_around_the_direction() -> None:
    """Four slices of 5 degrees between -40 and -20; an odd number holds the direction itself."""
    assert angles(-30, 4, 10) == [-37.5, -32.5, -27.5, -22.5]
    assert angles(-30, 3, 9) == [-36.0, -30.0, -24.0]
    assert angles(-30, 1, 10) == [-30.0]
    assert angles(-30, 3, 0) == [-30.0] * 3


def test_neighbours_stay_in_the_trained_arc_unless_the_direction_lies_outside() -> None:
    assert angles(-43, 4, 8, (-45, 0)) == [-45.0, -45.0, -41.0, -37.0]
    assert angles(-50, 2, 8, (-45, 0)) == [-54.0, -46.0]


def test_neighbours_across_the_half_turn_go_on_around() -> None:
    assert angles(179, 2, 4) == [177.0, -179.0]


def test_over_three_objectives_neighbours_fill_the_cone_with_the_direction_first() -> None:
    asked = Preference.from_vector([3, -2, 1], ("a", "b", "c"))
    around = neighbours(asked, 8, 12)
    away = [math.degrees(math.acos(min(1.0, float(near.v_K @ asked.v_K)))) for near in around]
    assert away[0] == pytest.approx(0, abs=1e-4)
    assert max(away) <= 12 + 1e-6
    assert min(away[1:]) > 3
    assert len({near.v for near in around}) == 8
    assert [near.v for near in neighbours(asked, 8, 12)] == [near.v for near in around]


@pytest.mark.parametrize(("n", "spread"), [(0, 5), (-1, 5), (4, -1), (4, 181), (4, math.nan)])
def test_no_answers_and_impossible_spreads_are_refused(n: int, spread: float) -> None:
    with pytest.raises(ValueError, match=r"give (at least 1|0 to 180)"):
        neighbours(Preference.from_angle(0, NAMES), n, spread)


def test_the_best_answer_is_so_at_the_direction_asked_and_finished_where_any_is() -> None:
    """v = (0.8, -0.6): 60*0.8 - 40*0.6 = 24, 50*0.8 - 10*0.6 = 34, 90*0.8 - 20*0.6 = 60 but cut short."""
    reward_NK = np.array([[60.0, 40.0], [50.0, 10.0], [90.0, 20.0]])
    asked = Preference.from_weights({"helpfulness": 0.8, "verbosity": -0.6}, NAMES)
    assert best_answer(reward_NK, [True, True, False], asked) == 1
    assert best_answer(reward_NK, [True, True, True], asked) == 2
    assert best_answer(reward_NK, [False, False, False], asked) == 2
    assert best_answer(reward_NK, [True, False, False], asked) == 0


def test_an_answer_that_says_nothing_is_never_the_best_of_several() -> None:
    """A reward model that takes silence for the best answer there is does not get its way."""

    async def draw(near: Preference, n: int, seed: int) -> list[Delta]:
        return [Delta(i, "" if i % 2 else "fox is red.", 1 if i % 2 else 5, "stop") for i in range(n)]

    async def score(answers: Sequence[str]) -> np.ndarray:
        return np.array([[50.0, 40.0] if answer else [100.0, -40.0] for answer in answers])

    dial, asked = Dial(NAMES, "fig1", "zephyr", Arc(-45.0, 0.0)), Preference.from_angle(-30, NAMES)
    best = asyncio.run(draw_best(dial, asked, 4, 0.0, 1, draw=draw, score=score))
    assert best.text == "fox is red."
    assert best.report.rewards == {"helpfulness": 50.0, "verbosity": 40.0}
