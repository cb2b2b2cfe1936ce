"""The words of the page: only what the intervals support is claimed."""

import pytest

from dpalign.measure.bootstrap import Bootstrap, Estimate
from dpalign.measure.seeds import DominanceOverSeeds, Seeds, over_seeds
from dpalign.measure.summary import DominanceRow, Figures, Intervals, Measured, Point, Summary, verdicts
from dpalign.measure.system import System
from dpalign.page.headline import headline, tiles
from dpalign.page.words import degrees, number, probability, said, whole
from dpalign.paper.direction import arithmetic, listed

LEADS = {"SFT": Estimate(3.0, 2.2, 3.9), "DPO": Estimate(0.5, -0.2, 1.2)}


def point(verbosity: float, angle: float | None) -> Point:
    direction = None if angle is None else {"helpfulness": 0.9, "verbosity": -0.4}
    rewards = {"helpfulness": Estimate(80.0, 79.0, 81.0), "verbosity": Estimate(verbosity)}
    return Point(direction=direction, angle=angle, rewards=rewards)


def summary(*ahead: str, sure_steps: int = 2) -> Summary:
    """SFT and DPO against one policy at three directions, which dominates those named."""
    systems = {
        name: Measured(system=System(name), points=(point(50.0, None),), figures=Figures(objective=Estimate(40.0)))
        for name in LEADS
    }
    figures = Figures(
        objective=Estimate(55.0), span=Estimate(19.0, 17.0, 21.0), drops=(Estimate(10.0), Estimate(9.0)),
        steps_beyond_doubt=sure_steps,
    )  # fmt: skip
    points = tuple(point(x, -22.5 * i) for i, x in enumerate((60.0, 50.0, 41.0)))
    systems["t=1"] = Measured(system=System("t=1", "iteration", iteration=1), points=points, figures=figures)
    return Summary(
        objectives=("helpfulness", "verbosity"),
        senses=(1.0, -1.0),
        directions=tuple({"helpfulness": x, "verbosity": y} for x, y in ((1.0, 0.0), (0.92, -0.38), (0.71, -0.71))),
        reference=None,
        measure="judged",
        intervals=Intervals(bootstrap=Bootstrap(), prompts=200),
        systems=systems,
        dominance=tuple(
            DominanceRow(
                a="t=1", b=name, margin=lead, objective_lead=lead, p_value=0.01, p_holm=0.01, dominates=name in ahead
            )
            for name, lead in LEADS.items()
        ),
    )


def outcomes(run: Summary) -> dict[str, str]:
    return {one.system: one.outcome for one in verdicts(run)}


def test_a_front_that_goes_beyond_the_best_answers_is_not_said_to_be_a_part_of_them() -> None:
    """A share above 1: the true front ends with the best answers at the ends of the dial."""

    def sentence(share: float) -> str:
        run = summary("SFT")
        last = run.systems["t=1"]
        figures = last.figures.model_copy(update={"true_front_share": Estimate(share)})
        systems = {**run.systems, "t=1": last.model_copy(update={"figures": figures})}
        lines = headline(run.model_copy(update={"systems": systems}))
        return next(line for line in map(str, lines) if f"{100 * share:.1f}%" in line)

    assert sentence(0.96).replace("96.0", "") == sentence(1.0).replace("100.0", "")
    assert sentence(1.04).replace("104.0", "") != sentence(1.0).replace("100.0", "")


def test_a_policy_that_dominates_one_baseline_is_not_said_to_beat_the_other() -> None:
    run = summary("SFT")
    assert outcomes(run) == {"SFT": "ahead", "DPO": "open"}
    sentences = headline(run)
    assert len(sentences) == 3
    won, left_open = sentences[0].split(";")
    assert ("SFT" in won, "DPO" in won) == (True, False)
    assert "DPO is not established" not in won
    assert ("DPO" in left_open, "not established" in left_open) == (True, True)


def test_a_policy_that_dominates_nothing_is_ahead_of_nobody() -> None:
    assert set(outcomes(summary()).values()) == {"open"}
    assert "not established" in headline(summary())[0]


def test_a_rival_that_dominates_the_policy_is_named() -> None:
    run = summary("SFT")
    lost = run.dominance[1].model_copy(update={"a": "DPO", "b": "t=1", "dominates": True})
    run = run.model_copy(update={"dominance": (*run.dominance, lost)})
    assert outcomes(run)["DPO"] == "behind"
    assert "DPO is ahead of t=1" in headline(run)[0]


def test_a_step_in_doubt_is_counted() -> None:
    assert "1 of 2 steps" in headline(summary("SFT", sure_steps=1))[1]
    assert "1 of 2" not in headline(summary("SFT"))[1]


def test_the_words_at_both_ends_of_the_dial_stand_in_the_headline() -> None:
    run = summary("SFT")
    policy = run.systems["t=1"]
    counted = tuple(
        one.model_copy(update={"words": Estimate(words)})
        for one, words in zip(policy.points, (97.4, 70.0, 47.6), strict=True)
    )
    told = run.model_copy(update={"systems": run.systems | {"t=1": policy.model_copy(update={"points": counted})}})
    assert "from 97 to 48 words" in headline(told)[1]
    assert "words" not in headline(run)[1]


def test_over_seeds_a_claim_must_hold_in_every_run_and_in_the_mean() -> None:
    def row(b: str, margins: list[float], decided: int) -> DominanceOverSeeds:
        return DominanceOverSeeds(a="t=1", b=b, margin=over_seeds(margins), dominates_in=decided)

    def over(*rows: DominanceOverSeeds) -> dict[str, str]:
        return outcomes(summary("SFT", "DPO").model_copy(update={"seeds": Seeds(seeds=(0, 1, 2), dominance=rows)}))

    assert over(row("SFT", [3.0, 3.1, 3.2], 3), row("DPO", [0.5, 0.6, 0.7], 2)) == {"SFT": "ahead", "DPO": "open"}
    assert over(row("SFT", [9.0, 0.1, 0.1], 3), row("DPO", [0.5, 0.6, 0.7], 3)) == {"SFT": "open", "DPO": "ahead"}


def test_without_a_policy_nothing_is_claimed() -> None:
    run = summary("SFT")
    run = run.model_copy(update={"systems": {"SFT": run.systems["SFT"]}})
    assert len(headline(run)) == 1
    assert (verdicts(run), tiles(run)) == ([], ())


def test_numbers_have_a_true_minus_and_never_a_minus_before_zero() -> None:
    assert [number(x) for x in (-0.04, -1.25, 1234.5, None)] == ["0.0", "\N{MINUS SIGN}1.2", "1,234.5", "\N{EN DASH}"]
    assert number(0.31, 2, sign=True) == "+0.31"
    assert said(Estimate(3.14, 2.2, 4.0)) == "3.1 (2.2 to 4.0)"
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
