"""A chat with a dial: its turns, its settings, and the slash commands that change them."""

import math
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, TypeVar

from rich.table import Table
from rich.text import Text

from dpalign.dial import TEMPERATURE
from dpalign.dial.best_of import SPREAD, BestOf
from dpalign.dial.chat.speakers import Ask, Piece, Speaker
from dpalign.dial.chat.terminal import STYLES, Terminal
from dpalign.dial.dial import Dial
from dpalign.dial.server.engine import RANGES
from dpalign.dial.taste import KEYS, Choice, Estimate, made
from dpalign.page.words import degrees, number
from dpalign.paper.direction import Preference, name_hint
from dpalign.rows import Message
from dpalign.runs.ledger import write_json

_T = TypeVar("_T")
_N = TypeVar("_N", int, float)


@dataclass
class Turn:
    """A question with its answer, and how it was drawn."""

    ask: Ask
    answer: str = ""
    finish: str = "stopped"
    """stop, length if it was cut, or stopped by the user."""
    rewards: Mapping[str, float] | None = None
    warnings: Sequence[str] = ()
    best_of: BestOf | None = None
    """How it was chosen, if it is the best of several."""

    @property
    def question(self) -> str:
        return self.ask.messages[-1]["content"]

    @property
    def preference(self) -> Preference | None:
        return self.ask.preference

    def add(self, piece: Piece) -> str:
        """Take in a piece of the answer; returns its text."""
        self.answer += piece.text
        self.finish = piece.finish or self.finish
        self.best_of = piece.choice or self.best_of
        self.warnings = (*self.warnings, *(one for one in piece.warnings if one not in self.warnings))
        return piece.text

    def to_json(self) -> dict[str, Any]:
        return {
            "question": self.question,
            "preference": None if self.preference is None else self.preference.weights,
            "seed": self.ask.seed,
            "temperature": self.ask.temperature,
            "answer": self.answer,
            "finish": self.finish,
            "rewards": None if self.rewards is None else dict(self.rewards),
            "warnings": list(self.warnings),
            "best_of": None if self.best_of is None else self.best_of.model_dump(),
        }


