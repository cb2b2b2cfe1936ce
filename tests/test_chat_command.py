"""The chat over HTTP, and its command: options, pipes, a model here or on a server, a terminal."""

import contextlib
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from dial_server import Model, serving
from dpalign import cli
from dpalign.dial.chat.remote import Remote
from dpalign.dial.chat.speakers import Ask
from dpalign.paper.direction import Preference
from dpalign.rows import Message
from test_chat import CHOSEN, DIAL

# --- over HTTP ---


def test_a_server_of_ours_tells_its_dial_and_takes_the_direction() -> None:
    with serving(Model(warning="mind the gap", rewards=True)) as model:
        remote = Remote(f"{model.url}/v1/", key=None, key_from="K")
        assert (remote.name, remote.scores) == ("world", True)
        assert remote.dial is not None
        assert (remote.dial.objectives, remote.dial.arc) == (DIAL.objectives, (-45.0, 0.0))
        ask = Ask([{"role": "user", "content": "tea?"}], Preference.from_angle(-45, DIAL.objectives), 0.5, 3, 9)
        text = "".join(piece.text for piece in remote.stream(ask))
        assert text == "tea is dark"
        assert remote.rewards(ask.messages, text) == {"helpfulness": 90.0, "verbosity": 81.0}
    (body,) = model.requests
    assert body["preference"] == {"helpfulness": 0.707107, "verbosity": -0.707107}
    assert (body["temperature"], body["seed"], body["max_tokens"], body["stream"]) == (0.5, 3, 9, True)


def test_a_server_of_ours_draws_the_best_of_several_and_tells_how_it_chose() -> None:
    message: Message = {"role": "user", "content": "tea?"}
    at = Preference.from_angle(0, DIAL.objectives)
    with serving(Model(chosen=CHOSEN.model_dump())) as model:
        remote = Remote(model.url, key=None, key_from="K")
        assert remote.max_best_of == 16
        for spread in (None, 5.0):
            pieces = list(remote.stream(Ask([message], at, 0.7, 3, 9, 4, spread)))
            assert [piece.chosen for piece in pieces if piece.finish] == [CHOSEN]
        model.chosen = {"drawn": 4}
        with pytest.raises(ValueError, match="BestOf"):
            list(remote.stream(Ask([message], at, 0.7, 3, 9, 4)))
    asked = [(body["best_of"], body.get("angle_spread")) for body in model.requests]
    assert asked == [(4, None), (4, 5.0), (4, None)]
    with serving(Model(rewards=False)) as model:
        assert Remote(model.url, key=None, key_from="K").max_best_of == 0


def test_any_other_server_gets_the_direction_in_its_template_arguments() -> None:
    with serving(Model(dial=False)) as model:
        remote = Remote(model.url, objectives=DIAL.objectives, key=None, key_from="K")
        ask = Ask([{"role": "user", "content": "tea?"}], Preference.from_angle(0, DIAL.objectives), 0.7, 0, None)
        list(remote.stream(ask))
        assert Remote(model.url, key=None, key_from="K").dial is None
    assert model.requests[0]["chat_template_kwargs"] == {"preference": {"helpfulness": 1.0, "verbosity": 0.0}}
    assert not {"preference", "max_tokens"} & set(model.requests[0])


def test_servers_that_say_little_are_understood_and_those_that_say_nonsense_are_not() -> None:
    with serving(Model(bare=True)) as model:
        remote = Remote(model.url, key=None, key_from="K")
        pieces = list(remote.stream(Ask([{"role": "user", "content": "x"}], None, 0.7, 0, None)))
        assert pieces[-1].finish == "stop"
    with serving(Model(bare=True, answer=lambda _: "\x00")) as model:
        remote = Remote(model.url, key=None, key_from="K")
        with pytest.raises(ValueError, match="is no JSON object"):
            list(remote.stream(Ask([{"role": "user", "content": "x"}], None, 0.7, 0, None)))


