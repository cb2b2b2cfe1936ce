"""Recipe files: what is read, what is refused and how, and that what is written reads back equal."""

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import RECIPES
from dpalign.data.union import split_prompts
from dpalign.pipeline.runner import execute
from dpalign.pipeline.steps import steps
from dpalign.recipe import Recipe, changed, from_mapping, load
from dpalign.rows import HALVES
from dpalign.runs.environment import shipped
from dpalign.runs.tables import changes, field_docs
from dpalign.stages.annotate import ANNOTATED_SHARD
from dpalign.stages.evaluate import shard_size
from dpalign.stages.select import select
from dpalign.stages.shards import parts_of

DOCS = RECIPES.parent / "docs"

AWKWARD = from_mapping(
    Recipe,
    {
        "name": "awkward",
        "sft": {"checkpoint": 'say "this"\n', "learning_rate": 1e-05, "warmup_steps": 0.25},
        "finetune": {"checkpoint": "ünïcode \x7f \\"},
        "heads": ["a head", "b.c"],
        "objectives": {"a-name": ["a head"], "plain": ["b.c", "a head"]},
        "preference": {"distribution": "fixed", "listed": [[1, 0], [0.6, -0.8]]},
        "evaluation": {"brevity": "", "senses": [1, -1]},
    },
)


def of(name: str, *overrides: str) -> Recipe:
    """A shipped recipe."""
    return load(RECIPES / f"{name}.toml", overrides)


