"""The order of the loop and of a comparison: which steps there are, what each reads, and what it is told."""

import re
from pathlib import Path

import numpy as np
import pytest

from conftest import MICRO, RECIPES
from dpalign.pipeline.command import steps_table
from dpalign.pipeline.runner import execute
from dpalign.pipeline.steps import knobs_of, recipe_of, rivals_of, steps
from dpalign.recipe import Recipe, changed, load
from dpalign.runs.environment import shipped
from dpalign.stages.dpo import dpo
from dpalign.stages.rival import spelled
from dpalign.stages.stage import Step

PAPER = Recipe(name="paper")
SHORT = changed(PAPER, {"iterations": 2, "data.tuning": 0.02})
THREE = changed(
    SHORT,
    {
        "objectives": {name: [f"helpsteer-{name}"] for name in ("helpfulness", "verbosity", "coherence")},
        "preference.distribution": "simplex",
    },
)


def plan(recipe: Recipe, compared: bool = False) -> dict[str, Step]:
    """The steps by name."""
    planned = {step.name: step for step in steps(recipe, compared)}
    assert len(planned) == len(steps(recipe, compared))
    return planned


def of_stage(recipe: Recipe, *stages: str) -> list[Step]:
    return [step for step in steps(recipe) if step.stage.name in stages]


def knob(step: Step, name: str) -> object:
    return knobs_of(SHORT, step)[name]


def named(name: str) -> Recipe:
    return load(RECIPES / f"{name}.toml")


# The loop


def test_the_papers_loop_in_order() -> None:
    """Section 3.1: reward model, SFT, then sample, score, select and fine-tune, four times."""
    loop = [f"{stage}-{t}" for t in (1, 2, 3, 4) for stage in ("sample", "score", "select", "policy")]
    evaluated = ["steerlm-d2", *(f"policy-{t}" for t in (1, 2, 3, 4)), "steerlm", "sft"]
    assert list(plan(PAPER)) == [
        *("data", "reward", "annotate", "sft", "steerlm-d2", *loop, "steerlm"),
        *(f"evaluate-{system}" for system in evaluated),
        "report",
    ]


@pytest.mark.parametrize("compared", [False, True])
@pytest.mark.parametrize("name", shipped())
def test_every_step_reads_only_what_an_earlier_one_wrote_and_what_its_stage_knows(name: str, compared: bool) -> None:
    recipe = changed(named(name), {"evaluation.dpo": "some/model", "evaluation.controls": True})
    recipe = recipe if recipe.has_judge else changed(recipe, {"data.judge": 0.2})
    done: set[str] = set()
    for step in plan(recipe, compared).values():
        assert {path for path in step.inputs.values() if isinstance(path, str)} <= done, step.name
        missing = set(step.stage.inputs) - set(step.inputs)
        assert missing <= ({"policy"} if step.name == "evaluate-dpo" else set()), step.name
        known = {*step.stage.inputs, *step.stage.optional}
        for key in set(step.inputs) - known:
            assert key.startswith(tuple(f"{kind}-" for kind in step.stage.repeated)), step.name
        done.add(step.name)
    assert step.name == "report"


@pytest.mark.parametrize("compared", [False, True])
@pytest.mark.parametrize("name", shipped())
def test_every_step_can_be_taken_alone_by_its_verb(name: str, compared: bool) -> None:
    asked = [
        (step.name, getattr(step, what), allowed)
        for step in steps(named(name), compared)
        for what, allowed in step.stage.asks.items()
    ]
    assert [(step, value) for step, value, allowed in asked if allowed and value not in allowed] == []


def test_the_halves_take_turns_and_sampling_uses_the_last_policy() -> None:
    samples, selects = of_stage(PAPER, "sample"), of_stage(PAPER, "select")
    assert [step.half for step in samples] == [step.half for step in selects] == ["D1", "D2", "D1", "D2"]
    assert [step.inputs["policy"] for step in samples] == ["steerlm-d2", "policy-1", "policy-2", "policy-3"]
    assert [step.condition for step in samples] == ["targets", "directions", "directions", "directions"]
    assert [step.t for step in samples] == [1, 2, 3, 4]
    assert (plan(PAPER)["steerlm-d2"].half, plan(PAPER)["steerlm"].half) == ("D2", "both")
    one_half = changed(PAPER, {"alternate": False})
    assert {step.half for step in of_stage(one_half, "sample", "select")} == {"D1"}