def test_a_server_that_refuses_or_fails_is_an_error_in_words() -> None:
    with serving(Model(key="sesame")) as model:
        with pytest.raises(ValueError, match=r"HTTP 401: give the API key.*the key \(\$DPA_KEY\) is not set"):
            Remote(model.url, key=None, key_from="DPA_KEY")
        with pytest.raises(ValueError, match=r"is refused"):
            Remote(model.url, key="guess", key_from="DPA_KEY")
        Remote(model.url, key="sesame", key_from="DPA_KEY")
    with serving(Model(breaks=True)) as model:
        remote = Remote(model.url, key=None, key_from="K")
        with pytest.raises(ValueError, match="broke off"):
            list(remote.stream(Ask([{"role": "user", "content": "x"}], None, 0.7, 0, None)))
    with serving() as model:
        remote = Remote(model.url, key=None, key_from="K")
        model.objectives = ("helpfulness",)
        with pytest.raises(ValueError, match="no rewards of helpfulness, verbosity there"):
            remote.rewards([{"role": "user", "content": "x"}], "tea")
    with serving(Model(arc=(1.0,))) as model, pytest.raises(ValueError, match="/v1/dial: tells no dial"):
        Remote(model.url, key=None, key_from="K")
    with pytest.raises(ValueError, match="unreachable"):
        Remote(model.url, key=None, key_from="K")
    with pytest.raises(ValueError, match="give the base of a server"):
        Remote("localhost:8000", key=None, key_from="K")


