"""The report of a comparison, from a run whose every figure was made up: what is chosen, measured and shown."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fake_run
from dpalign.measure.bootstrap import Estimate
from dpalign.measure.lineage import cost, footprint, lineage, made_from, objectives_read, sweep_cost
from dpalign.measure.seeds import combine_seeds
from dpalign.measure.summary import Summary, TrustChange, misunderstood, verdicts
from dpalign.measure.trust import optimised
from dpalign.page import comparison_tables as tables
from dpalign.page.combine import pairs_to_compare
from dpalign.page.comparison_figures import comparison_plots, feasibility
from dpalign.page.drawing import inline, svg
from dpalign.page.figures import trust, words
from dpalign.page.headline import headline, recipe_note, warning
from dpalign.page.looks import colours, in_order, looks_of
from dpalign.page.tables import (
    Cell,
    Row,
    Table,
    costs_table,
    dominance_tables,
    length_table,
    optimised_table,
    seeds_tables,
    stages_table,
    systems_table,
    trust_table,
    verdicts_table,
)
from dpalign.page.write import plots, render_page
from dpalign.pipeline import runner
from dpalign.pipeline.steps import steps
from dpalign.rows import CANDIDATES, read_rows
from dpalign.runs.folder import Run
from dpalign.runs.ledger import read_ledger
from test_report_page import Reader

PROMPTS = 16
ALONE: dict[str, Any] = {"compare.systems": ["dpo"], "dpo.betas": [0.1], "compare.ablations": []}
"""The smallest comparison: DPO in one setting."""


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run.fake_run(tmp_path_factory.mktemp("fake") / "run", fake_run.recipe(), prompts=PROMPTS)


@pytest.fixture(scope="session")
def summary(run: Path) -> Summary:
    return fake_run.summary_of(run, fake_run.recipe())


def reported(folder: Path, prompts: int = 8, compared: bool = True, changes: Any = ALONE, **made: Any) -> Summary:
    given = fake_run.recipe(**changes)
    run = fake_run.fake_run(folder / "run", given, prompts=prompts, compared=compared, **made)
    return fake_run.summary_of(run, given, compared)


def rows_of(table: Table | None) -> dict[str, Row]:
    """The rows by their first cell."""
    assert table is not None
    return {next(iter(row.cells.values())).text: row for row in table.rows}


def by_column(table: Table | None, name: str) -> dict[str, Cell]:
    """The cells of a row by their columns."""
    return dict(rows_of(table)[name].cells)


def changed(summary: Summary, **parts: Any) -> Summary:
    """The summary with other parts of its comparison."""
    return summary.model_copy(update={"comparison": summary.comparison.model_copy(update=parts)})


def test_every_system_has_its_role_and_tuned_ones_stand_once(summary: Summary) -> None:
    assert Summary.model_validate_json(summary.model_dump_json()) == summary
    assert [one.name for one in in_order(summary)] == [
        "SteerLM", "SFT", "DPO", "SFT, asked to be brief", "DPO, asked to be brief", "SteerLM, tuned",
        "SFT, best of 16", "SFT, asked", "base, asked", "RSF at helpfulness*1.00 - verbosity*0.00",
        "RSF at helpfulness*0.92 - verbosity*0.38", "RSF at helpfulness*0.71 - verbosity*0.71",
        "GRPO at helpfulness*1.00 - verbosity*0.00", "GRPO at helpfulness*0.71 - verbosity*0.71", "rewarded soups",
        "DPA t=2, no replay", "DPA t=2, one half", "DPA t=0", "DPA t=1", "DPA t=2",
    ]  # fmt: skip
    assert {one.system.family for one in summary.systems.values()} == {"", "RSF", "GRPO"}


def test_a_setting_is_chosen_by_the_reward_model_on_the_tuning_prompts(summary: Summary) -> None:
    """Of DPO beta 0.5 earns more, of SteerLM the 0.9 quantile, and of the soups those of the ends."""
    tuning = summary.comparison.tuning
    assert {name: [row.chosen for row in rows].index(True) for name, rows in tuning.items()} == {
        "DPO": 1, "DPO, asked to be brief": 1, "SteerLM, tuned": 1, "rewarded soups": 1,
    }  # fmt: skip
    assert summary.systems["DPO"].system.setting == "beta 0.5"
    assert summary.systems["GRPO at helpfulness*1.00 - verbosity*0.00"].system.setting == ""  # there was one
    for rows in tuning.values():
        assert max(rows, key=lambda row: row.tuning_objective.value).chosen
    points = summary.systems["SteerLM, tuned"].points
    assert points[2].by("helpfulness").value == pytest.approx(76, abs=2.5)


def test_a_setting_that_ends_its_grid_is_marked(summary: Summary) -> None:
    """Of two betas each is an end; SteerLM's 0.9 lies within its grid, and experts are no grid."""
    edges = {name: [row.at_edge for row in rows] for name, rows in summary.comparison.tuning.items()}
    assert edges == {
        "DPO": [True, True], "DPO, asked to be brief": [True, True], "SteerLM, tuned": [False, False, True],
        "rewarded soups": [False, False],
    }  # fmt: skip
    table = tables.tuning_table(summary, summary.comparison)
    notes = {row.cells["system"].text: bool(row.cells[""].note) for row in table.rows if row.strong}
    assert notes == {"DPO": True, "DPO, asked to be brief": True, "SteerLM, tuned": False, "rewarded soups": False}


