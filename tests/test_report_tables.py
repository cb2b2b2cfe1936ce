"""What the tables of a comparison say of budgets, settings, control and upkeep: no more than was measured."""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fake_run
from dpalign.measure.seeds import combine_seeds
from dpalign.page.accounts import costs_table, stages_table
from dpalign.page.compared_figures import compared_plots
from dpalign.page.compared_tables import budget_table, differences_table, table_1, tuning_table
from dpalign.page.compared_words import misunderstood, recipe_note, rivals_claims, what_was_run
from dpalign.page.headline import headline
from dpalign.page.systems import systems_of
from dpalign.page.tables import Row, Table
from dpalign.page.write import render_page
from test_report_comparison import taken
from test_report_page import Reader

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


def test_table_1_counts_conditions_and_compares_taus_at_as_many(summary: dict[str, Any]) -> None:
    rows = {row["system"]: row for row in summary["comparison"]["table_1"]}
    assert {name: rows[name]["conditions"] for name in ("DPA t=2", "SteerLM", "RSF", "GRPO", "SFT")} == {
        "DPA t=2": 10, "SteerLM": 5, "RSF": 3, "GRPO": 2, "SFT": 1,
    }  # fmt: skip
    assert rows["GRPO"]["span"]["value"] > 20
    assert (rows["GRPO"]["kendall_tau"], rows["GRPO"]["spearman"]) == (None, None)
    assert rows["RSF"]["kendall_tau_common"] is None
    assert rows["SteerLM"]["kendall_tau_common"] == rows["SteerLM"]["kendall_tau"]
    assert rows["DPA t=2"]["kendall_tau_common"]["value"] > rows["DPA t=2"]["kendall_tau"]["value"]
    table = shown(table_1(summary, systems_of(summary)))
    assert table.columns[3:8] == ("conditions", "Kendall tau", "at 5 conditions", "Spearman", "span of verbosity")
    assert [cell.text for cell in rows_of(table)["GRPO"].cells[3:7]] == ["2", *["\N{EN DASH}"] * 3]
    assert "the higher both correlations come out" in table.caption


def test_a_rival_with_a_wider_span_or_a_steadier_dial_is_said_to_be_ahead(summary: dict[str, Any]) -> None:
    """GRPO's two models are 31 points apart, the arc's ends of DPA 25; taus of five conditions are told apart."""
    leads = {row["system"]: row for row in summary["comparison"]["control_leads"]}
    assert {name for name, row in leads.items() if row["kendall_tau"] is None} == {"RSF", "GRPO"}
    assert leads["GRPO"]["span"]["high"] < 0
    leads["SteerLM"]["kendall_tau"] = {"value": -0.04, "low": -0.07, "high": -0.01}
    leads["SFT, best of 16"]["span"] = {"value": -1.0, "low": -3.0, "high": 1.0}
    row = next(row for row in summary["comparison"]["differences"] if row["system"] == "SteerLM")
    row["hypervolume_ratio"] = {"value": 0.9, "low": 0.85, "high": 0.96}
    ahead = [claim.text for claim in rivals_claims(summary, systems_of(summary)) if claim.rival]
    assert any(text.startswith("GRPO specialists have a wider span of verbosity than DPA t=2: by ") for text in ahead)
    tau = "a higher Kendall tau, at 5 conditions each, than DPA t=2: by 0.04 (0.01 to 0.07)."
    assert f"SteerLM has {tau}" in ahead
    assert "SteerLM has a larger hypervolume than DPA t=2, whose is 0.90 (0.85 to 0.96) of it." in ahead
    assert not [text for text in ahead if "best of" in text and "span" in text]


def test_a_wish_that_makes_answers_longer_was_not_understood_and_beating_it_is_no_claim(tmp_path: Path) -> None:
    """SFT goes from verbosity 50 to 58 when asked to be brief, DPO from 57 to 47."""
    given = fake_run.recipe(**{"compare.systems": ["dpo", "brief"], "compare.ablations": []})
    means = fake_run.MEANS | {"sft-brief": np.array([[63.0, 58.0]])}
    told = taken(fake_run.fake_run(tmp_path / "run", given, prompts=12, means=means), given)["summary"]
    changes = {row["system"]: row["change"]["value"] for row in told["comparison"]["wishes"]}
    assert changes == pytest.approx({"SFT, asked to be brief": 8, "DPO, asked to be brief": -10}, abs=2)
    systems = systems_of(told)
    assert list(misunderstood(told)) == ["SFT, asked to be brief"]
    (said,) = (part for part in what_was_run(told, systems) if part.startswith("The wish"))
    interval = r"\d+\.\d \(\d+\.\d to \d+\.\d\)"
    assert re.fullmatch(
        rf"The wish to be brief, in words, was not understood: SFT asked to be brief has verbosity {interval}, and "
        rf"unasked {interval}, a change of \+{interval}\. A model that does not follow the words is no "
        r"rival at being brief, so no victory over it is claimed\.",
        said.replace("(+", "(").replace("to +", "to "),
    )
    notes = {name: row.cells[0].note for name, row in rows_of(differences_table(told, systems)).items()}
    assert {name for name, note in notes.items() if note == "no briefer for being asked"} == {"SFT, asked to be brief"}
    shown_words = headline(told, systems)
    assert "SFT asked to be brief" not in shown_words.sentence
    assert not [claim for claim in shown_words.claims if "SFT asked to be brief" in claim.text]
    assert [claim for claim in shown_words.claims if "beats DPO asked to be brief" in claim.text]


