"""The plan of a comparison: which systems stand beside DPA, what they share, and what each step is told."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dpalign.cli import steps_table
from dpalign.pipeline import align
from dpalign.pipeline.compare import axes, contenders, spelled, tuned_systems
from dpalign.recipe import Compare, Data, Evaluation, Recipe, Steering, config
from dpalign.stages.stage import Step

PAPER = Recipe(name="paper", iterations=2, data=Data(tuning=0.02))
THREE = replace(
    PAPER,
    objectives={name: (f"helpsteer-{name}",) for name in ("helpfulness", "verbosity", "coherence")},
    preference=Steering(distribution="simplex"),
)


def plan(recipe: Recipe) -> dict[str, Step]:
    planned = align.steps(recipe, compared=True)
    names = Counter(step.name for step in planned)
    assert set(names.values()) == {1}
    return {step.name: step for step in planned}


def knob(step: Step, name: str) -> object:
    return align.knobs_of(PAPER, step)[name]


def test_every_system_of_table_1_is_compared() -> None:
    systems = {contender.system.split(" at ")[0] for contender in contenders(PAPER)}
    assert systems == {
        "DPO",
        "DPO, asked to be brief",
        "SFT, asked to be brief",
        "SteerLM, tuned",
        "RSF",
        "GRPO",
        "rewarded soups",
        "SFT, best of 16",
    }


def test_a_comparison_contains_the_plain_run() -> None:
    """In the same order and under the same names, so that a finished run goes on to a comparison."""
    plain = align.steps(PAPER)
    compared = plan(PAPER)
    order = list(compared)
    assert [order.index(step.name) for step in plain] == sorted(order.index(step.name) for step in plain)
    assert all(compared[step.name] == step for step in plain if step.kind != "report")


def test_every_step_reads_only_what_stands_before_it() -> None:
    done: set[str] = set()
    ablations = ("no replay", "no restart", "one half", "no LM loss")
    recipe = replace(PAPER, compare=Compare(ablations=ablations))  # type: ignore[arg-type]
    for step in plan(recipe).values():
        assert {str(value) for value in step.inputs.values()} <= done, step.name
        done.add(step.name)


def test_settings_are_chosen_on_the_tuning_prompts_and_shown_on_the_validation_prompts() -> None:
    steps = plan(PAPER)
    assert tuned_systems(contenders(PAPER)) == {"DPO", "DPO, asked to be brief", "SteerLM, tuned", "rewarded soups"}
    tuned = [step for name, step in steps.items() if name.startswith("tune-")]
    assert len(tuned) == 3 + 3 + 3 + 2
    for step in tuned:
        assert knob(step, "evaluation.split") == "tuning"
        shown = steps.get(step.name.replace("tune-", "evaluate-"))
        if shown is not None:  # SteerLM's paper setting is evaluated anyway, under its own name
            assert knob(shown, "evaluation.split") == "validation"
            assert shown.inputs == step.inputs
    assert [knob(steps[f"dpo-{i}"], "dpo.beta") for i in (1, 2, 3)] == [0.05, 0.1, 0.5]


def test_a_specialist_takes_turns_starts_from_sft_and_knows_one_direction() -> None:
    steps = plan(PAPER)
    assert [steps[f"rsf-3-sample-{t}"].half for t in (2,)] == ["D2"]
    assert steps["rsf-3-sample-2"].inputs["policy"] == "rsf-3-policy-1"
    assert steps["rsf-3-policy-2"].inputs == {"start": "sft", "chosen": "rsf-3-select-2"}
    assert steps["rsf-3-policy-2"].kind == "specialist"
    listed = knob(steps["rsf-3-select-2"], "preference.listed")
    assert np.allclose(listed, [[np.sqrt(0.5), -np.sqrt(0.5)]])  # -45 degrees
    assert knob(steps["rsf-3-select-2"], "preference.directions") == 1
    assert steps["rsf-3-select-2"].knobs["preference.margin"] == 0


def test_what_two_systems_need_is_made_once() -> None:
    """SFT's answers serve all specialists, which are the soups' experts too: only that for fewer words is new."""
    steps = plan(PAPER)
    firsts = [step for step in steps.values() if step.kind == "sample" and step.condition == "plain" and step.t == 1]
    assert [step.name for step in firsts] == ["rsf-1-sample-1"]
    assert steps["evaluate-soup-1"].inputs["expert-1"] == "rsf-1-policy-2"
    assert steps["evaluate-soup-1"].inputs["expert-2"] == "soup-1-expert-2-policy-2"
    assert steps["evaluate-soup-2"].inputs["expert-2"] == "rsf-3-policy-2"
    assert knob(steps["evaluate-soup-1"], "soups.experts") == [[1.0, 0.0], [0.0, -1.0]]
    assert steps["report"].inputs["evaluate-steerlm-1"] == "evaluate-steerlm"


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
    steps = plan(replace(PAPER, compare=Compare(systems=(), ablations=(ablation,))))  # type: ignore[arg-type]
    name = ablation.lower().replace(" ", "-")
    assert own in steps
    assert f"{name}-{shared}" not in steps
    evaluated = steps[f"evaluate-{name}-policy"]
    assert evaluated.inputs["policy"] == f"{name}-policy-2"
    assert evaluated.inputs["reward"] == "reward"  # all are judged by the same model


def test_without_restart_the_second_policy_goes_on_from_the_first() -> None:
    steps = plan(replace(PAPER, compare=Compare(systems=(), ablations=("no restart",))))
    assert steps["no-restart-policy-2"].inputs == {"start": "policy-1", "chosen": "select-2"}


def test_a_step_runs_under_its_own_knobs_and_the_ledger_knows_them() -> None:
    step = Step("dpo-1", "dpo", knobs={"dpo.beta": 0.5})
    assert align.recipe_of(PAPER, step).dpo.beta == 0.5
    assert align.knobs_of(PAPER, step)["dpo.beta"] == 0.5
    assert align.recipe_of(PAPER, Step("dpo-2", "dpo")) is PAPER


def test_a_changed_knob_is_checked_as_a_file_would_be() -> None:
    assert config.changed(PAPER, {"sampling.n": 8, "seed": 3}).sampling.n == 8
    with pytest.raises(ValueError, match=r"unknown key sampling\.m; the nearest is"):
        config.changed(PAPER, {"sampling.m": 8})
    with pytest.raises(ValueError, match=r"sampling\.n must be an int"):
        config.changed(PAPER, {"sampling.n": "many"})


def test_the_axes_point_where_the_population_does() -> None:
    """More help, fewer words; of three objectives that all are wanted, more of each."""
    assert axes([[1.0, 0.0], [0.8, -0.6]]) == ((1.0, 0.0), (0.0, -1.0))
    assert axes([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]) == ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    assert axes([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]]) == ((1, 0), (0, 1), (0, -1))  # of two minds about the second


def test_directions_are_spelled_as_the_paper_writes_them() -> None:
    assert spelled(PAPER, (1.0, 0.0)) == "helpfulness*1.00 - verbosity*0.00"
    assert spelled(PAPER, (0.8, -0.6)) == "helpfulness*0.80 - verbosity*0.60"
    assert spelled(PAPER, (0.0, -1.0)) == "helpfulness*0.00 - verbosity*1.00"
    assert spelled(THREE, (0.0, 1.0, 0.0)) == "helpfulness*0.00 + verbosity*1.00 + coherence*0.00"


def test_a_setting_at_the_end_of_its_grid_is_known_unless_nothing_lies_beyond() -> None:
    """No quantile is above 1, so only SteerLM's lowest is an end that could have gone on."""
    recipe = replace(PAPER, compare=Compare(dpo_betas=(0.1, 0.05, 0.5), steerlm_quantiles=(1.0, 0.9, 0.75)))
    edges = {contender.name: contender.edge for contender in contenders(recipe)}
    assert [edges[f"dpo-{i}"] for i in (1, 2, 3)] == [False, True, True]
    assert [edges[f"steerlm-{i}"] for i in (1, 2, 3)] == [False, False, True]
    assert not any(edges[name] for name in ("sft-brief", "rsf-1", "soup-1", "sft-best-of-n"))


