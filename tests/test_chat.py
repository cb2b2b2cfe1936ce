"""The chat in the terminal: its commands, what it draws, what it asks for, and how quiet it is in a pipe."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from dpalign.dial.best_of import BestOf
from dpalign.dial.chat import arc
from dpalign.dial.chat.command import answer_all, converse, first_direction
from dpalign.dial.chat.flowing import Columns, Wrapper, harmless, wide
from dpalign.dial.chat.session import Session
from dpalign.dial.chat.speakers import Ask, Piece, Pieces
from dpalign.dial.chat.terminal import Terminal
from dpalign.dial.dial import Dial
from dpalign.paper.direction import Preference
from dpalign.rows import Message

DIAL = Dial(("helpfulness", "verbosity"), "fig1", "zephyr", (-45.0, 0.0))


CHOSEN = BestOf(
    drawn=4,
    angle_spread=10.0,
    drawn_at={"helpfulness": 0.996195, "verbosity": -0.087156},
    rewards={"helpfulness": 70.0, "verbosity": 30.0},
    value=70.0,
    mean_value=64.25,
)
"""Of an answer drawn at -5 degrees and chosen at 0."""


class Parrot:
    """Says the last message again, with the angle that it was asked at."""

    name = "parrot"

    def __init__(self, dial: Dial | None = DIAL, scores: bool = True) -> None:
        self.dial, self.scores, self.max_best_of = dial, scores, 8 * scores
        self.asked: list[Ask] = []
        self.interrupted_after: int | None = None

    def stream(self, ask: Ask) -> Pieces:
        self.asked.append(ask)
        if ask.messages[-1]["content"] == "fail":
            raise ValueError("the parrot is ill")
        at = "" if ask.preference is None or self.dial is None else f" at {self.dial.angle_of(ask.preference):g}"
        for i, word in enumerate(f"{ask.messages[-1]['content']}{at} seed {ask.seed}".split(" ")):
            if i == self.interrupted_after:
                raise KeyboardInterrupt
            yield Piece(f" {word}" if i else word)
        yield Piece("", "stop", chosen=CHOSEN if ask.best_of else None)

    def rewards(self, messages: Sequence[Message], answer: str) -> Mapping[str, float]:
        return {"helpfulness": 80.0, "verbosity": float(len(answer))}

    def close(self) -> None:
        pass


def chat(*lines: str, speaker: Parrot | None = None, columns: int = 100, **options: object) -> tuple[str, Session]:
    """What a user sees who types these lines and leaves, without colours; and the session at the end."""
    out, typed = io.StringIO(), iter(lines)

    def read(prompt: str) -> str:
        line = next(typed, None)
        out.write(f"{prompt}{line or ''}\n")
        if line is None:
            raise EOFError
        return line

    terminal = Terminal(out, out, read, size=lambda: (columns, 40))
    terminal.colour = False
    session = Session(speaker or Parrot(), terminal, Preference.from_angle(0, DIAL.objectives), **options)  # type: ignore[arg-type]
    if session.dial is None:
        session.preference = None
    converse(session)
    return out.getvalue(), session


def test_the_dial_turns_and_the_next_answer_follows() -> None:
    turns = ("/dial -30", "/dial helpfulness=0.8 verbosity=-0.6", "/dial off")
    said, session = chat("tea?", *(line for turn in turns for line in (turn, "tea?")))
    assert [turn.answer for turn in session.turns] == [
        *("tea? at 0 seed 0", "tea? at -30 seed 0", "tea? at -36.8699 seed 0", "tea? seed 0"),
    ]
    assert "\u221230\u00b0  maximize helpfulness*0.87 - verbosity*0.50" in said
    assert [turn.preference is None for turn in session.turns] == [False, False, False, True]


def test_a_message_is_read_with_those_before_it_unless_memory_is_off() -> None:
    speaker = Parrot()
    chat(
        "/system Be kind.",
        "tea?",
        "iron?",
        "/memory off",
        "oak?",
        "/clear",
        "/memory on",
        "/system off",
        "owl?",
        speaker=speaker,
    )
    contents = [[message["content"] for message in ask.messages] for ask in speaker.asked]
    assert contents == [
        ["Be kind.", "tea?"],
        ["Be kind.", "tea?", "tea? at 0 seed 0", "iron?"],
        ["Be kind.", "oak?"],
        ["owl?"],
    ]


def test_retry_draws_the_next_seed_where_the_dial_stands_now() -> None:
    _, session = chat("/seed 5", "tea?", "/dial -45", "/retry", "/retry", "/temperature 0", "/tokens 7", "iron?")
    assert [turn.answer for turn in session.turns] == ["tea? at -45 seed 7", "iron? at -45 seed 5"]
    last = session.speaker.asked[-1]  # type: ignore[attr-defined]
    assert (last.temperature, last.max_tokens) == (0, 7)
    assert last.messages[1]["content"] == "tea? at -45 seed 7"


def test_two_directions_stand_side_by_side_in_a_wide_terminal_and_below_each_other_in_a_narrow_one() -> None:
    wide_said, session = chat("tea?", "/compare -45 0")
    first, second = "helpfulness*0.71 - verbosity*0.71", "helpfulness*1.00 - verbosity*0.00"
    assert f"\u221245\u00b0  {first}{' ' * 12}0\u00b0  {second}\n" in wide_said
    assert re.search(r"^tea\? at -45 seed 0 {33}tea\? at 0 seed 0$", last_screen(wide_said), re.MULTILINE)
    assert [turn.answer for turn in session.turns] == ["tea? at 0 seed 0"]  # the chat goes on as it was
    narrow_said, _ = chat("tea?", "/compare -45 0", columns=60)
    assert "\u221245\u00b0\ntea? at -45 seed 0\n0\u00b0\ntea? at 0 seed 0\n" in narrow_said


def last_screen(said: str) -> str:
    """What a terminal shows in the end."""
    rows, at = [""], 0
    for part in re.findall(r"\x1b\[\d*[AJ]|[\n\r]|[^\x1b\n\r]+", said):
        if part == "\n":
            at += 1
            rows += [""] * (at == len(rows))
        elif part.endswith("A") and part.startswith("\x1b"):
            at -= int(part[2:-1])
        elif part == "\x1b[J":
            rows[at:] = [""]
        elif part != "\r":
            rows[at] += part
    return "\n".join(rows)


def test_before_the_first_message_compare_waits_for_it_and_the_first_answer_goes_on() -> None:
    said, session = chat("/compare helpfulness=1 | -45", "tea?", "iron?")
    assert "0\u00b0 | \u221245\u00b0 \u276f tea?" in said
    assert [turn.answer for turn in session.turns] == ["tea? at 0 seed 0", "iron? at 0 seed 0"]


def test_scores_show_what_an_answer_is_worth_to_its_user() -> None:
    said, session = chat("/dial -45", "/score on", "tea?", "/score off", "iron?")
    # 80 * 0.7071 - 18 * 0.7071 = 43.8: "tea? at -45 seed 0" has 18 characters
    assert re.search(r"helpfulness  80\.0  \u2501+", said)
    assert "v.r          43.8  helpfulness*0.71 - verbosity*0.71" in said
    assert [turn.rewards is None for turn in session.turns] == [False, True]
    assert "no reward model here" in chat("/score", speaker=Parrot(scores=False))[0]


def test_the_best_of_several_answers_is_asked_for_and_says_how_it_was_chosen(tmp_path: Path) -> None:
    file, speaker = tmp_path / "chat.json", Parrot()
    first = ("/score on", "/best 4", "tea?", f"/save {file}")
    said, session = chat(*first, "/best 8 2.5", "/compare -45 0", "/best", "/best off", "oak?", speaker=speaker)
    assert "0\u00b0 best of 4 \u276f tea?\ndrawing 4 answers\n" in said
    assert "the best of 4 within 10\u00b0, drawn at \u22125\u00b0: v.r 70.0, the mean of all 64.2\n" in said
    assert re.search(r"helpfulness  70\.0  \u2501+", said)  # by the one who chose, not asked again: else 80
    assert [(ask.best_of, ask.spread) for ask in speaker.asked] == [(4, None), (8, 2.5), (8, 2.5), (None, None)]
    assert "the best of 8 answers drawn within 2.5\u00b0 of the direction, by the reward model\n" in said
    assert json.loads(file.read_text())["turns"][0]["best_of"] == CHOSEN.model_dump()
    assert [turn.to_json()["best_of"] is None for turn in session.turns] == [False, True]


def test_the_best_of_several_needs_a_reward_model_and_a_direction() -> None:
    said, session = chat("/best 4", "/dial off", "tea?", "/dial -30", "tea?")
    assert "the best of 4 answers is chosen by a direction: /dial turns to one, /best off draws one" in said
    assert [turn.answer for turn in session.turns] == ["tea? at -30 seed 0"]
    said, _ = chat("/best 4", speaker=Parrot(scores=False))
    assert "/best 4: no reward model here to choose" in said
    assert "the best of four" not in said  # nor is it offered


def test_a_stopped_answer_stays_and_the_chat_goes_on() -> None:
    speaker = Parrot()
    speaker.interrupted_after = 2
    said, session = chat("tea?", speaker=speaker)
    assert session.turns[0].answer == "tea? at"
    assert "tea? at\n(stopped)" in said


def test_what_cannot_be_done_is_said_and_changes_nothing(tmp_path: Path) -> None:
    stands = tmp_path / "stands.json"
    stands.write_text("mine")
    for line, words in {
        "/dail -30": r"unknown command /dail \(nearest: '/dial'",
        "/dial kindness=1": "unknown objective 'kindness'.*known: helpfulness, verbosity",
        "/dial 0*helpfulness": "zero",
        "/compare -45": "give two directions",
        "/seed -1": "give a whole number from 0 up",
        "/temperature hot": "give a number from 0 to 2",
        "/retry": "nothing to answer again",
        "/save": "name a file",
        f"/save {stands}": "stands already",
        "/score maybe": "give on or off",
        "/best 9": "/best 9: give a whole number from 2 to 8",
        "/best two": "/best two: give a whole number from 2 to 8",
        "/best 4 wide": "/best 4 wide: give a number from 0 to 180",
        "fail": "the parrot is ill",
    }.items():
        said, session = chat(line)
        assert re.search(words, said), (line, said)
        assert session.turns == []
        assert session.preference == Preference.from_angle(0, DIAL.objectives)
        assert (session.best_of, session.spread) == (None, None)
    assert stands.read_text() == "mine"


def test_a_failed_retry_keeps_the_answer_there_was() -> None:
    speaker = Parrot()
    _, session = chat("tea?", speaker=speaker)
    session.turns[0].question = "fail"
    with pytest.raises(ValueError, match="ill"):
        session.retry()
    assert session.turns[0].answer == "tea? at 0 seed 0"


def test_a_direction_outside_the_trained_range_is_warned_of() -> None:
    said, _ = chat("/dial -80")
    assert "-80 degrees (helpfulness=0.17 verbosity=-0.98) lies outside" in said


def test_a_message_may_begin_with_a_slash_and_go_on_in_the_next_line() -> None:
    _, session = chat("//dial is a path", "one \\", "two")
    assert [turn.question for turn in session.turns] == ["/dial is a path", "one \ntwo"]


def test_a_saved_chat_says_how_each_answer_was_drawn(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    chat("/dial -45", "tea?", f"/save {file}", "iron?", f"/save {file}")
    saved = json.loads(file.read_text())
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant"] * 2
    first = saved["turns"][0]
    assert first["question"] == "tea?"
    assert first["preference"]["verbosity"] == pytest.approx(-(0.5**0.5))
    assert (first["seed"], first["temperature"], first["finish"]) == (0, 0.7, "stop")


def test_help_names_every_command() -> None:
    said, _ = chat("/help")
    for name in ("dial", "compare", "best", "score", "system", "seed", "temperature", "retry", "clear", "save", "quit"):
        assert f"/{name}" in said


def test_the_arc_shows_where_one_stands() -> None:
    terminal = Terminal(io.StringIO(), io.StringIO(), size=lambda: (100, 40))
    terminal.colour = False
    lines = arc.drawn(terminal, DIAL, Preference.from_angle(-30, DIAL.objectives))
    assert any(line.endswith("\u25cf \u221230\u00b0") for line in lines)
    said = "\u221230\u00b0  maximize helpfulness*0.87 - verbosity*0.50; trained on \u221245\u00b0 to 0\u00b0"
    assert lines[-1] == said
    assert max(map(len, lines)) < 90


def test_a_terminal_of_few_letters_gets_them_alone() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    terminal = Terminal(out, out, size=lambda: (100, 40))
    terminal.colour = False
    terminal.draw(arc.drawn(terminal, DIAL, Preference.from_angle(-30, DIAL.objectives)))
    out.seek(0)
    assert "o -30 deg" in out.read()


def test_more_objectives_are_drawn_as_scales() -> None:
    dial = Dial(("helpfulness", "honesty", "verbosity"), "fig1", "zephyr")
    terminal = Terminal(io.StringIO(), io.StringIO(), size=lambda: (100, 40))
    terminal.colour = False
    lines = arc.drawn(terminal, dial, dial.parse("helpfulness=3 verbosity=-4"))
    assert [line[-5:] for line in lines[:3]] == ["+0.60", "+0.00", "-0.80"]
    assert lines[2].index("\u25cf") < lines[1].index("\u25cf") < lines[0].index("\u25cf")


def test_a_chat_begins_at_the_first_objective_alone_or_in_the_middle_of_an_arc_without_it() -> None:
    middle = Dial(DIAL.objectives, "fig1", "zephyr", (-60.0, -20.0))
    assert first_direction(DIAL, None) == Preference.from_angle(0, DIAL.objectives)
    assert first_direction(middle, None) == Preference.from_angle(-40, DIAL.objectives)
    assert first_direction(DIAL, "none") is None
    assert first_direction(None, None) is None
    with pytest.raises(ValueError, match="takes no directions"):
        first_direction(None, "-30")


@pytest.mark.parametrize("step", [1, 2, 7, 100])
def test_lines_break_between_words_however_the_text_comes(step: int) -> None:
    han = "\u6f22\u5b57\u6f22\u5b57\u6f22"
    text = f"one two  three\n\nfour abcdefghijklmnop five {han}"
    wrapper = Wrapper(10)
    said = "".join(wrapper.push(text[i : i + step]) for i in range(0, len(text), step)) + wrapper.flush()
    assert said.split("\n") == ["one two", "three", "", "four", "abcdefghij", "klmnop", "five", han]
    assert max(map(wide, said.split("\n"))) <= 10


def test_two_columns_end_up_whole_however_unevenly_they_come() -> None:
    out = io.StringIO()
    columns = Columns(out, 12, lambda: 5)  # a window of five lines
    left = "\n".join(f"left {i}" for i in range(9))
    columns.push(0, left)
    assert out.getvalue().count("\n") <= 3  # what could still change must stay within the window
    columns.push(1, "right 0\nright 1\n")
    columns.push(1, "right 2")
    columns.finish()
    rows = last_screen(out.getvalue()).rstrip("\n").split("\n")
    assert rows[:4] == ["left 0         right 0", "left 1         right 1", "left 2         right 2", "left 3"]
    assert len(rows) == 9


def test_an_answer_cannot_command_the_terminal() -> None:
    assert harmless("a\x1b[2Jb\x07\x9b1mc\r\u2028d\ne\tf") == "a\u241b[2Jb\u2407\ufffd1mc\u240d\ufffdd\ne\tf"


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    assert Terminal(out, out).styled("a", "warning") == "\x1b[33ma\x1b[0m"
    assert Terminal(out, out, tty=False).styled("a", "warning") == "a"
    monkeypatch.setenv("NO_COLOR", "1")
    assert Terminal(out, out).styled("a", "warning") == "a"


def test_in_a_pipe_only_the_answers_go_to_stdout() -> None:
    out, notes = io.StringIO(), io.StringIO()
    quiet = Terminal(out, notes, tty=False)
    session = Session(Parrot(), quiet, Preference.from_angle(0, DIAL.objectives), scoring=True)
    answer_all(session, ["tea?", "", "/dial -80", "iron?"])
    assert out.getvalue() == "tea? at 0 seed 0\niron? at -80 seed 0\n"
    assert "lies outside" in notes.getvalue()
    with pytest.raises(ValueError, match="unknown command"):
        answer_all(session, ["/dail -30", "never asked"])
    answer_all(session, ["/dial is no command here"], commands=False)
    assert out.getvalue().endswith("/dial is no command here at -80 seed 0\n")