def test_each_policy_starts_from_sft_or_goes_on_from_the_last() -> None:
    chosen = [{"start": "sft", "chosen": f"select-{t}"} for t in (1, 2, 3, 4)]
    assert [step.inputs for step in of_stage(PAPER, "finetune")] == chosen
    going_on = of_stage(changed(PAPER, {"restart": False}), "finetune")
    assert [step.inputs["start"] for step in going_on] == ["sft", "policy-1", "policy-2", "policy-3"]


def test_the_judge_never_selects() -> None:
    """It stands beside the reward model where systems are evaluated, and nowhere else."""
    assert "judge" not in plan(PAPER)
    judged = plan(changed(PAPER, {"data.judge": 0.2}))
    assert "judge" in judged
    readers = {step.stage.name for step in judged.values() if "judge" in step.inputs.values()}
    assert readers == {"evaluate", "report"}


def test_every_evaluated_system_is_in_the_report() -> None:
    """Asked for v = none, directions, or the baseline's targets, each as it was trained."""
    recipe = changed(load(MICRO), {"evaluation.dpo": "some/model", "evaluation.controls": True})
    evaluated = of_stage(recipe, "evaluate")
    assert {step.name: step.condition for step in evaluated} == {
        "evaluate-steerlm-d2": "targets",
        "evaluate-policy-1": "directions",
        "evaluate-policy-2": "directions",
        "evaluate-steerlm": "targets",
        "evaluate-sft": "plain",
        "evaluate-dpo": "plain",
        "evaluate-sft-asked": "directions",
        "evaluate-base-asked": "directions",
    }
    (report,) = of_stage(recipe, "report")
    assert {step.name for step in evaluated} <= set(report.inputs.values())
    assert report.systems["evaluate-policy-2"].name == "DPA t=2"


def test_the_papers_own_recipe_takes_a_base_and_evaluates_all_of_its_baselines() -> None:
    planned = set(plan(named("paper")))
    assert {"evaluate-sft", "evaluate-dpo", "evaluate-steerlm"} <= planned
    assert not {"world", "base"} & planned


@pytest.mark.parametrize("name", ["world", "demo", "micro"])
def test_in_the_world_base_and_sft_are_asked_for_directions(name: str) -> None:
    """The negative control: a dial that nobody taught."""
    asked = {step.name for step in steps(named(name)) if step.condition == "directions"}
    assert {"evaluate-base-asked", "evaluate-sft-asked"} <= asked


def test_an_unknown_last_step_is_refused_with_the_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'policy-9'.* data, reward, .*policy-4"):
        execute(PAPER, tmp_path, until="policy-9")


def test_more_evaluation_directions_than_a_list_has_are_refused_before_anything_is_trained() -> None:
    recipe = changed(SHORT, {"preference.distribution": "grid", "preference.points": 4})
    with pytest.raises(ValueError, match=r'evaluation\.directions 10 .* "grid": .*of a list of 4; ask for all 4'):
        steps(recipe)
    steps(changed(recipe, {"evaluation.directions": 4}))


# A comparison


def test_every_system_of_table_1_is_compared() -> None:
    assert {rival.system.name.split(" at ")[0] for rival in rivals_of(SHORT)} == {
        *("DPO", "DPO, asked to be brief", "SFT, asked to be brief", "SteerLM, tuned"),
        *("RSF", "GRPO", "rewarded soups", "SFT, best of 16"),
    }


def test_a_comparison_contains_the_plain_run() -> None:
    """In the same order and under the same names, so that a finished run goes on to a comparison."""
    plain, compared = steps(SHORT), plan(SHORT, compared=True)
    order = list(compared)
    assert [order.index(step.name) for step in plain] == sorted(order.index(step.name) for step in plain)
    assert all(compared[step.name] == step for step in plain if step.stage.name != "report")


def test_settings_are_chosen_on_the_tuning_prompts_and_shown_on_the_validation_prompts() -> None:
    planned = plan(SHORT, compared=True)
    tuned = [step for name, step in planned.items() if name.startswith("tune-")]
    assert [step.name.removeprefix("tune-") for step in tuned] == [
        *("dpo-1", "dpo-2", "dpo-3", "dpo-1-brief", "dpo-2-brief", "dpo-3-brief"),
        *("steerlm-1", "steerlm-2", "steerlm-3", "soup-1", "soup-2"),
    ]
    for step in tuned:
        assert knob(step, "evaluation.split") == "tuning"
        shown = planned.get(step.name.replace("tune-", "evaluate-"))
        if shown is not None:  # SteerLM's paper setting is evaluated anyway, under its own name
            assert knob(shown, "evaluation.split") == "validation"
            assert shown.inputs == step.inputs
    assert [knob(planned[f"dpo-{i}"], "dpo.beta") for i in (1, 2, 3)] == [0.05, 0.1, 0.5]


