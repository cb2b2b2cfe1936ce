"""Directions that disagree about an objective's sense: the report comes, without what needs a side of a front."""

import json
from pathlib import Path
from typing import Any

import pytest

import fake_run
from dpalign.recipe import load
from dpalign.recipe.config import changed
from test_report_page import Reader

ABOVE_0 = {"preference.high": 15.0, "compare.systems": ["dpo", "rsf", "soups"], "compare.ablations": []}
THREE = {
    "helpfulness": ["ultrafeedback-helpfulness"],
    "verbosity": ["helpsteer-verbosity"],
    "coherence": ["helpsteer-coherence"],
}


def told(folder: Path, changes: dict[str, Any], compared: bool) -> tuple[dict[str, Any], str]:
    """The summary of a fake run with its whole report, and the words of its page."""
    given = fake_run.recipe(**changes)
    fake_run.fake_run(folder / "run", given, prompts=8, compared=compared)
    report = fake_run.report(folder / "run", given, compared)
    summary = json.loads((report / "summary.json").read_text())
    return summary, Reader((report / "index.html").read_text()).text


def without_a_side(summary: dict[str, Any]) -> None:
    """What needs a side of a front is left out, and what does not is there."""
    assert summary["reference"] is None
    assert summary["hypervolume_sensitivity"] == []
    for entry in summary["systems"].values():
        assert entry["hypervolume"] is None
        assert entry["true_front_share"] is None
        assert entry["objective"] is not None
    assert summary["dominance"]
    for row in summary["dominance"]:
        assert (row["under"], row["inside"]) == (None, None)
        assert row["margin"]["value"] is not None


def test_an_arc_that_goes_above_0_is_reported_without_hypervolume(tmp_path: Path) -> None:
    summary, words = told(tmp_path, ABOVE_0, compared=True)
    without_a_side(summary)
    assert (summary["senses"], summary["disputed"]) == ([1, 0], ["verbosity"])
    last = summary["systems"]["DPA t=2"]
    assert last["span"] > 20
    assert last["kendall_tau"] > 0.8
    assert all(row["hypervolume_ratio"] is None for row in summary["comparison"]["differences"])
    assert "Some directions want more verbosity and others less, so that no side of a front is the better one" in words
    assert "evaluation.senses can state a sense" in words
    assert "verbosity falls" in words
    assert "control by an angle is left out" not in words


def test_a_stated_sense_gives_such_an_arc_its_hypervolume(tmp_path: Path) -> None:
    stated = {"evaluation.senses": [1, -1], "evaluation.reference": [40.0, 80.0]}
    summary, words = told(tmp_path, ABOVE_0 | stated, compared=True)
    assert summary["disputed"] == []
    assert summary["systems"]["DPA t=2"]["hypervolume"]["value"] > 0
    assert all(row["inside"] is not None for row in summary["dominance"])
    assert "are left out" not in words


def test_a_whole_circle_is_reported_without_a_dial(tmp_path: Path) -> None:
    summary, words = told(tmp_path, {"preference.distribution": "sphere"}, compared=False)
    without_a_side(summary)
    assert summary["disputed"] == ["helpfulness", "verbosity"]
    assert summary["systems"]["DPA t=2"]["span"] is None
    assert summary["true_front"] is None  # who wants less help is served better by faults than by the best answers
    assert "Some directions want more helpfulness and verbosity and others less" in words
    assert "control by an angle is left out too" in words


def test_a_sphere_of_three_objectives_is_reported(tmp_path: Path) -> None:
    summary, words = told(tmp_path, {"preference.distribution": "sphere", "objectives": THREE}, compared=False)
    without_a_side(summary)
    assert summary["disputed"] == list(THREE)
    assert summary["true_front"] is None
    assert "Some directions want more helpfulness, verbosity and coherence and others less" in words


@pytest.mark.parametrize("senses", [[1], [1, 0], [1, -1, 1]])
def test_senses_that_fit_no_objectives_are_refused_with_the_recipe(senses: list[int]) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.senses is \[1.*give one of 1 and -1 for each of helpfulness, v"):
        changed(load(fake_run.RECIPE), {"evaluation.senses": senses})
