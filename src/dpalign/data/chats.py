"""Chats to fine-tune on: ultrachat_200k's, or instruction rows as Stanford's Alpaca writes them.

ultrachat_200k (HuggingFaceH4, MIT) trained Zephyr's SFT checkpoint, from which section 3.1 starts. Named splits:
train_sft (207,865 chats) and test_sft (23,110). Alpaca's own frame ("Below is an instruction that describes a
task ...") is left out: the chat template marks the turns.
"""

from typing import Final

from dpalign.data.report import ReadReport, Tally
from dpalign.data.sources import describe, read_source
from dpalign.rows import Conversation, Message, prompt_id, user_prompt

INSTRUCTION_COLUMNS: Final = ("instruction", "input", "output")


def read_ultrachat(source: str, split: str | None = None) -> tuple[list[Conversation], ReadReport]:
    """Each chat as one conversation: all turns but the last, and the last answer.

    Raises:
        ValueError: a row that is cut, lacks the column `messages`, or holds an unknown role.
    """
    rows: list[Conversation] = []
    tally = Tally()
    for row in read_source(source, split):
        chat = row.chat("messages")
        if len(chat) < 2 or chat[-1]["role"] != "assistant" or chat[-2]["role"] != "user":
            tally.read += 1
            tally.filtered["does not end with an answer"] += 1
        elif tally.keeps(chat[-2]["content"], chat[-1]["content"]):
            rows.append(_conversation(chat[:-1], chat[-1]["content"]))
    return rows, tally.report("ultrachat", describe(source, split), rows)


def read_instructions(source: str, split: str | None = None) -> tuple[list[Conversation], ReadReport]:
    """Each row as a chat of one turn: the instruction, with its input after an empty line; then the output.

    Raises:
        ValueError: a row that is cut, or lacks a column.
    """
    rows: list[Conversation] = []
    tally = Tally()
    for row in read_source(source, split):
        instruction, context, output = (row.text_or_empty(column) for column in INSTRUCTION_COLUMNS)
        if tally.keeps(instruction, output):
            prompt = f"{instruction}\n\n{context}" if context else instruction
            rows.append(_conversation(user_prompt(prompt), output))
    return rows, tally.report("instructions", describe(source, split), rows)


def _conversation(messages: list[Message], response: str) -> Conversation:
    return {"prompt_id": prompt_id(messages), "messages": messages, "response": response, "origin": "sft"}
