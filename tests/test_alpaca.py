"""`dpa alpaca-eval` without its judge: the benchmark's files, the systems at their directions, answers and figures."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpalign import cli, recipe
from dpalign.measure.alpaca import Judged, differences_of, figures_of
from dpalign.measure.bootstrap import Array, Bootstrap
from dpalign.measure.paper_curves import FIG_5
from dpalign.paper.direction import rng_for
from dpalign.pipeline import alpaca
from dpalign.pipeline.alpaca import read_instructions, read_outputs
from dpalign.pipeline.shipped import recipe_file
from dpalign.runs.ledger import read_ledger
from dpalign.train.contract import contract_of, write_contract

QUESTIONS = tuple(f"name {thing}." for thing in ("owl", "tea", "fox", "iron", "salt", "rain", "moon", "wolf"))
SMALL = ("--recipe", "world", "--evaluation.bootstrap", "50", "--sampling.max_new_tokens", "12")


def write(path: Path, texts: list[Any], asked: tuple[str, ...] = QUESTIONS) -> Path:
    rows = [{"instruction": i, "output": t, "generator": "g"} for i, t in zip(asked, texts, strict=True)]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def reference(tmp_path: Path) -> list[str]:
    """The options of a reference and of an output folder."""
    return ["--reference", str(write(tmp_path / "reference.json", ["owl is wise."] * 8)), *SMALL]


def run(*words: object) -> None:
    cli.main(["alpaca-eval", *map(str, words)])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The last line of a command that ends with code 2."""
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def forecast(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    """The names of the points, in order."""
    capsys.readouterr()
    run(*words, "--dry-run")
    return [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]


def test_instructions_come_from_json_and_from_lines_and_can_be_limited(tmp_path: Path) -> None:
    lines = tmp_path / "asked.jsonl"
    lines.write_text("".join(json.dumps({"instruction": text, "dataset": "x"}) + "\n" for text in QUESTIONS))
    assert read_instructions(lines) == read_instructions(write(tmp_path / "a.json", ["x"] * 8)) == list(QUESTIONS)
    assert read_instructions(lines, limit=2) == list(QUESTIONS[:2])
    with pytest.raises(ValueError, match=r"8 instructions; --limit 9"):
        read_instructions(lines, limit=9)
    lines.write_text('{"instruction": "  "}\n')
    with pytest.raises(ValueError, match=r"asked.jsonl"):
        read_instructions(lines)


@pytest.mark.parametrize(
    ("texts", "asked", "fragment"),
    [
        (["x"] * 8, (*QUESTIONS[:5], "Name rain.", *QUESTIONS[6:]), "index 5 is 'Name rain.'"),
        (["x"] * 3, QUESTIONS[:3], "3 rows for 8 instructions"),
        (["x"] * 9, (*QUESTIONS, "more"), "9 rows for 8 instructions"),
        ([""] * 8, QUESTIONS, "all 8 outputs are empty"),
        (["x", None, *"abcdef"], QUESTIONS, "row 2: output is None"),
        (["x", math.nan, *"abcdef"], QUESTIONS, "row 2: output is nan"),
    ],
)
def test_outputs_that_do_not_fit_the_instructions_are_refused(
    tmp_path: Path, texts: list[Any], asked: tuple[str, ...], fragment: str
) -> None:
    with pytest.raises(ValueError, match=r"o.json") as error:
        read_outputs(write(tmp_path / "o.json", texts, asked), QUESTIONS)
    assert fragment in str(error.value)


def test_an_empty_answer_is_an_answer_and_a_file_may_go_on_after_the_limit(tmp_path: Path) -> None:
    assert read_outputs(write(tmp_path / "o.json", ["", *"bcdefgh"]), QUESTIONS[:2], part=True) == ["", "b"]


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["--judge-url", "http://x/v1"], "--judge-model"),
        (["--judge-url", "file:///etc", "--judge-model", "a"], "--judge-url file:///etc"),
        (["--judge-url", "ftp://me:s3cret@x/v1", "--judge-model", "a"], "--judge-url ftp://***@x/v1"),
        (["--judge-url", "http://x", "--judge-model", "a", "--api-key-env", "NO_KEY"], "NO_KEY"),
        (["--judge-model", "a", "--api-key-env", "HOME"], "--judge-url"),
        (["--angles", "0,x"], "'0,x'"),
        (["--angles", "nan"], "'nan'"),
        (["--angles", "-15,-30"], "--angles"),
        (["--line", "short"], "--line short"),
        (["--line", "zephyr=short"], "'zephyr'"),
        (["--judge-extra", "[1]"], "'[1]'"),
        (["--limit", "0"], "--limit"),
        (["--limit", "9"], "--limit 9"),
        (["nowhere"], "nowhere"),
        (["--outputs-from", "nowhere"], "--outputs-from nowhere"),
        (["--outputs", "dpa"], "--outputs dpa"),
        (["--outputs", "dpa=none.json"], "none.json: no such file"),
        (["--outputs", "???=none.json"], "name"),
        ([], "POLICY"),
    ],
)
def test_bad_arguments_are_answered_in_one_line_and_nothing_is_written(
    reference: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], fragment: str
) -> None:
    assert fragment in refused(capsys, *reference, "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_a_judge_needs_a_reference_and_everything_needs_instructions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = write(tmp_path / "asked.json", ["x"] * 8)
    words = ["--out", tmp_path / "out", "--outputs", f"a={asked}"]
    assert "--instructions" in refused(capsys, *words)
    assert "--reference" in refused(capsys, *words, "--instructions", asked, "--judge-model", "a")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random policy in a stage's folder, with a dial that it was never trained on."""
    pytest.importorskip("trl", reason="training needs the extra dpalign[train]")
    import tiny

    folder = tmp_path_factory.mktemp("tiny") / "policy-1"
    tiny.write_model(folder / "model", tiny.tokenizer(), tied=False, scale=0.4)
    write_contract(folder / "model", contract_of(recipe.load(recipe_file("world")), 1))
    return folder


@pytest.fixture
def plain(policy: Path, tmp_path: Path) -> Path:
    """The same model without its dial."""
    folder = tmp_path / "plain"
    folder.mkdir()
    for path in (policy / "model").iterdir():
        if path.name != "dpa.json":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_systems_stand_in_the_order_they_are_named_and_each_along_its_dial(
    policy: Path, plain: Path, reference: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without directions, 7 even steps of the trained arc: 0, -7.5 ... -45 degrees."""
    words = [*reference, "--out", tmp_path / "out"]
    points = [f"policy-1@{angle}" for angle in ("0", "-7.5", "-15", "-22.5", "-30", "-37.5", "-45")]
    assert forecast(capsys, policy, *words) == points
    assert forecast(capsys, f"dpa={policy}", "--weights", "0.8,-0.6", *words) == ["dpa@0.8,-0.6"]
    lines = ["--line", "s=short", "--line", "s=long"]
    assert forecast(capsys, plain, f"s={plain}", *lines, *words) == ["plain", "s@line-1", "s@line-2"]
    file = tmp_path / "reference.json"
    files = [word for name in ("dpa@-30", "gpt", "dpa@0") for word in ("--outputs", f"{name}={file}")]
    assert forecast(capsys, *files, *words) == ["dpa@0", "dpa@-30", "gpt"]
    assert "'a@1' and 'a 1'" in refused(capsys, *words, "--outputs", f"a@1={file}", "--outputs", f"a 1={file}")
    assert "3 weights for 2 objectives" in refused(capsys, *words, policy, "--weights", "1,0,0")
    assert not (tmp_path / "out").exists()


def outputs(out: Path, slug: str) -> list[str]:
    return [row["output"] for row in json.loads((out / f"outputs-{slug}" / "outputs.json").read_text())]


def test_a_policy_answers_at_each_direction_whatever_the_shards(
    policy: Path, plain: Path, reference: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    run(policy, *reference, "--angles", "-45,0", "--sampling.shard", "3", "--out", out)
    files = [out / f"outputs-policy-1-{label}" / "outputs.json" for label in ("0", "minus-45")]
    assert capsys.readouterr().out == "".join(f"{path}\n" for path in files)
    rows = json.loads(files[1].read_text())
    assert [row["instruction"] for row in rows] == list(QUESTIONS)
    assert {row["generator"] for row in rows} == {"policy-1@-45"}
    assert outputs(out, "policy-1-0") != outputs(out, "policy-1-minus-45")
    assert read_ledger(out / "outputs-policy-1-0")["counts"]["out"] == 8
    # Another direction leaves these alone; on another machine the same points come back, in order.
    stood = {path: path.stat().st_mtime_ns for path in files}
    run(policy, *reference, "--angles", "-45,-15,0", "--sampling.shard", "3", "--out", out)
    assert {path: path.stat().st_mtime_ns for path in files} == stood
    names = ["policy-1@0", "policy-1@-15", "policy-1@-45"]
    assert forecast(capsys, "--outputs-from", out, *reference, "--out", other) == names
    # A direction is a system line: the model without a dial says the same under it, in other shards.
    line = "plain=helpfulness*71 verbosity*-71"
    run(plain, "--line", line, *reference, "--sampling.shard", "8", "--out", other)
    assert outputs(other, "plain") == outputs(out, "policy-1-minus-45")


def test_an_interrupted_sampling_keeps_its_finished_shards(
    policy: Path, reference: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the fourth of eight shards: three stay, and the answers are those of one whole run."""
    calls: list[int] = []

    def interrupted(*positional: Any, **named: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return draw(*positional, **named)

    draw, out = alpaca.draw, tmp_path / "out"
    words = [policy, *reference, "--angles", "0", "--sampling.shard"]
    monkeypatch.setattr(alpaca, "draw", interrupted)
    with pytest.raises(SystemExit):
        run(*words, "1", "--out", out)
    assert len(list(out.glob("outputs-*.partial/answers/part-*.parquet"))) == 3
    run(*words, "1", "--out", out)
    assert len(calls) == 4 + 5
    run(*words, "8", "--out", tmp_path / "whole")
    assert outputs(out, "policy-1-0") == outputs(tmp_path / "whole", "policy-1-0")


def point(preference: list[float] | Array, length: float = 100.0, system: str = "dpa", label: str = "") -> Judged:
    preference_P = np.array(preference, dtype=float)
    return Judged(system, label, None, preference_P, np.full(len(preference_P), length), {})


def test_805_instructions_at_7_5_percent_say_no_more_than_1_8_points() -> None:
    """60 wins of 805: 1.96 sqrt(0.0745 x 0.9255 / 805) = 1.81 points either way."""
    rate = figures_of(point([2.0] * 60 + [1.0] * 745), Bootstrap(replicates=4000)).win_rate
    assert rate.value == pytest.approx(100 * 60 / 805)
    assert rate.low is not None
    assert rate.high is not None
    assert (rate.high - rate.low) / 2 == pytest.approx(1.81, abs=0.12)


def test_failed_judgements_enter_no_mean_and_no_difference() -> None:
    a, b = point([1.0, math.nan, 2.0, 1.5]), point([math.nan, 1.0, 1.0, 1.0], 90, "b")
    figures = figures_of(a, Bootstrap())
    assert (figures.win_rate.value, figures.judged, figures.failed) == (50.0, 3, (1,))
    (row,) = differences_of([a, b], Bootstrap())
    assert row.win_rate is not None
    assert (row.win_rate.value, row.instructions) == (75.0, 2)  # on the last two: 100 - 0 and 50 - 0
    assert row.length.value == 10


def test_a_paired_difference_sees_what_two_intervals_hide() -> None:
    """b is a less 2 points on every instruction: the difference is exact, though either interval is 2 points wide."""
    win_P = rng_for("paired").random(805) * 0.6 + 0.1
    a, b = point(1 + win_P), point(1 + win_P - 0.02, system="b")
    (row,) = differences_of([a, b], Bootstrap())
    assert row.win_rate is not None
    assert (row.win_rate.value, row.win_rate.low, row.win_rate.high) == pytest.approx((2.0, 2.0, 2.0))
    alone = figures_of(a, Bootstrap()).win_rate
    assert alone.high is not None
    assert alone.low is not None
    assert alone.high - alone.low > 2.0


def test_only_the_ends_of_curves_are_compared() -> None:
    curve = [point([1.0, 2.0], label=label) for label in ("0", "-15", "-45")]
    rows = differences_of([*curve, point([1.0, 1.0], system="sft")], Bootstrap())
    assert [(row.a, row.b) for row in rows] == [("dpa@0", "dpa@-45"), ("dpa@0", "sft"), ("dpa@-45", "sft")]


def test_the_papers_figure_5_rises_with_length_along_dpas_curve() -> None:
    assert (np.diff(np.array(FIG_5["DPA"]), axis=0) > 0).all()
    assert {name: len(points) for name, points in FIG_5.items()} == {"DPA": 7, "SteerLM": 4, "SFT": 1, "DPO": 1}
