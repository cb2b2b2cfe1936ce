"""Figures over several seeds of the whole pipeline."""

from typing import Any

import pytest

from dpalign.measure.seeds import combine_seeds, over_seeds, paired_over_seeds


def summary(sft: float, t2: float, dominates: bool) -> dict[str, Any]:
    return {
        "systems": {
            "sft": {"objective": sft, "hypervolume": {"value": 100.0}, "span": None},
            "t2": {"objective": t2, "hypervolume": {"value": 400.0 + t2}, "span": 20.0},
        },
        "dominance": [{"a": "t2", "b": "sft", "margin": {"value": t2 - sft}, "dominates": dominates}],
    }


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
    runs = {5: summary(40, 52, True), 3: summary(41, 50, False)}
    found = combine_seeds(runs, differences=[("t2", "sft")])
    assert found["seeds"] == [3, 5]
    assert found["systems"]["t2"]["objective"]["values"] == [50, 52]
    assert found["systems"]["t2"]["hypervolume"]["value"] == 451
    assert "span" not in found["systems"]["sft"]  # SFT has no dial
    assert found["differences"][0]["objective"]["values"] == [9, 12]
    assert found["dominance"][0]["dominates_in"] == 1
    assert found["dominance"][0]["margin"]["value"] == 10.5


def test_each_step_of_the_dial_is_combined_over_seeds() -> None:
    runs = {seed: summary(40, 50, True) for seed in (1, 2)}
    for seed, drops in ((1, (4.0, -1.0)), (2, (6.0, 2.0))):
        runs[seed]["systems"]["t2"]["drops"] = [{"value": drop} for drop in drops]
    found = combine_seeds(runs)["systems"]
    assert [(drop["value"], drop["values"]) for drop in found["t2"]["drops"]] == [(5, [4, 6]), (0.5, [-1, 2])]
    assert "drops" not in found["sft"]
    runs[2]["systems"]["t2"]["drops"].pop()  # dials of unlike steps
    assert "drops" not in combine_seeds(runs)["systems"]["t2"]


def test_a_difference_between_systems_that_some_run_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="no system 't4' in every seed's run; they share sft, t2"):
        combine_seeds({1: summary(40, 50, True)}, differences=[("t4", "sft")])
    with pytest.raises(ValueError, match="no summaries to combine"):
        combine_seeds({})