@dataclass
class Session:
    """One chat.

    Raises (all methods that ask the speaker):
        ValueError: the speaker refuses. The chat stays as it was.
    """

    speaker: Speaker
    terminal: Terminal
    preference: Preference | None = None
    system: str | None = None
    temperature: float = TEMPERATURE
    """Section 3.2's."""
    seed: int = 0
    max_tokens: int | None = None
    best_of: int | None = None
    """Draw this many answers and take the best; None draws one."""
    spread: float | None = None
    """Degrees around the direction within which they are drawn; None: the default."""
    scoring: bool = False
    memory: bool = True
    """A message is read with those before it; off for models that know only single questions."""
    turns: list[Turn] = field(default_factory=list)
    compared: tuple[Preference, Preference] | None = None
    """The two directions for the next message."""
    last_answers: Sequence[Turn] = ()
    """The answers to the last message: two, where directions were compared."""
    choices: list[Choice] = field(default_factory=list)
    """The user's choices between two answers: the rewards of the preferred one, and of the other."""
    saved: Path | None = None

    @property
    def dial(self) -> Dial | None:
        return self.speaker.dial

    def messages(self, turns: Sequence[Turn]) -> list[Message]:
        """A chat as a model reads it, without a direction."""
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for turn in turns if self.memory else ():
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages

    def ask(self, question: str) -> None:
        """Answer the next message: at the direction of the dial, or side by side at two."""
        directions = self.compared or (self.preference,)
        self.turns.append(self._answer(question, directions, self.seed, self.turns))
        self.compared = None

    def retry(self) -> None:
        """Answer the last message again, with the next seed, at the dial's present direction."""
        *before, last = self.turns
        self.turns = [*before, self._answer(last.question, (self.preference,), last.ask.seed + 1, before)]

    def compare(self, pair: tuple[Preference, Preference]) -> None:
        """Answer the last message at two directions; the chat goes on as it was."""
        *before, last = self.turns
        self._answer(last.question, pair, self.seed, before)

    def _answer(
        self, question: str, directions: Sequence[Preference | None], seed: int, before: Sequence[Turn]
    ) -> Turn:
        """Draw, show and score an answer at each direction; returns the first turn, which the chat keeps."""
        messages: list[Message] = [*self.messages(before), {"role": "user", "content": question}]
        drawing = (self.temperature, seed, self.max_tokens, self.best_of, self.spread)
        turns = [Turn(Ask(messages, preference, *drawing)) for preference in directions]
        if self.best_of is not None:
            if None in directions:
                cure = "/dial turns to one, /best off draws one"
                raise ValueError(f"the best of {self.best_of} answers is chosen by a direction: {cure}")
            self.terminal.say(f"drawing {self.best_of} answers", "dim")
        with suppress(KeyboardInterrupt):
            self._draw(turns)
        for turn in turns:
            self._say_how_it_ended(turn)
        if self.scoring and self.speaker.about.max_best_of and any(turn.answer.strip() for turn in turns):
            self._score(turns)
        self.last_answers = turns
        return turns[0]

    def _draw(self, turns: Sequence[Turn]) -> None:
        """Stream the answers: one, two side by side, or two one after the other in a narrow terminal."""
        if len(turns) > 1 and self.terminal.two_columns:
            self.terminal.show(*(self._title(turn, i) for i, turn in enumerate(turns)))
            with closing(self._both(turns)) as pieces:
                self.terminal.stream(pieces, len(turns))
            return
        for i, turn in enumerate(turns):
            if len(turns) > 1:
                self.terminal.show(self._title(turn, i))
            with closing(self.speaker.stream(turn.ask)) as stream:
                self.terminal.stream((0, turn.add(piece)) for piece in stream)

    def _both(self, turns: Sequence[Turn]) -> Generator[tuple[int, str], None, None]:
        """(column, text) of two answers as they come, each drawn in a thread of its own."""
        news: SimpleQueue[tuple[int, Piece | Exception | None]] = SimpleQueue()
        stop = threading.Event()

        def draw(column: int, turn: Turn) -> None:
            try:
                with closing(self.speaker.stream(turn.ask)) as stream:
                    for piece in stream:
                        news.put((column, piece))
                        if stop.is_set():
                            break
                news.put((column, None))
            except Exception as error:
                news.put((column, error))

        for column, turn in enumerate(turns):
            threading.Thread(target=draw, args=(column, turn), daemon=True).start()
        running = len(turns)
        try:
            while running:
                column, piece = news.get()
                if isinstance(piece, Exception):
                    raise piece
                if piece is None:
                    running -= 1
                else:
                    yield column, turns[column].add(piece)
        finally:
            stop.set()

    def _say_how_it_ended(self, turn: Turn) -> None:
        say = self.terminal.say
        if turn.finish == "stopped":
            say("(stopped)", "dim")
        elif turn.finish == "length":
            say("(cut at the longest answer: /tokens sets it)", "dim")
        elif not turn.answer.strip():
            say("(an empty answer)", "dim")
        for warning in turn.warnings:
            say(warning, "yellow")
        if turn.best_of is not None:
            best = turn.best_of
            where = "" if self.dial is None else f", drawn at {self.label(self.dial.read(best.drawn_at))}"
            worth = f"v.r {number(best.value)}, the mean of all {number(best.mean_value)}"
            say(f"the best of {best.drawn} within {degrees(best.angle_spread)}{where}: {worth}", "dim")

    def _score(self, turns: Sequence[Turn]) -> None:
        """Show the rewards of the answers, and their sums v . r."""
        tables = []
        for turn, style in zip(turns, STYLES, strict=False):
            chosen = turn.best_of
            try:
                rewards = chosen.rewards if chosen else self.speaker.rewards(turn.ask.messages, turn.answer)
            except ValueError as error:
                self.terminal.say(f"not scored: {error}", "yellow")
                continue
            turn.rewards, total, formula = rewards, "", ""
            if turn.preference is not None:
                total = number(sum(w * rewards[name] for name, w in turn.preference.weights.items()))
                formula = Dial.formula(turn.preference)
            tables.append(self.terminal.rewards(rewards, style, total, formula))
        self.terminal.say(style="dim")
        self.terminal.show(*tables)

    def _title(self, turn: Turn, i: int) -> Text:
        """The heading over one of two answers: its direction."""
        formula = "" if turn.preference is None else f"  {Dial.formula(turn.preference)}"
        return Text(self.label(turn.preference) + formula, STYLES[i])

    def label(self, preference: Preference | None) -> str:
        """The direction in a few characters; nothing for a model without a dial."""
        if self.dial is None:
            return ""
        return "plain" if preference is None else self.dial.label(preference)

    def draw_dial(self) -> None:
        """Show each objective's weight on a scale from -1 to 1, and the direction in words."""
        dial, preference = self.the_dial(), self.preference
        table = Table.grid(padding=(0, 2, 0, 0))
        for name in dial.objectives:
            weight = 0.0 if preference is None else preference.weights[name]
            scale = Text("\N{BOX DRAWINGS LIGHT HORIZONTAL}" * 21, "dim")
            if preference is not None:
                at = 10 + round(10 * weight)
                scale = scale[:at] + Text("\N{BLACK CIRCLE}", STYLES[0]) + scale[at + 1 :]
            table.add_row(name, scale, f"{weight:+.2f}")
        self.terminal.show(table)
        trained = f"; trained on {dial.trained}" if dial.trained else ""
        if preference is None:
            self.terminal.say(f"no direction: the plain model{trained}")
            return
        self.terminal.say(f"{self.label(preference)}  maximize {Dial.formula(preference)}{trained}")
        self.warn(preference)

    def warn(self, preference: Preference | None) -> None:
        """Warn of a direction outside the trained range."""
        if self.dial is not None and preference is not None and (warning := self.dial.warning(preference)):
            self.terminal.say(warning, "yellow")

    def the_dial(self) -> Dial:
        if self.dial is None:
            raise ValueError(f"{self.speaker.name} takes no directions, as far as is known (--objectives names them)")
        return self.dial

    def save(self, path: Path) -> None:
        """Write the chat as JSON: the messages as a model reads them, and every turn with how it was drawn.

        Raises:
            ValueError: the file exists, and this chat did not write it.
        """
        if path.exists() and path != self.saved:
            raise ValueError(f"{path} exists already; name another file")
        turns = [turn.to_json() for turn in self.turns]
        write_json(path, {"model": self.speaker.name, "messages": self.messages(self.turns), "turns": turns})
        self.saved = path


