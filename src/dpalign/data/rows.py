"""Rows on their way to Parquet (`records.RATED`, `CONVERSATIONS`, `PROMPTS`), and what is made of them."""

from collections.abc import Iterable, Mapping
from typing import Literal, TypedDict

from dpalign.rows import HEADS, Message, prompt_id


class Rated(TypedDict):
    """An answer and its labels, one a head in the order of `HEADS`, 0-100 or None."""

    prompt_id: str
    messages: list[Message]
    response: str
    source: str
    labels: list[float | None]


class Conversation(TypedDict):
    """A chat up to the user's last turn, and the answer to learn."""

    prompt_id: str
    messages: list[Message]
    response: str
    origin: str


class Prompt(TypedDict):
    prompt_id: str
    messages: list[Message]
    split: str


def rated(messages: list[Message], response: str, source: str, labels: list[float | None]) -> Rated:
    assert len(labels) == len(HEADS)
    return {
        "prompt_id": prompt_id(messages),
        "messages": messages,
        "response": response,
        "source": source,
        "labels": labels,
    }


def conversations_of(rows: Iterable[Rated], origin: Literal["sft", "steerlm", "replay"]) -> list[Conversation]:
    """Rated answers as conversations to learn: the original responses of section 3.1's replay, say."""
    return [
        {"prompt_id": row["prompt_id"], "messages": row["messages"], "response": row["response"], "origin": origin}
        for row in rows
    ]


def prompts_of(rows: Iterable[Rated | Conversation], split_of: Mapping[str, str]) -> list[Prompt]:
    """The unique prompts of some rows that a split was given to, in order of first appearance."""
    prompts: dict[str, Prompt] = {}
    for row in rows:
        if (key := row["prompt_id"]) not in prompts and key in split_of:
            prompts[key] = {"prompt_id": key, "messages": row["messages"], "split": split_of[key]}
    return list(prompts.values())
