"""The rewards of a system: its points, the checks at the door, and the senses of objectives."""

from pathlib import Path

import numpy as np
import pytest

from dpalign.measure.answers import with_texts
from dpalign.measure.bootstrap import Bootstrap
from dpalign.measure.points import (
    Rewards,
    by_condition,
    by_truth,
    opinion_gap,
    points,
    require_same_prompts,
    senses_of,
)
from dpalign.measure.system import System
from dpalign.rows import CANDIDATES, write_rows

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


def test_words_and_degenerate_answers_are_counted_in_the_texts(tmp_path: Path) -> None:
    """Two prompts, two samples: one answer was cut, one says a sentence twice, and one repeats 1 run of 5."""
    answers = {
        "a": ("one two three four", "it is so. it is so."),
        "b": ("don't stop", "one two three four one two three four"),
    }
    rows = [
        {
            "prompt_id": prompt, "t": 0, "condition_index": 0, "sample": s, "condition_kind": "plain", "condition": [],
            "messages": [{"role": "user", "content": "?"}], "response": text, "tokens": 9,
            "finished": text != "don't stop",
        }
        for prompt, texts in answers.items()
        for s, text in enumerate(texts)
    ]  # fmt: skip
    write_rows(tmp_path / "answers" / "part-00000.parquet", rows, CANDIDATES)
    sft = Rewards(System("sft"), ("a", "b"), None, TWO_PROMPTS, folder=tmp_path)
    strict, mild = with_texts(sft, 0.1), with_texts(sft, 0.3)
    assert strict.words_PVS.tolist() == mild.words_PVS.tolist() == [[[4, 6]], [[2, 8]]]
    assert strict.degenerate_PVS.tolist() == [[[False, True]], [[True, True]]]
    assert mild.degenerate_PVS.tolist() == [[[False, True]], [[True, False]]]
    (words,) = by_condition(mild.words_PVS, Bootstrap(replicates=200))
    assert (words.value, words.low, words.high) == (5, 5, 5)
    (share,) = by_condition(strict.degenerate_PVS, Bootstrap(replicates=200))
    assert (share.value, share.low, share.high) == (0.75, 0.5, 1)
