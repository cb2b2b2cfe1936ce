"""The forms of a row: a prompt alone, a prompt with its answer, a pair of answers, a chat, an instruction.

They include TRL's standard and conversational forms, also those with an implicit prompt. The columns of a file's first
row decide its form. If no form fits, the error names the nearest one.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from dpalign.data.sources import Row
from dpalign.rows import Message, user_prompt

Form = Literal["pairs", "answers", "instructions", "chats", "prompts"]

EXAMPLES: Final[Mapping[Form, str]] = {
    "pairs": '{"prompt": "Boil an egg.", "chosen": "Seven minutes.", "rejected": "No."}',
    "answers": '{"prompt": "Boil an egg.", "response": "Seven minutes.", "brevity": 4}',
    "instructions": '{"instruction": "Name a prime number.", "input": "", "output": "Seven."}',
    "chats": '{"messages": [{"role": "user", "content": "Boil an egg."}, {"role": "assistant", "content": "Now?"}]}',
    "prompts": '{"prompt": "Boil an egg."}',
}
"""An example row of each form."""

PROMPTS: Final = ("prompt", "messages")
ANSWERS: Final = ("response", "completion")
TEXTS: Final = frozenset((*PROMPTS, *ANSWERS, "chosen", "rejected", "instruction", "input", "output"))
"""The columns that hold prompts and answers."""

_NEEDED: Final[Mapping[Form, tuple[str, ...]]] = {
    "pairs": ("prompt", "chosen", "rejected"),
    "answers": ("prompt", "response"),
    "prompts": ("prompt",),
    "chats": ("messages",),
}
_SYNONYMS: Final[Mapping[str, tuple[str, ...]]] = {
    "prompt": ("question", "query", "instruction", "request", "input", "inputs", "user", "human"),
    "response": ("answer", "output", "completion", "reply", "generation", "target", "assistant"),
    "chosen": ("accepted", "preferred", "better", "winner", "good", "positive"),
    "rejected": ("dispreferred", "worse", "loser", "bad", "negative"),
    "messages": ("conversations", "conversation", "chat", "dialogue", "dialog", "turns"),
}


@dataclass(frozen=True)
class Example:
    """A parsed row.

    Attributes:
        messages: the chat up to the user's last turn.
        answers: the answers to that chat: none for a prompt alone, the chosen and the rejected one for a pair.
        gap: why the row is left out; "" if it is complete.
    """

    messages: list[Message]
    answers: tuple[str, ...] = ()
    gap: str = ""


def form_of(row: Row) -> Form:
    """The form of a file, by the columns of its first row.

    Raises:
        ValueError: no form fits; the message names the nearest one.
    """
    columns = row.values.keys()
    if not columns.isdisjoint(("chosen", "rejected")):
        if {"chosen", "rejected"} <= columns and (
            not columns.isdisjoint(PROMPTS) or isinstance(row.values["chosen"], list)
        ):
            return "pairs"
    elif {"instruction", "output"} <= columns:
        return "instructions"
    elif not columns.isdisjoint(PROMPTS) and not columns.isdisjoint(ANSWERS):
        return "answers"
    elif "messages" in columns:
        return "chats"
    elif "prompt" in columns:
        return "prompts"
    raise _unread(row)


def read_example(row: Row, form: Form) -> Example:
    """Parse a row of this form.

    Raises:
        ValueError: a column is missing or holds something else; the message names the row.
    """
    match form:
        case "pairs":
            (messages, chosen), (others, rejected) = _answered(row, "chosen"), _answered(row, "rejected")
            if messages != others:
                return Example(messages, gap="chosen and rejected differ before their last turns")
            return _whole(messages, chosen, rejected)
        case "answers":
            messages, response = _answered(row, _first_of(row, ANSWERS))
            return _whole(messages, response)
        case "instructions":
            instruction, output = row.text_or_empty("instruction"), row.text_or_empty("output")
            context = row.text_or_empty("input") if "input" in row.values else ""
            return _whole(
                user_prompt(f"{instruction}\n\n{context}" if instruction and context else instruction), output
            )
        case "chats":
            turns = row.chat("messages")
            if turns and turns[-1]["role"] == "assistant":
                return _whole(turns[:-1], turns[-1]["content"])
            return _whole(turns)
        case "prompts":
            return _whole(_prompt(row))


def _whole(messages: list[Message], *answers: str) -> Example:
    ends = bool(messages) and messages[-1]["role"] == "user"
    return Example(messages, answers, "" if ends else "the prompt does not end with the user's turn")


def _answered(row: Row, key: str) -> tuple[list[Message], str]:
    """The prompt and the answer; the column holds text, the assistant's turn, or the whole chat."""
    value = row.get(key)
    if not isinstance(value, list):
        return _prompt(row), _text(row, key)
    turns = row.chat(key)
    if not turns or turns[-1]["role"] != "assistant":
        raise row.wrong(key, value, "a chat that ends with the assistant's answer")
    before = _prompt(row) if turns[0]["role"] == "assistant" else []
    return [*before, *turns[:-1]], turns[-1]["content"]