def test_three_objectives_are_compared_without_the_ends_of_a_dial() -> None:
    steps = plan(THREE)
    assert knob(steps["evaluate-soup-1"], "soups.experts") == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert "evaluate-soup-2" not in steps
    assert "tune-soup-1" not in steps  # one choice of experts is no choice
    said = steps_table(THREE, Path("runs/three"), compared=True)
    assert re.search(
        r'^# compare\.soups: "ends" is left out: direction \(.*\) lies outside what the experts', said, re.M
    )
    assert "compare.soups" not in steps_table(PAPER, Path("runs/paper"), compared=True)


def test_experts_that_cannot_serve_every_direction_are_refused_before_anything_is_trained() -> None:
    given = replace(THREE, compare=Compare(soups=("axes", "ends")))
    with pytest.raises(
        ValueError, match=r'compare\.soups has "ends", which cannot serve every direction: direction \('
    ):
        align.steps(given, compared=True)
    align.steps(given)  # the loop alone needs no soups
    align.steps(replace(given, compare=replace(given.compare, systems=("dpo",))), compared=True)


@pytest.mark.parametrize("distribution", ["arc", "sphere"])
def test_directions_of_two_minds_have_an_expert_for_each(distribution: str) -> None:
    wide = Steering(distribution=distribution, high=15.0)  # type: ignore[arg-type]
    steps = plan(replace(PAPER, preference=wide))
    experts = knob(steps["evaluate-soup-1"], "soups.experts")
    assert experts[-2:] == [[0.0, 1.0], [0.0, -1.0]]  # type: ignore[index]
    assert ("evaluate-soup-2" in steps) == (distribution == "arc")


