"""The report of a comparison, from a run whose every figure was made up: what is chosen, measured and said."""

import json
import re
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

import fake_run
from dpalign.measure.seeds import combine_seeds
from dpalign.page.combine import pairs_to_compare
from dpalign.page.compared_figures import compared_plots
from dpalign.page.compared_tables import table_1
from dpalign.page.compared_words import rivals_claims, trust_warning, undecided, what_was_run
from dpalign.page.drawing import inline, svg
from dpalign.page.headline import headline
from dpalign.page.ledgers import cost, footprint, lineage, made_from, objectives_read
from dpalign.page.systems import colours, systems_of
from dpalign.page.trust_tables import feasibility_tables
from dpalign.page.write import render_page
from dpalign.pipeline import align
from dpalign.run.folder import Run
from dpalign.run.ledger import read_ledger
from dpalign.stages import report as stage
from test_report_page import Reader

PROMPTS = 16


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run.fake_run(tmp_path_factory.mktemp("fake") / "run", fake_run.recipe(), prompts=PROMPTS)


@pytest.fixture(scope="session")
def reported(run: Path) -> dict[str, Any]:
    return taken(run, fake_run.recipe())


def taken(run: Path, given: Any, compared: bool = True) -> dict[str, Any]:
    """What the report stage hands to the page, without drawing it."""
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "write_report", lambda out, summary, **page: found.update(summary=summary, **page))
        fake_run.report(run, given, compared)
    shutil.rmtree(run / "report")
    return found


@pytest.fixture
def summary(reported: dict[str, Any]) -> dict[str, Any]:
    return deepcopy(reported["summary"])


def page(summary: dict[str, Any]) -> str:
    given = {"answers": [], "quality": {}, "data_reports": [], "stages": [], "recipe_text": "", "title": "t"}
    return render_page(summary, {}, **given)  # type: ignore[arg-type]


def test_every_system_has_its_role_and_tuned_ones_stand_once(summary: dict[str, Any]) -> None:
    roles = {name: entry["role"] for name, entry in summary["systems"].items()}
    assert [name for name, role in roles.items() if role == "baseline"] == [
        "SteerLM", "SFT", "DPO", "SFT, asked to be brief", "DPO, asked to be brief", "SteerLM, tuned",
        "SFT, best of 16",
    ]  # fmt: skip
    assert [name for name, role in roles.items() if role == "soup"] == ["rewarded soups"]
    assert [name for name, role in roles.items() if role == "ablation"] == ["DPA t=2, no replay", "DPA t=2, one half"]
    assert len([role for role in roles.values() if role == "specialist"]) == 5
    assert {entry["family"] for entry in summary["systems"].values()} == {None, "RSF", "GRPO"}
    assert summary["systems"]["RSF at helpfulness*0.92 - verbosity*0.38"]["trained_for"] == pytest.approx(-22.5)


def test_a_setting_is_chosen_by_the_reward_model_on_the_tuning_prompts(summary: dict[str, Any]) -> None:
    """Of DPO beta 0.5 earns more, of SteerLM the 0.9 quantile, and of the soups those of the ends."""
    chosen = {system: [row["name"] for row in rows if row["chosen"]] for system, rows in summary["tuning"].items()}
    assert chosen == {
        "DPO": ["dpo-2"], "DPO, asked to be brief": ["dpo-2-brief"], "SteerLM, tuned": ["steerlm-2"],
        "rewarded soups": ["soup-2"],
    }  # fmt: skip
    assert summary["systems"]["DPO"]["setting"] == "beta 0.5"
    assert summary["systems"]["GRPO at helpfulness*1.00 - verbosity*0.00"]["setting"] is None  # there was one
    for rows in summary["tuning"].values():
        best = max(rows, key=lambda row: row["tuning_objective"]["value"])
        assert best["chosen"]
        assert best["tuning_objective"].keys() == {"value", "low", "high"}
    points = summary["systems"]["SteerLM, tuned"]["points"]
    assert points[2]["true_rewards"]["helpfulness"]["mean"] == pytest.approx(76, abs=2.5)


