"""What the tables of a comparison say of budgets, settings, control and upkeep: no more than was measured."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

import fake_run
from dpalign.report.accounts import costs_table, stages_table
from dpalign.report.compared_figures import compared_plots
from dpalign.report.compared_tables import budget_table, tuning_table
from dpalign.report.systems import systems_of
from dpalign.report.tables import Row, Table
from test_report_comparison import taken

COUNTED = "trained tokens include prompts, which DPO reads with each of its two answers; sampled and scored ones do not"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the report of the whole fake comparison hands to its page."""
    given = fake_run.recipe()
    return taken(fake_run.fake_run(tmp_path_factory.mktemp("tables") / "run", given, prompts=16), given)


@pytest.fixture
def summary(told: dict[str, Any]) -> dict[str, Any]:
    return deepcopy(told["summary"])


def shown(table: Table | None) -> Table:
    assert table is not None
    return table


def rows_of(table: Table | None) -> dict[str, Row]:
    """The rows by their first cell."""
    return {row.cells[0].text: row for row in shown(table).rows}


def test_budgets_say_which_tokens_hold_prompts(summary: dict[str, Any]) -> None:
    systems = systems_of(summary)
    assert COUNTED in shown(budget_table(summary, systems)).caption
    assert COUNTED in compared_plots(summary, systems)["tokens"].caption
    assert COUNTED in shown(costs_table(summary)).caption.replace("Trained", "trained")
    deviations = (Path(__file__).parent.parent / "docs" / "deviations.md").read_text(encoding="utf-8")
    assert "prompts left out" not in deviations
    assert COUNTED in " ".join(deviations.split()).replace("Trained", "trained")


def test_what_stages_scored_are_answers(told: dict[str, Any]) -> None:
    table = shown(stages_table(told["stages"]))
    assert table.columns[2:5] == ("tokens sampled", "answers scored", "tokens trained")
    assert rows_of(table)["annotate"].cells[3].text == "12,000"
    assert "An answer counts as scored once for each model that scores it" in table.caption


def test_a_setting_that_ends_its_grid_is_marked(summary: dict[str, Any]) -> None:
    """Of two betas each is an end; SteerLM's 0.9 lies within its grid, and experts are no grid."""
    edges = {system: [row["edge"] for row in rows] for system, rows in summary["tuning"].items()}
    assert edges == {
        "DPO": [True, True], "DPO, asked to be brief": [True, True], "SteerLM, tuned": [False, False, True],
        "rewarded soups": [False, False],
    }  # fmt: skip
    table = shown(tuning_table(summary, systems_of(summary)))
    notes = {row.cells[0].text: row.cells[-1].note for row in table.rows if row.strong}
    wider = "at the edge of its grid: a wider one may do better"
    assert notes == {"DPO": wider, "DPO, asked to be brief": wider, "SteerLM, tuned": "", "rewarded soups": ""}
    assert {row.cells[-1].note for row in table.rows if not row.strong} == {""}


def test_tuning_says_who_had_one_setting(summary: dict[str, Any]) -> None:
    systems = systems_of(summary)
    caption = shown(tuning_table(summary, systems)).caption
    assert (
        "Tuned were DPO (2 settings), DPO asked to be brief (2 settings), SteerLM tuned (3 settings) and rewarded "
        "soups (2 settings). One setting each, the recipe's, had SteerLM, SFT, SFT asked to be brief, SFT best of 16, "
        "RSF and GRPO. DPA's knobs are the recipe's too, and what it took to choose the recipe is counted nowhere here."
    ) in caption
    assert "DPA has one setting" not in caption
    assert "DPA's among them, is not counted" in shown(budget_table(summary, systems)).caption
