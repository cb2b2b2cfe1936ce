"""Tokens to text a piece at a time: no half characters, and no beginnings of stop strings."""

from collections.abc import Callable, Collection, Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes the first bytes of a character to."""


class Detokenizer:
    """The text of a growing list of tokens.

    The pieces and the last flush join to what decoding all tokens at once gives. Special tokens have no text; they are
    left out before decoding, as a tokenizer that skips them does.

    Args:
        decode: the text of tokens, without clean-up.
        special: the tokens that have no text.
    """

    def __init__(self, decode: Callable[[list[int]], str], special: Collection[int] = ()) -> None:
        self.decode, self.special = decode, special
        self.ids: list[int] = []
        self.start = self.read = 0  # the text of ids[start:read] is out, and gives the next tokens their surroundings

    def push(self, token: int) -> str:
        if token in self.special:
            return ""
        self.ids.append(token)
        return self._new(whole=True)

    def flush(self) -> str:
        """What has been held back, even where no whole character came of it."""
        return self._new(whole=False)

    def _new(self, whole: bool) -> str:
        out, now = self.decode(self.ids[self.start : self.read]), self.decode(self.ids[self.start :])
        if len(now) <= len(out) or (whole and now.endswith(UNFINISHED)):
            return ""
        self.start, self.read = self.read, len(self.ids)
        return now[len(out) :]


class StopStrings:
    """Ends a text before the first stop string in it, however it is cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What can be shown, and whether a stop string followed it."""
        if not self.stops:
            return text, False
        self.held += text
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            return self.held[: min(found)], True
        keep = max(_overlap(self.held, stop) for stop in self.stops)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown, False

    def flush(self) -> str:
        held, self.held = self.held, ""
        return held


class AnswerText:
    """The text of an answer as its tokens come, up to its first stop string."""

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str] = ()) -> None:
        self.detokenizer, self.stops = detokenizer, StopStrings(stops)

    def push(self, tokens: Sequence[int], last: bool) -> tuple[str, bool]:
        """What these tokens add, and whether a stop string ended the answer.

        Args:
            last: no more will come; nothing is held back.
        """
        text = "".join(map(self.detokenizer.push, tokens))
        shown, stopped = self.stops.push(text + self.detokenizer.flush() if last else text)
        return (shown + self.stops.flush() if last and not stopped else shown), stopped


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text that a stop string begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
