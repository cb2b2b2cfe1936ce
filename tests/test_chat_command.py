"""The chat over HTTP, and its command: options, pipes, a model here or on a server, a terminal."""

import contextlib
import http.server
import io
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dial_server import Model, serving
from dpalign import cli
from dpalign.dial.chat.speakers import Ask, Local, Piece, Remote
from dpalign.dial.dial import Dial
from dpalign.paper.direction import Preference
from dpalign.rows import Message
from dpalign.train.contract import Contract, write_contract
from test_chat import AHEAD, BEST, DIAL

TEA: Message = {"role": "user", "content": "tea?"}


def ask(preference: Preference | None = None, max_tokens: int | None = 9, **options: Any) -> Ask:
    return Ask([TEA], preference, 0.5, 3, max_tokens, **options)


def remote(url: str, key: str | None = None, objectives: Sequence[str] = ()) -> Remote:
    return Remote(url, key=key, key_name="DPA_KEY", objectives=objectives)


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


# --- over HTTP ---


def test_a_server_of_ours_describes_its_dial_and_takes_the_direction() -> None:
    levels = {level: {"angle": angle, "words": 10} for level, angle in (("low", -45), ("medium", -20), ("high", 0))}
    with serving(Model(warning="mind the gap", rewards=True, verbosity=levels)) as model:
        speaker = remote(f"{model.url}/v1/")
        assert (speaker.name, speaker.about.max_best_of) == ("world", 16)
        assert speaker.dial is not None
        assert (speaker.dial.objectives, speaker.dial.arc) == (DIAL.objectives, (-45.0, 0.0))
        text = text_of(list(speaker.stream(ask(Preference.from_angle(-45, DIAL.objectives)))))
        assert text == "tea is dark"
        assert speaker.dial.read(verbosity="low") == Preference.from_angle(-45, DIAL.objectives)
        assert speaker.rewards([TEA], text) == {"helpfulness": 90.0, "verbosity": 81.0}
    (body,) = model.requests
    assert body["preference"] == {"helpfulness": 0.707107, "verbosity": -0.707107}
    assert (body["temperature"], body["seed"], body["max_tokens"], body["stream"]) == (0.5, 3, 9, True)


def test_a_server_of_ours_draws_the_best_of_several_and_reports_its_choice() -> None:
    with serving(Model(chosen=vars(BEST))) as model:
        speaker = remote(model.url)
        for spread in (None, 5.0):
            pieces = list(speaker.stream(ask(AHEAD, best_of=4, spread=spread)))
            assert [piece.choice for piece in pieces if piece.finish] == [BEST]
        model.chosen = {"drawn": 4}
        with pytest.raises(ValueError, match="best_of"):
            list(speaker.stream(ask(AHEAD, best_of=4)))
    requests = [(body["best_of"], body.get("angle_spread")) for body in model.requests]
    assert requests == [(4, None), (4, 5.0), (4, None)]
    with serving(Model(rewards=False)) as model:
        assert remote(model.url).about.max_best_of == 0


def test_any_other_server_gets_the_direction_in_its_template_arguments() -> None:
    with serving(Model(dial=False)) as model:
        list(remote(model.url, objectives=DIAL.objectives).stream(ask(AHEAD, max_tokens=None)))
        assert remote(model.url).dial is None
    assert model.requests[0]["chat_template_kwargs"] == {"preference": {"helpfulness": 1.0, "verbosity": 0.0}}
    assert not {"preference", "max_tokens"} & set(model.requests[0])


def test_an_answer_needs_no_reason_for_its_end_but_must_be_json_and_whole() -> None:
    with serving(Model(bare=True)) as model:
        assert list(remote(model.url).stream(ask()))[-1].finish == "stop"
    with (
        serving(Model(bare=True, answer=lambda _: "\x00")) as model,
        pytest.raises(ValueError, match="is no JSON object"),
    ):
        list(remote(model.url).stream(ask()))
    with serving(Model(breaks=True)) as model, pytest.raises(ValueError, match="broke off"):
        list(remote(model.url).stream(ask()))


def test_a_server_that_refuses_or_describes_nonsense_is_an_error_in_words() -> None:
    with serving(Model(key="sesame")) as model:
        with pytest.raises(ValueError, match=r"HTTP 401: give the API key.*\$DPA_KEY\) is not set"):
            remote(model.url)
        with pytest.raises(ValueError, match=r"is refused") as error:
            remote(model.url, key="guess")
        assert "guess" not in str(error.value)
        remote(model.url, key="sesame")
    with serving() as model:
        speaker = remote(model.url)
        model.objectives = ("helpfulness",)
        with pytest.raises(ValueError, match="no rewards of helpfulness, verbosity there"):
            speaker.rewards([TEA], "tea")
    with serving(Model(arc=(1.0,))) as model, pytest.raises(ValueError, match="/v1/dial"):
        remote(model.url)
    for trained in ({"distribution": "wit"}, {"distribution": "cone", "center": [1, 2, 3], "angle": 9},
                    {"distribution": "cone", "center": [[1], 2], "angle": 9}):  # fmt: skip
        with serving(Model(trained=trained)) as model, pytest.raises(ValueError, match="/v1/dial: trained: "):
            remote(model.url)
    with pytest.raises(ValueError, match="unreachable"):
        remote(model.url)
    with pytest.raises(ValueError, match="give the base of a server"):
        remote("localhost:8000")


