"""Reward quality and its surface baseline, against numbers worked out by hand or by scipy."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dpalign.data.ratings import read_rated
from dpalign.measure.baseline import FEATURES, ridge_cross_validated, surface_features
from dpalign.measure.quality import quality

NAN = float("nan")


def noisy(n: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    """Labels in steps of 20, predictions with noise, three answers a prompt, lengths."""
    rng = np.random.default_rng(seed)
    label = 10 + 20 * rng.integers(0, 5, n).astype(float)
    predicted = label + rng.normal(0, 20, n) + 3
    return predicted, label, [f"p{i // 3}" for i in range(n)], rng.integers(10, 500, n).astype(float)


def test_a_worked_example_of_two_prompts() -> None:
    # Prompt a: labels 10 30 50, predictions 20 40 30: pairs 10<30 right, 10<50 right, 30<50 wrong.
    # Prompt b: labels 50 50 70, predictions 60 10 60: the equal labels are no pair, 50<70 a tie and a right one.
    label = np.array([[10.0], [30], [50], [50], [50], [70]])
    predicted = np.array([[20.0], [40], [30], [60], [10], [60]])
    head = quality(predicted, label, ["verbosity"], list("aaabbb"), [1, 2, 3, 4, 5, 6]).heads[0]
    assert (head.n, head.prompts, head.comparable_prompts, head.pairs) == (6, 2, 2, 5)
    assert head.within_prompt_accuracy.value == pytest.approx((2 + 1.5) / 5)
    # a: ranks 1 2 3 against 1 3 2 give 1/2; b: ranks 1.5 1.5 3 against 2.5 1 2.5 give 1/2.
    assert head.within_prompt_spearman.value == pytest.approx(0.5)
    # labels: squares 13,400, sum 260; squared errors 100 + 100 + 400 + 100 + 1600 + 100 = 2,400
    assert head.r2.value == pytest.approx(1 - 2400 / (13400 - 260**2 / 6))
    assert head.calibration_gap.value == pytest.approx((220 - 260) / 6)


def test_the_correlations_are_those_of_scipy() -> None:
    predicted, label, prompts, lengths = noisy()
    head = quality(predicted[:, None], label[:, None], ["x"], prompts, lengths, resamples=20).heads[0]
    assert head.pearson.value == pytest.approx(stats.pearsonr(predicted, label)[0])
    assert head.spearman.value == pytest.approx(stats.spearmanr(predicted, label)[0])
    assert head.length_correlation.value == pytest.approx(stats.pearsonr(predicted, lengths)[0])
    assert head.label_length_correlation.value == pytest.approx(stats.pearsonr(label, lengths)[0])


def test_each_resample_ranks_anew_whole_prompts() -> None:
    # One resample by hand: draw prompts as the seed says, repeat their rows, and ask scipy.
    predicted, label, prompts, lengths = noisy(30)
    draws = np.random.default_rng(7).multinomial(10, np.full(10, 0.1), size=1)[0]
    order = np.argsort(np.unique(prompts, return_inverse=True)[1], kind="stable")
    times = np.repeat(draws, 3)
    x, y = np.repeat(predicted[order], times), np.repeat(label[order], times)
    head = quality(predicted[:, None], label[:, None], ["x"], prompts, lengths, resamples=1, seed=7).heads[0]
    assert head.spearman.low == head.spearman.high == pytest.approx(stats.spearmanr(x, y)[0])
    assert head.pearson.low == pytest.approx(stats.pearsonr(x, y)[0])
    assert head.calibration_gap.low == pytest.approx(np.mean(x - y))


def test_intervals_hold_the_value_repeat_with_the_seed_and_shrink_with_the_data() -> None:
    few, many = noisy(90), noisy(900)
    small = quality(few[0][:, None], few[1][:, None], ["x"], few[2], few[3], resamples=200).heads[0]
    large = quality(many[0][:, None], many[1][:, None], ["x"], many[2], many[3], resamples=200).heads[0]
    again = quality(few[0][:, None], few[1][:, None], ["x"], few[2], few[3], resamples=200).heads[0]
    assert small == again
    for name in ("r2", "pearson", "spearman", "within_prompt_spearman", "within_prompt_accuracy", "calibration_gap"):
        one, other = getattr(small, name), getattr(large, name)
        assert one.low < one.value < one.high
        assert other.high - other.low < one.high - one.low


@pytest.mark.parametrize("seed", [-4, 0, 2**32 - 1])
def test_any_seed_that_a_recipe_may_have_serves(seed: int) -> None:
    predicted, label, prompts, lengths = noisy(30)
    heads = quality(predicted[:, None], label[:, None], ["x"], prompts, lengths, resamples=5, seed=seed).heads
    assert heads[0].r2 is not None


def test_the_interval_of_a_mean_covers_the_truth_about_as_often_as_it_says() -> None:
    # The gap's truth is 3; 60 data sets, 95% intervals: 57 expected, standard deviation 1.7.
    covered = 0
    for seed in range(60):
        predicted, label, prompts, lengths = noisy(150, seed)
        measured = quality(predicted[:, None], label[:, None], ["x"], prompts, lengths, resamples=200)
        gap = measured.heads[0].calibration_gap
        covered += gap.low <= 3 <= gap.high  # type: ignore[operator]
    assert 51 <= covered <= 60


def test_rows_without_a_label_do_not_count_and_a_head_without_labels_has_no_figures() -> None:
    predicted = np.array([[20.0, 1], [40, 2], [NAN, 3]])
    label = np.array([[10.0, NAN], [30, NAN], [NAN, NAN]])
    measured = quality(predicted, label, ["a", "b"], ["p", "p", "q"], [1, 2, 3], resamples=10)
    assert (measured.heads[0].n, measured.heads[0].prompts) == (2, 1)
    assert measured.heads[0].within_prompt_accuracy.value == 1.0
    assert (measured.heads[1].n, measured.heads[1].pearson, measured.heads[1].r2) == (0, None, None)
    assert "NaN" not in json.dumps(measured.to_json(), allow_nan=False)
    assert measured.to_json()["heads"]["a"]["calibration_gap"]["value"] == 10.0


def test_constant_columns_leave_correlations_undefined_and_say_nothing_of_order() -> None:
    label = np.array([[10.0], [30], [50]])
    flat = quality(np.full((3, 1), 41.3), label, ["x"], ["p"] * 3, [5, 5, 5], resamples=10).heads[0]
    assert (flat.pearson, flat.spearman, flat.length_correlation) == (None, None, None)
    assert (flat.within_prompt_accuracy.value, flat.within_prompt_spearman.value) == (0.5, 0.0)
    same = quality(label, np.full((3, 1), 0.1), ["x"], ["p"] * 3, [1, 2, 3], resamples=10).heads[0]
    assert (same.r2, same.within_prompt_accuracy, same.comparable_prompts) == (None, None, 0)


def test_a_nan_prediction_is_refused_with_its_row_and_head() -> None:
    with pytest.raises(ValueError, match="row 1: the prediction of verbosity is nan"):
        quality(np.array([[1.0], [NAN]]), np.array([[1.0], [2]]), ["verbosity"], ["p", "p"], [1, 2])
    with pytest.raises(ValueError, match="must describe the same answers and columns"):
        quality(np.ones((2, 1)), np.ones((2, 1)), ["verbosity"], ["p"], [1, 2])


def test_surface_features_count_what_they_name() -> None:
    feature = dict(zip(FEATURES, surface_features("Name two cats", "Two cats:\n- Tom, 7\n- Kit"), strict=True))
    # 24 characters, five words (the digit is one) of 14 letters and digits, two list items
    assert feature["log characters"] == pytest.approx(np.log(25))
    assert feature["log words"] == pytest.approx(np.log(6))
    assert feature["characters per word"] == pytest.approx(14 / 5)
    assert feature["list items"] == pytest.approx(np.log(3))
    assert feature["commas per word"] == pytest.approx(1 / 5)
    assert feature["digits per character"] == pytest.approx(1 / 24)
    assert feature["capitals per character"] == pytest.approx(3 / 24)
    assert feature["words shared with the prompt"] == pytest.approx(2 / 3)
    assert np.isfinite(surface_features("", "")).all()


def test_ridge_finds_a_line_and_never_sees_the_prompt_it_predicts() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 3))
    label = features @ np.array([[2.0], [-1], [0]]) + 50
    groups = [f"p{i // 4}" for i in range(400)]
    predicted = ridge_cross_validated(features, label, groups, penalty=1e-6)
    assert np.allclose(predicted, label, atol=1e-3)
    # A feature that names the prompt, and labels that depend on the prompt alone, predict nothing held out.
    prompt_label = np.repeat(rng.normal(size=100), 4)[:, None]
    one_hot = np.repeat(np.eye(100), 4, axis=0)
    leaked = ridge_cross_validated(one_hot, prompt_label, groups, penalty=1.0)
    assert abs(np.corrcoef(leaked[:, 0], prompt_label[:, 0])[0, 1]) < 0.35


def test_ridge_passes_over_missing_labels() -> None:
    features = np.random.default_rng(0).normal(size=(40, 2))
    label = np.column_stack([features[:, 0], np.full(40, NAN)])
    label[::3, 0] = NAN
    predicted = ridge_cross_validated(features, label, [f"p{i}" for i in range(40)], penalty=1e-6)
    assert np.allclose(predicted[:, 0], features[:, 0], atol=1e-3)
    assert np.isnan(predicted[:, 1]).all()
    with pytest.raises(ValueError, match="5 folds of 1 prompts"):
        ridge_cross_validated(features, label, ["p"] * 40)


@pytest.mark.skipif("DPA_REAL_DATA" not in os.environ, reason="DPA_REAL_DATA is not set")
def test_the_surface_of_real_answers_predicts_verbosity_better_than_helpfulness() -> None:
    rows, _ = read_rated("helpsteer", str(Path(os.environ["DPA_REAL_DATA"]) / "helpsteer_500.jsonl"))
    features = np.array([surface_features(row["messages"][-1]["content"], row["response"]) for row in rows])
    label = np.array([list(row["labels"].values()) for row in rows], dtype=float)
    prompts = [row["prompt_id"] for row in rows]
    predicted = ridge_cross_validated(features, label, prompts)
    names = ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]
    lengths = [len(row["response"]) for row in rows]
    heads = {head.name: head for head in quality(predicted, label, names, prompts, lengths, resamples=200).heads}
    assert heads["verbosity"].pearson.value == pytest.approx(0.62, abs=0.05)
    assert heads["complexity"].pearson.value == pytest.approx(0.51, abs=0.08)
    assert heads["helpfulness"].pearson.value == pytest.approx(0.16, abs=0.15)