def read(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return load(path, overrides)


def refusal(folder: Path, text: str, *overrides: str) -> str:
    """The message of a recipe that is refused: one line, in our words."""
    with pytest.raises(ValueError, match=r".") as caught:
        read(folder, text, *overrides)
    message = str(caught.value).replace(f"{folder}/", "")
    assert "\n" not in message
    for internal in ("Value error", "pydantic", "Input should", "validation error"):
        assert internal not in message
    return message


# Written and read


@pytest.mark.parametrize("comments", [True, False])
@pytest.mark.parametrize("recipe", [AWKWARD, *map(of, shipped())], ids=lambda recipe: recipe.name)
def test_a_written_recipe_reads_back_equal(recipe: Recipe, comments: bool, tmp_path: Path) -> None:
    assert read(tmp_path, recipe.to_toml(comments)) == recipe
    assert from_mapping(Recipe, recipe.as_mapping()) == recipe


def test_a_written_recipe_carries_the_help_of_each_key() -> None:
    docs = field_docs(Recipe)
    lines = Recipe(name="x").to_toml().splitlines()
    assert lines[lines.index("n = 16") - 1] == f"# {docs['sampling.n']}"
    assert lines[lines.index("[reward.training]") + 1].startswith("# ")
    assert [name for name, help_ in docs.items() if not help_] == []


def test_what_the_file_leaves_out_keeps_its_default_and_an_int_serves_as_a_float(tmp_path: Path) -> None:
    """SFT's own default is one epoch, where a training's is two."""
    recipe = read(tmp_path, 'name = "x"\n[sft]\nbatch = 32\n[sampling]\ntemperature = 1\n')
    assert (recipe.sft.batch, recipe.sft.epochs, recipe.sft.context) == (32, 1.0, 2048)
    assert type(recipe.sampling.temperature) is float
    assert recipe == changed(Recipe(name="x"), {"sft.batch": 32})


def test_a_warm_up_is_a_number_of_updates_or_a_share_of_them() -> None:
    recipe = of("paper", "--finetune.warmup_steps", "30", "--sft.warmup_steps", "0.25")
    assert (recipe.finetune.warmup_steps, recipe.sft.warmup_steps, recipe.dpo.training.warmup_steps) == (30, 0.25, 0.1)
    assert isinstance(recipe.finetune.warmup_steps, int)  # not 30.0, which would redo what was trained with 30


def test_overrides_are_read_as_their_knobs_types(tmp_path: Path) -> None:
    words = ["--sampling.n", "8", "--launcher=inprocess", "--seed", "-4", "--alternate", "false", "--sampling.n=9"]
    words += ["--name", "7", "--compare.systems", '["dpo"]', "--evaluation.senses=[1, -1]", "--model.base="]
    words += [
        "--dpo.training",
        "{batch = 8}",
        "--objectives",
        '{a = ["a"], b = ["b"]}',
        "--heads",
        '["a", "b"]',
        "--preference.low=-20",
    ]
    recipe = read(tmp_path, 'name = "x"\nseed = 3\n', *words)
    assert (recipe.name, recipe.seed, recipe.alternate, recipe.launcher) == ("7", -4, False, "inprocess")
    assert (recipe.sampling.n, recipe.compare.systems, recipe.evaluation.senses) == (9, ("dpo",), (1, -1))
    assert (recipe.dpo.training.batch, recipe.model.base) == (8, "")
    assert recipe.objectives == {"a": ("a",), "b": ("b",)}


# A recipe that extends another


def chain(folder: Path, **files: str) -> Path:
    """Recipe files side by side; the last is the one to read."""
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    return folder / f"{name}.toml"


def test_a_recipe_is_laid_over_the_one_that_it_extends_knob_by_knob(tmp_path: Path) -> None:
    base = 'name = "base"\nseed = 3\n[sampling]\nn = 8\nrows = 32\n[compare]\nsystems = ["dpo", "rl"]\n'
    middle = 'extends = "base.toml"\nname = "middle"\n[sampling]\nn = 4\n'
    mine = 'extends = "middle.toml"\nname = "mine"\n[compare]\nsystems = ["brief"]\n[sft]\nbatch = 32\n'
    file = chain(tmp_path, base=base, middle=middle, mine=mine)
    wanted = {"seed": 3, "sampling.n": 2, "sampling.rows": 32, "compare.systems": ["brief"], "sft.batch": 32}
    assert load(file, ["--sampling.n", "2"]) == changed(Recipe(name="mine"), wanted)


def test_a_shipped_recipe_is_extended_by_name_from_any_folder_and_a_file_beside_goes_first(tmp_path: Path) -> None:
    mine = 'extends = "micro"\nname = "mine"\nseed = 9\n'
    assert load(chain(tmp_path, mine=mine)) == changed(of("micro"), {"name": "mine", "seed": 9})
    (tmp_path / "micro").write_text("iterations = 3")
    assert load(tmp_path / "mine.toml") == changed(Recipe(name="mine"), {"iterations": 3, "seed": 9})


def test_names_of_ones_own_replace_the_bases_and_the_name_is_never_inherited(tmp_path: Path) -> None:
    own = '[preference]\nlow = -45\n[objectives]\nhelp = ["helpsteer-helpfulness"]\nshort = ["helpsteer-verbosity"]\n'
    file = chain(tmp_path, mine=f'extends = "demo"\nname = "mine"\n{own}')
    assert list(load(file).objectives) == ["help", "short"]
    with pytest.raises(ValueError, match=r"nameless\.toml: name is missing"):
        load(chain(tmp_path, nameless='extends = "demo"'))


def test_what_a_run_keeps_of_a_recipe_is_whole(tmp_path: Path) -> None:
    recipe = load(chain(tmp_path, mine='extends = "micro"\nname = "mine"\n'))
    assert "extends" not in recipe.to_toml(comments=False)
    assert read(tmp_path, recipe.to_toml()) == recipe


@pytest.mark.parametrize(
    ("base", "mine", "words", "parts"),
    [
        ("seed = true", "", "", ["base.toml: seed", "an int"]),
        ("[sampling]\nm = 8", "[sampling]\nn = 4", "", ["base.toml: unknown key sampling.m"]),
        ("[sampling]\nn = 8", "[sampling]\nn = 0", "", ["mine.toml: sampling.n is 0", "at least 1"]),
        ("[sampling]\nn = 8", "", "--sampling.n=0", ["mine.toml with --sampling.n=0: sampling.n is 0"]),
        ("heads = [1]", "seed = 1", "", ["base.toml: heads[0] must be a string"]),
        ("seed = 2024-01-01", "", "", ["base.toml: seed has the date"]),
        ("a b", "", "", ["base.toml: not valid TOML"]),
        ('extends = "mine.toml"', "", "", ["mine.toml extends base.toml extends mine.toml: a circle"]),
        ('extends = "nowhere"', "", "", ['base.toml: extends is "nowhere"', "demo, micro"]),
        ('extends = "../nowhere.toml"', "", "", ['base.toml: extends is "../nowhere.toml"', "no file"]),
        ("extends = 3", "", "", ["base.toml: extends must be", "demo, micro", "got 3"]),
        ('extend = "demo"', "", "", ["base.toml: unknown key extend; the nearest is extends"]),
    ],
)
def test_an_error_names_the_file_that_has_the_key(
    base: str, mine: str, words: str, parts: list[str], tmp_path: Path
) -> None:
    (tmp_path / "base.toml").write_text(base)
    message = refusal(tmp_path, f'extends = "base.toml"\nname = "mine"\n{mine}', *words.split())
    assert [part for part in parts if part not in message] == []


# Refused: the file, the key, the value, and what may stand there


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('seed = "3"', ["seed", "an int", '"3"']),
        ("seed = 3.0", ["seed", "an int", "3.0"]),
        ("seed = true", ["seed", "an int", "true"]),
        ("seed = {a = 1}", ["seed", "an int", "{a = 1}"]),
        ("seed = 2024-01-01", ["seed", "date", "2024-01-01", "quotes"]),
        ("heads = [07:30:00]", ["heads", "time", "07:30:00", "quotes"]),
        ("alternate = 1", ["alternate", "true or false", "1"]),
        ("replay = nan", ["replay", "a finite number", "nan"]),
        ("sampling = 3", ["sampling", "a table", "3"]),
        ("objectives = ['a']", ["objectives", "a table"]),
        ('launcher = "proces"', ["launcher", '"inprocess", "process", "torchrun", "accelerate"', '"proces"']),
        ("[sft]\ncheckpoint = 1", ["sft.checkpoint", "a string", "1"]),
        ('[sft]\nwarmup_steps = "x"', ["sft.warmup_steps", "an int or a finite number", '"x"']),
        ('heads = "x"', ["heads", "a list", '"x"']),
        ('heads = ["x", 1]', ["heads[1]", "a string", "1"]),
        ('[preference]\nlisted = [[1.0, "x"]]', ["preference.listed[0][1]", "a finite number", '"x"']),
        ('[compare]\nablations = ["no repaly"]', ["compare.ablations[0]", '"no replay", "no restart"', '"no repaly"']),
        ('[objectives]\na = "x"', ["objectives.a", "a list", '"x"']),
        ("replay = 1.0", ["replay is 1.0", "at least 0 and below 1"]),
        ("replay = -0.5", ["replay is -0.5", "at least 0 and below 1"]),
        ("[sampling]\nn = 0", ["sampling.n is 0", "at least 1"]),
        ("[sampling]\nfirst_targets = 0", ["sampling.first_targets is 0", "at least 1"]),
        ("[preference]\nmargin = -5", ["preference.margin is -5", "at least 0"]),
        ("[evaluation]\ntemperature = -1", ["evaluation.temperature is -1", "at least 0"]),
        ("[evaluation]\nbest_of = 0", ["evaluation.best_of is 0", "at least 1"]),
        ("[finetune]\nlearning_rate = 0", ["finetune.learning_rate is 0", "above 0"]),
        ("[finetune]\nwarmup_steps = -1", ["finetune.warmup_steps is -1", "at least 0"]),
        ("[steerlm.training]\nsave_every = 0", ["steerlm.training.save_every is 0", "at least 1"]),
        ("[dpo]\nbetas = [0.1, 0.0]", ["dpo.betas[1] is 0.0", "above 0"]),
        ("[rl]\nbetas = [-0.04]", ["rl.betas[0] is -0.04", "at least 0"]),
        ("[steerlm]\nquantiles = [1.0, 1.5]", ["steerlm.quantiles[1] is 1.5", "above 0 and at most 1"]),
        ("[rsf]\ndirections = 0", ["rsf.directions is 0", "at least 1"]),
        ("[rl]\ndirections = -1", ["rl.directions is -1", "at least 1"]),
        ("[samplin]\nn = 8", ["key samplin;", "nearest is sampling "]),
        ("[sampling]\ntemprature = 1.0", ["key sampling.temprature;", "nearest is sampling.temperature"]),
        ("score_tokens = 8", ["key score_tokens;", "nearest is reward.score_tokens"]),
        ("[sft.training]\nepochs = 2", ["key sft.training;", "nearest is reward.training"]),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_file_key_value_and_remedy(text: str, parts: list[str], tmp_path: Path) -> None:
    message = refusal(tmp_path, f'name = "x"\n{text}')
    assert message.startswith("mine.toml: ")
    assert [part for part in parts if part not in message] == [], message


def test_a_missing_key_a_missing_file_and_a_slip_of_syntax_are_named(tmp_path: Path) -> None:
    assert refusal(tmp_path, "seed = 1").startswith("mine.toml: name is missing; give it a string")
    assert refusal(tmp_path, "seed = 1\nname = m").startswith("mine.toml: not valid TOML: Invalid value (at line 2")
    assert refusal(tmp_path, "seed = 1\n[sampling").endswith("(at line 2, the end of the file)")
    with pytest.raises(ValueError, match=r"nowhere\.toml: no such recipe file"):
        load(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--smpling.n|8", ["command line: ", "key smpling;", "nearest is sampling "]),
        ("--n=8", ["command line: ", "key n;", "nearest is sampling.n "]),
        ("--seed.x|8", ["command line: ", "key seed.x;", "seed is a value and no table"]),
        ("--objectives.a.heads|['x']", ["command line: ", "objectives.a is a value and no table"]),
        ("seed=1", ["command line: ", "'seed=1'", "--sampling.n 8"]),
        ("--alternate|--seed|1", ["command line: ", "--alternate needs a value", "true or false"]),
        ("--alternate|no", ["mine.toml with --alternate no: ", "true or false", '"no"']),
        ("--sampling.n|eight", ["mine.toml with --sampling.n eight: sampling.n must be an int", '"eight"']),
        ("--sampling.n|1\nseed = 2", ["sampling.n must be an int", r'"1\nseed = 2"']),
        ("--sampling|{n = 0}", ["sampling.n is 0", "at least 1"]),
        ("--seed|2024-01-01", ["seed has the date 2024-01-01"]),
        ("--dpo.betas|0.1", ["dpo.betas must be a list", "0.1"]),
    ],
)
def test_a_wrong_override_is_refused_like_a_wrong_file(words: str, parts: list[str], tmp_path: Path) -> None:
    message = refusal(tmp_path, 'name = "x"', *words.split("|"))
    assert [part for part in parts if part not in message] == [], message