@pytest.mark.parametrize(
    "listed",
    [
        Steering(distribution="grid"),
        Steering(distribution="fixed", listed=tuple((1.0, -0.1 * i) for i in range(10))),
    ],
)
def test_a_list_of_directions_is_compared_with_specialists_of_some_of_them(listed: Steering) -> None:
    given = replace(PAPER, preference=listed)
    directions = [c.system for c in contenders(given) if c.system.startswith("RSF")]
    assert len(directions) == 3
    assert directions[0] == "RSF at helpfulness*1.00 - verbosity*0.00"
    assert directions[-1] == "RSF at helpfulness*0.71 - verbosity*0.71" or listed.distribution == "fixed"


def test_more_evaluation_directions_than_a_list_has_are_refused_before_anything_is_trained() -> None:
    given = replace(PAPER, preference=Steering(distribution="grid", points=4))
    with pytest.raises(ValueError, match=r'evaluation\.directions 10 .* "grid": .*of a list of 4; ask for all 4'):
        align.steps(given)
    align.steps(replace(given, evaluation=Evaluation(directions=4)))


def test_settings_without_tuning_prompts_are_refused_before_anything_is_trained() -> None:
    given = replace(PAPER, data=Data())
    with pytest.raises(ValueError, match=r"settings of DPO, .* on: data\.tuning is 0; give a share such as 0\.02, or"):
        align.steps(given, compared=True)
    align.steps(given)
    align.steps(replace(given, data=Data(tuning_prompts="mine.jsonl")), compared=True)
    align.steps(replace(given, compare=Compare(systems=("dpo",), dpo_betas=(0.1,))), compared=True)
    world = config.changed(PAPER, {"data.world": True, "data.tuning": 0.0, "world.tuning_prompts": 0})
    with pytest.raises(ValueError, match=r"world\.tuning_prompts is 0; give 150$"):
        align.steps(world, compared=True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dpo_betas", [0.1, 0.0], r"compare\.dpo_betas has 0; give numbers above 0"),
        ("rl_betas", [-0.04], r"compare\.rl_betas has -0\.04; give numbers of 0 or more"),
        ("steerlm_quantiles", [1.0, 1.5], r"compare\.steerlm_quantiles has 1\.5; give numbers above 0, 1 at most"),
        ("rsf_directions", 0, r"compare\.rsf_directions is 0; give at least 1"),
        ("rl_directions", -1, r"compare\.rl_directions is -1; give at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused_with_the_recipe(key: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.changed(PAPER, {f"compare.{key}": value})