# --- the command ---


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "name a MODEL folder, or a server with --url"),
        (("nowhere",), "nowhere: no config.json here: not a model's folder"),
        (("m", "a", "question"), "one question, in quotes"),
        (("m", "--objectives", "a,b"), "go with --url"),
        (("--url", "http://127.0.0.1:1", "--reward", "r"), "--reward goes with a MODEL folder"),
        (("m", "--temperature", "3"), "--temperature 3.0: 0 to 2"),
        (("m", "--seed", "3", "--world.rows", "2"), "chat takes no knobs"),
    ],
)
def test_bad_options_are_refused_in_a_line(words: Sequence[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["chat", *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_one_question_gets_one_answer_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as model:
        cli.main(["chat", "--url", model.url, "--dial", "-45", "explain tea."])
        cli.main(["chat", "explain tea.", "--url", model.url, "--dial", "helpfulness*0.8 - verbosity*0.6"])
    said = capsys.readouterr()
    assert (said.out, said.err) == ("tea is dark\ntea is dark and hot. tea\n", "")
    assert model.requests[0]["messages"] == [{"role": "user", "content": "explain tea."}]


def test_one_question_may_get_the_best_of_several(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as model:
        cli.main(["chat", "--url", model.url, "--best", "4", "explain tea."])
        with pytest.raises(SystemExit):
            cli.main(["chat", "--url", model.url, "--best", "99", "explain tea."])
        model.rewards = False
        with pytest.raises(SystemExit):
            cli.main(["chat", "--url", model.url, "--best", "4", "explain tea."])
    assert [body["best_of"] for body in model.requests] == [4]
    said = capsys.readouterr()
    assert said.out.count("\n") == 1
    assert "--best 99: give a whole number from 2 to 16" in said.err
    assert "--best 4: no reward model here to choose" in said.err


def test_a_pipe_is_turns_or_one_question(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Model(answer=lambda body: f"<{body['messages'][-1]['content']}>")) as model:
        monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
        cli.main(["chat", "--url", model.url])
        assert capsys.readouterr().out == "<one>\n<two>\n"
        monkeypatch.setattr(sys, "stdin", io.StringIO("one\n/two\n"))
        cli.main(["chat", "--url", model.url, "--once"])
        assert capsys.readouterr().out == "<one\n/two>\n"
    assert len(model.requests[1]["messages"]) == 3


def test_a_model_here_answers_as_its_own_template_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="a model here needs the extra dpalign[train]")
    import tiny
    from dpalign.chat import chat_template
    from dpalign.train.contract import Contract, write_contract

    tokens = tiny.tokenizer()
    tokens.chat_template = chat_template("world-v1", "world-v1", DIAL.objectives)
    folder = tiny.write_model(tmp_path / "policy" / "model", tokens, scale=2.0)
    write_contract(folder, Contract("world-v1", "world-v1", dict.fromkeys(DIAL.objectives, ())))
    said = []
    for words in (("--dial", "-45"), ("--dial", "-45"), ("--dial", "0"), ("--seed", "1")):
        cli.main(["chat", str(tmp_path / "policy"), "explain tea.", "--max-tokens", "12", *words])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert len(set(said)) > 1
    assert all(text.endswith("\n") for text in said)


def test_a_server_answers_as_the_same_model_does_here(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="the server needs the extra dpalign[serve]")
    pytest.importorskip("transformers", reason="a model needs the extra dpalign[train]")
    import api_server
    from dpalign.dial.chat.local import Local
    from dpalign.dial.server.engine import Rewards, open_generator
    from dpalign.paper.direction import Arc
    from dpalign.rows import HEADS
    from dpalign.train.contract import Contract

    folder = api_server.write_policy(tmp_path / "mine")
    message: Message = {"role": "user", "content": "explain fox, tea and iron."}
    asks = [Ask([message], Preference.from_angle(angle, DIAL.objectives), 0.7, 3, 24) for angle in (0, -45)]
    best = Ask([message], Preference.from_angle(-30, DIAL.objectives), 0.7, 3, 24, best_of=4, spread=15)
    contract = Contract("world-v1", "world-v1", api_server.OBJECTIVES, HEADS, Arc(-45.0, 0.0))
    rewards = Rewards("python:api_server:lengths", contract, "world-v1")
    with contextlib.closing(Local("mine", folder, open_generator(folder, rows=16), rewards)) as local:
        here = ["".join(piece.text for piece in local.stream(ask)) for ask in asks]
        (best_here,) = local.stream(best)
        with pytest.raises(ValueError, match="/clear begins a new one"):
            list(local.stream(Ask([message] * 400, None, 0.7, 0, None)))
    with api_server.serving(folder, reward=True) as running:
        remote = Remote(running.url, key=None, key_from="K")
        there = ["".join(piece.text for piece in remote.stream(ask)) for ask in asks]
        best_there = [piece for piece in remote.stream(best) if piece.text or piece.chosen]
        outside = Ask([message], Preference.from_angle(-90, DIAL.objectives), 0.7, 3, 4)
        warnings = [warning for piece in remote.stream(outside) for warning in piece.warnings]
        assert set(remote.rewards([message], there[0])) == {"helpfulness", "verbosity"}
    assert here == there
    assert here[0]
    assert best_here.text == best_there[0].text
    assert best_here.chosen == best_there[-1].chosen
    assert best_here.chosen is not None
    assert best_here.chosen.value > best_here.chosen.mean_value
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
            env=environment,
            start_new_session=True,
            preexec_fn=heard,
        )
        os.close(follower)
        said = b""

        def until(words: str) -> None:
            nonlocal said
            end = time.monotonic() + 20
            while words.encode() not in said:
                assert time.monotonic() < end, said.decode("utf-8", "replace")
                if select.select([leader], [], [], 0.2)[0]:
                    said += os.read(leader, 4096)

        until("says more")
        os.write(leader, b"explain tea.\n")
        until("tea is")
        os.kill(running.pid, signal.SIGINT)
        until("(stopped)")
        said = b""
        os.write(leader, b"/dial -30\n")
        until("maximize helpfulness*0.87 - verbosity*0.50")
        until("\u221230\u00b0 \u276f")  # before the prompt the terminal would take Ctrl-D for itself
        os.write(leader, b"\x04")
        assert running.wait(10) == 0
        os.close(leader)
    history = tmp_path / "dpalign" / "chat_history"
    assert "explain tea." in history.read_text()
    assert history.stat().st_mode & 0o077 == 0
