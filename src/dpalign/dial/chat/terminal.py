"""The chat's terminal: rich writes, prompt_toolkit reads.

The terminal never obeys text of a model or a server: its control characters are shown instead. rich handles colours,
widths, NO_COLOR and TERM=dumb.
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Final, TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

STYLES: Final = ("bold cyan", "bold magenta")
"""Styles of the first and the second of two answers."""
WIDEST: Final = 96
"""Most columns of a line of text: longer lines are hard to read."""
NARROWEST: Final = 80
"""Least columns of a terminal that has room for two answers side by side."""
GAP: Final = 3
"""Columns between two answers."""

_PICTURES: Final[Mapping[int, int]] = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    **dict.fromkeys((*range(127, 160), 0x2028, 0x2029), 0xFFFD),
}


def harmless(text: str) -> str:
    """Text that a terminal does not obey: control characters become their pictures."""
    return text.translate(_PICTURES)


class Terminal:
    """Where a chat is read and written.

    Args:
        console: shows what a user sees.
        out: in a pipe, gets the answers as they are; the console then shows only warnings and rewards.
        read: asks for a line; raises EOFError at the end.
    """

    def __init__(self, console: Console, out: TextIO | None = None, read: Callable[[str], str] = input) -> None:
        self.console, self.out, self.read = console, out, read

    @property
    def quiet(self) -> bool:
        return self.out is not None

    @property
    def two_columns(self) -> bool:
        """Whether there is room for two answers side by side."""
        return not self.quiet and self.console.width >= NARROWEST

    def column_width(self, columns: int) -> int:
        """The width of each answer's column, in characters."""
        return max(10, (min(self.console.width, columns * WIDEST) - GAP * (columns - 1)) // columns)

    def say(self, text: str = "", style: str = "") -> None:
        """Show a line that is no answer. In a pipe, dim lines are left out."""
        if not (self.quiet and style == "dim"):
            self.console.print(Text(harmless(text), style), soft_wrap=self.quiet)

    def show(self, *drawings: RenderableType) -> None:
        """Show drawings side by side if there is room, else below each other."""
        if len(drawings) > 1 and self.two_columns:
            self.console.print(_columns([drawings], self.column_width(len(drawings))))
        else:
            self.console.print(*drawings, sep="\n")

    def stream(self, pieces: Iterable[tuple[int, str]], columns: int = 1) -> None:
        """Show answers as they come, in one column or side by side. In a pipe, write their exact text and a newline.

        Args:
            pieces: (column, new text).
        """
        if self.out is None:
            self._flow(pieces, columns)
            return
        try:
            for _, text in pieces:
                self.out.write(text)
                self.out.flush()
        finally:
            self.out.write("\n")
            self.out.flush()

    def _flow(self, pieces: Iterable[tuple[int, str]], columns: int) -> None:
        """Rows that can no longer change scroll away; the others are drawn again with every piece."""
        width = self.column_width(columns)
        growing = [_Column(self.console, width) for _ in range(columns)]
        settled = 0
        with Live(console=self.console, auto_refresh=False) as live:
            for column, text in pieces:
                growing[column].push(harmless(text))
                rows = [one.rows() for one in growing]
                last = min(map(len, rows)) - 1
                if last > settled:
                    self.console.print(_side_by_side([one[settled:last] for one in rows], width))
                    settled = last
                live.update(_side_by_side([one[settled:] for one in rows], width), refresh=True)

    def rewards(self, rewards: Mapping[str, float], style: str, total: str = "", formula: str = "") -> Table:
        """A table with a row per objective: its name, its reward of 0-100 as a number and a bar. The total is last."""
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(style="dim")
        table.add_column(justify="right")
        for name, reward in rewards.items():
            bar = ProgressBar(100, min(100.0, max(0.0, reward)), 24, complete_style=style, finished_style=style)
            table.add_row(harmless(name), f"{reward:.1f}", bar)
        if total:
            table.add_row("v.r", total, Text(harmless(formula), "dim"))
        return table


class _Column:
    """Growing text, wrapped to rows of one width. Only the last row can still change."""

    def __init__(self, console: Console, width: int) -> None:
        self.console, self.width = console, width
        self.whole: list[Text] = []
        self.paragraph = ""

    def push(self, text: str) -> None:
        *paragraphs, self.paragraph = (self.paragraph + text).split("\n")
        for paragraph in paragraphs:
            self.whole += self._wrapped(paragraph)

    def rows(self) -> list[Text]:
        return [*self.whole, *self._wrapped(self.paragraph)]

    def _wrapped(self, paragraph: str) -> list[Text]:
        return list(Text(paragraph).wrap(self.console, self.width)) or [Text()]


def _columns(rows: Iterable[Iterable[RenderableType]], width: int) -> Table:
    table = Table.grid(padding=(0, GAP, 0, 0))
    for row in rows:
        table.add_row(*row)
    for column in table.columns:
        column.width = width
    return table


def _side_by_side(columns: Sequence[Sequence[Text]], width: int) -> RenderableType:
    if len(columns) == 1:
        return Text("\n").join(columns[0])
    return _columns(zip_longest(*columns, fillvalue=""), width)


def terminal_of_process(quiet: bool) -> Terminal:
    """The terminal that the command was started in. If quiet, only answers go to stdout."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model may write letters that the terminal lacks
    if quiet:
        return Terminal(Console(stderr=True, highlight=False), sys.stdout)
    return Terminal(Console(highlight=False))


def history_file() -> Path:
    """Where questions are kept for the next chat (XDG's state folder)."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "dpalign" / "chat_history"


def line_reader(commands: Mapping[str, str], names: Sequence[str], history: Path | None) -> Callable[[str], str]:
    """Return a function that reads lines with arrow keys, completed commands, and the questions of earlier chats.

    Args:
        commands: `/name` and its help.
        names: words that complete after a command.
        history: the file of earlier questions, readable by its owner alone; None keeps none.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory

    class Words(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            line = document.text_before_cursor
            if line.startswith("/"):
                word = line.rpartition(" ")[2]
                for known in names if " " in line else commands:
                    if known.startswith(word):
                        yield Completion(known, -len(word), display_meta=commands.get(known))

    kept: History = InMemoryHistory()
    if history is not None:
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            history.touch(mode=0o600)
            kept = FileHistory(history)
    session: PromptSession[str] = PromptSession(history=kept, completer=Words())
    return lambda prompt: session.prompt([(STYLES[0].replace("cyan", "ansicyan"), harmless(prompt))])
