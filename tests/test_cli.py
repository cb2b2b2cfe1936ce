"""The command line: what it prints and refuses, and a stage alone on files."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dpalign import __version__, cli
from dpalign.pipeline.shipped import recipe_file
from dpalign.pipeline.steps import STAGES
from dpalign.recipe import load
from dpalign.runs.ledger import read_ledger

FEW = [
    *("--world.helpsteer_prompts", "30", "--world.ultrafeedback_prompts", "40", "--world.sft_prompts=8"),
    *("--world.tuning_prompts", "4", "--world.test_prompts", "6", "--data.heldout", "0.2"),
]


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
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err.removeprefix("dpa: ").removesuffix("\n")


def test_every_verb_has_its_line_of_help_and_a_help_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([])
    overview = capsys.readouterr().out.splitlines()
    for verb in cli.VERBS:
        assert any(row.startswith(f"  {verb} ") for row in overview), verb
        with pytest.raises(SystemExit) as ended:
            cli.main([verb, "--help"])
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: dpa {verb} ")
    assert {verb for verb, known in cli.VERBS.items() if known.module == cli.ALONE} == set(STAGES)
    cli.main(["--version"])
    assert capsys.readouterr().out == f"dpalign {__version__}\n"


@pytest.mark.parametrize(
    ("verb", "options", "knobs"),
    [
        ("select", ["--candidates DIR", "--scores DIR", "--t N", "--half {D1,D2}"], ["selection", "replay"]),
        (
            "report",
            ["--evaluate NAME=DIR", "--tune NAME=DIR", "--feasible NAME=DIR", "--divergence NAME=DIR"],
            ["evaluation", "objectives"],
        ),
    ],
)
def test_the_help_of_a_stage_is_made_of_what_it_reads(
    capsys: pytest.CaptureFixture[str], verb: str, options: list[str], knobs: list[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert [option for option in options if option not in words] == []
    assert [knob for knob in knobs if knob not in words.partition("This stage reads:")[2]] == []


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("rnu", ["'rnu'", "nearest is run"]),
        ("run", ["RECIPE", "dpa run --help"]),
        ("run PAPER --dryrun", ["--dryrun", "nearest is --dry-run"]),
        ("run --dry-run PAPER --compare.systems ['dpx']", ["compare.systems has 'dpx'", "nearest: 'dpo'"]),
        ("run PAPER --dry-run --pretrain.batch 16", ["pretrain", "batch is 16"]),
        ("run PAPER --smapling.n 3", ["--smapling.n", "nearest is --sampling.n"]),
        ("run PAPER --sampling.m 3", ["sampling.m", "nearest is sampling.n", "first"]),
        ("run PAPER --sampling.n few", ["sampling.n", "an int", '"few"']),
        ("run PAPER --seed", ["--seed needs a value"]),
        ("run PAPER --seed --replay 0", ["--seed needs a value"]),
        ("run nowhere/a.toml", ["nowhere/a.toml", "no such recipe file"]),
        ("run wrld", ["wrld", "demo", "world"]),
        ("run PAPER --dry-run --until sft2", ["'sft2'", "data, reward, annotate, sft, "]),
        ("report PAPER --out x/report --data d --reward r --annotate a --tune dpo-1", ["--tune dpo-1", "NAME=DIR"]),
        ("sft PAPER", ["--out", "--data"]),
        ("sft PAPER --out a/My.Model --data d", ["--out a/My.Model", "lower-case letters"]),
        ("world PAPER --out PHOTOS", ["--out PHOTOS", "another place"]),
        (
            "sample PAPER --out a/sample --policy p --data d --t 1 --half D1 --condition targets",
            ["--condition targets", "--annotate DIR"],
        ),
        (
            "sample PAPER --out a/sample --policy p --data d --t 0 --half both --condition hints",
            ["--condition hints", "data.hints"],
        ),
        ("data PAPER --out PHOTOS/data --world gone", ["stage data, input world", "gone is missing"]),
        (
            "sample PAPER --policy p --data d --out o --t=1 --half=D1 --condition=directions --sampling.n=0",
            ["sampling.n is 0", "at least 1"],
        ),
    ],
)
def test_a_bad_command_is_answered_in_one_line(
    capsys: pytest.CaptureFixture[str], paper: Path, tmp_path: Path, words: str, parts: list[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()

    def placed(text: str) -> str:
        return text.replace("PAPER", str(paper)).replace("PHOTOS", str(photos))

    message = refused(capsys, *placed(words).split())
    assert [part for part in parts if placed(part) not in message] == [], message


def test_the_dry_run_shows_the_steps_and_what_differs_from_the_defaults(
    capsys: pytest.CaptureFixture[str], paper: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    cli.main(["run", str(paper), "--dry-run", "--out", str(out), "--sampling.n", "8"])
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    assert not out.exists()
    assert rows[0][:2] == ["30", "steps"]
    assert ["sample-1", "D1", "targets", "to", "do:", "new"] in rows
    assert ["sample-2", "D2", "directions", "to", "do:", "new"] in rows
    assert rows[-2][:4] == ["1", "knobs", "differ", "from"]
    assert rows[-1] == ["sampling.n", "=", "8", "(default", "16)"]


def test_a_printed_recipe_is_a_recipe_again(capsys: pytest.CaptureFixture[str], paper: Path, tmp_path: Path) -> None:
    cli.main(["run", str(paper), "--print-recipe", "--sampling.n", "8"])
    again = tmp_path / "again.toml"
    again.write_text(capsys.readouterr().out)
    assert load(again) == load(paper, ["--sampling.n", "8"])


@pytest.mark.slow
def test_the_demo_ends_with_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that `make demo` does, with few rows and few updates."""
    trainings = [f"--{name}.steps=4" for name in ("sft", "finetune", "steerlm.training", "reward.training")]
    few = ["--sampling.prompts=4", "--sampling.first=16", "--sampling.n=2", "--evaluation.bootstrap=1000"]
    cli.main(["run", "demo", "--out", str(tmp_path / "demo"), *FEW, *trainings, *few])
    page = Path(capsys.readouterr().out.strip().splitlines()[-1])
    assert page == tmp_path / "demo" / "report" / "index.html"
    assert "DPA t=2" in page.read_text()