def test_neither_the_truth_nor_a_validation_prompt_chooses(tmp_path: Path) -> None:
    """The reward model prefers beta 0.1 on the tuning prompts; the truth, and validation, prefer 0.5."""
    given = fake_run.recipe(**{"compare.systems": ["dpo"], "compare.ablations": []})
    opinions = fake_run.OPINIONS | {"dpo-1": 9.0}
    fake_run.fake_run(tmp_path / "run", given, prompts=8, opinions=opinions)
    told = taken(tmp_path / "run", given)["summary"]
    first, second = told["tuning"]["DPO"]
    assert first["chosen"]
    assert first["tuning_objective"]["value"] > second["tuning_objective"]["value"]
    assert first["objective"]["value"] < second["objective"]["value"]


def test_a_tuned_system_without_its_tuning_evaluations_is_refused(run: Path) -> None:
    given = fake_run.recipe()
    step = align.steps(given, compared=True)[-1]
    inputs = {name: path for name, path in step.inputs.items() if name != "tune-dpo-2"}
    with (
        Run.open(run, None, {"git_commit": None}) as opened,
        pytest.raises(ValueError, match="tune-dpo-2 is not given"),
    ):
        align.take(given, opened, align.replace(step, name="other-report", inputs=inputs))


def test_a_tuning_that_chooses_the_papers_setting_is_said_to_be_a_copy(tmp_path: Path) -> None:
    given = fake_run.recipe(**{"compare.systems": ["steerlm"], "compare.ablations": []})
    means = fake_run.MEANS | {"steerlm-2": fake_run.MEANS["steerlm-3"]}
    fake_run.fake_run(tmp_path / "run", given, prompts=8, means=means)
    told = taken(tmp_path / "run", given)["summary"]
    assert told["systems"]["SteerLM, tuned"]["same_as"] == "SteerLM"
    systems = systems_of(told)
    assert any("SteerLM tuned is SteerLM" in said for said in what_was_run(told, systems))
    claims = headline(told, systems).claims
    assert not [claim for claim in claims if "tuned" in claim.text]


def test_the_pairs_are_few_enough_and_the_replicates_many_enough(summary: dict[str, Any]) -> None:
    """17 systems and earlier iterations under the last, one step of the loop, four rivals above it."""
    pairs = [(row["a"], row["b"]) for row in summary["dominance"]]
    assert len(pairs) == len(set(pairs)) == 17 + 1 + 4
    assert {a for a, b in pairs if b == "DPA t=2"} == {"SteerLM", "SteerLM, tuned", "rewarded soups", "SFT, best of 16"}
    assert summary["intervals"]["bootstrap"]["replicates"] == 2 * 20 * 22  # micro.toml has 240
    assert not [b for _, b in pairs if "no replay" in b]


def test_table_1_counts_objectives_models_and_bytes(summary: dict[str, Any]) -> None:
    rows = {row["system"]: row for row in summary["comparison"]["table_1"]}
    read = {name: row["objectives_read"] for name, row in rows.items()}
    both = ["helpfulness", "verbosity"]
    assert read == {
        "DPA t=2": both, "SteerLM": both, "SteerLM, tuned": both, "RSF": both, "GRPO": both, "rewarded soups": both,
        "SFT": [], "SFT, asked to be brief": [], "SFT, best of 16": [], "DPO": ["overall score"],
        "DPO, asked to be brief": ["overall score"],
    }  # fmt: skip
    assert {name: row["models"] for name, row in rows.items() if row["models"] > 1} == {
        "RSF": 3, "GRPO": 2, "rewarded soups": 2, "SFT, best of 16": 2,  # its reward model is the second
    }  # fmt: skip
    assert rows["DPA t=2"]["bytes"] == 4_000_000
    assert rows["rewarded soups"]["bytes"] == 8_000_000
    assert rows["rewarded soups"]["switch_seconds"] == pytest.approx(0.12)
    assert (rows["SFT, best of 16"]["answers_a_reply"], rows["DPO"]["answers_a_reply"]) == (16, 1)
    assert rows["DPO"]["kendall_tau"] is None
    for name in ("DPA t=2", "SteerLM", "RSF", "rewarded soups"):
        assert rows[name]["kendall_tau"]["value"] > 0.8
        assert rows[name]["span"]["value"] > 20