def test_over_seeds_a_wish_must_be_understood_in_every_run(summary: dict[str, Any]) -> None:
    assert misunderstood(summary) == {}
    other = deepcopy(summary)
    next(row for row in other["comparison"]["wishes"] if row["system"].startswith("DPO"))["change"]["high"] = 0.5
    assert list(misunderstood(other)) == ["DPO, asked to be brief"]
    seeds = combine_seeds({1: summary, 2: other}, [])
    assert seeds["understood_in"] == {"SFT, asked to be brief": 2, "DPO, asked to be brief": 1}
    assert list(misunderstood(summary | {"seeds": seeds})) == ["DPO, asked to be brief"]


def test_soups_are_called_by_the_experts_that_were_mixed(tmp_path: Path) -> None:
    """Also where one pair was tried, and by what the evaluation wrote, not by [soups] of the printed recipe."""
    changes = {"compare.systems": ["soups", "best-of-n"], "compare.ablations": [], "compare.soups": ["ends"]}
    given = fake_run.recipe(**changes)
    means = fake_run.MEANS | {"soup-1": fake_run.MEANS["soup-2"]}
    folder = fake_run.fake_run(tmp_path / "run", given, prompts=8, means=means)
    told = taken(folder, given)["summary"]
    pair = "helpfulness*1.00 - verbosity*0.00 and helpfulness*0.71 - verbosity*0.71"
    systems = systems_of(told)
    assert told["systems"]["rewarded soups"]["setting"] == pair
    assert not told["systems"]["SFT, best of 16"]["setting"]
    for table in (budget_table(told, systems), table_1(told, systems)):
        assert rows_of(table)["rewarded soups"].cells[0].note == pair
    said = recipe_note(told)
    assert "`dpa compare` sets" in said
    assert "soups.experts" in said
    nothing = {"answers": [], "quality": {}, "data_reports": [], "stages": []}
    assert said in Reader(render_page(told, {}, **nothing, recipe_text="[soups]", title="t")).text  # type: ignore[arg-type]


def test_best_of_n_is_not_shown_as_free(summary: dict[str, Any]) -> None:
    systems = systems_of(summary)
    said = (
        "SFT, best of 16 is dearer than it looks: the 16 answers that it samples and scores for every question at "
        "inference are not on this axis."
    )
    assert said in compared_plots(summary, systems)["tokens"].caption
    rows = summary["comparison"]["table_1"]
    summary["comparison"]["table_1"] = [row for row in rows if row["system"] != "SFT, best of 16"]
    assert "at inference" not in compared_plots(summary, systems)["tokens"].caption


def test_table_1_says_what_another_direction_takes(summary: dict[str, Any]) -> None:
    table = shown(table_1(summary, systems_of(summary)))
    at = table.columns.index("to switch")
    assert {name: row.cells[at].text for name, row in rows_of(table).items()} == {
        "DPA t=2": "none", "SteerLM": "none", "SteerLM, tuned": "none", "SFT, best of 16": "none",
        "rewarded soups": "0.12 s to mix and load", "RSF": "another model to load", "GRPO": "another model to load",
        **dict.fromkeys(("SFT", "SFT, asked to be brief", "DPO", "DPO, asked to be brief"), "\N{EN DASH}"),
    }  # fmt: skip


def test_table_1_says_which_rows_of_the_papers_were_run(summary: dict[str, Any]) -> None:
    systems = systems_of(summary)
    caption = shown(table_1(summary, systems)).caption
    assert caption.endswith("feasibility guarantee. PPO's row is run with GRPO in its place.")
    rows = summary["comparison"]["table_1"]
    summary["comparison"]["table_1"] = [row for row in rows if row["system"] not in ("GRPO", "rewarded soups")]
    caption = shown(table_1(summary, systems)).caption
    assert caption.endswith("feasibility guarantee. Not run here: PPO and rewarded soups.")
    assert "in its place" not in caption
