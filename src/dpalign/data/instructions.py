"""Instruction rows, as Stanford's Alpaca writes them: instruction, input, output.

For SFT where no chats are at hand: each row is a chat of one turn. Alpaca's own frame ("Below is an
instruction that describes a task ...") is left out, since the chat template says who speaks.
"""

from dpalign.data.report import ReadReport, Tally
from dpalign.data.rows import Conversation
from dpalign.data.sources import describe, read_source
from dpalign.rows import prompt_id, user_prompt

COLUMNS = ("instruction", "input", "output")


def read_instructions(source: str, split: str | None = None) -> tuple[list[Conversation], ReadReport]:
    """Each row as one conversation: the instruction, an empty line and the input if there is one; the output.

    Raises:
        ValueError: a row that is cut, or lacks a column.
    """
    rows: list[Conversation] = []
    tally = Tally()
    for row in read_source(source, split):
        tally.read += 1
        instruction, given, output = (row.text_or_none(column) for column in COLUMNS)
        if instruction is None:
            tally.filtered["empty prompt"] += 1
        elif output is None:
            tally.filtered["empty response"] += 1
        else:
            messages = user_prompt(instruction if given is None else f"{instruction}\n\n{given}")
            rows.append({"prompt_id": prompt_id(messages), "messages": messages, "response": output, "origin": "sft"})
    return rows, tally.report("instructions", describe(source, split), rows)