def test_a_systems_cost_is_what_made_it_and_not_what_measured_it(run: Path, summary: dict[str, Any]) -> None:
    """Each training counts a million tokens, each sampling two, each of annotate's 12,000 answers SFT's mean."""
    entries = summary["systems"]
    assert entries["SFT"]["trained_tokens"] == 1_000_000
    assert entries["DPO"]["trained_tokens"] == 2_000_000  # neither reward model nor judge: DPO on ratings needs none
    assert entries["SFT, best of 16"]["trained_tokens"] == 2_000_000  # with the reward model, which chooses
    one, two = entries["DPA t=1"], entries["DPA t=2"]
    assert (one["sampled_tokens"], two["sampled_tokens"]) == (2_000_000, 4_000_000)
    # SFT, reward model, SteerLM on D2, two policies
    assert two["trained_tokens"] == 5_000_000
    assert two["scored_tokens"] == 4_000_000 + one["scored_tokens"] - 2_000_000
    assert two["total_tokens"] == two["sampled_tokens"] + two["scored_tokens"] + two["trained_tokens"]
    answers = run / "evaluate-dpo-2"
    assert cost([answers], 10.0)["trained_tokens"] == 2_000_000
    assert set(made_from(answers)) == {"policy"}
    assert [made.ledger["name"] for made in lineage([run / "dpo-2"])][-1] == "dpo-2"


def test_a_sweep_costs_every_setting_its_evaluation_and_the_reward_model(summary: dict[str, Any]) -> None:
    dpo = summary["systems"]["DPO"]
    assert dpo["sweep"]["trained_tokens"] == 4_000_000  # SFT, two policies, the reward model
    assert dpo["sweep"]["scored_responses"] == 2 * PROMPTS * 2
    assert summary["systems"]["DPA t=2"]["sweep"] is None


def test_footprints_and_objectives_without_ledgers_are_unknown(tmp_path: Path) -> None:
    assert footprint(tmp_path) == (1, None, None)
    assert objectives_read(tmp_path, ("helpfulness",)) == []


def test_the_trust_in_the_reward_model_is_measured_by_the_truth_and_by_the_judge(summary: dict[str, Any]) -> None:
    trust = summary["trust"]
    assert trust["check"] == "truth"
    assert [row["iteration"] for row in trust["curve"]] == [0, 1, 2]
    assert all("judge" in row for row in trust["curve"])
    # opinions of 1 and 4 points of helpfulness, which weighs 0.9 on the arc's average
    gap = trust["change"]["proxy"]["value"] - trust["change"]["check"]["value"]
    assert gap == pytest.approx(0.9 * 3, abs=0.2)
    assert not trust["warning"]
    assert trust_warning(summary) is None


def test_a_warning_stands_on_the_page_when_the_proxy_rises_and_the_check_falls(tmp_path: Path) -> None:
    given = fake_run.recipe(
        **{"compare.systems": ["dpo"], "compare.ablations": [], "compare.dpo_betas": [0.1], "evaluation.bootstrap": 300}
    )
    means = fake_run.MEANS | {"policy-2": fake_run.steered(11.0, 0.85)}
    fake_run.fake_run(tmp_path / "run", given, prompts=12, means=means, opinions={"policy-2": 8.0})
    told = taken(tmp_path / "run", given)["summary"]
    assert told["trust"]["warning"]
    text = Reader(page(told)).text
    assert "Over-optimised." in text
    assert "the policy pleases the reward model at the expense of what it stands for" in text