def test_neither_the_truth_nor_a_validation_prompt_chooses(tmp_path: Path) -> None:
    """The reward model prefers beta 0.1 on the tuning prompts; the truth, and validation, prefer 0.5."""
    changes = ALONE | {"dpo.betas": [0.1, 0.5]}
    first, second = reported(tmp_path, changes=changes, opinions=fake_run.OPINIONS | {"dpo-1": 9.0}).comparison.tuning[
        "DPO"
    ]
    assert first.chosen
    assert first.tuning_objective.value > second.tuning_objective.value
    assert first.objective.value < second.objective.value


def test_a_tuned_system_without_its_tuning_evaluations_is_refused(run: Path) -> None:
    given = fake_run.recipe()
    step = steps(given, compared=True)[-1]
    inputs = {name: path for name, path in step.inputs.items() if name != "tune-dpo-2"}
    with (
        Run.open(run, None, {"git_commit": None}) as opened,
        pytest.raises(ValueError, match="tune-dpo-2 is not given"),
    ):
        runner.take(given, opened, replace(step, name="other-report", inputs=inputs))


def test_a_tuning_that_chooses_the_papers_setting_makes_a_copy_without_claims(tmp_path: Path) -> None:
    means = fake_run.MEANS | {"steerlm-2": fake_run.MEANS["steerlm-3"]}
    found = reported(tmp_path, changes=ALONE | {"compare.systems": ["steerlm"]}, means=means)
    assert found.systems["SteerLM, tuned"].same_as == "SteerLM"
    assert "SteerLM, tuned" not in {one.system for one in verdicts(found)}
    assert "SteerLM, tuned" not in rows_of(tables.table_1(found, found.comparison))


def test_the_pairs_are_few_enough_and_the_replicates_many_enough(summary: Summary) -> None:
    """17 systems and earlier iterations under the last, one step of the loop, four rivals above it."""
    pairs = [(row.a, row.b) for row in summary.dominance]
    assert len(pairs) == len(set(pairs)) == 17 + 1 + 4
    assert {a for a, b in pairs if b == "DPA t=2"} == {"SteerLM", "SteerLM, tuned", "rewarded soups", "SFT, best of 16"}
    assert summary.intervals.bootstrap.replicates == 2 * 20 * 22  # micro.toml has 240
    assert not [b for _, b in pairs if "no replay" in b]


def test_table_1_counts_objectives_models_bytes_and_conditions(summary: Summary) -> None:
    rows = {row.name: row for row in summary.comparison.table_1}
    both = ("helpfulness", "verbosity")
    assert {name: row.objectives_read for name, row in rows.items()} == {
        "DPA t=2": both, "SteerLM": both, "SteerLM, tuned": both, "RSF": both, "GRPO": both, "rewarded soups": both,
        "SFT": (), "SFT, asked to be brief": (), "SFT, best of 16": (), "DPO": ("overall score",),
        "DPO, asked to be brief": ("overall score",),
    }  # fmt: skip
    assert {name: row.models for name, row in rows.items() if row.models > 1} == {
        "RSF": 3, "GRPO": 2, "rewarded soups": 2, "SFT, best of 16": 2,  # its reward model is the second
    }  # fmt: skip
    assert (rows["DPA t=2"].bytes, rows["rewarded soups"].bytes) == (4_000_000, 8_000_000)
    assert rows["rewarded soups"].switch_seconds == pytest.approx(0.12)
    assert (rows["SFT, best of 16"].answers_a_reply, rows["DPO"].answers_a_reply) == (16, 1)
    assert {name: rows[name].conditions for name in ("DPA t=2", "SteerLM", "RSF", "GRPO", "SFT")} == {
        "DPA t=2": 10, "SteerLM": 5, "RSF": 3, "GRPO": 2, "SFT": 1,
    }  # fmt: skip
    told = {name: rows[name].told_by for name in ("DPA t=2", "SteerLM", "rewarded soups", "SFT, asked to be brief")}
    assert len(set(told.values())) == 4


