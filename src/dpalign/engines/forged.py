"""Chat marks inside a message: they are read as plain text and begin no turn.

A mark is a special token, or a text with which the chat template separates turns. Only the template may write one. In a
message a placeholder hides it from the template, and its text is encoded in pieces that give other tokens. A chat
without marks in its messages is encoded as one text, unchanged.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from typing import Final

Encode = Callable[[str], list[int]]
"""The tokens of a text: special tokens are recognised, and none is added."""

_BEFORE: Final = "\n"
"""Encoded in front of a piece from inside a text: at the start of a text SentencePiece adds a space."""


class Guard:
    """Keeps marks inside messages from becoming marks of the chat.

    Args:
        marks: the texts that only the template may write.
        tokens: the ids of the marks that are tokens.
        normalize: the tokenizer's normalizer, which changes a text first; None if it has none.
        loose: the marks to look for in normalized text.
    """

    def __init__(
        self,
        encode: Encode,
        marks: Collection[str],
        tokens: Collection[int] = (),
        normalize: Callable[[str], str] | None = None,
        loose: Collection[str] = (),
    ) -> None:
        self.encode, self.tokens, self.normalize = encode, frozenset(tokens), normalize
        self._marks = _any_of(marks)
        # "a" in front: some normalizers begin a text with a space, and a mark inside a text has none
        self._loose = normalize and _any_of(normalize(f"a{mark}").partition("a")[2] for mark in loose)
        self._broken: dict[str, list[int]] = {}

    @cached_property
    def _before(self) -> list[int]:
        return self.encode(_BEFORE)

    def first(self, texts: Iterable[str]) -> str | None:
        """The first mark in the texts; None if they have none."""
        if self._marks is None:
            return None
        return next((found[0] for text in texts if (found := self._marks.search(text))), None)

    def hide(self, texts: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """The texts with a placeholder for each mark, and the marks by placeholder.

        Raises:
            ValueError: a text becomes a mark once it is normalized.
        """
        held: dict[str, str] = {}
        shown = list(texts)
        if self._marks is not None and self.first(texts) is not None:
            # a digest of the texts: none of them can hold it
            stem = f"Z{sha256(chr(0).join(texts).encode('utf-8', 'surrogatepass')).hexdigest()[:20]}"

            def place(found: re.Match[str]) -> str:
                name = f"{stem}n{len(held)}."
                held[name] = found[0]
                return name

            shown = [self._marks.sub(place, text) for text in texts]
        if self._loose and self.normalize:
            for text in shown:
                if found := self._loose.search(self.normalize(text)):
                    raise ValueError(
                        f"a message holds {found[0]!r} in other characters, which a chat's turn begins with"
                    )
        return shown, held

    def ids(self, text: str, held: Mapping[str, str]) -> list[int]:
        """The tokens of a text with placeholders in it.

        Raises:
            ValueError: a mark has the same tokens however it is cut.
        """
        if not held:
            return self.encode(text)
        stem = next(iter(held)).partition("n")[0]
        first, *rest = re.split(rf"({stem}n\d+\.)", text)
        ids = self.encode(first) if first else []
        for part in rest:
            ids += self.broken(held[part]) if part in held else self.inside(part)
        return ids

    def inside(self, text: str) -> list[int]:
        """The tokens of a text that follows another."""
        if not text:
            return []
        whole = self.encode(_BEFORE + text)
        count = len(self._before)
        return whole[count:] if whole[:count] == self._before else self.encode(text)

    def broken(self, mark: str) -> list[int]:
        """The tokens of a mark as plain text: cut near its middle or into characters, so as not to be the template's.

        Raises:
            ValueError: no cut gives other tokens.
        """
        if mark not in self._broken:
            self._broken[mark] = self._break(mark)
        return self._broken[mark]

    def _break(self, mark: str) -> list[int]:
        whole = (self.encode(mark), self.inside(mark))
        cuts = sorted(range(1, len(mark)), key=lambda at: abs(2 * at - len(mark)))
        for pieces in (*((mark[:at], mark[at:]) for at in cuts), tuple(mark)):
            ids = [token for piece in pieces for token in self.inside(piece)]
            if ids not in whole and self.tokens.isdisjoint(ids):
                return ids
        raise ValueError(
            f"a message holds {mark!r}, which the chat template writes between turns, and its tokens are the same "
            "however it is cut; write it in another way"
        )


def _any_of(marks: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern for any of the texts, the longest first; a space may be SentencePiece's. None without texts."""
    words = sorted({mark for mark in marks if mark}, key=lambda mark: (-len(mark), mark))
    return re.compile("|".join(re.escape(word).replace(r"\ ", "[ \u2581]") for word in words)) if words else None