def test_over_seeds_a_warning_stands_on_the_page_whichever_of_them_was_warned(summary: dict[str, Any]) -> None:
    """Seeds 1 to 3, of which the second alone rose by the reward model and fell in truth."""
    warned, third = deepcopy(summary), deepcopy(summary)
    warned["trust"]["warning"] = True
    warned["trust"]["change"] |= {"proxy": {"value": 2.0, "low": 1.0, "high": 3.0}}
    warned["trust"]["change"] |= {"check": {"value": -2.0, "low": -3.0, "high": -1.0}}
    combined = summary | {"seeds": combine_seeds({1: summary, 2: warned, 3: third})}
    said = trust_warning(combined)
    assert said is not None
    assert said.startswith(
        "In 1 of 3 seeds the reward model's E_v J(v) rose from DPA t=1 to DPA t=2 while by the truth"
    )
    assert "Over-optimised." in Reader(page(combined)).text
    assert trust_warning(summary | {"seeds": combine_seeds({1: summary, 3: third})}) is None


def test_what_another_system_wins_is_said_as_plainly(tmp_path: Path) -> None:
    """Soups that are five points more helpful everywhere beat DPA, and the headline says so."""
    given = fake_run.recipe(**{"compare.systems": ["soups"], "compare.ablations": []})
    means = fake_run.MEANS | {"soup-2": fake_run.steered(0.0, 0.85)}
    fake_run.fake_run(tmp_path / "run", given, prompts=24, means=means)
    told = taken(tmp_path / "run", given)["summary"]
    systems = systems_of(told)
    said = headline(told, systems)
    assert "rewarded soups beat DPA t=2 at every one of 10 directions" in said.sentence
    ahead = [claim.text for claim in rivals_claims(told, systems) if claim.rival]
    assert any(text.startswith("Rewarded soups beat DPA t=2 at every direction: smallest lead") for text in ahead)
    assert any(text.startswith("Rewarded soups have a higher E_v J(v) than DPA t=2: by") for text in ahead)
    assert any(text.startswith("Rewarded soups have a larger hypervolume than DPA t=2, whose is 0.") for text in ahead)
    text = Reader(page(told)).text
    assert "Where another is ahead" in text


def test_the_claims_tell_of_soups_and_specialists(summary: dict[str, Any]) -> None:
    claims = {claim.text: claim.holds for claim in rivals_claims(summary, systems_of(summary)) if not claim.rival}
    soups = next(text for text in claims if "soups" in text)
    assert re.fullmatch(
        r"DPA t=2 reaches at least the hypervolume of rewarded soups with one model \(4\sMB\) in place of 2 models "
        r"\(8\sMB\): \d\.\d\d \(\d\.\d\d to \d\.\d\d\) of theirs\.",
        soups,
    )
    assert any("within 3 reward points of the GRPO specialists" in text and holds for text, holds in claims.items())


def test_what_is_not_significant_is_listed(summary: dict[str, Any]) -> None:
    found = undecided(summary, systems_of(summary))
    assert any(said.startswith("Dominance is not shown over RSF at 0°, ") for said in found)
    row = next(row for row in summary["comparison"]["differences"] if row["system"] == "DPO")
    row["objective"] = {"value": 0.1, "low": -0.4, "high": 0.6}
    found = undecided(summary, systems_of(summary))
    assert found[0] == ("The lead of DPA t=2 in E_v J(v) is not significant over DPO: 0.1 (\N{MINUS SIGN}0.4 to 0.6).")


