"""The rewards of a system: its points, the checks at the door, and the senses of objectives."""

import numpy as np
import pytest

from dpalign.measure.bootstrap import Bootstrap
from dpalign.measure.points import Rewards, by_truth, opinion_gap, points, require_same_prompts, senses_of
from dpalign.measure.system import System

TWO_PROMPTS = np.array([[[[80.0, 60.0], [60.0, 40.0]]], [[[90.0, 70.0], [90.0, 50.0]]]])
"""Two prompts, one condition, two samples, (helpfulness, verbosity): means (70, 50) and (90, 60)."""


def test_a_point_is_the_mean_over_samples_and_prompts_with_an_interval_by_prompt() -> None:
    sft = Rewards(System("sft"), ("a", "b"), None, TWO_PROMPTS)
    ((helpfulness, verbosity),) = points(sft, Bootstrap(replicates=200))
    assert (helpfulness.value, verbosity.value) == (80, 55)
    # two prompts: a replicate has both, or one of them twice
    assert (helpfulness.low, helpfulness.high) == (70, 90)
    assert (verbosity.low, verbosity.high) == (50, 60)


def test_the_opinion_gap_is_what_the_reward_model_adds_to_the_truth() -> None:
    truth = TWO_PROMPTS - np.array([5.0, -1.0])
    sft = Rewards(System("sft"), ("a", "b"), None, TWO_PROMPTS, truth)
    assert [gap.value for gap in opinion_gap(sft, Bootstrap(replicates=10))] == [5, -1]
    assert by_truth(sft).point_VK.tolist() == [[75, 56]]


def test_systems_on_different_prompts_are_not_compared() -> None:
    one = Rewards(System("sft"), ("a", "b"), None, TWO_PROMPTS)
    swapped = Rewards(System("t1", iteration=1), ("b", "a"), None, TWO_PROMPTS)
    with pytest.raises(ValueError, match="'sft' and 't1' differ at prompt 0: a against b"):
        require_same_prompts([one, swapped])
    with pytest.raises(ValueError, match="sampled on 2 and 1 prompts"):
        require_same_prompts([one, Rewards(System("t1", iteration=1), ("a",), None, TWO_PROMPTS[:1])])


def test_the_arc_maximises_helpfulness_and_minimises_verbosity() -> None:
    assert senses_of(np.array([[1.0, 0.0], [0.8, -0.6]])).tolist() == [1, -1]
    assert senses_of(np.array([[1.0, 0.0]])).tolist() == [1, 1]


def test_an_objective_that_directions_disagree_about_has_no_sense() -> None:
    assert senses_of(np.array([[0.8, 0.6], [0.8, -0.6]])).tolist() == [1, 0]
    assert senses_of(np.array([[0.8, -1e-12], [0.8, 0.6]])).tolist() == [1, 1]  # a rounding error is no opinion
