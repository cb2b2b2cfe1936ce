"""The words of the page: only what the intervals support is said to hold."""

from typing import Any

import pytest

from dpalign.page.headline import headline
from dpalign.page.systems import systems_of
from dpalign.page.words import Figure, arithmetic, degrees, listed, number, probability, whole

DIRECTIONS = [{"helpfulness": x, "verbosity": y} for x, y in ((1.0, 0.0), (0.92, -0.38), (0.71, -0.71))]


def estimate(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


def points(*verbosity: float) -> list[dict[str, Any]]:
    rows = []
    for i, x in enumerate(verbosity):
        rewards = {"helpfulness": estimate(80.0, 79.0, 81.0), "verbosity": estimate(x, x - 1, x + 1)}
        direction = {"helpfulness": 0.9, "verbosity": -0.4}
        rows.append({"direction": direction, "angle": -22.5 * i, "rewards": rewards, "true_rewards": None})
    return rows


def summary(dominates: tuple[bool, bool], sure_steps: int = 2) -> dict[str, Any]:
    """SFT and DPO against one policy at three directions; leads of 3.0 over SFT and 0.5 over DPO."""
    plain = {"iteration": None, "points": [{**points(50.0)[0], "direction": None, "angle": None}], "objective": 40.0}
    policy = {
        "iteration": 1, "points": points(60.0, 50.0, 41.0), "objective": 55.0, "span": 19.0, "drops": [{}, {}],
        "steps_beyond_doubt": sure_steps, "intervals": {"span": {"low": 17.0, "high": 21.0}},
    }  # fmt: skip
    margins = (estimate(3.0, 2.2, 3.9), estimate(0.5, -0.2, 1.2))
    rows = [
        {"a": "t=1", "b": b, "dominates": holds, "margin": margin, "p_holm": 0.0004 if holds else 0.31}
        for b, holds, margin in zip(("SFT", "DPO"), dominates, margins, strict=True)
    ]
    return {
        "objectives": ["helpfulness", "verbosity"], "senses": [1.0, -1.0], "directions": DIRECTIONS,
        "measure": "judged", "intervals": {"prompts": 200, "bootstrap": {"level": 0.95}},
        "systems": {"SFT": plain, "DPO": plain, "t=1": policy}, "dominance": rows, "seeds": {},
    }  # fmt: skip


def test_a_policy_that_dominates_one_baseline_is_not_said_to_beat_the_other() -> None:
    run = summary((True, False))
    said = headline(run, systems_of(run))
    assert said.sentence == (
        "t=1 beats SFT at every one of 3 directions, by at least 3.0 reward points (2.2 to 3.9); "
        "it is not shown to beat DPO at all of them; "
        "its verbosity falls at each of 2 steps, from 60.0 to 41.0 as the dial turns from 0° to \N{MINUS SIGN}45°."
    )
    assert [(claim.holds, claim.text) for claim in said.claims[:2]] == [
        (True, "t=1 beats SFT at every direction: smallest lead 3.0 (2.2 to 3.9); Holm p < 0.001."),
        (False, "t=1 beats DPO at every direction: smallest lead 0.5 (\N{MINUS SIGN}0.2 to 1.2); Holm p = 0.310."),
    ]


def test_a_policy_that_dominates_nothing_is_said_to() -> None:
    run = summary((False, False))
    sentence = headline(run, systems_of(run)).sentence
    assert sentence.startswith("t=1 is not shown to beat SFT and DPO at every one of 3 directions, and ")
    assert " beats " not in sentence


def test_a_step_in_doubt_is_counted() -> None:
    run = summary((True, True), sure_steps=1)
    said = headline(run, systems_of(run))
    assert "beyond doubt at 1 of 2 steps" in said.sentence
    assert not said.claims[-1].holds


def test_over_seeds_a_claim_must_hold_in_every_run() -> None:
    run = summary((True, True))
    rows = [
        {"a": "t=1", "b": "SFT", "dominates_in": 3, "margin": estimate(3.1, 2.0, 4.2)},
        {"a": "t=1", "b": "DPO", "dominates_in": 2, "margin": estimate(0.6, 0.1, 1.1)},
    ]
    run["seeds"] = {"seeds": [0, 1, 2], "dominance": rows, "differences": []}
    said = headline(run, systems_of(run))
    assert said.sentence.startswith("Over 3 seeds of the whole pipeline, t=1 beats SFT at every one of 3 directions")
    assert "by at least 3.1 reward points (2.0 to 4.2); it is not shown to beat DPO at all of them" in said.sentence
    assert [claim.holds for claim in said.claims[:2]] == [True, False]


def test_without_a_policy_nothing_is_claimed() -> None:
    run = summary((True, True))
    run["systems"] = {"SFT": run["systems"]["SFT"]}
    said = headline(run, systems_of(run))
    assert said.sentence == "No policy was aligned in this run; it evaluates SFT."
    assert said.claims == ()


def test_numbers_have_a_true_minus_and_never_a_minus_before_zero() -> None:
    assert [number(x) for x in (-0.04, -1.25, 1234.5, None)] == ["0.0", "\N{MINUS SIGN}1.2", "1,234.5", "\N{EN DASH}"]
    assert number(0.31, 2, sign=True) == "+0.31"
    assert str(Figure(3.14, 2.2, 4.0)) == "3.1 (2.2 to 4.0)"
    assert [degrees(x) for x in (-15.0, -22.5, 0.0)] == ["\N{MINUS SIGN}15°", "\N{MINUS SIGN}22.5°", "0°"]
    assert [probability(p) for p in (0.0004, 0.0312)] == ["< 0.001", "0.031"]
    assert [whole(n) for n in (0, 640_000, 2_240_000)] == ["\N{EN DASH}", "640,000", "2.24\N{NO-BREAK SPACE}M"]
    assert listed(["SFT", "DPO", "SteerLM"]) == "SFT, DPO and SteerLM"


@pytest.mark.parametrize(
    ("weights", "senses", "text"),
    [
        ({"helpfulness": 0.9659, "verbosity": -0.2588}, (1, -1), "helpfulness*0.97 - verbosity*0.26"),
        ({"helpfulness": 1.0, "verbosity": -0.0}, (1, -1), "helpfulness*1.00 - verbosity*0.00"),
        ({"a": -0.6, "b": 0.0, "c": 0.8}, (-1, 1, 1), "-a*0.60 + b*0.00 + c*0.80"),
    ],
)
def test_a_direction_is_written_as_arithmetic(weights: dict[str, float], senses: tuple[int, ...], text: str) -> None:
    assert arithmetic(weights, senses) == text
