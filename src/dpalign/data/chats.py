"""Chats for SFT: ultrachat_200k, instructions in the form of Stanford's Alpaca, or prompts with an answer.

ultrachat_200k (HuggingFaceH4, MIT) trained Zephyr's SFT checkpoint, from which section 3.1 starts. Named splits:
train_sft (207,865 chats) and test_sft (23,110). Alpaca's own frame ("Below is an instruction that describes a
task ...") is left out: the chat template marks the turns.
"""

from dpalign.data.forms import EXAMPLES, Form, form_of, read_example
from dpalign.data.report import ReadReport
from dpalign.data.sources import describe, read_source
from dpalign.rows import Conversation, prompt_id


def read_chats(source: str, split: str | None = None) -> tuple[list[Conversation], ReadReport]:
    """Read each row as one conversation; its last turn is what SFT learns.

    Raises:
        ValueError: a row that is cut, lacks a column, or holds an unknown role; rows of pairs, or of prompts alone.
    """
    rows: list[Conversation] = []
    report, form = ReadReport("chats", describe(source, split)), None
    for row in read_source(source, split):
        if form is None:
            form = _with_one_answer(form_of(row), row.where)
            report.source = form
        example = read_example(row, form)
        if example.gap or not example.answers:
            report.drop("does not end with an answer")
        elif report.keeps(example.messages[-1]["content"], example.answers[0]):
            key = prompt_id(example.messages)
            rows.append(
                {"prompt_id": key, "messages": example.messages, "response": example.answers[0], "origin": "sft"}
            )
    return rows, report


def _with_one_answer(form: Form, where: str) -> Form:
    if form in ("pairs", "prompts"):
        raise ValueError(f"{where}: {form}, and no answer to learn; give rows such as {EXAMPLES['chats']}")
    return form
