"""Chats to fine-tune on: ultrachat_200k's, or instruction rows as Stanford's Alpaca writes them.

ultrachat_200k (HuggingFaceH4, MIT) trained Zephyr's SFT checkpoint, from which section 3.1 starts. Named splits:
train_sft (207,865 chats) and test_sft (23,110). Alpaca's own frame ("Below is an instruction that describes a
task ...") is left out: the chat template marks the turns.
"""

from typing import Final

from dpalign.data.report import ReadReport
from dpalign.data.sources import Row, describe, read_source
from dpalign.rows import Conversation, Message, prompt_id, user_prompt

INSTRUCTION_COLUMNS: Final = ("instruction", "input", "output")


def read_chats(source: str, split: str | None = None) -> tuple[list[Conversation], ReadReport]:
    """Each row as one conversation; the first row's columns say whether the rows are ultrachat's or instructions.

    Raises:
        ValueError: a row that is cut, lacks a column, or holds an unknown role.
    """
    rows: list[Conversation] = []
    report = ReadReport("ultrachat", describe(source, split))
    for row in read_source(source, split):
        if not report.read and set(INSTRUCTION_COLUMNS) <= set(row.values):
            report.source = "instructions"
        turns = _instruction(row) if report.source == "instructions" else row.chat("messages")
        if [turn["role"] for turn in turns[-2:]] != ["user", "assistant"]:
            report.drop("does not end with an answer")
            continue
        *messages, answer = turns
        if report.keeps(messages[-1]["content"], answer["content"]):
            key, response = prompt_id(messages), answer["content"]
            rows.append({"prompt_id": key, "messages": messages, "response": response, "origin": "sft"})
    return rows, report


def _instruction(row: Row) -> list[Message]:
    """One turn of the user, the instruction with its input after an empty line, and the output."""
    instruction, context, output = (row.text_or_empty(column) for column in INSTRUCTION_COLUMNS)
    prompt = f"{instruction}\n\n{context}" if instruction and context else instruction
    return [*user_prompt(prompt), {"role": "assistant", "content": output}]
