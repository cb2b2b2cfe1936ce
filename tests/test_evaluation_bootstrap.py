"""The bootstrap by prompt: draws that pair, intervals that cover, Holm's steps."""

import numpy as np
import pytest

from dpalign.measure.bootstrap import Bootstrap, holm, replicate_means


def test_equal_settings_draw_the_same_prompts_and_each_replicate_weighs_one() -> None:
    weight_RP = Bootstrap(seed=3, replicates=50).weights(7)
    assert np.array_equal(weight_RP, Bootstrap(seed=3, replicates=50, level=0.5).weights(7))
    assert weight_RP.shape == (50, 7)
    assert np.allclose(weight_RP.sum(axis=1), 1)
    assert np.allclose(weight_RP * 7, np.round(weight_RP * 7))
    assert not np.array_equal(weight_RP, Bootstrap(seed=4, replicates=50).weights(7))
    assert not np.array_equal(weight_RP, Bootstrap(seed=3, replicates=50).weights(7, "first half"))


def test_replicate_means_are_weighted_means_over_prompts() -> None:
    mean_PVK = np.array([[[10.0, 1.0]], [[20.0, 3.0]]])
    assert replicate_means(np.array([[0.5, 0.5], [0.0, 1.0]]), mean_PVK).tolist() == [[[15.0, 2.0]], [[20.0, 3.0]]]


def test_the_interval_of_a_mean_is_about_two_standard_errors_wide_on_each_side() -> None:
    value_P = np.tile([0.0, 100.0], 50)  # standard error of the mean: 50 / sqrt(100) = 5
    bootstrap = Bootstrap(replicates=2000)
    estimate = bootstrap.interval(value_P.mean(), bootstrap.weights(100) @ value_P)
    assert estimate.value == 50
    assert estimate.low == pytest.approx(50 - 1.96 * 5, abs=1.0)
    assert estimate.high == pytest.approx(50 + 1.96 * 5, abs=1.0)


def test_95_percent_intervals_hold_the_truth_about_95_times_in_100() -> None:
    bootstrap = Bootstrap(replicates=400)
    weight_RP = bootstrap.weights(60)
    rng = np.random.default_rng(11)
    held = 0
    for _ in range(400):
        value_P = rng.normal(50, 10, 60)
        estimate = bootstrap.interval(value_P.mean(), weight_RP @ value_P)
        assert estimate.low is not None
        assert estimate.high is not None
        held += estimate.low <= 50 <= estimate.high
    assert 0.91 <= held / 400 <= 0.98


def test_holm_multiplies_the_smallest_p_value_by_the_number_of_tests() -> None:
    # sorted 0.01, 0.02, 0.04 times 3, 2, 1: 0.03, 0.04, 0.04
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    # a later product may not fall below an earlier one: 0.02 * 3 = 0.06, then 0.025 * 2 = 0.05 -> 0.06
    assert holm([0.025, 0.02, 0.9]) == pytest.approx([0.06, 0.06, 0.9])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_no_prompts_and_one_replicate_are_refused() -> None:
    with pytest.raises(ValueError, match="evaluation set is empty"):
        Bootstrap().weights(0)
    with pytest.raises(ValueError, match="replicates is 1"):
        Bootstrap(replicates=1)
    with pytest.raises(ValueError, match="level is 95"):
        Bootstrap(level=95)