def test_a_judge_scores_the_answers_that_are_shown_and_no_tuning_answers() -> None:
    planned = plan(changed(SHORT, {"data.judge": 0.1}), compared=True)
    evaluated = {name: step.inputs for name, step in planned.items() if name.startswith(("evaluate-", "tune-"))}
    assert {name for name, inputs in evaluated.items() if "judge" not in inputs} == {
        name for name in evaluated if name.startswith("tune-")
    }


def test_a_specialist_takes_turns_starts_from_sft_and_knows_one_direction() -> None:
    planned = plan(SHORT, compared=True)
    assert planned["rsf-3-sample-2"].half == "D2"
    assert planned["rsf-3-sample-2"].inputs["policy"] == "rsf-3-policy-1"
    assert planned["rsf-3-policy-2"].inputs == {"start": "sft", "chosen": "rsf-3-select-2"}
    assert planned["rsf-3-policy-2"].stage.name == "specialist"
    listed = knob(planned["rsf-3-select-2"], "preference.listed")
    assert np.allclose(listed, [[np.sqrt(0.5), -np.sqrt(0.5)]])  # -45 degrees
    assert knob(planned["rsf-3-select-2"], "preference.directions") == 1
    assert planned["rsf-3-select-2"].knobs["preference.margin"] == 0


def test_what_two_systems_need_is_made_once() -> None:
    """SFT's answers serve all specialists, which are the soups' experts too: only that for fewer words is new."""
    planned = plan(SHORT, compared=True)
    plain = [step for step in planned.values() if (step.stage.name, step.condition, step.t) == ("sample", "plain", 1)]
    assert [step.name for step in plain] == ["rsf-1-sample-1"]
    assert planned["evaluate-soup-1"].inputs["expert-1"] == "rsf-1-policy-2"
    assert planned["evaluate-soup-1"].inputs["expert-2"] == "soup-1-expert-2-policy-2"
    assert planned["evaluate-soup-2"].inputs["expert-2"] == "rsf-3-policy-2"
    assert knob(planned["evaluate-soup-1"], "soups.experts") == [[1.0, 0.0], [0.0, -1.0]]
    assert planned["report"].inputs["evaluate-steerlm-1"] == "evaluate-steerlm"


@pytest.mark.parametrize(
    ("ablation", "shared", "own"),
    [
        ("no replay", "score-1", "no-replay-select-1"),
        ("no restart", "policy-1", "no-restart-policy-2"),
        ("one half", "annotate", "one-half-steerlm-d2"),
        ("no LM loss", "sft", "no-lm-loss-reward"),
    ],
)
def test_an_ablation_goes_its_own_way_from_the_step_that_it_changes(ablation: str, shared: str, own: str) -> None:
    planned = plan(changed(SHORT, {"compare.systems": [], "compare.ablations": [ablation]}), compared=True)
    name = ablation.lower().replace(" ", "-")
    assert own in planned
    assert f"{name}-{shared}" not in planned
    evaluated = planned[f"evaluate-{name}-policy"]
    assert evaluated.inputs["policy"] == f"{name}-policy-2"
    assert evaluated.inputs["reward"] == "reward"  # all are scored by the same model
    if ablation == "no restart":
        assert planned[own].inputs == {"start": "policy-1", "chosen": "select-2"}


def test_a_step_runs_under_its_own_knobs_and_the_ledger_knows_them() -> None:
    step = Step("dpo-1", dpo, knobs={"dpo.beta": 0.5})
    assert recipe_of(SHORT, step).dpo.beta == knobs_of(SHORT, step)["dpo.beta"] == 0.5
    assert recipe_of(SHORT, Step("dpo-2", dpo)) is SHORT


def test_directions_are_spelled_as_the_paper_writes_them() -> None:
    assert spelled(SHORT, (1.0, 0.0)) == "helpfulness*1.00 - verbosity*0.00"
    assert spelled(SHORT, (0.8, -0.6)) == "helpfulness*0.80 - verbosity*0.60"
    assert spelled(SHORT, (0.0, -1.0)) == "helpfulness*0.00 - verbosity*1.00"
    assert spelled(THREE, (0.0, 1.0, 0.0)) == "helpfulness*0.00 + verbosity*1.00 + coherence*0.00"


