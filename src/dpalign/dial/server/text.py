"""Chats to tokens, by the model's own chat template; tokens to text, piece by piece.

Pieces hold no half characters and no beginnings of stop strings.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

from transformers import AutoTokenizer

from dpalign.engines.tokens import guard_of, prompt_ids
from dpalign.rows import Message

UNFINISHED: Final = "\N{REPLACEMENT CHARACTER}"
"""A tokenizer decodes the first bytes of a character to this."""


class Prompts:
    """Writes prompts in its own thread, so that a long one does not hold up the answers that are being sent.

    Attributes:
        refuses_marks: refuse a message that holds a special token or a turn's tag; else it is read as plain text.

    Raises:
        ValueError: the model's chat template does not end.
    """

    def __init__(self, folder: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        guard_of(self.tokenizer)  # tries the template before any client is let in
        self.refuses_marks = False
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="prompts")

    async def ids(self, messages: Sequence[Message], preference: Mapping[str, float] | None) -> list[int]:
        """Token ids of a prompt, up to where its answer begins. The template writes direction and special tokens.

        Raises:
            ValueError: the template refuses the chat or the direction, or a message holds a mark.
        """
        return await asyncio.get_running_loop().run_in_executor(self.thread, self._ids, messages, preference)

    def _ids(self, messages: Sequence[Message], preference: Mapping[str, float] | None) -> list[int]:
        mark = (
            guard_of(self.tokenizer).first(message["content"] for message in messages) if self.refuses_marks else None
        )
        if mark is not None:
            raise ValueError(f"a message holds {mark!r}, which only the chat template may write; leave it out")
        arguments: dict[str, Any] = {} if preference is None else {"preference": dict(preference)}
        return prompt_ids(self.tokenizer, messages, **arguments)

    def close(self) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)


def decoder_of(tokenizer: Any) -> Callable[[list[int]], str]:
    """The text of tokens, without special ones and without clean-up."""
    return partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Detokenizer:
    """The text of a growing list of tokens.

    The pieces and the last flush join to what decoding all tokens at once gives. Special tokens have no text. They are
    left out before decoding, as a tokenizer that skips them does.

    Args:
        decode: the text of tokens, without clean-up.
        special: the tokens that have no text.
    """

    def __init__(self, decode: Callable[[list[int]], str], special: Collection[int] = ()) -> None:
        self.decode, self.special = decode, special
        self.ids: list[int] = []
        # the text of ids[start:read] is out; it is decoded again, as context of the next tokens
        self.start = self.read = 0

    def push(self, token: int) -> str:
        if token in self.special:
            return ""
        self.ids.append(token)
        return self._new(whole=True)

    def flush(self) -> str:
        """Return the text held back, even if it is no whole character."""
        return self._new(whole=False)

    def _new(self, whole: bool) -> str:
        shown, now = self.decode(self.ids[self.start : self.read]), self.decode(self.ids[self.start :])
        if len(now) <= len(shown) or (whole and now.endswith(UNFINISHED)):
            return ""
        self.start, self.read = self.read, len(self.ids)
        return now[len(shown) :]


class StopStrings:
    """Ends a text before the first stop string in it, however it is cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that can be shown, and whether a stop string follows it."""
        if not self.stops:
            return text, False
        self.held += text
        places = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if places:
            return self.held[: min(places)], True
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
        """The text that these tokens add, and whether a stop string ended the answer.

        Args:
            last: no more tokens will come; nothing is held back.
        """
        text = "".join(map(self.detokenizer.push, tokens))
        shown, stopped = self.stops.push(text + self.detokenizer.flush() if last else text)
        return (shown + self.stops.flush() if last and not stopped else shown), stopped


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text that a stop string begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