def test_table_1_compares_control_at_as_many_conditions(summary: Summary) -> None:
    rows = {row.name: row for row in summary.comparison.table_1}
    for name in ("DPA t=2", "SteerLM", "RSF", "rewarded soups"):
        assert rows[name].kendall_tau.value > 0.8
        assert rows[name].span.value > 20
    assert rows["DPO"].kendall_tau is None
    assert rows["GRPO"].span.value > 20
    assert (rows["GRPO"].kendall_tau, rows["GRPO"].spearman) == (None, None)
    assert rows["RSF"].kendall_tau_common is None
    assert rows["SteerLM"].kendall_tau_common == rows["SteerLM"].kendall_tau
    assert rows["DPA t=2"].kendall_tau_common.value > rows["DPA t=2"].kendall_tau.value
    leads = summary.comparison.control_leads
    assert {name for name, lead in leads.items() if lead.kendall_tau is None} == {"RSF", "GRPO"}
    assert leads["GRPO"].span.below_zero  # its two models are 31 points apart, the arc's ends of DPA 25


def test_table_1_says_what_another_direction_takes_and_which_rows_of_the_papers_were_run(summary: Summary) -> None:
    table = tables.table_1(summary, summary.comparison)
    assert {name: row.cells["to switch"].text for name, row in rows_of(table).items()} == {
        "DPA t=2": "none", "SteerLM": "none", "SteerLM, tuned": "none", "SFT, best of 16": "none",
        "rewarded soups": "0.12 s to mix and load", "RSF": "another model to load", "GRPO": "another model to load",
        **dict.fromkeys(("SFT", "SFT, asked to be brief", "DPO", "DPO, asked to be brief"), "\N{EN DASH}"),
    }  # fmt: skip
    assert rows_of(table)["GRPO"].cells["the paper's Table 1"].text == "PPO: no, no, yes, yes"
    kept = tuple(row for row in summary.comparison.table_1 if row.name not in ("GRPO", "rewarded soups"))
    fewer = changed(summary, table_1=kept)
    assert "PPO and rewarded soups" in tables.table_1(fewer, fewer.comparison).caption
    assert "PPO and rewarded soups" not in table.caption


def test_a_systems_cost_is_what_made_it_and_not_what_measured_it(run: Path, summary: Summary) -> None:
    """Each training counts a million tokens, each sampling two, each of annotate's 12,000 answers SFT's mean."""
    costs = {name: one.cost for name, one in summary.systems.items()}
    assert costs["SFT"].trained_tokens == 1_000_000
    assert costs["DPO"].trained_tokens == 2_000_000  # neither reward model nor judge: DPO on ratings needs none
    assert costs["SFT, best of 16"].trained_tokens == 2_000_000  # with the reward model, which chooses
    one, two = costs["DPA t=1"], costs["DPA t=2"]
    assert (one.sampled_tokens, two.sampled_tokens) == (2_000_000, 4_000_000)
    # SFT, reward model, SteerLM on D2, two policies
    assert two.trained_tokens == 5_000_000
    assert two.scored_tokens == 4_000_000 + one.scored_tokens - 2_000_000
    assert two.total_tokens == two.sampled_tokens + two.scored_tokens + two.trained_tokens
    answers = run / "evaluate-dpo-2"
    assert cost([answers], 10.0).trained_tokens == 2_000_000
    assert set(made_from(answers)) == {"policy"}
    assert [made.ledger["name"] for made in lineage([run / "dpo-2"])][-1] == "dpo-2"


def test_a_sweep_costs_every_setting_its_evaluation_and_the_reward_model(summary: Summary) -> None:
    sweep = summary.systems["DPO"].sweep
    assert sweep.trained_tokens == 4_000_000  # SFT, two policies, the reward model
    assert sweep.scored_responses == 2 * PROMPTS * 2
    assert summary.systems["DPA t=2"].sweep is None


def test_an_answer_that_the_judge_scored_too_counts_once_in_a_sweep(run: Path) -> None:
    folder = run / "evaluate-dpo-2"
    tokens, sweep = read_ledger(folder)["tokens"], sweep_cost([folder], 10.0)
    assert tokens["scored"] == 2 * PROMPTS * 2
    assert (sweep.scored_responses, sweep.scored_tokens) == (PROMPTS * 2, tokens["sampled"])


def test_footprints_and_objectives_without_ledgers_are_unknown(tmp_path: Path) -> None:
    assert footprint(tmp_path) == (1, None, None)
    assert objectives_read(tmp_path, ("helpfulness",), lambda knobs: pytest.fail("nothing to read")) == []


def test_the_stages_are_counted_once_each(run: Path, summary: Summary) -> None:
    names = [stage.name for stage in summary.stages]
    assert len(names) == len(set(names))
    assert "rsf-1-policy-2" in names
    assert rows_of(stages_table(summary))["annotate"].cells["answers scored"].text == "12,000"
    assert read_ledger(run / "evaluate-soup-2")["inputs"]["expert-1"]["path"] == "rsf-1-policy-2"


def test_the_curve_of_a_training_is_found(run: Path) -> None:
    from dpalign.measure.lineage import curves

    kept = {"step": [1, 2], "loss": [3.0, 2.5], "learning_rate": [1e-3, 1e-4]}
    (run / "sft" / "curve.json").write_text(json.dumps(kept))
    (found,) = curves(lineage([run / "dpo-2"]))
    assert (found.stage, found.step, found.loss) == ("sft", (1, 2), (3.0, 2.5))
    (run / "sft" / "curve.json").unlink()