def test_the_section_says_what_was_run_and_shows_every_table(summary: dict[str, Any]) -> None:
    text = Reader(page(summary)).text
    for said in (
        "5 specialists for one direction each (RSF and GRPO)",
        "2 ablations of the loop",
        "4 systems were tuned over 9 settings (DPO, DPO asked to be brief, SteerLM tuned and rewarded soups)",
        "880 bootstrap replicates over 16 validation prompts",
        "Seed 1: one training of each system",
        "Table 1, measured",
        "PPO: no, no, yes, yes",
        "Asked for more than can be had",
        "100% of the way beyond",
        "below \N{MINUS SIGN}45 degrees",
        "Against specialists",
        "Budgets",
        "Tuning",
        "Ablations",
    ):
        assert said in text, said
    assert "None" not in text
    assert "nan" not in text.lower().split()


def test_tuned_specialists_are_called_by_their_angles(tmp_path: Path) -> None:
    given = fake_run.recipe(
        **{
            "compare.systems": ["rl"],
            "compare.rl_directions": 1,
            "compare.rl_betas": [0.04, 0.4],
            "compare.ablations": [],
        }
    )
    means = fake_run.MEANS | {"rl-1-2": fake_run.MEANS["rl-1-1"]}
    fake_run.fake_run(tmp_path / "run", given, prompts=8, means=means)
    text = Reader(page(taken(tmp_path / "run", given)["summary"])).text
    assert "1 system was tuned over 2 settings (GRPO at 0°)" in text
    assert "GRPO at helpfulness" not in text


def test_the_margin_of_the_training_is_told_from_the_arc_and_from_beyond(tmp_path: Path) -> None:
    """Trained from -55 to 10 degrees: 7.5 and -52.5 were trained on and are not asked for."""
    given = fake_run.recipe(**{"preference.margin": 10.0, "compare.systems": ["dpo"], "compare.ablations": []})
    fake_run.fake_run(tmp_path / "run", given, prompts=12)
    told = taken(tmp_path / "run", given)["summary"]
    found = told["feasibility"]["DPA t=2"]
    assert [(group["name"], group["conditions"]) for group in found["groups"]] == [
        ("above 10 degrees", 1), ("margin, 0 to 10 degrees", 1), ("asked arc", 4), ("margin, -45 to -55 degrees", 1),
        ("below -55 degrees", 2),
    ]  # fmt: skip
    assert found["ranges"] == {"asked": [-45, 0], "trained": [-55, 10]}
    step = json.loads((tmp_path / "run" / "feasible-policy-2" / "feasibility.json").read_text())
    assert [group["name"] for group in step["groups"]] == ["above 0 degrees", "trained range", "below -45 degrees"]
    for one, other in zip(found["conditions"], step["conditions"], strict=True):
        assert one["degenerate"]["share"]["value"] == other["degenerate"]["share"]["value"]
    text = Reader(page(told)).text
    assert "margin, \N{MINUS SIGN}45 to \N{MINUS SIGN}55 degrees" in text
    assert "directions that training had around the arc and nobody asks for" in text
    (axes,) = compared_plots(told, systems_of(told))["feasibility"].wide.axes
    shaded = [patch.get_extents().transformed(axes.transData.inverted()) for patch in axes.patches]
    assert [sorted([round(box.x0, 6), round(box.x1, 6)]) for box in shaded] == [[-45, 0], [-55, -45], [0, 10]]


