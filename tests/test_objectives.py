"""Objectives read from the heads of a reward model."""

import math

import numpy as np
import pytest

from dpalign.paper.objectives import PAPER_OBJECTIVES, Objective, head_indices, read_objectives
from dpalign.rows import HEADS

RELEASED = [68.99269, 69.62718, 76.23071, 33.48785, 35.853596, 63.833366, 55.58917, 68.7175, 59.552124, 46.465595]
"""The sample output on the released reward model's card."""


def test_the_papers_objectives_read_the_released_sample_as_57_58_and_35_85() -> None:
    assert read_objectives([RELEASED], HEADS, PAPER_OBJECTIVES)[0] == pytest.approx([57.58, 35.85], abs=0.005)


def test_the_papers_helpfulness_is_the_mean_of_heads_6_to_9() -> None:
    helpfulness, verbosity = PAPER_OBJECTIVES
    assert head_indices(helpfulness, HEADS) == (6, 7, 8, 9)
    assert head_indices(verbosity, HEADS) == (4,)


def test_heads_are_named_or_counted_and_weighed() -> None:
    objectives = [Objective("mean", ("0", "b")), Objective("sum", ("a", "c"), (2.0, -0.5))]
    read_NK = read_objectives(np.array([[10, 20, 40], [0, 50, 8]], dtype=np.float32), ["a", "b", "c"], objectives)
    assert read_NK.tolist() == [[15.0, 0.0], [25.0, -4.0]]
    assert read_NK.dtype == np.float64


def test_no_answers_read_as_no_rows() -> None:
    assert read_objectives(np.empty((0, 10)), HEADS, PAPER_OBJECTIVES).shape == (0, 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_score_is_refused_with_its_row_and_head(bad: float) -> None:
    rewards_NH = np.full((5, 10), 50.0)
    rewards_NH[3, 8] = bad
    with pytest.raises(
        ValueError, match=f"row 3: head 'ultrafeedback-honesty' scored {bad} and objective 'helpfulness'"
    ):
        read_objectives(rewards_NH, HEADS, PAPER_OBJECTIVES)


def test_a_head_that_no_objective_reads_may_be_unlabelled() -> None:
    rewards_NH = np.full((1, 10), 50.0)
    rewards_NH[0, 5] = math.nan
    assert read_objectives(rewards_NH, HEADS, PAPER_OBJECTIVES).tolist() == [[50.0, 50.0]]


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            Objective("brevity", ("helpsteer-verbocity",)),
            "objective 'brevity' reads head 'helpsteer-verbocity', which this reward model lacks "
            "\\(nearest: 'helpsteer-verbosity'; known: helpsteer-helpfulness, ",
        ),
        (Objective("brevity", ("10",)), "reads head '10', which this reward model lacks"),
        (Objective("brevity", ("-1",)), "reads head '-1', which"),
        (Objective("brevity", ("4", "helpsteer-verbosity")), "names head 'helpsteer-verbosity' .* twice"),
    ],
)
def test_a_head_that_the_model_lacks_is_refused_by_name(objective: Objective, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_objectives([RELEASED], HEADS, [objective])


def test_two_objectives_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="objective 'a' is named twice among a, b, a"):
        read_objectives([RELEASED], HEADS, [Objective("a", ("0",)), Objective("b", ("1",)), Objective("a", ("2",))])


def test_a_table_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 9\) for 10 heads"):
        read_objectives([RELEASED[:9]], HEADS, PAPER_OBJECTIVES)


@pytest.mark.parametrize(
    ("heads", "weights", "message"),
    [
        ((), None, "reads no head"),
        (("1", "2"), (1.0,), "1 weights for 2 heads"),
        (("1",), (math.nan,), "give finite numbers"),
        (("1", "2"), (0.0, 0.0), "not all zero"),
    ],
)
def test_an_objective_that_reads_nothing_is_refused(heads: tuple, weights: tuple | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective("a", heads, weights)
