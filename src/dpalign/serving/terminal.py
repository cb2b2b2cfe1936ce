"""The chat's terminal: words that wrap as they stream, two answers in columns, bars for rewards, keys and history.

What a model says is never trusted with the terminal: control characters are shown, not obeyed. Colours are the
terminal's own, on a tty alone and not with NO_COLOR (no-color.org).
"""

import contextlib
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, TextIO

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
GAP: Final = 3
"""Columns between two answers."""
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

    def styled(self, text: str, style: Style) -> str:
        code = _CODES[style]
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and code and text else text

    def read(self, prompt: str, style: Style) -> str:
        """A line from the user; EOFError at the end of the input."""
        marked = self.styled(prompt, style)
        if self.colour:  # readline must not count what takes no room
            marked = re.sub(r"(\x1b\[[\d;]*m)", "\x01\\1\x02", marked)
        return self._read(marked)

    def say(self, text: str = "", style: Style = "plain") -> None:
        """A line that is no answer; off a tty only if it matters."""
        if not self.tty and style == "dim":
            return
        self.notes.write(self.styled(text, style) + "\n")
        self.notes.flush()

    def draw(self, lines: Sequence[str]) -> None:
        """Lines that are styled already."""
        self.notes.write("".join(f"{line}\n" for line in lines))
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
        width = (min(self.columns, 2 * WIDEST) - GAP) // 2
        painter = Columns(self, width)
        left, right = titles
        self.out.write(f"{self.styled(_fit(left, width), 'a')}{' ' * GAP}{self.styled(right, 'b')}\n")
        try:
            for side, text in texts:
                painter.push(side, harmless(text))
        finally:
            painter.finish()

    def bars(self, rewards: Mapping[str, float], style: Style, room: int | None = None) -> list[str]:
        """A line an objective: its name, its reward of 0-100 as a bar and a number."""
        name_width = max(map(len, rewards))
        long = min(30, max(8, (room or self.columns) - name_width - 9))
        lines = []
        for name, reward in rewards.items():
            bar = self.styled(self.bar(reward / 100, long), style)
            lines.append(f"{self.styled(f'{name:{name_width}}', 'dim')} {reward:5.1f} {bar}")
        return lines

    def bar(self, share: float, columns: int) -> str:
        eighths = round(min(1.0, max(0.0, share)) * columns * 8)
        if self.ascii:
            return "#" * (eighths // 8)
        return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


class Wrapper:
    """Breaks lines between words while they stream; a word is held back until it is whole."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.column = 0
        self.space = ""
        self.word = ""

    def push(self, text: str) -> str:
        out = ""
        for part in re.findall(r"\n|[^\S\n]+|\S+", text):
            if part == "\n":
                out += self._place() + "\n"
                self.column, self.space = 0, ""
            elif part.isspace():
                out += self._place()
                self.space += part
            else:
                self.word += part
        return out

    def flush(self) -> str:
        return self._place()

    def _place(self) -> str:
        """The word that is whole now, on this line or the next."""
        word, self.word = self.word, ""
        if not word:
            return ""
        space, self.space = self.space.replace("\t", "    "), ""
        broken = self.column and self.column + wide(space) + wide(word) > self.width
        if broken:
            space, self.column = "", 0
        text, at = "", self.column + wide(space)
        for character in word:  # one that fits no line is cut
            if at and at + wide(character) > self.width:
                text, at = text + "\n", 0
            text, at = text + character, at + wide(character)
        self.column = at
        return ("\n" if broken else "") + space + text


class Columns:
    """Two texts that grow side by side. What can still change is kept within the window: the faster one waits."""

    def __init__(self, terminal: Terminal, width: int) -> None:
        self.terminal, self.width = terminal, width
        self.wrappers = [Wrapper(width), Wrapper(width)]
        self.texts = ["", ""]
        self.over = False
        self.fixed = 0
        """Rows that will not change any more."""
        self.loose = 0
        """Rows below them that are on the screen."""

    def push(self, side: int, text: str) -> None:
        self.texts[side] += self.wrappers[side].push(text)
        self._paint()

    def finish(self) -> None:
        self.texts = [text + wrapper.flush() for text, wrapper in zip(self.texts, self.wrappers, strict=True)]
        self.over = True
        self._paint()

    def _paint(self) -> None:
        sides = [text.split("\n") for text in self.texts]
        last = max(map(len, sides))
        shown = last if self.over else min(last, self.fixed + max(2, self.terminal.size()[1] - 2))
        rows = [
            _fit(_at(sides[0], i), self.width) + " " * GAP + _at(sides[1], i).rstrip() for i in range(self.fixed, shown)
        ]
        back = f"\x1b[{self.loose}A\r\x1b[J" if self.loose else ""
        self.terminal.out.write(back + "".join(f"{row.rstrip()}\n" for row in rows))
        self.terminal.out.flush()
        done = last if self.over else max(self.fixed, min(min(map(len, sides)) - 1, shown))
        self.loose = shown - done
        self.fixed = done


def harmless(text: str) -> str:
    """Without what a terminal would obey: control characters are shown as their pictures."""
    shown = ""
    for character in text:
        code = ord(character)
        if character in "\n\t" or (code >= 32 and not 127 <= code < 160 and character not in "\u2028\u2029"):
            shown += character
        elif code < 32:
            shown += chr(0x2400 + code)
        else:
            shown += "\N{REPLACEMENT CHARACTER}"
    return shown


def wide(text: str) -> int:
    """The columns that a text takes."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) or unicodedata.category(c) in ("Cf", "Me", "Mn") else _cells(c) for c in text
    )


def _cells(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _fit(text: str, width: int) -> str:
    return text + " " * max(0, width - wide(text))


def _at(lines: Sequence[str], i: int) -> str:
    return lines[i] if i < len(lines) else ""


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
    if quiet:
        return Terminal(sys.stdout, sys.stderr, tty=False)
    return Terminal(sys.stdout, sys.stdout)