def test_degenerate_answers_are_counted_by_condition_and_the_worst_group_is_named(summary: dict[str, Any]) -> None:
    """At 0 degrees 3 of 10 answers repeat themselves, which the average over the arc hides."""
    found = summary["feasibility"]["DPA t=2"]
    worst = max(found["conditions"], key=lambda row: row["degenerate"]["share"]["value"])
    assert worst["angle"] == 0
    groups, conditions = feasibility_tables(summary)["DPA t=2"]
    assert [row.cells[0].text for row in groups.rows] == [
        "above 0 degrees",
        "trained range",
        "below \N{MINUS SIGN}45 degrees",
    ]
    assert len(conditions.rows) == 9
    assert conditions.columns[:3] == ("angle", "of the group", "degenerate, %")
    assert all(row.cells[2].note for row in conditions.rows)
    assert "Most answers are degenerate at 0\N{DEGREE SIGN} (trained range): " in conditions.caption
    table = table_1(summary, systems_of(summary))
    assert table is not None
    column = table.columns.index("asked for more: the worst, %")
    notes = {row.cells[0].text: row.cells[column].note for row in table.rows}
    within = {row.cells[0].text: row.cells[column - 1].note for row in table.rows}
    assert re.search(r"; up to \d\d\.\d in one condition$", within["DPA t=2"])
    assert notes["DPA t=2"].endswith(", below \N{MINUS SIGN}45 degrees")
    assert notes["SteerLM"].endswith(", 100% of the way beyond")


def test_the_figures_of_a_comparison_are_drawn(summary: dict[str, Any]) -> None:
    systems = systems_of(summary)
    summary["comparison"]["paper_curves"] = {"SFT": [[50.0, 66.9]], "t=1": [[38.1, 63.4], [56.5, 77.5]]}
    drawn = compared_plots(summary, systems)
    assert list(drawn) == ["comparison", "range", "ablations", "tokens", "feasibility"]
    (axes,) = drawn["comparison"].wide.axes
    labels = axes.get_legend_handles_labels()[1]
    assert {"RSF", "GRPO", "rewarded soups", "DPA t=2", "true front"} <= set(labels)
    assert len(labels) == len(set(labels))  # the specialists of a family share one entry
    notes = {note.get_text() for note in axes.texts}
    assert {"0\N{DEGREE SIGN}", "\N{MINUS SIGN}22.5\N{DEGREE SIGN}", "paper, SFT"} <= notes
    this_run, paper = drawn["range"].wide.axes
    assert [label.get_text() for label in paper.get_yticklabels()] == ["SteerLM", "t=0", "t=1", "t=2", "t=3", "t=4"]
    assert "18.4" in {note.get_text() for note in paper.texts}  # from 38.1 to 56.5
    assert "DPA t=2, no replay" not in {label.get_text() for label in this_run.get_yticklabels()}


def test_every_colour_of_these_figures_has_a_dark_form(summary: dict[str, Any]) -> None:
    systems = systems_of(summary)
    for plot in compared_plots(summary, systems).values():
        element = inline(svg(plot.wide, plot.name), plot.name, plot.title, colours(systems))
        assert set(re.findall(r"#[0-9a-f]{6}\b", element)) == set(), plot.name


def test_looks_tell_the_systems_apart(summary: dict[str, Any]) -> None:
    systems = systems_of(summary)
    looks = {system.family: (system.look.light, system.look.marker) for system in systems}
    assert len(set(looks.values())) == len(looks)
    assert len({system.look.name for system in systems}) == len(looks)
    hollow = {system.family for system in systems if system.look.hollow}
    assert hollow == {"RSF", "GRPO"}
    assert [system.name for system in systems][-1] == "DPA t=2"


def test_a_run_without_a_comparison_has_no_such_section(tmp_path: Path) -> None:
    given = fake_run.recipe()
    fake_run.fake_run(tmp_path / "run", given, prompts=8, compared=False)
    told = taken(tmp_path / "run", given, compared=False)["summary"]
    assert not {"comparison", "tuning", "feasibility"} & told.keys()
    assert list(told["systems"]) == ["DPA t=0", "DPA t=1", "DPA t=2", "SteerLM", "SFT", "SFT, asked", "base, asked"]
    assert told["intervals"]["bootstrap"]["replicates"] == 240
    text = page(told)
    assert 'id="comparison"' not in text
    assert "Over-optimisation" not in Reader(text).text  # no figure was drawn here


