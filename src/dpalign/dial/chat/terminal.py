"""The chat's terminal: what is read and written, in colours or without, rewards as bars, keys and history.

What a model says is never trusted with the terminal: control characters are shown, not obeyed. Colours are the
terminal's own, on a tty alone and not with NO_COLOR (no-color.org).
"""

import contextlib
import io
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, TextIO

from dpalign.dial.chat.flowing import GAP, Columns, Wrapper, at, fit, harmless

Style = Literal["a", "b", "dim", "bold", "warning", "error", "plain"]

_CODES: Final[Mapping[str, str]] = {
    "a": "36;1",
    "b": "35;1",
    "dim": "2",
    "bold": "1",
    "warning": "33",
    "error": "31;1",
    "plain": "",
}
WIDEST: Final = 96
"""Columns of a line of text: longer ones are hard to read."""
HISTORY: Final = 1000
"""Questions kept from chat to chat."""


class Terminal:
    """Where a chat is read and written.

    Args:
        out: takes the answers.
        notes: takes all else that is said.
        read: asks for a line; raises EOFError at the end.
        tty: out is a terminal: wrap, draw, and colour unless NO_COLOR is set.
        size: (columns, lines) of the terminal.
    """

    def __init__(
        self,
        out: TextIO,
        notes: TextIO,
        read: Callable[[str], str] = input,
        *,
        tty: bool = True,
        size: Callable[[], tuple[int, int]] = shutil.get_terminal_size,
    ) -> None:
        self.out, self.notes, self._read, self.tty, self.size = out, notes, read, tty, size
        self.colour = tty and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.ascii = not _can_say(out, "─⣀█°·")

    @property
    def columns(self) -> int:
        return max(20, self.size()[0])

    @property
    def in_columns(self) -> bool:
        """There is room for two answers side by side."""
        return self.tty and self.columns >= 80

    @property
    def half(self) -> int:
        """Columns of each of two answers."""
        return (min(self.columns, 2 * WIDEST) - GAP) // 2

    def styled(self, text: str, style: Style) -> str:
        code = _CODES[style]
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and code and text else text

    def spelled(self, text: str) -> str:
        """Our own words in characters that this terminal has."""
        return text.translate({0x2212: "-", 0xB0: " deg"}) if self.ascii else text

    def read(self, prompt: str, style: Style) -> str:
        """A line from the user; EOFError at the end of the input."""
        marked = self.styled(self.spelled(prompt), style)
        if self.colour:  # readline must not count what takes no room
            marked = re.sub(r"(\x1b\[[\d;]*m)", "\x01\\1\x02", marked)
        return self._read(marked)

    def say(self, text: str = "", style: Style = "plain") -> None:
        """A line that is no answer; off a tty only if it matters."""
        if not self.tty and style == "dim":
            return
        self.notes.write(self.styled(self.spelled(text), style) + "\n")
        self.notes.flush()

    def draw(self, lines: Sequence[str]) -> None:
        """Lines that are styled already."""
        self.notes.write("".join(f"{self.spelled(line)}\n" for line in lines))
        self.notes.flush()

    def stream(self, texts: Iterator[str]) -> None:
        """An answer as it comes; off a tty its very characters, and a newline."""
        wrapper = Wrapper(min(self.columns, WIDEST)) if self.tty else None
        try:
            for text in texts:
                self.out.write(wrapper.push(harmless(text)) if wrapper else text)
                self.out.flush()
        finally:
            self.out.write((wrapper.flush() if wrapper else "") + "\n")
            self.out.flush()

    def side_by_side(self, titles: Sequence[str], texts: Iterator[tuple[int, str]]) -> None:
        """Two answers as they come, in columns: rows that can still change are painted again."""
        width = self.half
        painter = Columns(self.out, width, lambda: self.size()[1])
        left, right = map(self.spelled, titles)
        self.out.write(f"{self.styled(fit(left, width), 'a')}{' ' * GAP}{self.styled(right, 'b')}\n")
        try:
            for side, text in texts:
                painter.push(side, harmless(text))
        finally:
            painter.finish()

    def beside(self, left: Sequence[str], right: Sequence[str]) -> list[str]:
        """Lines that are styled already, in two columns."""
        rows = range(max(len(left), len(right)))
        return [f"{fit(at(left, i), self.half)}{' ' * GAP}{at(right, i)}".rstrip() for i in rows]

    def bars(self, rewards: Mapping[str, float], style: Style) -> list[str]:
        """A line an objective: its name, its reward of 0-100 as a bar and a number."""
        name_width = max(map(len, rewards))
        long = min(24, max(8, self.half - name_width - 9))
        lines = []
        for name, reward in rewards.items():
            lines.append(
                f"{self.styled(f'{name:{name_width}}', 'dim')} {reward:5.1f}  {self.bar(reward / 100, long, style)}"
            )
        return lines

    def bar(self, share: float, columns: int, style: Style) -> str:
        """A share of a line, the rest of it dim; in half columns."""
        halves = round(min(1.0, max(0.0, share)) * columns * 2)
        if self.ascii:
            return "#" * (halves // 2)
        full = "━" * (halves // 2) + "╸" * (halves % 2)
        return self.styled(full, style) + self.styled("─" * (columns - len(full)) if self.colour else "", "dim")


def _can_say(out: TextIO, text: str) -> bool:
    try:
        text.encode(getattr(out, "encoding", None) or "utf-8")
    except (UnicodeError, LookupError):
        return False
    return True


@contextlib.contextmanager
def line_editing(words: Sequence[str], history: Path | None) -> Iterator[None]:
    """Arrow keys, completion of `words`, and the questions of earlier chats; nothing where there is no readline.

    Args:
        history: the file of earlier questions, readable by its owner alone; None keeps none.
    """
    try:
        import readline
    except ImportError:
        yield
        return

    def complete(text: str, state: int) -> str | None:
        found = [word for word in words if word.startswith(text)] if text else []
        return found[state] if state < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n,")
    readline.parse_and_bind("tab: complete")
    if history is not None:
        with contextlib.suppress(OSError):
            readline.read_history_file(history)
    try:
        yield
    finally:
        if history is not None:
            with contextlib.suppress(OSError):
                history.parent.mkdir(parents=True, exist_ok=True)
                history.touch(mode=0o600)
                readline.set_history_length(HISTORY)
                readline.write_history_file(history)


def history_file() -> Path:
    """Where questions are kept (XDG's state folder)."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "dpalign" / "chat_history"


def of_this_process(quiet: bool) -> Terminal:
    """The terminal that the command was started in; quiet, only answers go to stdout."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model may say what the terminal has no letters for
    if quiet:
        return Terminal(sys.stdout, sys.stderr, tty=False)
    return Terminal(sys.stdout, sys.stdout)