THREE = '{a = ["helpsteer-helpfulness"], b = ["helpsteer-coherence"], c = ["helpsteer-verbosity"]}'


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--sampling.first|8", ["[sampling] first is 8", "first_targets 16"]),
        ("--finetune.micro_batch|3", ["[finetune] batch is 64", "micro_batch 3", "multiple"]),
        ("--sft.epochs|0", ["[sft] 0 steps and 0 epochs"]),
        ("--reward.training.checkpoint|x", ["[reward] training.checkpoint is 'x'", "[rewards.NAME]"]),
        ("--preference.low|5", ["[preference]", "5.0 to 0.0 degrees"]),
        ("--preference.margin|5|--preference.distribution|sphere", ["[preference] margin 5", "sphere"]),
        ("--evaluation.reference|[1.0]", ["evaluation.reference has 1 numbers", "[objectives] names 2"]),
        ("--evaluation.senses|[1, 2]", ["evaluation.senses is [1, 2]", "[objectives] names 2"]),
        ('--objectives|{tone = ["helpsteer-verbosity"]}', ["[objectives] names 1 (tone)", "at least two"]),
        (
            '--objectives|{tone = ["helpsteer-coherense"], b = ["helpsteer-verbosity"]}',
            ["'tone'", "'helpsteer-coherense'", "'helpsteer-coherence'"],
        ),
        (f"--objectives|{THREE}", ["'arc' over 2 objectives", "[objectives] names 3 (a, b, c)", "simplex or sphere"]),
        (
            f"--objectives|{THREE}|--preference.distribution|cone|--preference.center|[1.0,-1.0]",
            ["'cone' over 2 objectives", "[objectives] names 3 (a, b, c)"],
        ),
        ("--jobs|2|--processes|2", ["jobs is 2", "processes 2"]),
        ("--engines.tensor_parallel|2", ["[engines] tensor_parallel 2", '"vllm"']),
        (
            "--cluster.address|auto|--cluster.gpus|1|--engines.sampling|vllm|--engines.tensor_parallel|2",
            ["cluster.gpus is 1", "engines.tensor_parallel", "2 GPUs"],
        ),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(words: str, parts: list[str], tmp_path: Path) -> None:
    message = refusal(tmp_path, 'name = "x"', *words.split("|"))
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize(
    ("knobs", "key", "value"),
    [
        ({"sampling.m": 8}, "sampling.m", "sampling.n"),
        ({"sampling.n": "many"}, "sampling.n", '"many"'),
        ({"preference.distribution": "fixed", "preference.listed": []}, "preference", "no directions"),
    ],
)
def test_a_changed_knob_is_checked_as_a_file_would_be(knobs: dict[str, object], key: str, value: str) -> None:
    recipe = changed(Recipe(name="x"), {"sampling.n": 8, "seed": 3})
    assert (recipe.sampling.n, recipe.seed) == (8, 3)
    with pytest.raises(ValueError, match=f"{re.escape(key)}.*{re.escape(value)}"):
        changed(recipe, knobs)