def test_a_setting_at_the_end_of_its_grid_is_known_unless_nothing_lies_beyond() -> None:
    """No quantile is above 1, so only SteerLM's lowest is an end that could have gone on."""
    recipe = changed(SHORT, {"dpo.betas": [0.1, 0.05, 0.5], "steerlm.quantiles": [1.0, 0.9, 0.75]})
    edges = {rival.name: rival.system.at_edge for rival in rivals_of(recipe)}
    assert [edges[f"dpo-{i}"] for i in (1, 2, 3)] == [False, True, True]
    assert [edges[f"steerlm-{i}"] for i in (1, 2, 3)] == [False, False, True]
    assert not any(edges[name] for name in ("sft-brief", "rsf-1", "soup-1", "sft-best-of-n"))


def test_three_objectives_are_compared_without_the_ends_of_a_dial() -> None:
    planned = plan(THREE, compared=True)
    assert knob(planned["evaluate-soup-1"], "soups.experts") == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert not {"evaluate-soup-2", "tune-soup-1"} & set(planned)  # one choice of experts is no choice
    table = steps_table(THREE, Path("runs/three"), compared=True)
    assert re.search(r'^soups\.choices: "ends" is left out: direction \(', table, re.MULTILINE)
    assert "soups.choices" not in steps_table(SHORT, Path("runs/paper"), compared=True)


@pytest.mark.parametrize("distribution", ["arc", "sphere"])
def test_directions_of_two_minds_have_an_expert_for_each(distribution: str) -> None:
    wide = changed(SHORT, {"preference.distribution": distribution, "preference.high": 15.0})
    planned = plan(wide, compared=True)
    experts = knob(planned["evaluate-soup-1"], "soups.experts")
    assert experts[-2:] == [[0.0, 1.0], [0.0, -1.0]]  # type: ignore[index]
    assert ("evaluate-soup-2" in planned) == (distribution == "arc")


@pytest.mark.parametrize("distribution", ["grid", "fixed"])
def test_a_list_of_directions_is_compared_with_specialists_of_some_of_them(distribution: str) -> None:
    listed = [[1.0, -0.1 * i] for i in range(10)]
    recipe = changed(SHORT, {"preference.distribution": distribution, "preference.listed": listed})
    directions = [rival.system.name for rival in rivals_of(recipe) if rival.system.family == "RSF"]
    assert len(directions) == 3
    assert directions[0] == "RSF at helpfulness*1.00 - verbosity*0.00"
    assert directions[-1] == "RSF at helpfulness*0.71 - verbosity*0.71" or distribution == "fixed"


def test_asking_for_more_than_can_be_had_is_planned_for_the_last_policy_and_for_steerlm() -> None:
    planned = plan(load(MICRO), compared=True)
    assert planned["feasible-policy-2"].inputs["policy"] == "policy-2"
    assert planned["feasible-steerlm"].condition == "targets"
    assert {"feasible-policy-2", "feasible-steerlm"} <= set(planned["report"].inputs)
    assert not of_stage(load(MICRO), "feasibility")
    no_arc = changed(load(MICRO), {"preference.distribution": "simplex", "compare.systems": ["dpo"]})
    assert not [name for name in plan(no_arc, compared=True) if name.startswith("feasible")]


@pytest.mark.parametrize(
    ("knobs", "parts", "cures"),
    [
        (
            {"data.tuning": 0.0},
            ["settings of DPO; ", "data.tuning is 0", "0.02", "data.tuning_prompts"],
            [{"data.tuning_prompts": "mine.jsonl"}, {"compare.systems": ["dpo"], "dpo.betas": [0.1]}],
        ),
        (
            {"data.world": True, "data.tuning": 0.0, "world.tuning_prompts": 0},
            ["world.tuning_prompts is 0", "150"],
            [{"world.tuning_prompts": 150}],
        ),
        (
            {"objectives": dict(THREE.objectives), "preference.distribution": "simplex", "soups.choices": ["ends"]},
            ["soups.choices", '"ends"', "direction ("],
            [{"compare.systems": ["dpo"]}],
        ),
    ],
)
def test_a_comparison_that_would_fail_later_is_refused_before_anything_is_trained(
    knobs: dict[str, object], parts: list[str], cures: list[dict[str, object]]
) -> None:
    recipe = changed(SHORT, knobs)
    with pytest.raises(ValueError, match=r".") as error:
        steps(recipe, compared=True)
    assert [part for part in parts if part not in str(error.value)] == [], str(error.value)
    steps(recipe)  # the loop alone needs none of it
    for cure in cures:
        steps(changed(recipe, cure), compared=True)