def test_the_trust_in_the_reward_model_is_measured_by_the_truth_and_by_the_judge(summary: Summary) -> None:
    trust = summary.trust
    assert trust.check == "truth"
    assert [point.iteration for point in trust.curve] == [0, 1, 2]
    assert all(point.judge for point in trust.curve)
    # opinions of 1 and 4 points of helpfulness, which weighs 0.9 on the arc's average
    assert trust.change.proxy.value - trust.change.check.value == pytest.approx(0.9 * 3, abs=0.2)
    assert not trust.warning
    assert warning(summary) == ""


def test_a_warning_stands_on_the_page_when_the_proxy_rises_and_the_check_falls(tmp_path: Path) -> None:
    means = fake_run.MEANS | {"policy-2": fake_run.steered(11.0, 0.85)}
    found = reported(tmp_path, prompts=12, means=means, opinions={"policy-2": 8.0})
    assert found.trust.warning
    assert Reader(render_page(found, {})).text.count("Over-optimised.") == 2


def test_over_seeds_a_warning_stands_on_the_page_whichever_of_them_was_warned(summary: Summary) -> None:
    """Seeds 1 to 3, of which the second alone rose by the reward model and fell in truth."""
    change = summary.trust.change.model_copy(
        update={"proxy": Estimate(2.0, 1.0, 3.0), "check": Estimate(-2.0, -3.0, -1.0)}
    )
    trust = summary.trust.model_copy(update={"warning": True, "change": change})
    warned = summary.model_copy(update={"trust": trust})
    seeds = combine_seeds({1: summary, 2: warned, 3: summary})
    assert "In 1 of 3 seeds" in warning(summary.model_copy(update={"seeds": seeds}))
    assert warning(summary.model_copy(update={"seeds": combine_seeds({1: summary, 3: summary})})) == ""


def with_steps(summary: Summary, *steps: TrustChange) -> Summary:
    return summary.model_copy(update={"trust": summary.trust.model_copy(update={"steps": steps})})


UP, DOWN = Estimate(2.0, 1.0, 3.0), Estimate(-2.0, -3.0, -1.0)
FINE = TrustChange(a="DPA t=1", b="DPA t=0", proxy=UP, check=UP)
SPOILT = TrustChange(a="DPA t=2", b="DPA t=1", proxy=UP, check=DOWN)


def test_a_single_step_that_is_over_optimised_is_marked_and_warned_of(summary: Summary) -> None:
    spoilt = with_steps(summary, FINE, SPOILT)
    assert "From DPA t=1 to DPA t=2" in warning(spoilt)
    assert [row.cells[""].tone for row in trust_table(spoilt).rows] == ["", "no", ""]  # the last is the whole way


@pytest.mark.parametrize(
    ("proxy", "check"), [(UP, UP), (DOWN, DOWN), (UP, Estimate(-1.0, -2.0, 0.1)), (Estimate(1.0, -0.1, 2.0), DOWN)]
)
def test_a_step_within_the_intervals_or_in_agreement_is_not_warned_of(
    summary: Summary, proxy: Estimate, check: Estimate
) -> None:
    fine = with_steps(summary, FINE, SPOILT.model_copy(update={"proxy": proxy, "check": check}))
    assert warning(fine) == ""
    assert "" not in trust_table(fine).columns


def test_over_seeds_a_step_is_warned_of_in_the_seeds_that_it_was_spoilt_in(summary: Summary) -> None:
    fine = with_steps(summary, FINE, SPOILT.model_copy(update={"check": UP}))
    seeds = combine_seeds({1: fine, 2: with_steps(summary, FINE, SPOILT), 3: fine})
    assert [(step.b, step.a, step.warned_in) for step in seeds.trust.steps] == [
        ("DPA t=0", "DPA t=1", 0),
        ("DPA t=1", "DPA t=2", 1),
    ]
    assert seeds.trust.steps[1].check.values == (2.0, -2.0, 2.0)
    assert "In 1 of 3 seeds, from DPA t=1 to DPA t=2" in warning(fine.model_copy(update={"seeds": seeds}))
    assert warning(fine.model_copy(update={"seeds": combine_seeds({1: fine, 2: fine})})) == ""


def test_every_policy_stands_over_its_divergence_from_sft(summary: Summary) -> None:
    """Two samples lie a nat below and above the made-up divergence of each system."""
    found = {row.system: row for row in optimised(summary)}
    last = summary.systems["DPA t=2"]
    assert last.divergence == Estimate(9.0, 9.0, 9.0)
    assert found["DPA t=2"].divergence == last.divergence
    assert found["DPA t=2"].scored == last.cost.scored_responses > 0
    assert found["DPA t=2"].proxy == last.judged.objective
    assert found["DPA t=2"].truth == last.figures.objective
    assert found["DPA t=2"].judge == last.by_judge.objective
    shown = rows_of(optimised_table(summary))
    assert [shown[name].cells["KL from SFT, nats"].text for name in ("SFT", "DPO", "DPA t=0", "DPA t=1")] == [
        "0.0", "3.0", "2.0", "6.0",
    ]  # fmt: skip
    assert "DPA t=2, no replay" in shown
    assert not {"rewarded soups", "SFT, best of 16"} & set(shown)  # no model of their own draws their answers


