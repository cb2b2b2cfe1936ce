"""The command line: what it prints and refuses, that it is quick, and a stage alone on files."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dpalign import __version__, cli, recipe
from dpalign.recipe import config
from dpalign.run.ledger import read_ledger

FEW = [
    *("--world.helpsteer_prompts", "30", "--world.ultrafeedback_prompts", "40", "--world.sft_prompts=8"),
    *("--world.tuning_prompts", "4", "--world.test_prompts", "6", "--data.heldout", "0.2"),
]
HEAVY = {"torch", "transformers", "datasets", "trl", "peft", "matplotlib", "vllm", "ray"}


@pytest.fixture
def paper(tmp_path: Path) -> Path:
    """Nothing but defaults: the paper's experiment."""
    path = tmp_path / "plain.toml"
    path.write_text('name = "plain"\n')
    return path


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a bad command prints, without the word `dpa` before it."""
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err.removeprefix("dpa: ").removesuffix("\n")


def modules_after(*words: str) -> tuple[str, set[str]]:
    """What a command prints in a process of its own, and the modules that it imported."""
    code = (
        "import sys; from dpalign import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit as ended: assert not ended.code, ended.code\n"
        "sys.stderr.write(' '.join(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, text=True)
    return done.stdout, set(done.stderr.split())


@pytest.mark.parametrize("words", [("--help",), ("run", "--help"), ("sample", "--help")])
def test_help_imports_nothing_heavy(words: tuple[str, ...]) -> None:
    said, modules = modules_after(*words)
    assert said.startswith("usage: dpa")
    assert not HEAVY & modules


def test_help_comes_well_under_a_second() -> None:
    """Of the processor: what else the machine does is not ours."""
    took = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-m", "dpalign", "--help"], check=True, capture_output=True)
        after = os.times()
        took.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(took) < 1.0


def test_every_verb_has_its_line_of_help_and_a_help_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([])
    overview = capsys.readouterr().out
    for verb in cli.VERBS:
        assert re.search(rf"\n  {verb} +{re.escape(cli.VERBS[verb].help[:30])}", overview), verb
        with pytest.raises(SystemExit) as ended:
            cli.main([verb, "--help"])
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: dpa {verb} ")
    cli.main(["--version"])
    assert capsys.readouterr().out == f"dpalign {__version__}\n"


def test_the_help_of_a_stage_is_made_of_what_it_reads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        cli.main(["select", "--help"])
    said = capsys.readouterr().out
    assert said.startswith(
        "usage: dpa select [-h] --out DIR --candidates DIR --scores DIR --data DIR --annotate DIR --t N\n"
        "                  --half {D1,D2}\n"
    )
    assert "  --scores DIR      a finished score folder, of the same candidates\n" in said
    assert said.endswith("This stage reads: seed, replay, preference, selection, model.chat, objectives, heads.\n")


def test_a_report_takes_any_number_of_each_kind_of_folder(capsys: pytest.CaptureFixture[str], paper: Path) -> None:
    given = ["--data", "d", "--reward", "r", "--annotate", "a"]
    with pytest.raises(SystemExit):
        cli.main(["report", "--help"])
    said = capsys.readouterr().out
    assert all(f"--{kind} NAME=DIR" in said for kind in ("evaluate", "tune", "feasible"))
    assert refused(capsys, "report", str(paper), "--out", "x/report", *given, "--tune", "dpo-1") == (
        "--tune dpo-1: give NAME=DIR"
    )


def test_bad_commands_are_answered_in_one_line(capsys: pytest.CaptureFixture[str], paper: Path) -> None:
    file = str(paper)
    assert refused(capsys, "rnu") == "unknown verb 'rnu'; the nearest is run (see dpa --help)"
    assert refused(capsys, "run") == "the following arguments are required: RECIPE (see dpa run --help)"
    assert refused(capsys, "run", file, "--dryrun") == "unknown option --dryrun; the nearest is --dry-run"
    assert refused(capsys, "run", file, "--smapling.n", "3") == (
        "unknown option --smapling.n; the nearest is --sampling.n"
    )
    assert refused(capsys, "run", file, "--sampling.m", "3").startswith(
        "command line: unknown key sampling.m; the nearest is sampling.n (known here: n, first, "
    )
    assert refused(capsys, "run", file, "--sampling.n", "few") == ('command line: sampling.n must be an int, got "few"')
    assert refused(capsys, "run", file, "--seed") == (
        "command line: --seed needs a value (say --seed VALUE; true or false for a switch)"
    )
    assert refused(capsys, "run", "nowhere/a.toml") == "nowhere/a.toml: no such recipe file"
    assert refused(capsys, "run", "wrld").startswith("wrld: no such recipe file, and no installed recipe either (")
    assert refused(capsys, "run", file, "--dry-run", "--until", "sft2").startswith(
        "no step is called 'sft2'; this recipe has data, reward, annotate, sft, "
    )


def test_a_stage_alone_refuses_what_it_could_not_do(
    capsys: pytest.CaptureFixture[str], paper: Path, tmp_path: Path
) -> None:
    file = str(paper)
    assert "arguments are required: --out, --data (" in refused(capsys, "sft", file)
    assert refused(capsys, "sft", file, "--out", "a/My.Model", "--data", "d") == (
        "--out a/My.Model: a stage's folder is named in lower-case letters, digits, - and _"
    )
    (tmp_path / "photos").mkdir()
    assert refused(capsys, "world", file, "--out", str(tmp_path / "photos")) == (
        f"--out {tmp_path}/photos: stands already, and no stage wrote it; name another place"
    )
    assert refused(
        capsys, "sample", file, "--out", "a/sample", "--policy", "p", "--data", "d", "--t", "1", "--half", "D1",
        "--condition", "targets",
    ) == "--condition targets needs --annotate DIR: targets are drawn from the rewards of rated answers"  # fmt: skip
    gone = tmp_path / "gone"
    assert refused(capsys, "data", file, "--out", str(tmp_path / "w" / "data"), "--world", str(gone)) == (
        f"stage data, input world: {gone} is missing or empty"
    )


def test_the_dry_run_of_the_paper_prints_four_iterations_and_needs_no_torch(paper: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    said, modules = modules_after("run", str(paper), "--dry-run", "--out", str(out), "--sampling.n", "8")
    assert not HEAVY & modules
    assert not out.exists()
    resolved, _, table = said.partition(f"# 30 steps into {out}:\n")
    # Resolved: every knob with its help, and a recipe again with the table and all.
    assert "# Answers a direction.\nn = 8\n" in resolved
    again = tmp_path / "again.toml"
    again.write_text(said)
    assert recipe.load(again) == recipe.load(paper, ["--sampling.n", "8"])
    steps = [line.split()[1] for line in table.strip().splitlines()]
    loop = [f"{step}-{t}" for t in (1, 2, 3, 4) for step in ("sample", "score", "select", "policy")]
    evaluations = ["steerlm-d2", *(f"policy-{t}" for t in (1, 2, 3, 4)), "steerlm", "sft"]
    systems = [f"evaluate-{system}" for system in evaluations]
    assert steps == ["data", "reward", "annotate", "sft", "steerlm-d2", *loop, "steerlm", *systems, "report"]
    assert "#   sample-1             D1 targets     to do: new\n" in table
    assert "#   sample-2             D2 directions  to do: new\n" in table
    said, modules = modules_after("run", "paper", "--dry-run", "--out", str(out))
    assert not HEAVY & modules
    assert 'base = "mistralai/Mistral-7B-v0.1"' in said


@pytest.mark.slow
def test_the_demo_ends_with_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that `make demo` does, with few rows and few updates."""
    trainings = [f"--{name}.steps=4" for name in ("sft", "finetune", "steerlm.training", "reward.training")]
    few = ["--sampling.prompts=4", "--sampling.first=16", "--sampling.n=2", "--evaluation.bootstrap=1000"]
    cli.main(["demo", "--out", str(tmp_path / "demo"), *FEW, *trainings, *few])
    page = Path(capsys.readouterr().out.strip().splitlines()[-1])
    assert page == tmp_path / "demo" / "report" / "index.html"
    assert "DPA t=2" in page.read_text()