# --- commands ---


class Leave(Exception):
    """The user leaves the chat."""


def obey(session: Session, line: str) -> None:
    """Do what a line says: send a message, or obey a command that begins with a slash.

    Raises:
        ValueError: the command is unknown or cannot be done, or the speaker refuses; the turns are unchanged.
        Leave: the user wants to go.
    """
    if line.startswith("//"):
        session.ask(line[1:])
    elif not line.startswith("/"):
        session.ask(line)
    else:
        name, _, rest = line.partition(" ")
        if name not in COMMANDS:
            raise ValueError(f"unknown command {name} ({name_hint(name, list(COMMANDS))}); a message begins with //")
        COMMANDS[name].do(session, rest.strip())


def _dial(session: Session, rest: str) -> None:
    dial = session.the_dial()
    if rest:
        session.preference = None if rest in ("off", "none") else dial.parse(rest)
    session.compared = None
    if not rest or session.preference is None:
        session.draw_dial()
        return
    session.terminal.say(f"{session.label(session.preference)}  maximize {Dial.formula(session.preference)}", "dim")
    session.warn(session.preference)


def _verbosity(session: Session, rest: str) -> None:
    dial = session.the_dial()
    if not rest:
        session.terminal.say(dial.lengths or "no lengths of answers are on record for this model", "dim")
        return
    preference = dial.read(verbosity=rest)
    assert preference is not None
    session.preference, session.compared = preference, None
    session.terminal.say(f"{session.label(preference)}  maximize {Dial.formula(preference)}", "dim")