def test_proxy_and_check_are_drawn_over_scored_answers_and_over_the_divergence(summary: Summary) -> None:
    scored, away = trust(summary).canvas.axes
    made = [summary.systems[f"DPA t={t}"] for t in (0, 1, 2)]
    for axes, at in ((scored, [one.cost.scored_responses for one in made]), (away, [2.0, 6.0, 9.0])):
        lines = {container.get_label(): container.lines[0] for container in axes.containers}
        proxy, truth = (lines[name] for name in list(lines)[:2])
        assert proxy.get_xdata().tolist() == truth.get_xdata().tolist() == at
        assert proxy.get_ydata().tolist() == [one.judged.objective.value for one in made]
        assert truth.get_ydata().tolist() == [one.figures.objective.value for one in made]
        assert "DPO" in lines
        assert not [name for name in lines if name.startswith(("RSF", "GRPO"))]  # they serve one direction
    (alone,) = trust(without_divergence(summary)).canvas.axes
    assert alone.get_xlabel() == scored.get_xlabel()
    plain = {name: one.model_copy(update={"cost": None}) for name, one in without_divergence(summary).systems.items()}
    (by_iteration,) = trust(summary.model_copy(update={"systems": plain})).canvas.axes
    assert by_iteration.containers[0].lines[0].get_xdata().tolist() == [0, 1, 2]


def without_divergence(summary: Summary) -> Summary:
    systems = {name: one.model_copy(update={"divergence": None}) for name, one in summary.systems.items()}
    return summary.model_copy(update={"systems": systems})


def test_seeds_carry_the_divergence_and_both_objectives(summary: Summary) -> None:
    last = summary.systems["DPA t=2"]
    further = last.model_copy(update={"divergence": Estimate(11.0, 10.0, 12.0)})
    other = summary.model_copy(update={"systems": summary.systems | {"DPA t=2": further}})
    seeds = combine_seeds({1: summary, 2: other})
    own = seeds.systems["DPA t=2"]
    assert own["divergence"].values == (9.0, 11.0)
    assert own["objective_by_reward"].value == pytest.approx(last.judged.objective.value)
    assert own["objective"].value == pytest.approx(last.figures.objective.value)
    assert own["scored"].value == last.cost.scored_responses
    combined = summary.model_copy(update={"seeds": seeds})
    row = {row.system: row for row in optimised(combined)}["DPA t=2"]
    assert (row.divergence, row.proxy, row.scored) == (
        own["divergence"],
        own["objective_by_reward"],
        own["scored"].value,
    )
    assert by_column(optimised_table(combined), "DPA t=2")["KL from SFT, nats"].text == "10.0"
    assert trust(combined).canvas.axes[1].containers[0].lines[0].get_xdata().tolist() == [2.0, 6.0, 10.0]


def test_what_another_system_wins_is_said_as_plainly(tmp_path: Path) -> None:
    """Soups that are five points more helpful everywhere beat DPA, and the headline says so."""
    means = fake_run.MEANS | {"soup-2": fake_run.steered(0.0, 0.85)}
    found = reported(tmp_path, prompts=24, changes=ALONE | {"compare.systems": ["soups"]}, means=means)
    assert {one.system: one.outcome for one in verdicts(found)}["rewarded soups"] == "behind"
    assert "rewarded soups" in headline(found)[0].casefold()
    row = by_column(verdicts_table(found), "rewarded soups")
    assert row["DPA t=2 beats it for every user"].text == "it beats DPA t=2"
    assert row["ahead on average"].text == "rewarded soups"


def test_soups_and_specialists_are_measured_beside_the_last_iteration(summary: Summary) -> None:
    compared = summary.comparison
    assert compared.differences["rewarded soups"].hypervolume_ratio.value == pytest.approx(1, abs=0.2)
    assert compared.family_shortfalls["GRPO"].high < 3
    table = tables.specialists_table(summary, compared)
    assert (
        rows_of(table)["RSF at \N{MINUS SIGN}22.5\N{DEGREE SIGN}"].cells["trained for"].text
        == "\N{MINUS SIGN}22.5\N{DEGREE SIGN}"
    )
    ablated = rows_of(tables.ablation_table(summary, compared))
    assert list(ablated) == ["DPA t=2", "DPA t=2, no replay", "DPA t=2, one half"]


