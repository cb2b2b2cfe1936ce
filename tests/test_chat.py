"""The chat in the terminal: its commands, what it shows, what it asks a model for, and how quiet it is in a pipe."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from dpalign.dial.chat.command import answer_all, converse, first_direction
from dpalign.dial.chat.session import COMMANDS, Session
from dpalign.dial.chat.speakers import Ask, BestOf, Piece, Pieces, Speaker
from dpalign.dial.chat.terminal import Terminal, harmless
from dpalign.dial.dial import Dial
from dpalign.dial.server.shapes import DialReply
from dpalign.paper.direction import Arc, Preference
from dpalign.rows import Message
from dpalign.train.contract import Length

DIAL = Dial(("helpfulness", "verbosity"), "fig1", "zephyr", Arc(-45.0, 0.0))
AHEAD = Preference.from_angle(0, DIAL.objectives)

BEST = BestOf(
    drawn=4,
    angle_spread=10.0,
    drawn_at={"helpfulness": 0.996195, "verbosity": -0.087156},
    rewards={"helpfulness": 70.0, "verbosity": 30.0},
    value=70.0,
    mean_value=64.25,
)
"""Of an answer drawn at -5 degrees and chosen at 0."""


class Parrot(Speaker):
    """Repeats the last message, with the angle and the seed of the request."""

    def __init__(self, dial: Dial | None = DIAL, scores: bool = True, interrupted_after: int | None = None) -> None:
        questions = ["tea?", "iron?"]
        super().__init__(
            DialReply(model="parrot", objectives=[], max_best_of=8 * scores, note="It repeats.", questions=questions)
        )
        self.dial = dial
        self.interrupted_after = interrupted_after
        self.requests: list[Ask] = []

    def stream(self, ask: Ask) -> Pieces:
        self.requests.append(ask)
        if ask.messages[-1]["content"] == "fail":
            raise ValueError("the parrot is ill")
        at = "" if ask.preference is None or self.dial is None else f" at {self.dial.angle_of(ask.preference):g}"
        for i, word in enumerate(f"{ask.messages[-1]['content']}{at} seed {ask.seed}".split(" ")):
            if i == self.interrupted_after:
                raise KeyboardInterrupt
            yield Piece(f" {word}" if i else word)
        yield Piece("", "stop", choice=BEST if ask.best_of else None)

    def rewards(self, messages: Sequence[Message], answer: str) -> Mapping[str, float]:
        return {"helpfulness": 80.0, "verbosity": float(len(answer))}


def console(out: io.StringIO, width: int, height: int = 40) -> Console:
    """A terminal that is only written to: no colours, and no row is painted again."""
    return Console(file=out, width=width, height=height, force_terminal=True, _environ={"TERM": "dumb"})


def chat(*lines: str, speaker: Parrot | None = None, columns: int = 100) -> tuple[str, Session]:
    """What a user sees who types these lines and leaves, without colours; and the session at the end."""
    out, typed = io.StringIO(), iter(lines)

    def read(prompt: str) -> str:
        line = next(typed, None)
        out.write(f"{prompt}{line or ''}\n")
        if line is None:
            raise EOFError
        return line

    speaker = speaker or Parrot()
    terminal = Terminal(console(out, columns), read=read)
    session = Session(speaker, terminal, first_direction(speaker.dial, None))
    converse(session)
    return out.getvalue(), session


def test_the_dial_turns_and_the_next_answer_follows() -> None:
    turns = ("/dial -30", "/dial helpfulness=0.8 verbosity=-0.6", "/dial off")
    screen, session = chat("tea?", *(line for turn in turns for line in (turn, "tea?")))
    assert [turn.answer for turn in session.turns] == [
        *("tea? at 0 seed 0", "tea? at -30 seed 0", "tea? at -36.8699 seed 0", "tea? seed 0"),
    ]
    assert "\u221230°  maximize helpfulness*0.87 - verbosity*0.50" in screen
    assert [turn.preference is None for turn in session.turns] == [False, False, False, True]


def test_a_word_for_a_length_turns_the_dial() -> None:
    levels = {"low": Length(-40.0, 12.0), "medium": Length(-22.5, 16.0), "high": Length(-5.0, 20.0)}
    speaker = Parrot(replace(DIAL, verbosity=levels))
    screen, session = chat("/verbosity", "/verbosity low", "tea?", "/verbosity tiny", "tea?", speaker=speaker)
    assert [turn.answer for turn in session.turns] == ["tea? at -40 seed 0"] * 2
    assert "low \u221240\u00b0 (12 words), medium" in screen
    assert "verbosity 'tiny'; give low, medium, high" in screen


def test_a_chat_begins_with_the_speakers_name_and_questions_that_work() -> None:
    screen, _ = chat()
    assert screen.startswith("parrot\nIt repeats.\n")
    assert "\n  tea?\n  iron?\n" in screen


def test_a_message_is_read_with_those_before_it_unless_memory_is_off() -> None:
    speaker = Parrot()
    first = ("/system Be kind.", "tea?", "iron?", "/memory off", "oak?")
    chat(*first, "/clear", "/memory on", "/system off", "owl?", speaker=speaker)
    contents = [[message["content"] for message in ask.messages] for ask in speaker.requests]
    assert contents == [
        ["Be kind.", "tea?"],
        ["Be kind.", "tea?", "tea? at 0 seed 0", "iron?"],
        ["Be kind.", "oak?"],
        ["owl?"],
    ]


def test_retry_draws_the_next_seed_where_the_dial_stands_now() -> None:
    speaker = Parrot()
    lines = ("/seed 5", "tea?", "/dial -45", "/retry", "/retry", "/temperature 0", "/tokens 7", "iron?")
    _, session = chat(*lines, speaker=speaker)
    assert [turn.answer for turn in session.turns] == ["tea? at -45 seed 7", "iron? at -45 seed 5"]
    last = speaker.requests[-1]
    assert (last.temperature, last.max_tokens, last.messages[1]["content"]) == (0, 7, "tea? at -45 seed 7")


def test_a_failed_retry_keeps_the_answer_there_was() -> None:
    _, session = chat("tea?")
    session.turns[0].ask = Ask([{"role": "user", "content": "fail"}], AHEAD, 0.7, 0, None)
    with pytest.raises(ValueError, match="ill"):
        session.retry()
    assert session.turns[0].answer == "tea? at 0 seed 0"


def test_two_directions_stand_side_by_side_in_a_wide_terminal_and_below_each_other_in_a_narrow_one() -> None:
    wide, session = chat("tea?", "/compare -45 0")
    titles = r"^\u221245°  helpfulness\*0\.71 - verbosity\*0\.71 +0°  helpfulness\*1\.00 - verbosity\*0\.00 *$"
    assert re.search(titles, wide, re.MULTILINE)
    assert re.search(r"^tea\? at -45 seed 0 {33}tea\? at 0 seed 0 *$", wide, re.MULTILINE)
    assert [turn.answer for turn in session.turns] == ["tea? at 0 seed 0"]  # the chat goes on as it was
    narrow, _ = chat("tea?", "/compare -45 0", columns=60)
    assert re.search(r"^\u221245°.*\ntea\? at -45 seed 0\n+0°.*\ntea\? at 0 seed 0$", narrow, re.MULTILINE)


def test_before_the_first_message_compare_waits_for_it_and_the_first_answer_goes_on() -> None:
    screen, session = chat("/compare helpfulness=1 | -45", "tea?", "iron?")
    assert "0° | \u221245° \u276f tea?" in screen
    assert [turn.answer for turn in session.turns] == ["tea? at 0 seed 0", "iron? at 0 seed 0"]


def test_after_a_refused_message_the_next_is_still_answered_at_two_directions() -> None:
    speaker = Parrot()
    _, session = chat("/compare -45 0", "fail", "tea?", "iron?", speaker=speaker)
    assert [turn.answer for turn in session.turns] == ["tea? at -45 seed 0", "iron? at 0 seed 0"]
    assert [turn.question for turn in session.last_answers] == ["iron?"]
    assert sum(ask.messages[-1]["content"] == "tea?" for ask in speaker.requests) == 2
    assert session.compared is None


def test_scores_show_the_value_of_an_answer_to_its_user() -> None:
    screen, session = chat("/dial -45", "/score on", "tea?", "/score off", "iron?")
    # 80 * 0.7071 - 18 * 0.7071 = 43.8: "tea? at -45 seed 0" has 18 characters
    assert re.search(r"helpfulness +80\.0  ━+", screen)
    assert re.search(r"v\.r +43\.8  helpfulness\*0\.71 - verbosity\*0\.71", screen)
    assert [turn.rewards is None for turn in session.turns] == [False, True]


def test_the_best_of_several_answers_shows_its_direction_and_its_value(tmp_path: Path) -> None:
    file, speaker = tmp_path / "chat.json", Parrot()
    first = ("/score on", "/best 4", "tea?", f"/save {file}")
    screen, session = chat(*first, "/best 8 2.5", "/compare -45 0", "/best off", "oak?", speaker=speaker)
    assert "0° best of 4 \u276f tea?" in screen
    assert "the best of 4 within 10°, drawn at \u22125°: v.r 70.0, the mean of all 64.2" in screen
    assert re.search(r"helpfulness +70\.0", screen)  # the rewards by which it was chosen; asked again, 80
    asks = [(ask.best_of, ask.spread) for ask in speaker.requests]
    assert asks == [(4, None), (8, 2.5), (8, 2.5), (None, None)]
    assert json.loads(file.read_text())["turns"][0]["best_of"]["mean_value"] == 64.25
    assert [turn.to_json()["best_of"] is None for turn in session.turns] == [False, True]


def test_the_best_of_several_needs_a_direction() -> None:
    screen, session = chat("/best 4", "/dial off", "tea?", "/dial -30", "tea?")
    assert "the best of 4 answers is chosen by a direction" in screen
    assert [turn.answer for turn in session.turns] == ["tea? at -30 seed 0"]


@pytest.mark.parametrize("command", ["/score", "/best 4"])
def test_without_a_reward_model_nothing_is_scored(command: str) -> None:
    assert "--reward DIR" in chat(command, speaker=Parrot(scores=False))[0]
    assert "takes no directions" in chat("/dial 0", speaker=Parrot(dial=None))[0]


def test_a_stopped_answer_stays_and_the_chat_goes_on() -> None:
    screen, session = chat("tea?", speaker=Parrot(interrupted_after=2))
    assert session.turns[0].answer == "tea? at"
    assert "tea? at\n(stopped)" in screen


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/dail -30", r"unknown command /dail \(nearest: '/dial'"),
        ("/dial kindness=1", "unknown objective 'kindness'.*known: helpfulness, verbosity"),
        ("/dial 0*helpfulness", "zero"),
        ("/verbosity low", "no lengths of answers are on record for this model; give a preference"),
        ("/compare -45", "give two directions"),
        (f"/seed {2**63}", f"/seed {2**63}: give a whole number from {-(2**63)} to {2**63 - 1}"),
        ("/tokens 0", "give a whole number from 1 up"),
        ("/temperature hot", "give a number from 0 to 2"),
        ("/retry", "nothing to answer again"),
        ("/save", "name a file"),
        ("/score maybe", "give on or off"),
        ("/best 9", "/best 9: give a whole number from 2 to 8"),
        ("/best two", "/best two: give a whole number from 2 to 8"),
        ("/best 4 wide", "/best 4 wide: give a number from 0 to 180"),
        ("fail", "the parrot is ill"),
    ],
)
def test_a_bad_command_names_its_cure_and_changes_nothing(line: str, words: str) -> None:
    screen, session = chat(line)
    assert re.search(words, " ".join(screen.split()))  # it may go on in the next line
    assert (session.turns, session.preference, session.best_of, session.spread) == ([], AHEAD, None, None)


def test_a_saved_chat_has_how_each_answer_was_drawn_and_takes_no_other_files_place(tmp_path: Path) -> None:
    file, other = tmp_path / "chat.json", tmp_path / "mine.json"
    other.write_text("mine")
    screen, _ = chat("/dial -45", "tea?", f"/save {file}", "iron?", f"/save {file}", f"/save {other}")
    assert f"{other} exists already" in screen.replace("\n", "")
    assert other.read_text() == "mine"
    saved = json.loads(file.read_text())
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant"] * 2
    first = saved["turns"][0]
    assert first["preference"]["verbosity"] == pytest.approx(-(0.5**0.5))
    assert (first["question"], first["seed"], first["temperature"], first["finish"]) == ("tea?", 0, 0.7, "stop")


def test_a_direction_outside_the_trained_range_is_warned_of() -> None:
    assert "-80 degrees (helpfulness=0.17 verbosity=-0.98)" in chat("/dial -80")[0]


def test_a_message_may_begin_with_a_slash_and_go_on_in_the_next_line() -> None:
    _, session = chat("//dial is a path", "one \\", "two")
    assert [turn.question for turn in session.turns] == ["/dial is a path", "one \ntwo"]


def test_help_names_every_command() -> None:
    screen, _ = chat("/help")
    assert all(name in screen for name in COMMANDS)


def test_the_dial_is_a_scale_an_objective() -> None:
    dial = Dial(("helpfulness", "honesty", "verbosity"), "fig1", "zephyr")
    screen, _ = chat("/dial helpfulness=3 verbosity=-4", "/dial", speaker=Parrot(dial))
    rows = [line for line in screen.splitlines() if "●" in line][-3:]
    assert [row.split()[-1] for row in rows] == ["+0.60", "+0.00", "-0.80"]
    assert rows[2].index("●") < rows[1].index("●") < rows[0].index("●")


def test_a_chat_begins_at_the_first_objective_alone_or_in_the_middle_of_an_arc_without_it() -> None:
    middle = Dial(DIAL.objectives, "fig1", "zephyr", Arc(-60.0, -20.0))
    assert first_direction(DIAL, None) == AHEAD
    assert first_direction(middle, None) == Preference.from_angle(-40, DIAL.objectives)
    assert first_direction(DIAL, "none") is None
    assert first_direction(None, None) is None
    with pytest.raises(ValueError, match="takes no directions"):
        first_direction(None, "-30")


def shown(pieces: Sequence[tuple[int, str]], width: int, height: int = 40, columns: int = 1) -> list[str]:
    """The lines of a terminal after a stream."""
    out = io.StringIO()
    Terminal(console(out, width, height)).stream(iter(pieces), columns)
    return [line.rstrip() for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("step", [1, 2, 7, 100])
def test_lines_break_between_words_however_the_text_comes(step: int) -> None:
    text = "one two  three\n\nfour abcdefghijklmnop five 漢字漢字漢字"
    pieces = [(0, text[i : i + step]) for i in range(0, len(text), step)]
    assert shown(pieces, 10) == ["one two", "three", "", "four", "abcdefghij", "klmnop", "five", "漢字漢字漢", "字"]


def test_two_columns_end_up_whole_however_unevenly_they_come() -> None:
    left = "\n".join(f"left {i}" for i in range(9))
    rows = shown([(0, left), (1, "right 0\nright 1\n"), (1, "right 2")], 28, 5, columns=2)
    assert rows[:4] == ["left 0         right 0", "left 1         right 1", "left 2         right 2", "left 3"]
    assert len(rows) == 9


def test_an_answer_cannot_command_the_terminal() -> None:
    evil = "a\x1b[2Jb\x07\x9b1mc\r\u2028d\ne\tf[bold]g"
    assert harmless(evil) == "a␛[2Jb␇\ufffd1mc␍\ufffdd\ne\tf[bold]g"
    out = io.StringIO()
    terminal = Terminal(console(out, 60))
    terminal.stream([(0, evil)])
    terminal.say(f"a warning {evil}", "yellow")
    assert "\x1b" not in out.getvalue()
    assert out.getvalue().count("[bold]g") == 2  # rich's markup is text too


def test_in_a_pipe_only_the_answers_go_to_stdout() -> None:
    out, notes = io.StringIO(), io.StringIO()
    quiet = Terminal(console(notes, 80), out)
    session = Session(Parrot(), quiet, AHEAD)
    answer_all(session, ["tea?", "", "/dial -80", "iron?"])
    assert out.getvalue() == "tea? at 0 seed 0\niron? at -80 seed 0\n"
    assert notes.getvalue().count("\n") == 1  # the warning, in a line however long
    with pytest.raises(ValueError, match="unknown command"):
        answer_all(session, ["/dail -30", "never asked"])
    answer_all(session, ["/dial is no command here"], commands=False)
    assert out.getvalue().endswith("/dial is no command here at -80 seed 0\n")


def test_who_prefers_the_shorter_of_two_answers_turns_the_dial_to_brevity() -> None:
    screen, session = chat("/score on", "tea?", "/compare -45 0", "/prefer b", "/prefer b")
    # the parrot's answer at 0 degrees is a character shorter than that at -45, and as helpful
    assert session.preference is not None
    assert session.preference.angle < AHEAD.angle - 20
    assert len(session.choices) == 1
    assert "no two answers" in screen  # the second /prefer has nothing to choose between


def test_a_preference_can_be_shown_and_taken_back() -> None:
    screen, session = chat("/score on", "/prefer", "/prefer undo", "tea?", "/compare -45 0", "/prefer b", "/prefer")
    assert "1 choice:" in screen
    assert "1 choices" not in screen
    screen, session = chat("/score on", "tea?", "/compare -45 0", "/prefer b", "iron?", "/prefer a", "/prefer undo")
    assert len(session.choices) == 1
    assert session.preference is not None
    assert session.preference.angle < AHEAD.angle - 20  # as after the first choice


def test_a_preference_without_rewards_or_a_side_says_what_to_do() -> None:
    screen, session = chat("tea?", "/compare -45 0", "/prefer left", "/prefer a", speaker=Parrot(scores=False))
    assert "/prefer a or /prefer b" in screen
    assert "--reward" in screen
    assert session.choices == []