def test_one_system_in_one_setting_is_a_comparison_too(tmp_path: Path) -> None:
    """Nothing was chosen, so that no setting stands beside the name; the tables are as for many."""
    given = fake_run.recipe(**{"compare.systems": ["dpo"], "compare.dpo_betas": [0.1], "compare.ablations": []})
    fake_run.fake_run(tmp_path / "run", given, prompts=8)
    told = taken(tmp_path / "run", given)["summary"]
    assert not told["tuning"]
    assert [row["system"] for row in told["comparison"]["table_1"]] == ["DPA t=2", "SteerLM", "SFT", "DPO"]
    assert list(told["feasibility"]) == ["DPA t=2"]
    assert "Asked for more than can be had" in page(told)


def test_a_checkpoint_of_the_same_method_is_told_from_the_one_trained_here() -> None:
    from dpalign.page.entrants import _fixed

    given = fake_run.recipe(**{"evaluation.dpo": "HuggingFaceH4/zephyr-7b-beta"})
    assert _fixed(given, "evaluate-dpo", Path("x"), {"DPO"}).title == "DPO, zephyr-7b-beta"
    assert _fixed(given, "evaluate-dpo", Path("x"), set()).title == "DPO"
    assert _fixed(given, "evaluate-mine", Path("x"), set()).title == "mine"
    assert _fixed(given, "evaluate-no-restart-policy", Path("x"), set()).role == "ablation"


def test_the_last_iteration_is_compared_over_seeds_with_every_system_that_all_runs_share(
    summary: dict[str, Any],
) -> None:
    other = deepcopy(summary)
    del other["systems"]["DPO"]
    other["comparison"]["differences"] = [row for row in other["comparison"]["differences"] if row["system"] != "DPO"]
    other["dominance"] = [row for row in other["dominance"] if row["b"] != "DPO"]
    other["tuning"]["SteerLM, tuned"][1]["chosen"], other["tuning"]["SteerLM, tuned"][2]["chosen"] = False, True
    pairs = pairs_to_compare([summary, other])
    assert ("DPA t=2", "SFT") in pairs
    assert ("DPA t=2", "DPA t=1") in pairs
    assert ("DPA t=2", "DPO") not in pairs
    seeds = combine_seeds({1: summary, 2: other}, pairs)
    assert len(seeds["differences"]) == len(pairs) == 18
    assert seeds["specialists"]["RSF"]["values"][0] == seeds["specialists"]["RSF"]["values"][1]
    assert seeds["settings"]["SteerLM, tuned"] == [
        "helpfulness at its 0.9 quantile",
        "helpfulness at its 0.75 quantile",
    ]
    assert {row["b"] for row in seeds["hypervolume_ratios"]} >= {"rewarded soups", "SteerLM"}
    assert seeds["control_leads"]["RSF"]["span"]["value"] < 0
    assert seeds["degenerate"]["SteerLM"]["100% of the way beyond"]["value"] > 0.05
    assert seeds["trust"]["warned_in"] == 0
    both = summary | {"seeds": seeds}
    text = Reader(page(both)).text
    assert "Over 2 seeds of the whole pipeline, DPA t=2 beats" in text
    assert "The setting that each seed's tuning chose." in text
    assert "reward points lost to the specialists of" in text
    assert "this section shows the first, the section on seeds all" in text


def test_the_reports_ledger_names_every_evaluation_it_read(run: Path, reported: dict[str, Any]) -> None:
    given = fake_run.recipe()
    step = align.steps(given, compared=True)[-1]
    assert {name for name in step.inputs if name.startswith("tune-")} >= {"tune-dpo-1", "tune-soup-2"}
    names = [stage["name"] for stage in reported["stages"]]
    assert len(names) == len(set(names))
    assert "rsf-1-policy-2" in names
    assert json.dumps(reported["summary"], allow_nan=False)
    assert read_ledger(run / "evaluate-soup-2")["inputs"]["expert-1"]["path"] == "rsf-1-policy-2"
