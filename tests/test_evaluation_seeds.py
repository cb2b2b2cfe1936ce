"""Figures over several seeds of the whole pipeline."""

import pytest

from dpalign.measure.bootstrap import Bootstrap, Estimate
from dpalign.measure.control import Length
from dpalign.measure.seeds import combine_seeds, over_seeds, paired_over_seeds
from dpalign.measure.summary import DominanceRow, Figures, Intervals, Measured, Point, Summary
from dpalign.measure.system import System


def summary(sft: float, t2: float, dominates: bool, drops: tuple[float, ...] = ()) -> Summary:
    point = Point(rewards={"helpfulness": Estimate(50.0)})
    figures = {
        "sft": Figures(objective=Estimate(sft), hypervolume=Estimate(100.0)),
        "t2": Figures(
            objective=Estimate(t2),
            hypervolume=Estimate(400.0 + t2),
            span=Estimate(20.0),
            drops=tuple(map(Estimate, drops)),
        ),
    }
    lead = Estimate(t2 - sft)
    row = DominanceRow(a="t2", b="sft", margin=lead, objective_lead=lead, p_value=0.1, p_holm=0.1, dominates=dominates)
    return Summary(
        objectives=("helpfulness",),
        senses=(1.0,),
        directions=({"helpfulness": 1.0},),
        reference=None,
        measure="judged",
        intervals=Intervals(bootstrap=Bootstrap(), prompts=3),
        systems={name: Measured(system=System(name), points=(point,), figures=one) for name, one in figures.items()},
        dominance=(row,),
    )


def test_three_seeds_give_a_t_interval() -> None:
    # mean 12, standard deviation 2, t(0.975, 2) = 4.3027: 4.3027 * 2 / sqrt(3) = 4.9683
    found = over_seeds([10, 12, 14])
    assert (found.value, found.low, found.high) == pytest.approx((12, 12 - 4.9683, 12 + 4.9683), abs=1e-3)
    assert found.values == (10, 12, 14)


def test_one_seed_has_no_interval_and_no_seed_no_figure() -> None:
    assert (over_seeds([7]).low, over_seeds([7]).value) == (None, 7)
    with pytest.raises(ValueError, match="at least one is needed"):
        over_seeds([])
    with pytest.raises(ValueError, match="all must be numbers"):
        over_seeds([1.0, float("nan")])


def test_pairing_by_seed_cancels_what_a_seed_shares() -> None:
    found = paired_over_seeds([51, 61, 71], [50, 60, 70])
    assert (found.value, found.low, found.high) == (1, 1, 1)
    with pytest.raises(ValueError, match="2 figures against 1"):
        paired_over_seeds([1, 2], [1])


def test_runs_are_combined_figure_by_figure() -> None:
    found = combine_seeds({5: summary(40, 52, True), 3: summary(41, 50, False)}, [("t2", "sft")])
    assert found.seeds == (3, 5)
    assert found.systems["t2"]["objective"].values == (50, 52)
    assert found.systems["t2"]["hypervolume"].value == 451
    assert "span" not in found.systems["sft"]  # SFT has no dial
    assert found.differences[0].objective.values == (9, 12)
    assert (found.dominance[0].dominates_in, found.dominance[0].margin.value) == (1, 10.5)


def test_each_step_of_the_dial_is_combined_over_seeds() -> None:
    first, second = summary(40, 50, True, (4.0, -1.0)), summary(40, 50, True, (6.0, 2.0))
    found = combine_seeds({1: first, 2: second}).drops
    assert [(drop.value, drop.values) for drop in found["t2"]] == [(5, (4, 6)), (0.5, (-1, 2))]
    assert "sft" not in found
    unlike = summary(40, 50, True, (6.0,))
    assert "t2" not in combine_seeds({1: first, 2: unlike}).drops


def test_taus_with_weights_are_combined_over_seeds_where_all_have_them() -> None:
    def with_taus(run: Summary, tau: float, of: tuple[str, ...]) -> Summary:
        t2 = run.systems["t2"]
        taus = {"a": {name: Estimate(tau) for name in of}}
        figures = t2.figures.model_copy(update={"weight_taus": taus})
        return run.model_copy(update={"systems": run.systems | {"t2": t2.model_copy(update={"figures": figures})}})

    runs = {0: with_taus(summary(50, 60, True), 0.4, ("a", "b")), 1: with_taus(summary(50, 60, True), 0.6, ("a",))}
    assert combine_seeds(runs).weight_taus == {"t2": {"a": {"a": over_seeds([0.4, 0.6])}}}


def test_words_and_the_judges_objective_are_combined_over_seeds() -> None:
    def told(judge: float, words: tuple[float, ...]) -> Summary:
        run = summary(40, 50, True)
        points = tuple(
            Point(rewards={"helpfulness": Estimate(50.0)}, words=Estimate(each), degenerate=Estimate(0.0))
            for each in words
        )
        length = Length(
            kendall_tau=Estimate(0.5), drops=(), steps_beyond_doubt=0, last_to_first=Estimate(words[-1] / words[0])
        )
        t2 = run.systems["t2"].model_copy(
            update={"points": points, "length": length, "by_judge": Figures(objective=Estimate(judge))}
        )
        sft = run.systems["sft"].model_copy(update={"by_judge": Figures(objective=Estimate(30.0))})
        return run.model_copy(update={"systems": {"sft": sft, "t2": t2}})

    found = combine_seeds({1: told(45, (100.0, 50.0)), 2: told(47, (80.0, 60.0))}, [("t2", "sft")])
    assert [each.values for each in found.words["t2"]] == [(100, 80), (50, 60)]
    assert found.length["t2"]["last_to_first"].values == (0.5, 0.75)
    assert found.systems["t2"]["objective_by_judge"].value == 46
    assert found.differences[0].by_judge.values == (15, 17)
    assert "sft" not in found.words
    unlike = combine_seeds({1: told(45, (100.0, 50.0)), 2: summary(40, 50, True)}, [("t2", "sft")])
    assert (unlike.words, unlike.length, unlike.differences[0].by_judge) == ({}, {}, None)


def test_a_difference_between_systems_that_some_run_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="no system 't4' in every seed's run; they share sft, t2"):
        combine_seeds({1: summary(40, 50, True)}, [("t4", "sft")])
    with pytest.raises(ValueError, match="no summaries to combine"):
        combine_seeds({})
