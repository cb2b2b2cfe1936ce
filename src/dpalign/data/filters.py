"""Rows that must not be trained on: those that repeat a held-out prompt."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import TypeVar

from dpalign.data.report import ReadReport
from dpalign.data.rows import Conversation, Prompt, Rated
from dpalign.rows import Message

AnyRow = TypeVar("AnyRow", Rated, Conversation, Prompt)


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
