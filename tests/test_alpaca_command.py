"""`dpa alpaca-eval` from end to end: answers drawn, judged once whatever happens, and shown."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import judge_server
from dpalign import cli
from dpalign.run.ledger import read_ledger
from judge_server import Says, completion

QUESTIONS = tuple(f"name {thing}." for thing in ("owl", "tea", "fox", "iron", "salt", "rain", "moon", "wolf"))
SMALL = ["--recipe", "world", "--evaluation.bootstrap", "50"]


def write(path: Path, texts: list[str], generator: str, asked: tuple[str, ...] = QUESTIONS) -> Path:
    rows = [{"instruction": i, "output": t, "generator": generator} for i, t in zip(asked, texts, strict=True)]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two points of a curve and a plain system, beside a reference of 20 characters."""
    reference = write(tmp_path / "reference.json", ["r" * 20] * 8, "ref")
    long = write(tmp_path / "long.json", ["l" * (30 + i) for i in range(8)], "g")
    short = write(tmp_path / "short.json", ["s" * (10 + i) for i in range(8)], "g")
    even = write(tmp_path / "even.json", ["e" * 20] * 7 + ["r" * 20], "g")
    return [
        *("--reference", str(reference), "--out", str(tmp_path / "out"), *SMALL),
        *("--outputs", f"dpa@-45={short}", "--outputs", f"dpa@0={long}", "--outputs", f"sft={even}"),
    ]


def run(words: list[str], url: str | None = None, *more: str) -> None:
    judge = [] if url is None else ["--judge-url", url, "--judge-model", "short"]
    cli.main(["alpaca-eval", *words, *judge, *more])


