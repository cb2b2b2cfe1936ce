"""Text that flows into a terminal: lines that break between words as they stream, and two answers in columns."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Final, TextIO

GAP: Final = 3
"""Columns between two answers."""


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

    def __init__(self, out: TextIO, width: int, lines: Callable[[], int]) -> None:
        self.out, self.width, self.lines = out, width, lines
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
        shown = last if self.over else min(last, self.fixed + max(2, self.lines() - 2))
        rows = [
            fit(at(sides[0], i), self.width) + " " * GAP + at(sides[1], i).rstrip() for i in range(self.fixed, shown)
        ]
        back = f"\x1b[{self.loose}A\r\x1b[J" if self.loose else ""
        self.out.write(back + "".join(f"{row.rstrip()}\n" for row in rows))
        self.out.flush()
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
    """The columns that a text takes, its styles aside."""
    text = re.sub(r"\x1b\[[\d;]*m", "", text)
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) or unicodedata.category(c) in ("Cf", "Me", "Mn") else _cells(c) for c in text
    )


def _cells(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def fit(text: str, width: int) -> str:
    return text + " " * max(0, width - wide(text))


def at(lines: Sequence[str], i: int) -> str:
    return lines[i] if i < len(lines) else ""