def _compare(session: Session, rest: str) -> None:
    dial = session.the_dial()
    if rest in ("", "off") and session.compared is not None:
        session.compared = None
        return
    parts = rest.split("|") if "|" in rest else rest.split()
    if len(parts) != 2:
        raise ValueError(f"give two directions, such as /compare -45 0, or with a bar between them; not {rest!r}")
    pair = dial.parse(parts[0]), dial.parse(parts[1])
    for preference in pair:
        session.warn(preference)
    if session.turns:
        session.compare(pair)
    else:
        session.compared = pair
        session.terminal.say("The next message is answered at both.", "dim")


def _prefer(session: Session, rest: str) -> None:
    """Learn from a choice, or take one back. Turn the dial to the direction estimated from all choices."""
    dial, word = session.the_dial(), rest.lower()
    if word == "undo":
        if not session.choices:
            raise ValueError("/prefer undo: nothing is chosen")
        session.choices.pop()
    elif word in KEYS:
        _choose(session, KEYS[word])
    elif word:
        raise ValueError("/prefer a or /prefer b: the left or the right one of two answers; /prefer undo takes it back")
    own = Estimate.of(dial, session.choices)
    known = f"{made(len(session.choices))}: {own.words}"
    session.terminal.say(
        known if session.choices else "nothing is chosen; /compare two answers, then /prefer one", "dim"
    )
    if not word or not session.choices:
        return
    session.preference, session.compared = own.direction, own.next
    if session.compared is not None:
        session.terminal.say("The next message is answered at two directions again; /compare off ends that.", "dim")


def _choose(session: Session, place: int) -> None:
    """Keep a choice between the last two answers.

    Raises:
        ValueError: no two answers with rewards are shown.
    """
    rewards = [turn.rewards for turn in session.last_answers if turn.rewards is not None]
    if len(rewards) != 2:
        cure = "/score on, then /compare -45 0" if session.speaker.about.max_best_of else "start with --reward DIR"
        raise ValueError(f"/prefer: no two answers with rewards are shown: {cure}")
    session.choices.append((rewards[place], rewards[1 - place]))
    session.last_answers = ()


def _best(session: Session, rest: str) -> None:
    if rest in ("off", "1"):
        session.best_of = session.spread = None
    elif rest:
        n, _, spread = rest.partition(" ")
        within = None if not spread else _named(f"/best {n}", spread.strip(), partial(_number, float, (0, 180)))
        session.best_of, session.spread = count_of_best(session.speaker, n, "/best"), within
    if session.best_of is None:
        session.terminal.say("one answer is drawn", "dim")
        return
    around = degrees(SPREAD if session.spread is None else session.spread)
    text = f"the best of {session.best_of} answers drawn within {around} of the direction, by the reward model"
    session.terminal.say(text, "dim")


def count_of_best(speaker: Speaker, n: str, option: str) -> int:
    """Read the number of answers to choose the best from.

    Raises:
        ValueError: no whole number, too many, or no reward model to choose; names the command or option.
    """
    require_rewards(speaker, f"{option} {n}")
    return _named(option, n, partial(_number, int, (2, speaker.about.max_best_of)))


def require_rewards(speaker: Speaker, option: str) -> None:
    """Raise ValueError if no reward model can score."""
    if not speaker.about.max_best_of:
        cure = "start with --reward DIR, or with a server that has one"
        raise ValueError(f"{option}: no reward model here: {cure}")


def _named(what: str, text: str, read: Callable[[str], _T]) -> _T:
    """Read a value with `read`; its errors name the command."""
    try:
        return read(text)
    except ValueError as error:
        raise ValueError(f"{what} {text}: {error}") from None


def _number(kind: type[_N], limits: tuple[float, float], text: str) -> _N:
    """Read a number; an int never goes through a float, which would round it."""
    least, most = limits
    try:
        value: _N | None = kind(text)
    except ValueError:
        value = None
    if value is None or not least <= value <= most:
        noun = "whole number" if kind is int else "number"
        raise ValueError(f"give a {noun} from {least}" + (" up" if most == math.inf else f" to {most}"))
    return value


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError("give on or off")
    return text == "on"