# Compared, and read by a stage


def test_changes_are_told_knob_by_knob() -> None:
    old = {"steerlm": {"epochs": 2, "lr": 1e-05}, "seed": 1, "gone": [1, 2], "same": (1, 2)}
    new = {"steerlm": {"epochs": 3, "lr": 1e-05}, "seed": 1.0, "added": "x", "same": [1, 2]}
    assert changes(old, new) == ["steerlm.epochs 2 -> 3", "seed 1 -> 1.0", "gone [1, 2] is gone", 'added "x" is new']
    assert changes(old, old) == []
    assert changes({"switches": {}}, {"switches": {"think": True}}) == ["switches.think true is new"]


def test_a_stage_reads_its_knobs_flat() -> None:
    knobs = select.knobs(AWKWARD)
    assert knobs["objectives.a-name"] == ["a head"]
    assert knobs["preference.listed"] == [[1.0, 0.0], [0.6, -0.8]]
    assert knobs["seed"] == 42
    assert "sampling.n" not in knobs


# The shipped ones

COMMENTED = re.compile(r"(\w+) = ([^#]*)(?:#(.*))?")


def stated_in(path: Path) -> Iterator[tuple[str, str]]:
    """Each knob that a recipe file states, by its dotted name, with the comment on its line."""
    section = ""
    for row in path.read_text().splitlines():
        if header := re.match(r"\[([\w.]+)\]", row):
            section = header[1] + "."
        elif knob := COMMENTED.match(row):
            yield section + knob[1], (knob[3] or "").strip()


