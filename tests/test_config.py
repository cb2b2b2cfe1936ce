"""Recipe files: what is read, what is refused and how, and that what is written reads back equal."""

import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest

from dpalign.recipe import config


@dataclass(frozen=True)
class Sampling:
    n: int = 16
    """Answers a direction (section 3.1)."""
    temperature: float = 1.0
    """True sampling: no top-k."""
    engine: Literal["transformers", "vllm"] = "transformers"
    stop: tuple[str, ...] = ("</s>",)
    span: tuple[int, int] = (-45, 0)

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}; ask for one answer or more")


@dataclass(frozen=True)
class Objective:
    heads: tuple[int, ...]
    """The reward heads whose mean it is."""
    source: str | None = None


@dataclass(frozen=True)
class Adapter:
    rank: int = 8
    """Of the low-rank update."""


@dataclass(frozen=True)
class Recipe:
    base: Path
    """The checkpoint
    everything starts from."""
    seed: int = 0
    shuffle: bool = True
    sampling: Sampling = Sampling()
    """Rejection sampling (section 2.2)."""
    adapter: Adapter | None = None
    limit: int | None = 100
    judge: str | float = "reward"
    weights: dict[str, float] = field(default_factory=lambda: {"helpfulness": 0.8, "verbosity": -0.6})
    objectives: dict[str, Objective] = field(default_factory=dict)
    """What v weighs."""
    systems: tuple[Objective, ...] = ()


def read(text: str, tmp_path: Path, *overrides: str) -> Recipe:
    path = tmp_path / "world.toml"
    path.write_text(text, encoding="utf-8")
    return config.load(Recipe, path, overrides)


def refusal(text: str, tmp_path: Path, *overrides: str) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        read(text, tmp_path, *overrides)
    return str(caught.value).replace(f"{tmp_path}/", "")


FULL = Recipe(
    base=Path("models/sft model"),
    seed=3,
    shuffle=False,
    sampling=Sampling(n=8, temperature=1e-05, stop=('say "stop"\n', "ünïcode \x7f \\"), span=(-90, 90)),
    adapter=Adapter(rank=4),
    limit=None,
    judge=0.5,
    weights={"a key with spaces": 1.0, "plain": 2.5},
    objectives={"helpfulness": Objective((6, 7, 8, 9)), "short answers": Objective((4,), "none of it")},
    systems=(Objective((1,)), Objective((), "x")),
)


@pytest.mark.parametrize("recipe", [FULL, Recipe(Path("m")), replace(FULL, weights={}, objectives={}, systems=())])
@pytest.mark.parametrize("comments", [True, False])
def test_a_written_recipe_reads_back_equal(recipe: Recipe, comments: bool, tmp_path: Path) -> None:
    assert read(config.to_toml(recipe, comments), tmp_path) == recipe


def test_the_written_recipe_carries_the_help_of_each_key() -> None:
    assert config.to_toml(Recipe(Path("m"), objectives={"h": Objective((6,)), "v": Objective((4,))})) == (
        "# The checkpoint\n# everything starts from.\n"
        'base = "m"\nseed = 0\nshuffle = true\nadapter = "none"\nlimit = 100\njudge = "reward"\nsystems = []\n\n'
        "# Rejection sampling (section 2.2).\n[sampling]\n"
        "# Answers a direction (section 3.1).\nn = 16\n"
        "# True sampling: no top-k.\ntemperature = 1.0\n"
        'engine = "transformers"\nstop = ["</s>"]\nspan = [-45, 0]\n\n'
        "[weights]\nhelpfulness = 0.8\nverbosity = -0.6\n\n"
        "# What v weighs.\n[objectives]\n\n"
        '[objectives.h]\n# The reward heads whose mean it is.\nheads = [6]\nsource = "none"\n\n'
        '[objectives.v]\nheads = [4]\nsource = "none"\n'
    )


