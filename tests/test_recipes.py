"""Every shipped recipe: it parses, its steps are those of its kind, and paper.toml accounts for every value."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpalign.pipeline import align
from dpalign.recipe import Recipe, config, load

RECIPES = Path(__file__).parent.parent / "recipes"
SHIPPED = sorted(path.stem for path in RECIPES.glob("*.toml"))
NOT_OF_THE_PAPER = ("name", "pretrain", "world")
SECTION = re.compile(r"\[([\w.]+)\]")
KNOB = re.compile(r"(\w+) = ([^#]*)(?:#(.*))?")


def shipped(name: str, *overrides: str) -> Recipe:
    return load(RECIPES / f"{name}.toml", overrides)


def commented_knobs(path: Path) -> Iterator[tuple[str, str]]:
    """Each knob that a recipe file states, by its dotted name, with the comment on its line."""
    section = ""
    for line in path.read_text().splitlines():
        if header := SECTION.match(line):
            section = header[1] + "."
        elif knob := KNOB.match(line):
            yield section + knob[1], (knob[3] or "").strip()


def names_of_knobs(recipe: Recipe) -> list[str]:
    named = config.knobs(recipe, *config.as_mapping(recipe))
    return [name for name in named if name.split(".")[0] not in NOT_OF_THE_PAPER]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_parses_and_has_its_own_name(name: str) -> None:
    assert shipped(name).name == name


@pytest.mark.parametrize("name", SHIPPED)
def test_every_step_of_a_shipped_recipe_reads_what_an_earlier_one_wrote(name: str) -> None:
    before: set[str] = set()
    for step in align.steps(shipped(name)):
        assert {value for value in step.inputs.values() if isinstance(value, str)} <= before
        assert set(step.stage.inputs) <= set(step.inputs) | ({"policy"} if step.name == "evaluate-dpo" else set())
        assert step.name not in before
        before.add(step.name)
    assert step.name == "report"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_comparison_of_every_shipped_recipe_can_be_planned(name: str) -> None:
    steps = {step.name: step for step in align.steps(shipped(name), compared=True)}
    assert {"tune-dpo-1", "evaluate-soup-1", "evaluate-sft-best-of-n"} <= set(steps)


def test_the_recipes_that_users_are_told_of_are_shipped() -> None:
    assert {"world", "paper", "one-gpu", "real"} <= set(SHIPPED)


def test_the_papers_recipe_states_every_knob_and_where_it_comes_from() -> None:
    stated = dict(commented_knobs(RECIPES / "paper.toml"))
    assert [name for name in names_of_knobs(shipped("paper")) if name not in stated] == []
    unsourced = [
        name
        for name, comment in stated.items()
        if name != "name" and not re.search(r"section [23]\.\d|Fig\. \d|paper silent\b.*: .", comment)
    ]
    assert unsourced == []


def test_the_papers_recipe_departs_from_the_defaults_only_where_it_says_so() -> None:
    recipe, default = shipped("paper"), Recipe("paper")
    names = names_of_knobs(recipe)
    values, defaults = config.knobs(recipe, *names), config.knobs(default, *names)
    departing = {name for name in names if values[name] != defaults[name]}
    text = (RECIPES / "paper.toml").read_text()
    for name in departing:
        written = json.dumps(defaults[name])
        assert re.search(rf"^{name.split('.')[-1]} = [^\n]*\n?(\s*#[^\n]*\n)*", text, re.MULTILINE)
        assert f"default {written}" in re.sub(r"\s*\n\s*#\s*", " ", text), name
    assert departing == {
        *(
            "launcher",
            "processes",
            "launch.config",
            "data.judge",
            "data.tuning",
            "evaluation.dpo",
            "evaluation.reference",
            "compare.paper_curves",
        ),
    }


def test_the_papers_plan_has_four_iterations_on_alternating_halves_and_all_of_its_baselines() -> None:
    steps = {step.name: step for step in align.steps(shipped("paper"))}
    assert [steps[f"sample-{t}"].half for t in (1, 2, 3, 4)] == ["D1", "D2", "D1", "D2"]
    assert [steps[f"policy-{t}"].inputs["start"] for t in (1, 2, 3, 4)] == ["sft"] * 4
    assert {"evaluate-sft", "evaluate-dpo", "evaluate-steerlm"} <= set(steps)
    assert not {"world", "base"} & set(steps)


@pytest.mark.parametrize("name", ["world", "demo", "micro"])
def test_in_the_world_base_and_sft_are_asked_for_directions(name: str) -> None:
    """The negative control: a dial that nobody taught."""
    asked = {step.name for step in align.steps(shipped(name)) if step.condition == "directions"}
    assert {"evaluate-base-asked", "evaluate-sft-asked"} <= asked


def test_every_training_of_a_shipped_recipe_splits_its_batch_evenly() -> None:
    for name in SHIPPED:
        recipe = shipped(name)
        processes = recipe.processes if recipe.launcher in ("torchrun", "accelerate") else 1
        for training in (
            recipe.reward.training,
            recipe.sft,
            recipe.steerlm.training,
            recipe.finetune,
            recipe.dpo.training,
            recipe.rl.training,
        ):
            assert training.batch % (training.micro_batch * processes) == 0
        assert recipe.pretrain.batch % recipe.pretrain.micro_batch == 0
        assert recipe.rl.training.batch % recipe.rl.samples == 0


def test_an_answer_and_its_prompt_fit_every_context_of_the_real_recipe() -> None:
    recipe = shipped("real")
    system_line = 150  # tokens of the longest published form, in a small vocabulary
    needed = recipe.sampling.prompt_tokens + system_line + recipe.sampling.max_new_tokens
    for context in (recipe.pretrain.context, recipe.steerlm.training.context, recipe.finetune.context):
        assert needed <= context


def test_real_rows_without_their_folder_are_an_error_that_names_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DPA_REAL_DATA", raising=False)
    with pytest.raises(ValueError, match=r"data\.helpsteer is '\$DPA_REAL_DATA/.*no such variable"):
        align.execute(shipped("real"), tmp_path / "real", until="data")


QUICK = {
    "pretrain.steps": 60,
    "reward.training.steps": 10,
    "sft.steps": 60,
    "steerlm.training.steps": 4,
    "finetune.steps": 4,
    "sampling.prompts": 6,
    "sampling.max_new_tokens": 64,
    "data.validation_prompts": 12,
    "evaluation.directions": 3,
    "evaluation.bootstrap": 200,
    "steerlm.targets": 2,
}


@pytest.mark.slow
@pytest.mark.skipif("DPA_REAL_DATA" not in os.environ, reason="DPA_REAL_DATA names no folder of real rows")
def test_every_stage_runs_on_real_rows_to_a_report(tmp_path: Path) -> None:
    recipe = shipped("real", *(f"--{knob}={value}" for knob, value in QUICK.items()))
    run = align.execute(recipe, tmp_path / "real")
    assert all((run / step.name / "ledger.json").is_file() for step in align.steps(recipe))
    assert (run / "report" / "index.html").is_file()
    figures = json.loads((run / "reward" / "quality.json").read_text())
    for name in ("helpfulness", "verbosity"):
        assert figures["objectives"][name]["pearson"]["value"] is not None
        assert figures["baseline"][name]["n"] == figures["objectives"][name]["n"] > 0
    assert figures["baseline"]["verbosity"]["pearson"]["value"] > 0.4  # length alone tells most of it


def test_a_table_given_in_part_keeps_the_rest_of_its_fields_own_default() -> None:
    """SFT's own default is one epoch, where a training's is two."""
    recipe = config.from_mapping(Recipe, {"name": "x", "sft": {"batch": 32}})
    assert (recipe.sft.batch, recipe.sft.epochs, recipe.sft.context) == (32, 1.0, 2048)


def test_a_warm_up_is_a_number_of_updates_or_a_share_of_them() -> None:
    recipe = shipped("paper", "--finetune.warmup_steps", "30", "--sft.warmup_steps", "0.25")
    assert (recipe.finetune.warmup_steps, recipe.sft.warmup_steps, recipe.dpo.training.warmup_steps) == (30, 0.25, 0.1)
    assert isinstance(recipe.finetune.warmup_steps, int)  # not 30.0, which would redo what was trained with 30