def leaves_of(recipe: Recipe) -> dict[str, object]:
    """Every knob but those of the small world."""
    skipped = ("name", "pretrain", "world")
    flat = {key for key in field_docs(Recipe) if key.split(".")[0] not in skipped and "*" not in key}
    values = recipe.as_mapping()
    found = {}
    for key in flat:
        value = values
        for part in key.split("."):
            value = value[part]
        if not isinstance(value, dict):
            found[key] = value
    return found


def test_each_shipped_recipe_has_its_own_name_and_users_are_told_of_them() -> None:
    assert {name: of(name).name for name in shipped()} == {name: name for name in shipped()}
    assert {"world", "demo", "paper", "one-gpu", "real"} <= set(shipped())


def test_the_papers_recipe_states_every_knob_and_where_it_comes_from() -> None:
    stated = dict(stated_in(RECIPES / "paper.toml"))
    assert sorted(set(leaves_of(of("paper"))) - set(stated)) == []
    sourced = re.compile(r"section [23]\.\d|Fig\. \d|paper silent\b.*: .")
    assert [name for name, comment in stated.items() if name != "name" and not sourced.search(comment)] == []


def test_the_papers_recipe_departs_from_the_defaults_only_where_it_says_so() -> None:
    values, defaults = leaves_of(of("paper")), leaves_of(Recipe(name="paper"))
    departing = {name for name in values if values[name] != defaults[name]}
    assert departing == {
        *("launcher", "processes", "launch.config", "cluster.address", "cluster.actors", "cluster.gpus"),
        *("data.heldout", "data.judge", "data.judge_takes", "data.tuning", "data.sft"),
        *("sft.checkpoint", "sft.prompt", "dpo.prompt", "steerlm.template"),
        *("engines.sampling", "engines.scoring", "evaluation.shards", "evaluation.dpo"),
    }
    text = re.sub(r"\s*\n\s*#\s*", " ", (RECIPES / "paper.toml").read_text())
    for name in departing:
        assert f"default {json.dumps(defaults[name])}" in text, name