def test_an_installed_recipe_is_found_by_its_name_and_a_file_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recipe_file("world") == Path(cli.__file__).parent / "recipe" / "shipped" / "world.toml"
    monkeypatch.chdir(tmp_path)
    assert recipe_file("mine.toml") == Path("mine.toml")
    Path("world").write_text("")
    assert recipe_file("world") == Path("world")


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
    assert {path.name for path in (tmp_path / "read").glob("[!.]*")} == {"environment.json", "log.txt", "rows"}
    # 4 rows for each of 30 HelpSteer prompts, and one for each of the others
    assert read_ledger(world)["counts"] == {"in": 0, "out": 120 + 40 + 8 + 4 + 6, "filtered": {}}
    assert read_ledger(data)["inputs"]["world"]["path"] == str(world)
    assert (data / "train" / "part-00000.parquet").is_file()
    made = (data / "ledger.json").stat().st_mtime_ns
    cli.main(command)
    assert (data / "ledger.json").stat().st_mtime_ns == made
    cli.main([*command, "--data.heldout", "0.3"])
    assert "data.heldout 0.2 -> 0.3" in capsys.readouterr().err
    assert (data / "ledger.json").stat().st_mtime_ns > made


def test_a_stage_alone_deletes_and_overwrites_nothing_of_a_users(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["world", "world", *FEW, "--out"]
    mine = {tmp_path / "made.old" / "notes": "a", tmp_path / "made.partial" / "notes": "b"}
    for path, text in mine.items():
        path.parent.mkdir()
        path.write_text(text)
    with pytest.raises(SystemExit):
        cli.main([*command, str(tmp_path / "made")])
    assert "made.partial: no stage made it" in capsys.readouterr().err
    cli.main([*command, str(tmp_path / "other")])
    cli.main([*command, str(tmp_path / "other"), "--seed", "7"])  # made anew
    assert {path: path.read_text() for path in mine} == mine
    own = tmp_path / "own"
    own.mkdir()
    (own / "environment.json").write_text("mine")
    (own / "made").mkdir()
    (own / "made" / "ledger.json").write_text('{"accounts": []}')
    for out, said in ((own / "new", "environment.json: no run wrote it"), (own / "made", "no stage wrote it")):
        with pytest.raises(SystemExit) as ended:
            cli.main([*command, str(out)])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
    assert {path.name: path.read_text() for path in own.rglob("*.json")} == {
        "environment.json": "mine",
        "ledger.json": '{"accounts": []}',
    }


@pytest.mark.parametrize("name", ["../../elsewhere", "a/b", "..", ".hidden", "", " ", "a\\b", "a\nb"])
def test_a_recipes_name_leads_nowhere_but_below_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    here = tmp_path / "home" / "work"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    Path("mine.toml").write_text(f'extends = "world"\nname = {json.dumps(name)}\n')
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "mine.toml", "--until", "world", *FEW])
    assert ended.value.code == 2
    assert f"{name!r} names no folder below runs/" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["mine.toml"]


def test_a_run_up_to_a_step_can_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    command = ["run", "world", "--out", str(run), "--until", "data", *FEW]
    cli.main(command)
    assert capsys.readouterr().out == f"{run}\n"
    assert load(run / "recipe.toml") == load(recipe_file("world"), FEW)
    assert json.loads((run / "environment.json").read_text())["packages"]["numpy"]
    cli.main([*command, "--dry-run"])
    assert [row.split() for row in capsys.readouterr().out.splitlines()[1:3]] == [["world", "done"], ["data", "done"]]


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


@pytest.mark.parametrize("error", [KeyboardInterrupt, KeyError])
def test_an_interruption_ends_with_130_and_our_own_mistakes_keep_their_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, paper: Path, error: type[BaseException]
) -> None:
    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr("dpalign.pipeline.runner.execute", failing)
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error) as ended:
        cli.main(["run", str(paper)])
    if error is KeyboardInterrupt:
        assert getattr(ended.value, "code", None) == 130
        assert capsys.readouterr().err.startswith("dpa: interrupted")


def test_a_reader_that_has_seen_enough_is_no_error(paper: Path) -> None:
    command = [sys.executable, "-m", "dpalign", "run", paper, "--dry-run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.communicate()[1] == b""
    assert process.returncode == 128 + signal.SIGPIPE