def _prompt(row: Row) -> list[Message]:
    key = _first_of(row, PROMPTS)
    return row.chat(key) if isinstance(row.get(key), list) else user_prompt(_text(row, key))


def _first_of(row: Row, names: Sequence[str]) -> str:
    return next((name for name in names if name in row.values), names[0])


def _text(row: Row, key: str) -> str:
    """A column of text; refuse a chat that was written as text."""
    text = row.text_or_empty(key)
    if text.startswith("[{") and "role" in text and "content" in text:
        raise row.wrong(key, text, "a chat as a list and not as text; .jsonl and .parquet files can hold lists")
    return text


def _unread(row: Row) -> ValueError:
    """The error if no form fits: the nearest form, and the changes that lead to it."""
    form, found = _nearest(list(row.values))
    renamed = [f"rename {column} to {name}" for name, column in found.items() if column not in ("", name)]
    turns = row.values.get(found.get("messages", ""))
    if isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and "from" in turns[0]:
        renamed.append("in its turns from to role (system, user or assistant) and value to content")
    missing = [f"add {name}" for name, column in found.items() if not column]
    return ValueError(
        f"{row.where}: has the columns {', '.join(map(str, row.values))}, which is no form that is read; the nearest "
        f"is {EXAMPLES[form]}: {' and '.join(renamed + missing)} (docs/data.md shows every form)"
    )


def or_rename(columns: Sequence[str]) -> str:
    """The end of an error about missing answers: which column to rename; "" if none looks like answers."""
    column = _column_for("response", columns)
    return f", or rename {column} to response" if column else ""


def _nearest(columns: Sequence[str]) -> tuple[Form, dict[str, str]]:
    """The form that needs the fewest new columns, then uses the most existing ones; and its column for each name."""
    choices = {form: {name: _column_for(name, columns) for name in needed} for form, needed in _NEEDED.items()}

    def fit(form: Form) -> tuple[int, int]:
        used = sum(bool(column) for column in choices[form].values())
        return (used - len(choices[form]) if used else -len(columns) - len(choices[form]), used)

    of_pairs = not {"chosen", "rejected"}.isdisjoint(columns)
    best: Form = "pairs" if of_pairs else max(choices, key=fit)
    return best, choices[best]


def _column_for(name: str, columns: Sequence[str]) -> str:
    """The column for a name: the name itself, a synonym, or a similar spelling; "" if there is none."""
    known = {column.strip().lower(): column for column in columns}
    for candidate in (name, *_SYNONYMS[name]):
        if candidate in known:
            return known[candidate]
    return next((known[close] for close in difflib.get_close_matches(name, known, n=1, cutoff=0.8)), "")