def test_a_server_tells_a_cone_and_the_chat_warns_beyond_it() -> None:
    cone = {"distribution": "cone", "center": [2, -3, 1], "angle": 15.0}
    with serving(Model(objectives=("help", "words", "detail"), arc=None, front=None, trained=cone)) as model:
        dial = remote(model.url).dial
    assert dial is not None
    assert dial.warning(dial.parse("help=2 words=-3 detail=1")) is None
    assert "within 15 degrees of help=0.53" in str(dial.warning(dial.parse("help=1")))


@pytest.mark.parametrize(
    "url",
    [
        "http://me:s3cret@127.0.0.1:1",
        "http://me:s3/cret@127.0.0.1:1",
        "ftp://me:s3cret@x",
        "http://127.0.0.1:1?k=s3cret",
    ],
)
def test_a_url_with_a_secret_is_refused_without_repeating_it(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="--url ") as refused:
        remote(url)
    with pytest.raises(SystemExit) as ended:
        cli.main(["chat", "--url", url, "explain tea."])
    assert ended.value.code == 2
    for message in (str(refused.value), capsys.readouterr().err):
        assert "--url " in message
        assert "s3" not in message
        assert "cret" not in message


def test_a_redirection_is_not_followed_so_that_the_key_stays_here() -> None:
    class Redirecting(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(307)
            self.send_header("Location", f"{elsewhere.url}/v1/dial?token=s3cret")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with serving() as elsewhere, http.server.ThreadingHTTPServer(("127.0.0.1", 0), Redirecting) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with pytest.raises(ValueError, match=f"HTTP 307.*{elsewhere.url}/v1/dial:"):
            remote(f"http://127.0.0.1:{server.server_address[1]}", key="sesame")
        server.shutdown()
    assert elsewhere.keys == []


# --- the command ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name a MODEL folder, or a server with --url"),
        (("nowhere",), "nowhere: no config.json here"),
        (("m", "a", "question"), "one question, in quotes"),
        (("m", "--objectives", "a,b"), "go with --url"),
        (("--url", "http://127.0.0.1:1", "--reward", "r"), "--reward goes with a MODEL folder"),
        (("m", "--temperature", "3"), "--temperature 3.0: 0 to 2"),
        (("m", "--seed", "3", "--world.rows", "2"), "--world.rows"),
    ],
)
def test_bad_options_are_refused_in_a_line(
    words: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["chat", *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_one_question_gets_one_answer_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as model:
        cli.main(["chat", "--url", model.url, "--dial", "-45", "explain tea."])
        cli.main(["chat", "explain tea.", "--url", model.url, "--dial", "helpfulness*0.8 - verbosity*0.6"])
    out, err = capsys.readouterr()
    assert (out, err) == ("tea is dark\ntea is dark and hot. tea\n", "")
    assert model.requests[0]["messages"] == [{"role": "user", "content": "explain tea."}]


def test_one_question_may_get_the_best_of_several(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as model:
        cli.main(["chat", "--url", model.url, "--best", "4", "explain tea."])
        with pytest.raises(SystemExit):
            cli.main(["chat", "--url", model.url, "--best", "99", "explain tea."])
    assert [body["best_of"] for body in model.requests] == [4]
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert "--best 99: give a whole number from 2 to 16" in err


def test_a_pipe_is_turns_or_one_question(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Model(answer=lambda body: f"<{body['messages'][-1]['content']}>")) as model:
        monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
        cli.main(["chat", "--url", model.url])
        assert capsys.readouterr().out == "<one>\n<two>\n"
        monkeypatch.setattr(sys, "stdin", io.StringIO("one\n/two\n"))
        cli.main(["chat", "--url", model.url, "--once"])
        assert capsys.readouterr().out == "<one\n/two>\n"
    assert len(model.requests[1]["messages"]) == 3


@pytest.mark.parametrize(
    ("word", "seeds"),
    [
        ("0", [0]),
        ("-5", [-5]),
        ("+7", [7]),
        ("1_000", [1000]),
        ("9007199254740993", [9007199254740993]),
        (str(2**63 - 1), [2**63 - 1]),
        (str(2**63), []),
        (str(-(2**63)), [-(2**63)]),
        (str(-(2**63) - 1), []),
        ("2.0", []),
        ("few", []),
    ],
)
def test_a_seed_typed_in_the_chat_is_read_like_that_of_the_command_line(
    word: str, seeds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as model:
        for words, lines in (((), f"/seed {word}\nexplain tea.\n"), (("--seed", word, "explain tea."), "")):
            monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
            with contextlib.nullcontext() if seeds else pytest.raises(SystemExit):
                cli.main(["chat", "--url", model.url, *words])
            assert [body["seed"] for body in model.requests] == seeds
            model.requests.clear()


def test_a_model_here_answers_as_its_own_template_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="a model here needs the extra train")
    import tiny
    from dpalign.chat import chat_template

    tokens = tiny.tokenizer()
    tokens.chat_template = chat_template("world-v1", "world-v1", DIAL.objectives)
    folder = tiny.write_model(tmp_path / "policy" / "model", tokens, scale=2.0)
    write_contract(folder, Contract("world-v1", "world-v1", dict.fromkeys(DIAL.objectives, ())))
    answers = []
    for words in (("--dial", "-45"), ("--dial", "-45"), ("--dial", "0"), ("--seed", "1")):
        cli.main(["chat", str(tmp_path / "policy"), "explain tea.", "--max-tokens", "12", *words])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert len(set(answers)) > 1
    assert all(text.endswith("\n") for text in answers)


def test_a_server_answers_as_the_same_model_does_here(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="the server needs the extra serve")
    pytest.importorskip("transformers", reason="a model needs the extra train")
    import api_server
    from dpalign.dial.server.engine import Limits
    from dpalign.dial.server.service import Service, open_generator

    folder = api_server.write_policy(tmp_path / "mine")
    message: Message = {"role": "user", "content": "explain fox, tea and iron."}
    asks = [Ask([message], Preference.from_angle(angle, DIAL.objectives), 0.7, 3, 24) for angle in (0, -45)]
    best = Ask([message], Preference.from_angle(-30, DIAL.objectives), 0.7, 3, 24, best_of=4, spread=15)
    service = Service(
        "mine", Dial.load(folder), open_generator(folder, rows=16), Limits(), rewards=api_server.rewards()
    )
    with contextlib.closing(Local(service)) as local:
        here = [text_of(list(local.stream(one))) for one in asks]
        best_here = list(local.stream(best))[-1]
        with pytest.raises(ValueError, match="/clear begins"):
            list(local.stream(Ask([message] * 400, None, 0.7, 0, None)))
        assert list(local.stream(Ask([message], None, 0.0, 3, 10**6)))[-1].finish  # cut at the context, not refused
        with pytest.raises(ValueError, match="seed: Input should be less than"):
            list(local.stream(Ask([message], None, 0.7, 2**63, None)))
    with api_server.serving(folder, reward=True) as running:
        there = remote(running.url)
        assert here == [text_of(list(there.stream(one))) for one in asks]
        best_there = [piece for piece in there.stream(best) if piece.text or piece.choice]
        outside = Ask([message], Preference.from_angle(-90, DIAL.objectives), 0.7, 3, 4)
        warnings = [warning for piece in there.stream(outside) for warning in piece.warnings]
        assert set(there.rewards([message], here[0])) == {"helpfulness", "verbosity"}
    assert here[0]
    assert (best_here.text, best_here.choice) == (best_there[0].text, best_there[-1].choice)
    assert best_here.choice is not None
    assert best_here.choice.value > best_here.choice.mean_value
    assert len(warnings) == 1


def test_in_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves(tmp_path: Path) -> None:
    with serving(Model(pause=0.2)) as model:
        leader, follower = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "XDG_STATE_HOME": str(tmp_path), "COLUMNS": "100", "LINES": "40"}
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs are deaf to Ctrl-C
        running = subprocess.Popen(
            [sys.executable, "-m", "dpalign", "chat", "--url", model.url],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=environment | {"PROMPT_TOOLKIT_NO_CPR": "1"},
            start_new_session=True,
            preexec_fn=heard,
        )
        os.close(follower)
        screen = b""

        def until(words: str) -> None:
            nonlocal screen
            end = time.monotonic() + 20
            while words.encode() not in screen:
                assert time.monotonic() < end, screen.decode("utf-8", "replace")
                if select.select([leader], [], [], 0.2)[0]:
                    screen += os.read(leader, 4096)

        until("\u276f")
        os.write(leader, b"explain tea.\r")
        until("tea is")
        os.kill(running.pid, signal.SIGINT)
        until("(stopped)")
        screen = b""
        os.write(leader, b"/dial -30\r")
        until("helpfulness*0.87 - verbosity*0.50")
        until("\u221230\u00b0 \u276f")  # before the prompt the terminal would take Ctrl-D for itself
        os.write(leader, b"\x04")
        assert running.wait(10) == 0
        os.close(leader)
    history = tmp_path / "dpalign" / "chat_history"
    assert "explain tea." in history.read_text()
    assert history.stat().st_mode & 0o077 == 0
