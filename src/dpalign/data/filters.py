"""Rows that must not be trained on: too long for the context, or repeating a held-out prompt."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from dpalign.data.report import ReadReport
from dpalign.data.rows import Conversation, Rated, plain_text
from dpalign.records import Message

AnyRow = TypeVar("AnyRow", Rated, Conversation)


def drop_long(
    rows: Sequence[AnyRow],
    length: Callable[[str], int],
    limit: int,
    render: Callable[[Sequence[Message], str], str] = plain_text,
) -> tuple[list[AnyRow], ReadReport]:
    """Rows whose text is at most `limit` long.

    Args:
        length: of a text, in tokens; the caller's tokenizer decides.
        limit: in the same unit.
        render: (messages, response) -> the text as the model will read it; plain turns by default.
    """
    if limit < 1:
        raise ValueError(f"the longest text allowed is {limit} tokens; give a limit of at least 1")
    kept = [row for row in rows if length(render(row["messages"], row["response"])) <= limit]
    dropped = len(rows) - len(kept)
    filtered = {f"too long (over {limit:,} tokens)": dropped} if dropped else {}
    return kept, ReadReport("length", "", len(rows), len(kept), filtered)


def drop_held_out(rows: Sequence[AnyRow], held_out: Iterable[Sequence[Message]]) -> tuple[list[AnyRow], ReadReport]:
    """Rows that answer no held-out prompt, whatever data set they come from.

    A row answers a held-out prompt when one of its user turns, alone or with all before it, says the
    same, but for letter case, spacing and system messages.

    Args:
        held_out: the chats of the validation and test prompts.
    """
    keys = {_key(chat) for chat in held_out}
    kept = [row for row in rows if keys.isdisjoint(_asked(row["messages"]))]
    dropped = len(rows) - len(kept)
    filtered = {"held-out prompt": dropped} if dropped else {}
    return kept, ReadReport("held out", "", len(rows), len(kept), filtered)


def _asked(messages: Sequence[Message]) -> set[str]:
    """The keys of all prompts within a chat: each user turn alone, and each with the turns before it."""
    ends = [i for i, message in enumerate(messages) if message["role"] == "user"]
    return {_key(messages[i : i + 1]) for i in ends} | {_key(messages[: i + 1]) for i in ends}


def _key(messages: Sequence[Message]) -> str:
    turns = [(m["role"], " ".join(m["content"].split()).casefold()) for m in messages if m["role"] != "system"]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()