RAW, TEST_PREFS, TRAIN_PREFS = 63_967, 2_000, 61_135
"""Prompts of raw UltraFeedback, and of the two splits of ultrafeedback_binarized, which are Zephyr's."""


def test_the_papers_halves_are_as_large_as_the_paper_s_and_the_page_shows_the_sum() -> None:
    """61,967 prompts that are not for validation, less 0.01 and 0.005 of them; the judge takes ratings alone."""
    data, rest = of("paper").data, RAW - TEST_PREFS
    heldout, tuning = round(rest * data.heldout), round(rest * data.tuning)
    judge = round(rest * data.judge) if data.judge_takes == "prompts" else 0
    both = rest - heldout - tuning - judge
    table = re.findall(r"^\| (.+?) \| (-?[\d,]+) \| (-?[\d,]*) ?\|$", (DOCS / "data.md").read_text(), re.MULTILINE)
    shown = {name: tuple(int(cell.replace(",", "") or 0) for cell in cells) for name, *cells in table}
    assert list(shown.values()) == [
        *((RAW, TRAIN_PREFS + TEST_PREFS), (-TEST_PREFS, -TEST_PREFS), (-heldout, 0), (-tuning, 0), (-judge, 0)),
        *((both, TRAIN_PREFS), ((both + 1) // 2, (TRAIN_PREFS + 1) // 2)),
    ]
    assert both == pytest.approx(TRAIN_PREFS, rel=0.005)
    ids = [f"{i:016x}" for i in range(rest)]
    split_of = split_prompts(ids, 42, {"heldout": data.heldout, "tuning": data.tuning})
    assert sum(split in HALVES for split in split_of.values()) == pytest.approx(both, abs=100)
    comment = dict(stated_in(RECIPES / "paper.toml"))
    assert (f"{heldout} prompts" in comment["data.heldout"], f"{tuning} prompts" in comment["data.tuning"]) == (
        True,
    ) * 2


def test_the_papers_recipe_says_what_share_of_an_iterations_answers_rl_draws() -> None:
    """30,519 prompts with 80 answers each are 2,441,520; 64 an update makes 38,149 updates, of which 500 are 1.3%."""
    recipe, rl = of("paper"), of("paper").rl.training
    prompts = round((RAW - TEST_PREFS) * (1 - recipe.data.heldout - recipe.data.tuning) / 2)
    iteration = prompts * recipe.preference.directions * recipe.sampling.n
    assert iteration == prompts * recipe.sampling.first
    text = (RECIPES / "paper.toml").read_text()
    (said,) = re.findall(r"^steps = 500 .*\n.*$", text, re.MULTILINE)
    for figure in (rl.steps * rl.batch, iteration, math.ceil(iteration / rl.batch)):
        assert f"{figure:,}" in said
    assert f"{100 * rl.steps * rl.batch / iteration:.1f}%" in said


def test_no_stage_of_the_papers_recipe_that_draws_or_scores_has_fewer_shards_than_gpus() -> None:
    recipe = of("paper")
    gpus = recipe.cluster.actors
    assert (recipe.cluster.address, gpus, recipe.processes) == ("local", 8, 8)
    tuning = round((RAW - TEST_PREFS) * recipe.data.tuning)
    for prompts in (recipe.data.validation_prompts, tuning, recipe.feasibility.prompts):
        assert len(parts_of([{}] * prompts, shard_size(recipe, prompts))) == gpus
    assert shard_size(recipe, 2000) * gpus == 2000
    half = (RAW - TEST_PREFS) // 2
    assert half / recipe.sampling.shard > 10 * gpus
    assert 4 * 2 * half / ANNOTATED_SHARD > 7 * gpus


def test_an_answer_and_its_prompt_fit_every_context_of_the_real_recipe() -> None:
    recipe = of("real")
    system_line = 150  # tokens of the longest published form, in a small vocabulary
    needed = recipe.sampling.prompt_tokens + system_line + recipe.sampling.max_new_tokens
    for context in (recipe.pretrain.context, recipe.steerlm.training.context, recipe.finetune.context):
        assert needed <= context


@pytest.mark.parametrize("name", shipped())
def test_every_training_of_a_shipped_recipe_splits_its_batch_evenly(name: str) -> None:
    recipe = of(name)
    processes = recipe.processes if recipe.launcher in ("torchrun", "accelerate") else 1
    for step in steps(recipe, compared=True):
        if step.stage.trains is not None and step.stage.name != "base":
            training = step.stage.trains(recipe)
            assert training.batch % (training.micro_batch * processes) == 0
    assert recipe.pretrain.batch % recipe.pretrain.micro_batch == 0
    assert recipe.rl.training.batch % recipe.rl.samples == 0


def test_real_rows_without_their_folder_are_an_error_that_names_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DPA_REAL_DATA", raising=False)
    with pytest.raises(ValueError, match=r"data\.helpsteer is '\$DPA_REAL_DATA/.*no such variable"):
        execute(of("real"), tmp_path / "real", until="data")


@pytest.mark.slow
@pytest.mark.skipif("DPA_REAL_DATA" not in os.environ, reason="DPA_REAL_DATA names no folder of real rows")
def test_every_stage_runs_on_real_rows_to_a_report(tmp_path: Path) -> None:
    quick = {
        **{"pretrain.steps": 60, "reward.training.steps": 10, "sft.steps": 60, "steerlm.training.steps": 4},
        **{"finetune.steps": 4, "sampling.prompts": 6, "sampling.max_new_tokens": 64, "steerlm.targets": 2},
        **{"data.validation_prompts": 12, "evaluation.directions": 3, "evaluation.bootstrap": 200},
    }
    recipe = changed(of("real"), quick)
    run = execute(recipe, tmp_path / "real")
    assert all((run / step.name / "ledger.json").is_file() for step in steps(recipe))
    assert (run / "report" / "index.html").is_file()
    figures = json.loads((run / "reward" / "quality.json").read_text())
    for name in ("helpfulness", "verbosity"):
        assert figures["objectives"][name]["pearson"]["value"] is not None
        assert figures["baseline"][name]["n"] == figures["objectives"][name]["n"] > 0
    assert figures["baseline"]["verbosity"]["pearson"]["value"] > 0.4  # length alone tells most of it