def refused(capsys: pytest.CaptureFixture[str], words: list[str], url: str | None = None, *more: str) -> str:
    """The last line of a command that ends with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(words, url, *more)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.splitlines()[-1].removeprefix("dpa: ")


def numbers(out: Path) -> Any:
    return json.loads((out / "figure" / "alpaca.json").read_text())


def test_answers_in_files_are_judged_once_and_shown(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A judge of lengths: P(30 beside 20) = 0.269 at the longest, 0.5 for as many characters, 0.731 for ten fewer."""
    out = tmp_path / "out"
    with judge_server.serving() as server:
        run(files, server.url, "--paper")
        assert server.answered == 23  # 3 x 8, less the one answer that is the reference's own
        said = capsys.readouterr().out
        assert "| dpa | 0\N{DEGREE SIGN} |" in said
        assert said.endswith(f"{out}/figure/fig5.svg\n")
        run(files, server.url, "--paper")
        assert server.answered == 23
    found = numbers(out)
    assert [point["label"] for point in found["systems"]["dpa"]["points"]] == ["0", "-45"]
    assert found["systems"]["sft"]["points"][0]["win_rate"]["value"] == 50.0
    assert found["systems"]["sft"]["points"][0]["draws"] == 8
    # mean over i = 0..7 of logistic((i - 10) / 10), negative for the long ones: by hand 33.7% and 66.3%
    expected = 100 * sum(1 / (1 + 2.718281828459045 ** ((10 - i) / -10)) for i in range(8)) / 8
    assert found["systems"]["dpa"]["points"][1]["win_rate"]["value"] == pytest.approx(expected)
    assert expected == pytest.approx(65.5, abs=0.1)
    assert found["reference"] == found["reference"] | {"generator": "ref", "length": 20.0}
    assert found["paper"]["SFT"] == [[1031, 4.7]]
    assert found["failures"] == []
    assert (out / "figure" / "fig5.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "figure" / "fig5.svg").read_text().startswith("<?xml")
    ledger = read_ledger(out / "judge-dpa-minus-45")
    assert (ledger["counts"]["in"], ledger["counts"]["out"], ledger["tokens"]["scored"]) == (8, 8, 8)
    assert "https" not in (out / "log.txt").read_text()


def test_a_killed_judging_goes_on_and_nothing_is_paid_for_twice(files: list[str], tmp_path: Path) -> None:
    """Killed with -9 while the judge holds back its 10th answer: the other nine are not asked for again."""
    held = threading.Event()
    reached = threading.Event()

    def hold_the_tenth(number: int, body: Mapping[str, Any]) -> Says | None:
        if number != 9:
            return None
        reached.set()
        return Says(judge_server.shorter(body), wait_for=held)

    with judge_server.serving(hold_the_tenth) as server:
        words = [*files, "--judge-url", server.url, "--judge-model", "short", "--workers", "1"]
        process = subprocess.Popen([sys.executable, "-m", "dpalign", "alpaca-eval", *words], stderr=subprocess.DEVNULL)
        assert reached.wait(300)
        process.send_signal(signal.SIGKILL)
        process.wait()
        held.set()
        store = next((tmp_path / "out" / "judgements").glob("*.jsonl"))
        assert len(store.read_text().splitlines()) == 9
        with store.open("a") as file:
            file.write('{"key": "cut short by the ki')
        run(files, server.url, "--workers", "1")
        assert len(server.requests) == 23 + 1  # the one that was under way
        texts = [json.dumps(request["messages"]) for request in server.requests]
        assert sorted(text for text in set(texts) if texts.count(text) > 1) == [texts[9]]
    assert numbers(tmp_path / "out")["systems"]["dpa"]["points"][0]["judged"] == 8


def test_an_interruption_waits_for_the_answer_under_way_which_is_paid_for(files: list[str], tmp_path: Path) -> None:
    """Ctrl-C while the 5th answer is held back: it is kept with the four before it, and the process ends with 130."""
    held, reached = threading.Event(), threading.Event()

    def hold_the_fifth(number: int, body: Mapping[str, Any]) -> Says | None:
        if number != 4:
            return None
        reached.set()
        return Says(judge_server.shorter(body), wait_for=held)

    with judge_server.serving(hold_the_fifth) as server:
        words = [*files, "--judge-url", server.url, "--judge-model", "short", "--workers", "1"]
        command = [sys.executable, "-m", "dpalign", "alpaca-eval", *words]
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs are deaf to Ctrl-C
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
        assert reached.wait(300)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        held.set()
        _, said = process.communicate()
        assert process.returncode == 130
        assert said.endswith("dpa: interrupted; the same command goes on from here\n")
        assert (len(server.requests), server.answered) == (5, 5)
        run(files, server.url)
        assert server.answered == 23


def test_a_rate_limited_judge_is_waited_for_and_one_that_is_lost_costs_nothing_that_was_judged(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limited = Says({"error": {"message": "rate limit"}}, 429, {"Retry-After": "0.05"})
    gone = Says({"error": {"message": "bad key"}}, 401)

    def behave(number: int, body: Mapping[str, Any]) -> Says | None:
        return limited if number in (3, 4) else gone if number == 14 else None

    with judge_server.serving(behave) as server:
        said = refused(capsys, files, server.url, "--workers", "1")
        assert said.startswith(
            f"dpa@-45: {server.url}/chat/completions: HTTP 401: bad key; the key is not set (4 of 8 are"
        )
        assert server.answered == 12
        run(files, server.url, "--workers", "1")
        assert server.answered == 23


def test_failed_judgements_are_counted_and_listed_and_asked_again_when_told_to(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    says = {1: Says("<html>"), 2: Says(completion({"A": -0.1})), 9: Says({"error": {"message": "too long"}}, 400)}
    with judge_server.serving(lambda number, body: says.get(number)) as server:
        run(files, server.url, "--workers", "1")
        said = capsys.readouterr().out
        assert "Failed judgements, in no mean: " in said
        found = numbers(tmp_path / "out")
        (first, second), (plain,) = (found["systems"][name]["points"] for name in ("dpa", "sft"))
        assert [point["judged"] for point in (first, second, plain)] == [6, 7, 8]
        assert first["failed"] == {
            "no completion in the answer": 1,
            "neither m nor M among the likeliest tokens": 1,
        }
        assert [(row["of"], row["index"], row["reason"]) for row in found["failures"]] == [
            ("dpa@0", 1, "no completion in the answer: '<html>'"),
            ("dpa@0", 2, "neither m nor M among the likeliest tokens: 'A'"),
            ("dpa@-45", 1, "HTTP 400: too long"),
        ]
        assert found["failures"][0]["instruction"] == "name tea."
        assert read_ledger(tmp_path / "out" / "judge-dpa-minus-45")["counts"]["filtered"] == {"HTTP 400": 1}
        run(files, server.url)
        assert len(server.requests) == 23
        run(files, server.url, "--retry-failed")
        assert len(server.requests) == 26
        assert [point["judged"] for point in numbers(tmp_path / "out")["systems"]["dpa"]["points"]] == [8, 8]
        run(files, server.url, "--retry-failed")
        assert len(server.requests) == 26


def test_more_systems_or_another_folder_ask_only_for_what_is_new(files: list[str], tmp_path: Path) -> None:
    more = write(tmp_path / "more.json", ["m"] * 8, "g")
    with judge_server.serving() as server:
        run(files, server.url)
        run([*files, "--outputs", f"more={more}"], server.url)
        assert server.answered == 23 + 8
        elsewhere = [word if word != str(tmp_path / "out") else str(tmp_path / "other") for word in files]
        run(elsewhere, server.url, "--judgements", str(tmp_path / "out" / "judgements"))
        assert server.answered == 23 + 8
        run(files, server.url, "--limit", "3")
        assert server.answered == 23 + 8
        assert numbers(tmp_path / "out")["instructions"] == numbers(tmp_path / "out")["instructions"] | {
            "count": 3, "first_of_more": True,
        }  # fmt: skip
        run(files, server.url, "--seed", "9")  # another order of the answers is another question
        assert server.answered == 2 * 23 + 8


def test_a_dry_run_says_what_it_would_cost_and_touches_nothing(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with judge_server.serving() as server:
        run(files, server.url, "--dry-run")
        said = capsys.readouterr().out
        assert "dpa@0: answers are there, 8 judgements to ask for\n" in said
        assert "sft: answers are there, 7 judgements to ask for\n" in said
        assert "judge short: 23 requests, about " in said
        assert not (tmp_path / "out").exists()
        run(files, server.url)
        asked = len(server.requests)
        run(files, server.url, "--dry-run")
        assert "judge short: 0 requests" in capsys.readouterr().out
        assert len(server.requests) == asked


def test_what_cannot_be_judged_is_refused_before_anything_is_paid_for(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = write(tmp_path / "wrong.json", ["x"] * 8, "g", (*QUESTIONS[:5], "Name rain.", *QUESTIONS[6:]))
    with judge_server.serving() as server:
        assert refused(capsys, [*files, "--outputs", f"wrong={wrong}"], server.url) == (
            f"{wrong}: the instruction at index 5 is 'Name rain.', and the benchmark's is 'name rain.'; instructions "
            "must be the benchmark's, letter by letter"
        )
        few = write(tmp_path / "few.json", ["x"] * 3, "g", QUESTIONS[:3])
        assert "few.json: 3 rows for 8 instructions" in refused(capsys, [*files, "--outputs", f"few={few}"], server.url)
        none = write(tmp_path / "none.json", [""] * 8, "g")
        assert "all 8 outputs are empty" in refused(capsys, [*files, "--outputs", f"none={none}"], server.url)
        nan = tmp_path / "nan.json"
        nan.write_text(few.read_text().replace('"x"', "NaN", 1))
        assert "row 1: output is nan, expected text" in refused(
            capsys, [*files, "--limit", "3", "--outputs", f"n={nan}"], server.url
        )
        monkeypatch.delenv("NO_SUCH_KEY", raising=False)
        assert refused(capsys, files, server.url, "--api-key-env", "NO_SUCH_KEY") == (
            "--api-key-env NO_SUCH_KEY: that environment variable is not set"
        )
        assert server.requests == []
    assert not (tmp_path / "out").exists()


def test_a_key_is_sent_and_written_nowhere(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    with judge_server.serving() as server:
        run(files, server.url, "--api-key-env", "MY_KEY")
        assert {headers["Authorization"] for headers in server.headers} == {"Bearer sk-very-secret"}
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            assert b"sk-very-secret" not in path.read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--judge-url", "http://x/v1"], "our own client needs both --judge-url and --judge-model"),
        (["--judge-url", "file:///etc", "--judge-model", "a"], "--judge-url file:///etc: give the base of a server"),
        (["--annotator", "weighted"], "'weighted': give alpaca_eval:NAME"),
        (["--annotator", "alpaca_eval:x", "--prompt", "p"], "an annotator brings its own prompt"),
        (["--angles", "0,x"], "'0,x' is no list of numbers"),
        (["--angles", "nan"], "'nan': finite numbers are needed"),
        (["--angles", "-15,-30"], "no POLICY here takes directions"),
        (["--line", "short"], "'short': give NAME=TEXT"),
        (["--line", "zephyr=short"], "no POLICY is called 'zephyr'"),
        (["--judge-extra", "[1]"], "'[1]' is no JSON object"),
        (["--limit", "0"], "--limit, --workers and --timeout must be above 0"),
        (["--limit", "9"], "8 instructions, and the first 9 were asked for"),
        (["nowhere"], "nowhere: no such folder; a policy is a local checkpoint"),
        (["--outputs-from", "nowhere"], "--outputs-from nowhere: no finished answers here"),
        (["--outputz", "x"], "unknown option --outputz; the nearest is --outputs"),
    ],
)
def test_bad_arguments_are_answered_in_one_line(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert said in refused(capsys, [*files, *words])
    assert not (tmp_path / "out").exists()


def test_a_judge_needs_a_reference_and_everything_needs_instructions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert refused(capsys, out, "http://127.0.0.1:1/v1") == "a judge compares with something: give --reference FILE"
    assert refused(capsys, out).startswith("no instructions: give --instructions FILE, or --reference FILE")
    asked = write(tmp_path / "asked.json", [""] * 8, "g")
    assert refused(capsys, [*out, "--instructions", str(asked)]).startswith("no systems: name a POLICY")


def test_length_controlled_rates_come_with_the_difficulty_file(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    difficulty = tmp_path / "instruction_difficulty.csv"
    difficulty.write_text("".join([",instruction_difficulty\n", *(f"{i},{i / 8 - 0.5}\n" for i in range(8))]))
    with judge_server.serving() as server:
        run(files, server.url, "--difficulty", str(difficulty))
    assert "length-controlled win rate, %" in capsys.readouterr().out
    found = numbers(tmp_path / "out")
    assert found["length_control"]["applied"] is True
    point = found["systems"]["dpa"]["points"][0]
    assert point["extrapolated"] is True
    assert set(point["coefficients"]) == {"theta", "phi", "psi"}
    assert (tmp_path / "out" / "figure" / "fig5-length-controlled.png").is_file()


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random policy in a stage's folder, with a dial that it was never trained on."""
    pytest.importorskip("trl", reason="training needs the extra dpalign[train]")
    import tiny
    from dpalign import recipe
    from dpalign.stages.finetune import contract_of
    from dpalign.train.contract import write_contract

    folder = tmp_path_factory.mktemp("tiny") / "policy-1"
    tiny.write_model(folder / "model", tiny.tokenizer(), tied=False, scale=0.4)
    write_contract(folder / "model", contract_of(recipe.load(cli.recipe_file("world")), 1))
    return folder


def test_a_policy_answers_the_exact_instructions_at_each_direction_and_goes_on_by_shard(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = write(tmp_path / "reference.json", ["owl is wise."] * 8, "ref")
    out = tmp_path / "out"
    words = [str(policy), "--reference", str(reference), "--out", str(out), *SMALL, "--angles", "-45,0"]
    words += ["--sampling.max_new_tokens", "12", "--sampling.shard", "3"]
    run(words)
    drawn = [out / f"outputs-policy-1-{label}" / "outputs.json" for label in ("0", "minus-45")]
    assert capsys.readouterr().out == "".join(f"{path}\n" for path in drawn)
    rows = json.loads(drawn[1].read_text())
    assert [row["instruction"] for row in rows] == list(QUESTIONS)
    assert {row["generator"] for row in rows} == {"policy-1@-45"}
    assert [row["output"] for row in rows] != [row["output"] for row in json.loads(drawn[0].read_text())]
    assert len(list((out / "outputs-policy-1-0" / "answers").glob("*.parquet"))) == 3
    assert read_ledger(out / "outputs-policy-1-0")["counts"]["out"] == 8
    system = json.loads((out / "outputs-policy-1-minus-45" / "system.json").read_text())
    assert system["line"] == "helpfulness*71 verbosity*-71"
    assert system["sampled_with"]["evaluation.temperature"] == 0.7
    # Another direction leaves these alone; the same answers come back, whatever the shards are.
    stood = {path: path.stat().st_mtime_ns for path in drawn}
    run([word if word != "-45,0" else "-45,-15,0" for word in words])
    assert {path: path.stat().st_mtime_ns for path in drawn} == stood
    other = [word if word != str(out) else str(tmp_path / "other") for word in words]
    run([word if word != "3" else "8" for word in other])
    again = json.loads((tmp_path / "other" / "outputs-policy-1-minus-45" / "outputs.json").read_text())
    assert again == rows
    # On another machine: the answers alone, a judge, the figure.
    with judge_server.serving() as server:
        judged = ["--outputs-from", str(out), "--reference", str(reference), "--out", str(tmp_path / "judged"), *SMALL]
        run(judged, server.url)
        paid = server.answered
        run([*words, "--judgements", str(tmp_path / "judged" / "judgements")], server.url)
        assert server.answered == paid
    points = numbers(tmp_path / "judged")["systems"]["policy-1"]["points"]
    assert [point["angle"] for point in points] == [0, -15, -45]
    assert points[2]["weights"] == pytest.approx({"helpfulness": 0.7071, "verbosity": -0.7071}, abs=1e-4)


def test_a_drawing_that_was_killed_keeps_its_shards(policy: Path, tmp_path: Path) -> None:
    reference = write(tmp_path / "reference.json", ["owl is wise."] * 8, "ref")
    words = [str(policy), "--reference", str(reference), "--angles", "0", *SMALL]
    words += ["--sampling.max_new_tokens", "12", "--sampling.shard", "1"]
    out = tmp_path / "killed"
    code = (
        "import sys, time, threading, os\n"
        "from pathlib import Path\n"
        "from dpalign import cli\n"
        "def watch():\n"
        "    while len(list(Path(sys.argv[1]).rglob('answers/part-*.parquet'))) < 3: time.sleep(0.001)\n"
        "    os.kill(os.getpid(), 9)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "cli.main(['alpaca-eval', *sys.argv[2:]])\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(out), *words, "--out", str(out)], env=os.environ, stderr=subprocess.DEVNULL
    )
    assert ended.returncode == -signal.SIGKILL
    partial = out / "outputs-policy-1-0.partial" / "answers"
    before = {path.name: path.stat().st_mtime_ns for path in partial.glob("part-*.parquet")}
    assert 3 <= len(before) < 8
    time.sleep(0.01)
    run([*words, "--out", str(out)])
    after = {path.name: path.stat().st_mtime_ns for path in (out / "outputs-policy-1-0" / "answers").glob("part-*")}
    kept = [name for name in before if after[name] == before[name]]
    assert len(kept) >= len(before) - 1  # the last may have lacked its tally
    run([*words, "--out", str(tmp_path / "whole")])
    one, other = (tmp_path / name / "outputs-policy-1-0" / "outputs.json" for name in ("killed", "whole"))
    assert one.read_bytes() == other.read_bytes()


def test_a_plain_model_answers_plainly_and_under_a_line(policy: Path, tmp_path: Path) -> None:
    reference = write(tmp_path / "reference.json", ["owl is wise."] * 8, "ref")
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in (policy / "model").iterdir():
        if path.name != "dpa.json":
            (bare / path.name).write_bytes(path.read_bytes())
    words = [str(bare), f"brief={bare}", "--line", "brief=helpfulness*71 verbosity*-71", "--reference", str(reference)]
    run([*words, "--out", str(tmp_path / "out"), *SMALL, "--sampling.max_new_tokens", "12"])
    plain, brief = (
        [row["output"] for row in json.loads((tmp_path / "out" / f"outputs-{name}" / "outputs.json").read_text())]
        for name in ("bare", "brief")
    )
    assert plain != brief
    # The line is all that a direction is: a policy asked for it says the same.
    words = [str(policy), "--angles", "-45", "--reference", str(reference), "--out", str(tmp_path / "steered")]
    run([*words, *SMALL, "--sampling.max_new_tokens", "12", "--cluster.address", "auto"])
    assert "these answers are few, and drawn in this process" in (tmp_path / "steered" / "log.txt").read_text()
    steered = json.loads((tmp_path / "steered" / "outputs-policy-1-minus-45" / "outputs.json").read_text())
    assert [row["output"] for row in steered] == brief
