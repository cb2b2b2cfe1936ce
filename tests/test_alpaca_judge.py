"""`dpa alpaca-eval` before a judge: the real package alpaca_eval asks a small server over HTTP."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import judge_server
from dpalign import cli
from dpalign.paper.direction import rng_for
from dpalign.pipeline.alpaca_judge import CLIENT, HOPELESS, Pair, package, win_rates
from judge_server import Reply, completion

QUESTIONS = tuple(f"name thing {i}." for i in range(20))
SMALL = ("--recipe", "world", "--evaluation.bootstrap", "50")


@pytest.fixture(autouse=True)
def _installed() -> None:
    with package():
        pytest.importorskip("alpaca_eval", reason="a judge needs the extra dpalign[alpaca]")


def write(path: Path, texts: list[str], generator: str) -> Path:
    rows = [{"instruction": i, "output": t, "generator": generator} for i, t in zip(QUESTIONS, texts, strict=False)]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def words(tmp_path: Path, out: Path) -> list[str]:
    """20 instructions, a reference of 20 characters, and a system whose answers have 10 to 29."""
    reference = write(tmp_path / "reference.json", ["r" * 20] * 20, "ref")
    answers = write(tmp_path / "answers.json", ["s" * (10 + i) for i in range(20)], "g")
    return ["--reference", str(reference), "--out", str(out), "--outputs", f"dpa@-45={answers}", *SMALL]


def run(words: list[str], url: str, *more: str) -> None:
    cli.main(["alpaca-eval", *words, "--judge-url", url, "--judge-model", "short", *more])


def refused(capsys: pytest.CaptureFixture[str], words: list[str], url: str, *more: str) -> str:
    """The last line of a command that ends with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(words, url, *more)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def summary(out: Path) -> Any:
    return json.loads((out / "figure" / "alpaca.json").read_text())