def test_a_lead_that_holds_zero_is_nobodys(summary: Summary) -> None:
    rows = [
        row.model_copy(update={"objective_lead": Estimate(0.1, -0.4, 0.6)})
        if (row.a, row.b) == ("DPA t=2", "DPO")
        else row
        for row in summary.dominance
    ]
    level = summary.model_copy(update={"dominance": tuple(rows)})
    ahead = [by_column(verdicts_table(one), "DPO")["ahead on average"].text for one in (summary, level)]
    assert ahead == ["DPA t=2", "not significant"]


def test_a_wish_that_makes_answers_longer_was_not_understood_and_beating_it_is_no_claim(tmp_path: Path) -> None:
    """SFT goes from verbosity 50 to 58 when asked to be brief, DPO from 57 to 47."""
    means = fake_run.MEANS | {"sft-brief": np.array([[63.0, 58.0]])}
    found = reported(tmp_path, prompts=12, changes=ALONE | {"compare.systems": ["dpo", "brief"]}, means=means)
    changes = {name: wish.change.value for name, wish in found.comparison.wishes.items()}
    assert changes == pytest.approx({"SFT, asked to be brief": 8, "DPO, asked to be brief": -10}, abs=2)
    assert list(misunderstood(found)) == ["SFT, asked to be brief"]
    rows = rows_of(verdicts_table(found))
    assert [
        list(rows[name].cells.values())[1].tone for name in ("SFT, asked to be brief", "DPO, asked to be brief")
    ] == ["no", "yes"]
    assert "SFT asked to be brief" not in headline(found)[0]


def test_over_seeds_a_wish_must_be_understood_in_every_run(summary: Summary) -> None:
    assert misunderstood(summary) == {}
    wishes = summary.comparison.wishes
    name = "DPO, asked to be brief"
    other = changed(
        summary, wishes=wishes | {name: wishes[name].model_copy(update={"change": Estimate(-1.0, -2.0, 0.5)})}
    )
    assert list(misunderstood(other)) == [name]
    seeds = combine_seeds({1: summary, 2: other})
    assert seeds.understood_in == {"SFT, asked to be brief": 2, name: 1}
    assert list(misunderstood(summary.model_copy(update={"seeds": seeds}))) == [name]


def test_soups_are_called_by_the_experts_that_were_mixed(tmp_path: Path) -> None:
    """Also where one pair was tried, and by what the evaluation wrote, not by [soups] of the printed recipe."""
    changes = ALONE | {"compare.systems": ["soups"], "soups.choices": ["ends"]}
    found = reported(tmp_path, changes=changes, means=fake_run.MEANS | {"soup-1": fake_run.MEANS["soup-2"]})
    pair = "helpfulness*1.00 - verbosity*0.00 and helpfulness*0.71 - verbosity*0.71"
    assert found.systems["rewarded soups"].system.setting == pair
    for table in (costs_table(found), tables.table_1(found, found.comparison)):
        assert rows_of(table)["rewarded soups"].cells["system"].note == pair
    assert "soups.experts" in recipe_note(found)
    assert "preference.listed" in recipe_note(found)


def test_the_margin_of_the_training_is_told_from_the_arc_and_from_beyond(tmp_path: Path) -> None:
    """Trained from -55 to 10 degrees: 7.5 and -52.5 were trained on and are not asked for."""
    summary = reported(tmp_path, prompts=12, changes=ALONE | {"preference.margin": 10.0})
    found = summary.comparison.feasibility["DPA t=2"]
    assert [(group.name, group.conditions) for group in found.groups] == [
        ("above 10 degrees", 1), ("margin, 0 to 10 degrees", 1), ("asked arc", 4), ("margin, -45 to -55 degrees", 1),
        ("below -55 degrees", 2),
    ]  # fmt: skip
    assert (found.asked_range, found.trained_range) == ((-45, 0), (-55, 10))
    step = json.loads((tmp_path / "run" / "feasible-policy-2" / "feasibility.json").read_text())
    assert [group["name"] for group in step["groups"]] == ["above 0 degrees", "trained range", "below -45 degrees"]
    for one, other in zip(found.conditions, step["conditions"], strict=True):
        assert one.degenerate.share.value == other["degenerate"]["share"]["value"]
    (axes,) = feasibility(summary, summary.comparison).canvas.axes
    shaded = [patch.get_extents().transformed(axes.transData.inverted()) for patch in axes.patches]
    assert [sorted([round(box.x0, 6), round(box.x1, 6)]) for box in shaded] == [[-45, 0], [-55, -45], [0, 10]]


