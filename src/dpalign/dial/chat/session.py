"""A chat with a dial: what has been said, at which direction, and the commands that turn it."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

from dpalign.dial.best_of import BestOf
from dpalign.dial.chat import arc
from dpalign.dial.chat.speakers import Ask, Piece, Speaker
from dpalign.dial.chat.terminal import Style, Terminal
from dpalign.dial.dial import Dial
from dpalign.page.words import degrees, number
from dpalign.paper.direction import Preference
from dpalign.rows import Message
from dpalign.run.ledger import write_json

_SIDES: Final[tuple[Style, Style]] = ("a", "b")


@dataclass
class Turn:
    """A question with its answer, and how it was drawn."""

    question: str
    preference: Preference | None
    seed: int
    temperature: float
    answer: str = ""
    finish: str = "stopped"
    """stop, length where it was cut, or stopped by the user."""
    rewards: Mapping[str, float] | None = None
    warnings: Sequence[str] = ()
    chosen: BestOf | None = None
    """Of the best of several answers: how it was chosen."""

    def to_json(self) -> dict[str, Any]:
        preference = None if self.preference is None else self.preference.weights
        rewards = None if self.rewards is None else dict(self.rewards)
        told = {"preference": preference, "rewards": rewards, "warnings": list(self.warnings)}
        chosen = None if self.chosen is None else self.chosen.model_dump()
        return {name: value for name, value in vars(self).items() if name != "chosen"} | told | {"best_of": chosen}


@dataclass
class Session:
    """One chat. The commands of `commands.py` change its fields between two answers.

    Raises (all that asks the speaker):
        ValueError: the speaker refuses; the chat is as it was before.
    """

    speaker: Speaker
    terminal: Terminal
    preference: Preference | None = None
    system: str = ""
    temperature: float = 0.7
    """Section 3.2's."""
    seed: int = 0
    max_tokens: int | None = None
    best_of: int | None = None
    """Draw so many answers and take the best; None draws one."""
    spread: float | None = None
    """Degrees around the direction at which they are drawn; None: the speaker's own."""
    scoring: bool = False
    memory: bool = True
    """A message is read with those before it; off for models that know single questions alone."""
    turns: list[Turn] = field(default_factory=list)
    compared: tuple[Preference, Preference] | None = None
    """The two directions that the next message is answered at."""
    saved: Path | None = None

    @property
    def dial(self) -> Dial | None:
        return self.speaker.dial

    def said(self, before: Sequence[Turn] | None = None) -> list[Message]:
        """The chat so far as a model reads it, without a direction."""
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for turn in (self.turns if before is None else before) if self.memory else ():
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages

    def ask(self, question: str) -> None:
        """Answer the next message: at the direction of the dial, or side by side at two."""
        if self.compared is not None:
            pair, self.compared = self.compared, None
            self.turns.append(self.compare(question, pair))
            return
        self.turns.append(self._answer(Turn(question, self.preference, self.seed, self.temperature)))

    def retry(self) -> None:
        """Answer the last message again, with the next seed, at the direction where the dial stands now."""
        last = self.turns.pop()
        try:
            self.turns.append(self._answer(Turn(last.question, self.preference, last.seed + 1, self.temperature)))
        except ValueError:
            self.turns.append(last)
            raise

    def compare(self, question: str, pair: tuple[Preference, Preference], before: Sequence[Turn] | None = None) -> Turn:
        """Answer a message side by side; the first answer is returned, to go on with."""
        turns = [Turn(question, preference, self.seed, self.temperature) for preference in pair]
        self._announce(turns)
        titles = [self._title(preference) for preference in pair]
        if self.terminal.in_columns:
            self.terminal.side_by_side(titles, self._together(turns, before))
        else:
            for title, style, turn in zip(titles, _SIDES, turns, strict=True):
                self.terminal.say(title, style)
                self.terminal.stream(self._texts(turn, before))
        self._after(turns, before)
        return turns[0]

    def _title(self, preference: Preference) -> str:
        """The direction over an answer of two: with its arithmetic where there is room."""
        label, formula = self.label(preference), "" if self.dial is None else arc.words(self.dial, preference)
        return f"{label}  {formula}" if len(label) + len(formula) + 2 <= self.terminal.half else label

    def label(self, preference: Preference | None) -> str:
        return "" if self.dial is None else arc.label(self.dial, preference)

    def _answer(self, turn: Turn) -> Turn:
        self._announce([turn])
        self.terminal.stream(self._texts(turn))
        self._after([turn])
        return turn

    def _announce(self, turns: Sequence[Turn]) -> None:
        """Why nothing streams yet: the best of several answers comes when all are drawn and scored."""
        if self.best_of is None:
            return
        if any(turn.preference is None for turn in turns):
            raise ValueError(
                f"the best of {self.best_of} answers is chosen by a direction: /dial turns to one, /best off draws one"
            )
        self.terminal.say(f"drawing {self.best_of} answers", "dim")

    def _texts(self, turn: Turn, before: Sequence[Turn] | None = None) -> Iterator[str]:
        """The text of an answer as it comes, kept in the turn; an interruption stops it and is no error."""
        with closing(self.speaker.stream(self._asked(turn, before))) as pieces, suppress(KeyboardInterrupt):
            for piece in pieces:
                yield _take(turn, piece)

    def _together(self, turns: Sequence[Turn], before: Sequence[Turn] | None) -> Iterator[tuple[int, str]]:
        """(side, text) of two answers as they come, each drawn in a thread of its own."""
        news: SimpleQueue[tuple[int, Piece | Exception | None]] = SimpleQueue()
        stop = threading.Event()

        def draw(side: int, turn: Turn) -> None:
            try:
                with closing(self.speaker.stream(self._asked(turn, before))) as pieces:
                    for piece in pieces:
                        news.put((side, piece))
                        if stop.is_set():
                            break
                news.put((side, None))
            except Exception as error:
                news.put((side, error))

        for side, turn in enumerate(turns):
            threading.Thread(target=draw, args=(side, turn), daemon=True).start()
        running = len(turns)
        try:
            while running:
                side, piece = news.get()
                if isinstance(piece, Exception):
                    raise piece
                if piece is None:
                    running -= 1
                else:
                    yield side, _take(turns[side], piece)
        except KeyboardInterrupt:
            pass
        finally:
            stop.set()

    def _asked(self, turn: Turn, before: Sequence[Turn] | None) -> Ask:
        messages: list[Message] = [*self.said(before), {"role": "user", "content": turn.question}]
        return Ask(messages, turn.preference, turn.temperature, turn.seed, self.max_tokens, self.best_of, self.spread)

    def _after(self, turns: Sequence[Turn], before: Sequence[Turn] | None = None) -> None:
        """What is said under one answer or two: how it ended, warnings, rewards."""
        notes = {"stopped": "(stopped)", "length": "(cut at the longest answer: /tokens sets it)"}
        for turn in turns:
            if turn.finish == "stop" and not turn.answer.strip():
                self.terminal.say("(an empty answer)", "dim")
            if turn.finish in notes:
                self.terminal.say(notes[turn.finish], "dim")
            for warning in turn.warnings:
                self.terminal.say(warning, "warning")
            if turn.chosen is not None:
                self.terminal.say(self._choice(turn.chosen), "dim")
        if not self.scoring or not self.speaker.scores or not any(turn.answer.strip() for turn in turns):
            return
        self.terminal.say(style="dim")
        for turn in turns:
            messages: list[Message] = [*self.said(before), {"role": "user", "content": turn.question}]
            if turn.chosen is not None:
                turn.rewards = turn.chosen.rewards
                continue
            try:
                turn.rewards = self.speaker.rewards(messages, turn.answer)
            except ValueError as error:
                self.terminal.say(f"not scored: {error}", "warning")
        scored = [self._scored(turn, style, len(turns) == 1) for turn, style in zip(turns, _SIDES, strict=False)]
        if len(turns) > 1 and self.terminal.in_columns:
            self.terminal.draw(self.terminal.beside(*scored))
            return
        for turn, style, lines in zip(turns, _SIDES, scored, strict=False):
            title = [self.terminal.styled(self.label(turn.preference), style)] if len(turns) > 1 else []
            self.terminal.draw([*title, *lines])

    def _choice(self, chosen: BestOf) -> str:
        """How the best of several answers was chosen, in a line."""
        at = "" if self.dial is None else f", drawn at {self.label(self.dial.read(chosen.drawn_at))}"
        worth = f"v.r {number(chosen.value)}, the mean of all {number(chosen.mean_value)}"
        return f"the best of {chosen.drawn} within {degrees(chosen.angle_spread)}{at}: {worth}"

    def _scored(self, turn: Turn, style: Style, said: bool) -> list[str]:
        """Its rewards as bars, and what they come to for its user; with the arithmetic, if it is to be said."""
        if turn.rewards is None:
            return []
        lines = self.terminal.bars(turn.rewards, style)
        if turn.preference is None or self.dial is None:
            return lines
        total = sum(w * turn.rewards[name] for name, w in turn.preference.weights.items())
        name = self.terminal.styled(f"{'v.r':{max(map(len, turn.rewards))}}", "dim")
        formula = f"  {arc.words(self.dial, turn.preference)}" if said else ""
        return [*lines, f"{name} {number(total):>5}{self.terminal.styled(formula, 'dim')}"]

    def save(self, path: Path) -> None:
        """The chat as JSON: the messages as a model reads them, and every turn with how it was drawn.

        Raises:
            ValueError: the file stands already, and this chat did not write it.
        """
        if path.exists() and path != self.saved:
            raise ValueError(f"{path} stands already; name another file")
        write_json(
            path, {"model": self.speaker.name, "messages": self.said(), "turns": [t.to_json() for t in self.turns]}
        )
        self.saved = path


def _take(turn: Turn, piece: Piece) -> str:
    turn.answer += piece.text
    turn.finish = piece.finish or turn.finish
    turn.chosen = piece.chosen or turn.chosen
    turn.warnings = (*turn.warnings, *(one for one in piece.warnings if one not in turn.warnings))
    return piece.text
