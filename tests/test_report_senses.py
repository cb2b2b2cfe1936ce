"""Directions that disagree about an objective's sense: the report comes, without what needs a side of a front."""

from pathlib import Path
from typing import Any

import pytest

import fake_run
from dpalign.measure.summary import Summary
from dpalign.page.headline import left_out
from dpalign.page.write import write_report
from dpalign.recipe import changed, load

ABOVE_0 = {"preference.high": 15.0, "compare.systems": ["dpo", "rsf", "soups"], "compare.ablations": []}
THREE = {
    "helpfulness": ["ultrafeedback-helpfulness"],
    "verbosity": ["helpsteer-verbosity"],
    "coherence": ["helpsteer-coherence"],
}


def reported(folder: Path, changes: dict[str, Any], compared: bool) -> Summary:
    """The summary of a fake run."""
    given = fake_run.recipe(**changes)
    return fake_run.summary_of(fake_run.fake_run(folder / "run", given, prompts=8, compared=compared), given, compared)


def without_a_side(summary: Summary) -> None:
    """What needs a side of a front is left out, and what does not is there."""
    assert summary.reference is None
    assert summary.sensitivity == ()
    for one in summary.systems.values():
        assert (one.figures.hypervolume, one.figures.true_front_share) == (None, None)
    assert summary.dominance
    assert {row.coverage for row in summary.dominance} == {None}


def test_an_arc_that_goes_above_0_is_reported_without_hypervolume(tmp_path: Path) -> None:
    summary = reported(tmp_path, ABOVE_0, compared=True)
    without_a_side(summary)
    assert (summary.senses, summary.disputed, summary.is_dial) == ((1, 0), ("verbosity",), True)
    last = summary.systems["DPA t=2"].figures
    assert last.span.value > 20
    assert last.kendall_tau.value > 0.8
    assert all(row.hypervolume_ratio is None for row in summary.comparison.differences.values())
    assert "evaluation.senses" in left_out(summary)


def test_a_stated_sense_gives_such_an_arc_its_hypervolume(tmp_path: Path) -> None:
    stated = {"evaluation.senses": [1, -1], "evaluation.reference": [40.0, 80.0]}
    summary = reported(tmp_path, ABOVE_0 | stated, compared=True)
    assert summary.disputed == ()
    assert summary.systems["DPA t=2"].figures.hypervolume.value > 0
    assert all(row.coverage is not None for row in summary.dominance)
    assert left_out(summary) == ""


def test_a_whole_circle_is_reported_without_a_dial(tmp_path: Path) -> None:
    summary = reported(tmp_path, {"preference.distribution": "sphere"}, compared=False)
    without_a_side(summary)
    assert (summary.disputed, summary.is_dial) == (("helpfulness", "verbosity"), False)
    assert summary.systems["DPA t=2"].figures.span is None
    assert summary.true_front is None  # who wants less help is served better by faults than by the best answers


def test_a_sphere_of_three_objectives_is_reported(tmp_path: Path) -> None:
    summary = reported(tmp_path, {"preference.distribution": "sphere", "objectives": THREE}, compared=False)
    without_a_side(summary)
    assert summary.disputed == tuple(THREE)
    assert summary.true_front is None
    assert write_report(tmp_path, summary).is_file()


@pytest.mark.parametrize("senses", [[1], [1, 0], [1, -1, 1]])
def test_senses_that_fit_no_objectives_are_refused_with_the_recipe(senses: list[int]) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.senses is \[1.*names 2 \(helpfulness, verbosity\)"):
        changed(load(fake_run.RECIPE), {"evaluation.senses": senses})
