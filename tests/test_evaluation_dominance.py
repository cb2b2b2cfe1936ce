"""Dominance at every direction at once."""

import numpy as np
import pytest

from dpalign.measure.bootstrap import Array, Bootstrap
from dpalign.measure.dominance import dominance, lead
from dpalign.measure.points import Rewards
from dpalign.measure.system import System

DIRECTIONS = np.array([[1.0, 0.0], [0.8, -0.6]])


def system(name: str, reward_PVK: Array) -> Rewards:
    prompt_ids = tuple(f"prompt {p}" for p in range(len(reward_PVK)))
    return Rewards(System(name), prompt_ids, None, reward_PVK[:, :, None, :])


def test_a_lead_is_between_the_best_points_at_each_direction() -> None:
    a, b = np.array([[80.0, 60.0], [70.0, 30.0]]), np.array([[75.0, 50.0], [60.0, 20.0]])
    # (1, 0): 80 - 75; (0.8, -0.6): 56 - 18 = 38 against 48 - 12 = 36
    assert lead(a, b, DIRECTIONS) == pytest.approx([5, 2])


def test_a_constant_lead_has_no_error_and_the_smallest_p_value() -> None:
    shared_P = np.random.default_rng(1).normal(0, 15, (20, 1, 1))
    b = np.array([[60.0, 40.0]]) + shared_P
    ahead = dominance(system("a", b + np.array([3.0, 0.0])), system("b", b), DIRECTIONS, Bootstrap(replicates=99))
    assert ahead.margin.value == pytest.approx(2.4)  # 3 at (1, 0), 0.8 * 3 at the other
    assert ahead.margin.low == pytest.approx(2.4, abs=1e-6)
    assert ahead.p_value == 0.01  # 1 / (99 + 1)


def test_a_lead_at_all_directions_but_one_is_no_dominance() -> None:
    rng = np.random.default_rng(7)
    b = np.array([[60.0, 40.0]]) + rng.normal(0, 1, (50, 1, 2))
    a = b + np.array([5.0, 8.0])  # + 5 at (1, 0); 4 - 4.8 = -0.8 at (0.8, -0.6)
    verdict = dominance(system("a", a), system("b", b), DIRECTIONS, Bootstrap(replicates=200))
    assert [one.value for one in verdict.leads] == pytest.approx([5, -0.8])
    assert verdict.margin.value == pytest.approx(-0.8)
    assert verdict.p_value == 1


def test_a_system_does_not_dominate_itself() -> None:
    one = system("one", np.random.default_rng(3).normal(50, 10, (30, 4, 2)))
    verdict = dominance(one, one, DIRECTIONS, Bootstrap(replicates=100))
    assert (verdict.margin.value, verdict.margin.low, verdict.p_value) == (0, 0, 1)


def test_ten_noisy_points_seldom_dominate_one_that_is_as_good() -> None:
    angle = np.radians(np.linspace(0, -45, 10))
    directions = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    bootstrap, rng = Bootstrap(replicates=200), np.random.default_rng(9)
    claims = 0
    for _ in range(200):
        ten, one = rng.normal(50, 10, (60, 10, 2)), rng.normal(50, 10, (60, 1, 2))
        claims += dominance(system("ten", ten), system("one", one), directions, bootstrap).p_value <= 0.05
    assert claims / 200 <= 0.06


def test_the_band_holds_the_leads_at_all_directions_together() -> None:
    angle = np.radians(np.linspace(0, -45, 10))
    directions = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    bootstrap, rng = Bootstrap(replicates=300), np.random.default_rng(4)
    truth = lead(np.array([[70.0, 40.0]]), np.array([[60.0, 42.0]]), directions)
    held = 0
    for _ in range(200):
        a, b = rng.normal([70, 40], 10, (60, 1, 2)), rng.normal([60, 42], 10, (60, 1, 2))
        ends = dominance(system("a", a), system("b", b), directions, bootstrap).leads
        held += all(e.low <= t <= e.high for e, t in zip(ends, truth, strict=True))
    assert 0.90 <= held / 200 <= 0.99


def test_systems_on_other_prompts_are_refused() -> None:
    reward = np.full((2, 1, 2), 50.0)
    other = Rewards(System("b"), ("x", "y"), None, reward[:, :, None, :])
    with pytest.raises(ValueError, match="'a' and 'b' differ at prompt 0"):
        dominance(system("a", reward), other, DIRECTIONS, Bootstrap(replicates=10))