def test_answers_are_judged_once_and_shown(
    words: list[str], out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """P(win) = logistic((20 - length) / 10); as many characters draw; an answer equal to the reference's is free."""
    long = write(tmp_path / "long.json", ["l" * 30] * 20, "g")
    even = write(tmp_path / "even.json", ["e" * 20] * 19 + ["r" * 20], "g")
    words += ["--outputs", f"dpa@0={long}", "--outputs", f"sft={even}", "--paper"]
    with judge_server.serving() as server:
        run(words, server.url)
        assert len(server.requests) == 59
        assert server.requests[0]["model"] == "short"
        assert "## Best Model Identifier" in server.requests[0]["messages"][-1]["content"]
        table = capsys.readouterr().out
        stood = {path: path.read_bytes() for path in (out / "figure").iterdir()}
        run(words, server.url)
        assert len(server.requests) == 59
    assert {path: path.read_bytes() for path in (out / "figure").iterdir()} == stood
    assert {path.name for path in stood} == {"alpaca.json", "table.md", "fig5.svg", "fig5.png"}
    first, last, sft = summary(out)["points"]
    assert [(point["system"], point["angle"]) for point in (first, last, sft)] == [
        ("dpa", 0),
        ("dpa", -45),
        ("sft", None),
    ]
    assert first["win_rate"]["value"] == pytest.approx(100 / (1 + math.e), abs=1e-3)  # 26.9
    expected = 100 * np.mean([1 / (1 + math.exp((i - 10) / 10)) for i in range(20)])
    assert last["win_rate"]["value"] == pytest.approx(expected, abs=1e-3)
    assert last["metrics"]["win_rate"] == pytest.approx(expected, abs=1e-3)
    assert last["win_rate"]["low"] < expected < last["win_rate"]["high"]
    assert (sft["win_rate"]["value"], sft["metrics"]["n_draws"], sft["length"]["value"]) == (50, 20, 20)
    assert "| dpa | 0\N{DEGREE SIGN} | 30 (30 to 30) | 26.9 (26.9 to 26.9) | 20 | 0 |" in table
    differences = {(row["a"], row["b"]): row for row in summary(out)["differences"]}
    assert differences["dpa@0", "sft"]["win_rate"]["value"] == pytest.approx(-23.106, abs=1e-3)
    assert differences["dpa@0", "sft"]["length"]["value"] == 10
    assert summary(out)["paper"]["SFT"] == [[1031, 4.7]]
    assert summary(out)["reference"]["generator"] == "ref"


def test_a_kill_costs_at_most_one_chunk(words: list[str], out: Path) -> None:
    """Killed with -9 while the judge holds back its 7th answer: the first 5 are kept, and 2 are asked again."""
    held, reached = threading.Event(), threading.Event()

    def hold(number: int, body: Mapping[str, Any]) -> Reply | None:
        if number != HOPELESS + 1:
            return None
        reached.set()
        return Reply(judge_server.shorter(body), wait_for=held)

    with judge_server.serving(hold) as server:
        command = [sys.executable, "-m", "dpalign", "alpaca-eval", *words, "--judge-url", server.url]
        command += ["--judge-model", "short", "--workers", "1"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        assert reached.wait(120)
        process.send_signal(signal.SIGKILL)
        process.wait()
        held.set()
        run(words, server.url)
        asked = [request["messages"][-1]["content"] for request in server.requests]
        assert (len(asked), len(set(asked))) == (22, 20)
    assert summary(out)["points"][0]["judged"] == 20


def test_failed_judgements_are_counted_and_asked_again_only_when_told_to(words: list[str], out: Path) -> None:
    """An answer without m or M, and a request that the server refuses (its chunk is asked one by one)."""
    seen: list[str] = []

    def behave(number: int, body: Mapping[str, Any]) -> Reply | None:
        text = body["messages"][-1]["content"]
        if "s" * 13 + '"' in text and "s" * 14 not in text and not seen:
            return Reply(completion({"A": -0.1}))
        return Reply({"error": {"message": "too long"}}, 400) if "s" * 29 in text else None

    with judge_server.serving(behave) as server:
        run(words, server.url, "--workers", "1")
        assert (summary(out)["points"][0]["failed"], summary(out)["points"][0]["judged"]) == ([3, 19], 18)
        assert "2 of 20 judgements failed" in (out / "log.txt").read_text()
        asked = len(server.requests)
        run(words, server.url)
        again = [request["messages"][-1]["content"] for request in server.requests[asked:]]
        assert all("s" * 29 in text for text in again)  # the refused request, which costs nothing
        seen.append("the judge is corrected")
        run(words, server.url, "--retry-failed")
        assert summary(out)["points"][0]["failed"] == [19]


def test_a_judge_that_only_fails_is_stopped(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with judge_server.serving(lambda number, body: Reply(completion({"A": -0.1}))) as server:
        assert "--retry-failed" in refused(capsys, words, server.url)
        assert len(server.requests) == 5
        assert "--retry-failed" in refused(capsys, words, server.url)
        assert len(server.requests) == 5


def test_answers_equal_to_the_references_put_off_no_stop(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three of the first five are equal, and cost no request: the judge still gets five before it is stopped."""
    write(tmp_path / "answers.json", ["r" * 20] * 3 + ["s" * (10 + i) for i in range(17)], "g")
    with judge_server.serving(lambda number, body: Reply(completion({"A": -0.1}))) as server:
        assert "--retry-failed" in refused(capsys, words, server.url)
        assert len(server.requests) == 5


def test_a_lost_judge_ends_the_command_and_the_key_is_written_nowhere(
    words: list[str], out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    lost = Reply({"error": {"message": "bad key sk-very-secret"}}, 401)
    with judge_server.serving(lambda number, body: lost if number == HOPELESS + 1 else None) as server:
        message = refused(capsys, words, server.url, "--api-key-env", "MY_KEY", "--workers", "1")
        assert "401" in message
        assert "5 of 20" in message
        assert "secret" not in message
        assert "MY_KEY" not in os.environ  # nor in what a worker inherits
        monkeypatch.setenv("MY_KEY", "sk-very-secret")
        run(words, server.url, "--api-key-env", "MY_KEY")
        assert {headers["authorization"] for headers in server.headers} == {"Bearer sk-very-secret"}
        without = len(server.requests)
        run([word.replace(str(out), f"{out}-2") for word in words], server.url, "--limit", "3")
        assert "secret" not in server.headers[without]["authorization"]
    for path in out.rglob("*"):
        assert not path.is_file() or b"sk-very-secret" not in path.read_bytes()


def test_a_judge_that_refuses_for_its_rate_limit_ends_the_command(
    words: list[str], out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package would keep a judgement of nothing: the command ends instead, and asks for it again when resumed."""
    from alpaca_eval.decoders import openai

    monkeypatch.setitem(CLIENT, "max_retries", 0)
    monkeypatch.setattr(openai.time, "sleep", lambda seconds: None)
    busy = Reply({"error": {"message": "Rate limit reached"}}, 429)
    with judge_server.serving(lambda number, body: busy if number >= HOPELESS + 1 else None) as server:
        message = refused(capsys, words, server.url, "--workers", "1")
        assert "rate limit" in message
        assert "5 of 20" in message
    with judge_server.serving() as server:
        run(words, server.url)
        assert len(server.requests) == 15
    assert summary(out)["points"][0]["judged"] == 20


def test_an_annotator_can_be_a_folder_and_requests_take_more_fields(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from alpaca_eval import constants

    mine = tmp_path / "mine"
    mine.mkdir()
    config = (constants.EVALUATORS_CONFIG_DIR / "weighted_alpaca_eval_gpt4_turbo" / "configs.yaml").read_text()
    (mine / "configs.yaml").write_text(config.replace("alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt", "mine/p.txt"))
    turn = 'Mine: {instruction}\n"m", "output": """{output_1}""" "M", "output": """{output_2}"""'
    (mine / "p.txt").write_text(f"<|im_start|>user\n{turn}\n<|im_end|>")
    with judge_server.serving() as server:
        run(words, server.url, "--annotator", str(mine), "--judge-extra", '{"top_k": 1}', "--limit", "2")
        assert server.requests[0]["messages"][0]["content"].startswith("Mine: name thing")
        assert server.requests[0]["top_k"] == 1
        assert "weighted_alpaca_eval_gpt4_turbo" in refused(capsys, words, server.url, "--annotator", "none")


def test_length_controlled_rates_take_the_difficulty_file_as_a_path(tmp_path: Path) -> None:
    """Longer answers win here by length alone, so the controlled rate lies below the raw one."""
    rng = rng_for("glm")
    difficulty = tmp_path / "df_gamed.csv"
    gamma_P = rng.standard_normal(100)
    with difficulty.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["model", "index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline"])
        for model, delta in (("concise", 1.0), ("verbose", -1.0)):
            rows.writerows([model, i, 1 / (1 + math.exp(delta)), delta, gamma_P[i], False] for i in range(100))
    longer_P = (100 * rng.standard_normal(100) + 150).round()
    preference_P = 1 + 1 / (1 + np.exp(-longer_P / 100))
    pairs = [Pair(str(i), "r" * 1000, "o" * (1000 + int(longer))) for i, longer in enumerate(longer_P)]
    rates = win_rates(pairs, preference_P, ("ref", "dpa"), difficulty)
    assert rates["win_rate"] == pytest.approx(100 * (preference_P - 1).mean())
    assert rates["length_controlled_winrate"] < rates["win_rate"] - 5
    assert rates["lc_standard_error"] > 0
    same = [Pair(str(i), "r" * 100, "o" * 110) for i in range(100)]
    assert "length_controlled_winrate" not in win_rates(same, preference_P, ("ref", "dpa"), difficulty)
    with pytest.raises(ValueError, match=r"df_gamed.csv"):
        win_rates(pairs + pairs, np.concatenate([preference_P, preference_P]), ("ref", "dpa"), difficulty)