def test_degenerate_answers_are_counted_by_condition_and_the_worst_group_is_named(summary: Summary) -> None:
    """At 0 degrees 3 of 10 answers repeat themselves, which the average over the arc hides."""
    found = summary.comparison.feasibility["DPA t=2"]
    assert max(found.conditions, key=lambda row: row.degenerate.share.value).angle == 0
    groups, conditions = tables.feasibility_tables(summary, summary.comparison)["DPA t=2"]
    assert list(rows_of(groups)) == ["above 0 degrees", "trained range", "below \N{MINUS SIGN}45 degrees"]
    assert len(conditions.rows) == 9
    assert [row.cells["angle"].text for row in conditions.rows if row.strong] == ["0\N{DEGREE SIGN}"]
    table = tables.table_1(summary, summary.comparison)
    column = "asked for more: the worst, %"
    row = rows_of(table)["DPA t=2"]
    assert re.search(r"; up to \d\d\.\d in one condition$", row.cells["degenerate, %"].note)
    assert row.cells[column].note.endswith(", below \N{MINUS SIGN}45 degrees")
    assert rows_of(table)["SteerLM"].cells[column].note.endswith(", 100% of the way beyond")


def test_the_figures_of_a_comparison_are_drawn_and_every_colour_has_a_dark_form(summary: Summary) -> None:
    drawn = {plot.name: plot for plot in comparison_plots(changed(summary, paper_curves=True))}
    assert list(drawn) == ["comparison", "range", "ablations", "tokens", "feasibility"]
    (axes,) = drawn["comparison"].canvas.axes
    labels = axes.get_legend_handles_labels()[1]
    assert {"RSF", "GRPO", "rewarded soups", "DPA t=2", "true front"} <= set(labels)
    assert len(labels) == len(set(labels))  # the specialists of a family share one entry
    notes = {note.get_text() for note in axes.texts}
    assert {"0\N{DEGREE SIGN}", "\N{MINUS SIGN}22.5\N{DEGREE SIGN}", "paper, SFT"} <= notes
    this_run, paper = drawn["range"].canvas.axes
    assert [label.get_text() for label in paper.get_yticklabels()] == ["SteerLM", "t=0", "t=1", "t=2", "t=3", "t=4"]
    assert "18.4" in {note.get_text() for note in paper.texts}  # from 38.1 to 56.5
    assert "DPA t=2, no replay" not in {label.get_text() for label in this_run.get_yticklabels()}
    for plot in drawn.values():
        element = inline(svg(plot.canvas, plot.name), plot.name, plot.title, colours(summary))
        assert set(re.findall(r"#[0-9a-f]{6}\b", element)) == set(), plot.name


def test_looks_tell_the_systems_apart(summary: Summary) -> None:
    looks = {summary.systems[name].system.group: look for name, look in looks_of(summary).items()}
    assert len({(look.light, look.marker) for look in looks.values()}) == len(looks)
    assert len({look.name for look in looks.values()}) == len(looks)
    assert {name for name, look in looks.items() if look.hollow} == {"RSF", "GRPO"}


def test_the_page_of_a_comparison_stands(summary: Summary) -> None:
    text = Reader(render_page(summary, {})).text
    assert "None" not in text
    assert "nan" not in text.lower().split()
    for section in ("comparison", "use", "reward-model", "cost"):
        assert f'id="{section}"' in render_page(summary, {})


def test_words_are_counted_in_the_answers_of_every_system(run: Path, summary: Summary) -> None:
    points = [point for one in summary.systems.values() for point in one.points]
    assert all(point.words.low <= point.words.value <= point.words.high for point in points)
    assert {point.degenerate.value for point in points} == {0}  # the made-up answers repeat nothing
    rows = list(read_rows(run / "evaluate-policy-2" / "answers", CANDIDATES))
    last = summary.systems["DPA t=2"]
    for v, point in enumerate(last.points):
        own = [len(row["response"].split()) for row in rows if row["condition_index"] == v]
        assert point.words.value == pytest.approx(np.mean(own), abs=1e-6)
    assert last.length.last_to_first.high < 0.8  # from verbosity 60 to 35, a sentence each 16 points
    assert last.length.kendall_tau.above_zero
    assert summary.systems["SteerLM"].length is None
    assert summary.degenerate_rule.repetition == 0.3


def test_the_judge_rates_every_system_beside_the_truth(summary: Summary) -> None:
    """It finds each answer a point less verbose, which a directed user is glad of by -v2."""
    last = summary.systems["DPA t=2"]
    gain = last.by_judge.objective.value - last.figures.objective.value
    assert gain == pytest.approx(-np.mean([v["verbosity"] for v in summary.directions]), abs=1e-5)
    assert all(one.by_judge for one in summary.systems.values())
    assert [(row.a, row.b) for row in summary.dominance_by_judge] == [(row.a, row.b) for row in summary.dominance]


def without_truth(summary: Summary) -> Summary:
    """The summary as if its figures were a reward model's."""
    return summary.model_copy(update={"measure": "judged"})


def test_the_judges_leads_stand_beside_the_reward_models_where_no_truth_is_known(summary: Summary) -> None:
    column = "lead by the judge"
    assert column not in verdicts_table(summary).columns
    shown = by_column(verdicts_table(without_truth(summary)), "SFT")
    lead = summary.dominance_of("DPA t=2", "SFT", by_judge=True).objective_lead
    assert shown[column].text == f"{lead.value:+.1f}"
    by_judge = rows_of(systems_table(summary, "by_judge"))
    assert by_judge.keys() == rows_of(systems_table(summary)).keys()
    main = by_column(systems_table(summary), "DPA t=2")
    assert main["by the judge"].text == by_judge["DPA t=2"].cells["E_v J(v)"].text != main["E_v J(v)"].text
    assert len(dominance_tables(summary)["by_judge"].rows) == len(dominance_tables(summary)["last"].rows)