def test_an_installed_recipe_is_found_by_its_name_and_a_file_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.DEMO in cli.shipped()
    assert cli.recipe_file("world") == Path(cli.__file__).parent / "recipe" / "shipped" / "world.toml"
    monkeypatch.chdir(tmp_path)
    assert cli.recipe_file("mine.toml") == Path("mine.toml")
    Path("world").write_text("")
    assert cli.recipe_file("world") == Path("world")


@pytest.mark.parametrize("name", cli.shipped())
def test_every_installed_recipe_is_read_and_planned(name: str, tmp_path: Path) -> None:
    read = recipe.load(cli.recipe_file(name))
    assert cli.steps_table(read, tmp_path / "run").count("to do: new") >= 10
    assert config.from_mapping(recipe.Recipe, config.as_mapping(read)) == read


def test_knobs_may_stand_anywhere_among_a_verbs_own_words() -> None:
    words = ["--seed", "5", "r.toml", "--preference.low", "-30", "--dry-run", "--sampling.n=8", "--out", "a", "--data"]
    own, overrides = cli.split_overrides(words, ["--out", "--dry-run"])
    assert own == ["r.toml", "--dry-run", "--out", "a"]
    assert overrides == ["--seed", "5", "--preference.low", "-30", "--sampling.n=8", "--data"]