def test_the_help_is_found_by_dotted_name() -> None:
    docs = config.field_docs(Recipe)
    assert docs["base"] == "The checkpoint\neverything starts from."
    assert docs["sampling.n"] == "Answers a direction (section 3.1)."
    assert docs["adapter.rank"] == "Of the low-rank update."
    assert docs["objectives.*.heads"] == "The reward heads whose mean it is."
    assert docs["seed"] == ""
    assert "weights.*" not in docs


def test_what_the_file_leaves_out_keeps_its_default_and_an_int_serves_as_a_float(tmp_path: Path) -> None:
    recipe = read('base = "m"\n[sampling]\ntemperature = 1\nstop = ["a", "b"]\n', tmp_path)
    assert recipe == Recipe(Path("m"), sampling=Sampling(temperature=1.0, stop=("a", "b")))
    assert type(recipe.sampling.temperature) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[sampling]\ntemprature = 1.0",
            "world.toml: unknown key sampling.temprature; the nearest is sampling.temperature "
            "(known here: n, temperature, engine, stop, span)",
        ),
        (
            "rank = 8",
            "world.toml: unknown key rank; the nearest is adapter.rank "
            "(known here: base, seed, shuffle, sampling, adapter, limit, judge, weights, objectives, systems)",
        ),
        (
            "[objectives.h]\nhead = 6",
            "world.toml: unknown key objectives.h.head; the nearest is objectives.h.heads (known here: heads, source)",
        ),
        ('seed = "3"', 'world.toml: seed must be an int, got "3"'),
        ("seed = 3.0", "world.toml: seed must be an int, got 3.0"),
        ("seed = true", "world.toml: seed must be an int, got true"),
        ("shuffle = 1", "world.toml: shuffle must be true or false, got 1"),
        ("base = 1", "world.toml: base must be a path, got 1"),
        ('limit = "all"', 'world.toml: limit must be an int or "none", got "all"'),
        ("judge = true", "world.toml: judge must be a string or a finite number, got true"),
        ("sampling = 3", "world.toml: sampling must be a table, got 3"),
        ("[sampling]\ntemperature = nan", "world.toml: sampling.temperature must be a finite number, got nan"),
        (
            '[sampling]\nengine = "vlm"',
            'world.toml: sampling.engine must be one of "transformers", "vllm", got "vlm"',
        ),
        ('[sampling]\nstop = "x"', 'world.toml: sampling.stop must be a list, each a string, got "x"'),
        ('[sampling]\nstop = ["x", 1]', "world.toml: sampling.stop[1] must be a string, got 1"),
        ("[sampling]\nspan = [1]", "world.toml: sampling.span must be a list of 2 values, got [1]"),
        ("[weights]\nhelpfulness = true", "world.toml: weights.helpfulness must be a finite number, got true"),
        ("[objectives.h]", "world.toml: objectives.h.heads is missing; give it a list, each an int"),
        ("systems = [{heads = [1], sauce = 'x'}]", "world.toml: unknown key systems[0].sauce; the nearest is "
         "systems[0].source (known here: heads, source)"),
        ("[sampling]\nn = 0", "world.toml: [sampling] n must be at least 1, got 0; ask for one answer or more"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_by_file_key_value_and_remedy(text: str, message: str, tmp_path: Path) -> None:
    assert refusal(("" if "base" in text else 'base = "m"\n') + text, tmp_path) == message


def test_a_missing_key_a_missing_file_and_a_slip_of_syntax_are_named(tmp_path: Path) -> None:
    assert refusal("seed = 1", tmp_path) == "world.toml: base is missing; give it a path"
    assert refusal("seed = 1\nbase = m", tmp_path).startswith("world.toml: not valid TOML: Invalid value (at line 2")
    assert refusal("seed = 1\n[sampling", tmp_path).endswith("(at line 2, the end of the file)")
    with pytest.raises(ValueError, match=r"nowhere\.toml: no such recipe file"):
        config.load(Recipe, tmp_path / "nowhere.toml")


def test_overrides_are_read_as_their_fields_types(tmp_path: Path) -> None:
    words = ["--sampling.n", "8", "--sampling.engine=vllm", "--seed", "-4", "--shuffle", "false", "--limit=none"]
    words += ["--judge", "7b", "--sampling.stop", '["a=b"]', "--weights.helpfulness=2", "--adapter.rank=2"]
    words += ["--objectives.h", "{heads = [6]}", "--objectives.h.source", "12", "--sampling.n=9"]
    assert read('base = "m"\nadapter = "none"\n', tmp_path, *words) == Recipe(
        Path("m"),
        seed=-4,
        shuffle=False,
        sampling=Sampling(n=9, engine="vllm", stop=("a=b",)),
        adapter=Adapter(rank=2),
        limit=None,
        judge="7b",
        weights={"helpfulness": 2.0},
        objectives={"h": Objective((6,), "12")},
    )


def test_overrides_complete_a_file_that_lacks_a_required_key(tmp_path: Path) -> None:
    assert read("", tmp_path, "--base", "models/sft").base == Path("models/sft")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--smpling.n", "8"],
            "command line: unknown key smpling; the nearest is sampling "
            "(known here: base, seed, shuffle, sampling, adapter, limit, judge, weights, objectives, systems)",
        ),
        (
            ["--n=8"],
            "command line: unknown key n; the nearest is sampling.n "
            "(known here: base, seed, shuffle, sampling, adapter, limit, judge, weights, objectives, systems)",
        ),
        (
            ["--seed.x", "8"],
            "command line: unknown key seed.x; the nearest is seed (known here: none, seed is a value and no table)",
        ),
        (["--sampling.n", "eight"], 'command line: sampling.n must be an int, got "eight"'),
        (["--sampling.n", "1\nseed = 2"], 'command line: sampling.n must be an int, got "1\\nseed = 2"'),
        (["--shuffle", "no"], 'command line: shuffle must be true or false, got "no"'),
        (["--shuffle", "--seed", "1"],
         "command line: --shuffle needs a value (say --shuffle VALUE; true or false for a switch)"),
        (["seed=1"], "command line: expected --key value, got 'seed=1' (say --sampling.n 8)"),
        (["--sampling.n", "0"],
         "world.toml with --sampling.n 0: [sampling] n must be at least 1, got 0; ask for one answer or more"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_refused_like_a_wrong_file(words: list[str], message: str, tmp_path: Path) -> None:
    assert refusal('base = "m"', tmp_path, *words) == message


def test_changes_are_told_knob_by_knob() -> None:
    old = {"steerlm": {"epochs": 2, "lr": 1e-05}, "seed": 1, "gone": [1, 2], "same": (1, 2)}
    new = {"steerlm": {"epochs": 3, "lr": 1e-05}, "seed": 1.0, "added": "x", "same": [1, 2]}
    assert config.changes(old, new) == [
        "steerlm.epochs 2 -> 3",
        "seed 1 -> 1.0",
        "gone [1, 2] is gone",
        'added "x" is new',
    ]
    assert config.changes(old, old) == []


def test_a_stage_reads_its_knobs_flat() -> None:
    assert config.knobs(FULL, "sampling.n", "seed", "adapter", "base", "objectives") == {
        "sampling.n": 8,
        "seed": 3,
        "adapter.rank": 4,
        "base": "models/sft model",
        "objectives.helpfulness.heads": [6, 7, 8, 9],
        "objectives.helpfulness.source": None,
        "objectives.short answers.heads": [4],
        "objectives.short answers.source": "none of it",
    }
    with pytest.raises(ValueError, match=r"^Recipe: unknown key sampling\.m; the nearest is sampling\.n "):
        config.knobs(FULL, "sampling.m")


def test_reading_recipes_needs_no_torch() -> None:
    code = "import sys, dpalign.recipe.config, dpalign.run.folder; print(sorted({'torch', 'trl'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