def _unless_off(read: Callable[[str], _T]) -> Callable[[str], _T | None]:
    return lambda text: None if text == "off" else read(text)


def _setting(name: str, attribute: str, read: Callable[[str], Any]) -> Callable[[Session, str], None]:
    """Return a command that sets one value of the session and shows it; without a value it only shows it."""

    def do(session: Session, rest: str) -> None:
        if rest:
            setattr(session, attribute, _named(name, rest, read))
        value = getattr(session, attribute)
        words = {True: "on", False: "off"}[value] if isinstance(value, bool) else "none" if value is None else value
        session.terminal.say(f"{name[1:]}: {words}", "dim")

    return do


def _score(session: Session, rest: str) -> None:
    require_rewards(session.speaker, "/score")
    _setting("/score", "scoring", _switch)(session, rest)


def _retry(session: Session, rest: str) -> None:
    if not session.turns:
        raise ValueError("nothing to answer again yet")
    session.retry()


def _clear(session: Session, rest: str) -> None:
    session.turns.clear()
    session.compared = None
    session.terminal.say("a new chat", "dim")


def _save(session: Session, rest: str) -> None:
    if not rest:
        raise ValueError("/save: name a file")
    path = Path(rest).expanduser()
    session.save(path)
    session.terminal.say(f"saved to {path}", "dim")


def _help(session: Session, rest: str) -> None:
    table = Table.grid(padding=(0, 2, 0, 2))
    table.add_column(style="bold", no_wrap=True)
    for name, command in COMMANDS.items():
        table.add_row(Text(f"{name} {command.takes}"), Text(command.help))
    session.terminal.show(table)
    session.terminal.say("  Ctrl-C stops an answer, Ctrl-D leaves; a line that ends in \\ goes on in the next.", "dim")


def _leave(session: Session, rest: str) -> None:
    raise Leave


@dataclass(frozen=True)
class Command:
    """A slash command: its argument, its help, and its function of the session and that argument."""

    takes: str
    help: str
    do: Callable[[Session, str], None]


COMMANDS: Final[Mapping[str, Command]] = {
    "/dial": Command("[DIRECTION|off]", "turn to -30, or helpfulness=0.8 verbosity=-0.6; alone: show the dial", _dial),
    "/verbosity": Command("[low|medium|high]", "turn to short, medium or long answers; alone: how long", _verbosity),
    "/compare": Command("A B", "answer the last message, or the next, at two directions side by side", _compare),
    "/prefer": Command(
        "[a|b|undo]", "say which of two answers you prefer: the dial turns to you; alone: where", _prefer
    ),
    "/best": Command("[N [DEGREES]|off]", "show the best of N answers near the direction, by the reward model", _best),
    "/score": Command("[on|off]", "show the reward model's rewards under each answer", _score),
    "/system": Command(
        "[TEXT|off]", "the system message before the chat", _setting("/system", "system", _unless_off(str))
    ),
    "/memory": Command(
        "[on|off]", "whether a message is read with those before it", _setting("/memory", "memory", _switch)
    ),
    "/seed": Command(
        "[N]", "the same seed gives the same answer", _setting("/seed", "seed", partial(_number, int, RANGES["seed"]))
    ),
    "/temperature": Command(
        "[T]",
        "0 takes the likeliest word each time",
        _setting("/temperature", "temperature", partial(_number, float, RANGES["temperature"])),
    ),
    "/tokens": Command(
        "[N|off]",
        "the longest answer",
        _setting("/tokens", "max_tokens", _unless_off(partial(_number, int, RANGES["max_tokens"]))),
    ),
    "/retry": Command("", "answer the last message again, with the next seed, at the dial's present direction", _retry),
    "/clear": Command("", "begin a new chat", _clear),
    "/save": Command("FILE", "write the chat to a JSON file", _save),
    "/help": Command("", "these commands", _help),
    "/quit": Command("", "leave", _leave),
}