def test_a_stage_alone_reads_files_from_elsewhere_and_is_skipped_the_second_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world, data = tmp_path / "made" / "world", tmp_path / "read" / "rows"
    cli.main(["world", "world", "--out", str(world), *FEW])
    command = ["data", "world", "--out", str(data), "--world", str(world), *FEW]
    cli.main(command)
    assert capsys.readouterr().out == f"{world}\n{data}\n"
    assert sorted(path.name for path in (tmp_path / "read").iterdir() if path.name[0] != ".") == [
        *("environment.json", "log.txt", "rows"),
    ]
    # 4 rows for each of 30 HelpSteer prompts, and one for each of the others
    assert read_ledger(world)["counts"] == {"in": 0, "out": 120 + 40 + 8 + 4 + 6, "filtered": {}}
    assert read_ledger(data)["inputs"]["world"]["path"] == str(world)
    assert (data / "train" / "part-00000.parquet").is_file()
    cli.main(command)
    assert capsys.readouterr().err == "rows: done before, nothing changed\n"
    cli.main([*command, "--data.heldout", "0.3"])
    assert capsys.readouterr().err.startswith("rows: data.heldout 0.2 -> 0.3\n")


def test_a_run_up_to_a_step_can_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    command = ["run", "world", "--out", str(run), "--until", "data", *FEW]
    cli.main(command)
    assert capsys.readouterr().out == f"{run}\n"
    assert recipe.load(run / "recipe.toml") == recipe.load(cli.recipe_file("world"), FEW)
    assert json.loads((run / "environment.json").read_text())["packages"]["numpy"]
    cli.main([*command, "--dry-run"])
    assert capsys.readouterr().out.endswith(f"# 2 steps into {run}:\n#   world    done\n#   data     done\n")


def test_the_traceback_of_a_failed_stage_is_in_the_log_and_not_on_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "world", f"--out={run}", "--until=data", "--data.world=false", "--data.helpsteer=a.jsonl"])
    assert ended.value.code == 2
    screen = capsys.readouterr().err
    assert "dpa: a.jsonl: no such file" in screen
    assert "Traceback" not in screen
    assert "Traceback" in (run / "log.txt").read_text()


def test_an_interruption_ends_with_130_and_says_that_the_run_can_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, paper: Path
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.align, "execute", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", str(paper)])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "dpa: interrupted; the same command goes on from here\n"


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, paper: Path) -> None:
    monkeypatch.setattr(cli.align, "execute", lambda *_: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        cli.main(["run", str(paper)])


def test_a_reader_that_has_seen_enough_is_no_error(paper: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "dpalign", "run", paper, "--dry-run"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.communicate()[1] == b""
    assert process.returncode == 128 + signal.SIGPIPE