def test_words_stand_at_three_directions_and_open_where_no_truth_is_known(summary: Summary) -> None:
    table = length_table(summary)
    at = [
        "words at 0\N{DEGREE SIGN}",
        "words at \N{MINUS SIGN}25\N{DEGREE SIGN}",
        "words at \N{MINUS SIGN}45\N{DEGREE SIGN}",
    ]
    assert [title for title in table.columns if title.startswith("words")] == at
    points = summary.systems["DPA t=2"].points
    shown = by_column(table, "DPA t=2")
    assert [shown[title].text for title in at] == [f"{points[v].words.value:.1f}" for v in (0, 5, 9)]
    assert shown["steps"].text == f"{summary.systems['DPA t=2'].length.steps_beyond_doubt} of 9"
    plain, targets = by_column(table, "SFT"), by_column(table, "SteerLM")
    assert [plain[title].text == "\N{EN DASH}" for title in at] == [False, True, True]
    most, middle, fewest = (float(targets[title].text) for title in at)
    assert most > middle > fewest
    text, world = render_page(without_truth(summary), {}), render_page(summary, {})
    assert ('id="words" open' in text, 'id="words">' in world) == (True, True)
    seeds = combine_seeds({1: summary, 2: summary}, [("DPA t=2", "SFT")])
    assert seeds.words["DPA t=2"][9].value == points[9].words.value
    over = [len(seeds_tables(one.model_copy(update={"seeds": seeds}))) for one in (summary, without_truth(summary))]
    assert over[1] == over[0] + 1


def test_words_are_drawn_along_the_dial(summary: Summary) -> None:
    (axes,) = words(summary).canvas.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["DPA t=2"].get_ydata().tolist() == [point.words.value for point in summary.systems["DPA t=2"].points]
    assert "SFT, asked to be brief" in lines
    assert not [name for name in lines if name.startswith(("RSF", "GRPO")) or "no replay" in name]
    assert "words" in plots(summary)


def test_a_run_without_a_comparison_has_no_such_section(tmp_path: Path) -> None:
    found = reported(tmp_path, compared=False, changes={})
    assert found.comparison is None
    assert list(found.systems) == ["DPA t=0", "DPA t=1", "DPA t=2", "SteerLM", "SFT", "SFT, asked", "base, asked"]
    assert found.intervals.bootstrap.replicates == 240
    assert 'id="comparison"' not in render_page(found, {})


def test_one_system_in_one_setting_is_a_comparison_too(tmp_path: Path) -> None:
    """Nothing was chosen, so that no setting stands beside the name; the tables are as for many."""
    found = reported(tmp_path).comparison
    assert not found.tuning
    assert {row.name for row in found.table_1} == {"DPA t=2", "SteerLM", "SFT", "DPO"}
    assert list(found.feasibility) == ["DPA t=2"]


def test_the_last_iteration_is_compared_over_seeds_with_every_system_that_all_runs_share(summary: Summary) -> None:
    compared = summary.comparison
    tuned = [row.model_copy(update={"chosen": i == 2}) for i, row in enumerate(compared.tuning["SteerLM, tuned"])]
    other = changed(
        summary,
        differences={name: row for name, row in compared.differences.items() if name != "DPO"},
        tuning=compared.tuning | {"SteerLM, tuned": tuple(tuned)},
    ).model_copy(update={
        "systems": {name: one for name, one in summary.systems.items() if name != "DPO"},
        "dominance": tuple(row for row in summary.dominance if row.b != "DPO"),
    })  # fmt: skip
    pairs = pairs_to_compare([summary, other])
    assert ("DPA t=2", "SFT") in pairs
    assert ("DPA t=2", "DPO") not in pairs
    seeds = combine_seeds({1: summary, 2: other}, pairs)
    assert len(seeds.differences) == len(pairs) == 18
    first, second = seeds.family_shortfalls["RSF"].values
    assert first == second
    assert seeds.settings["SteerLM, tuned"] == ("helpfulness at its 0.9 quantile", "helpfulness at its 0.75 quantile")
    assert {"rewarded soups", "SteerLM"} <= seeds.hypervolume_ratios.keys()
    assert seeds.control_leads["RSF"]["span"].value < 0
    assert seeds.degenerate["SteerLM"]["100% of the way beyond"].value > 0.05
    assert seeds.trust.warned_in == 0
    text = Reader(render_page(summary.model_copy(update={"seeds": seeds}), {})).text
    assert "seeds 1, 2" in text
    assert "helpfulness at its 0.75 quantile" in text
