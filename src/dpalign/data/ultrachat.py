"""ultrachat_200k (HuggingFaceH4, MIT): the chats of Zephyr's SFT, whose checkpoint section 3.1 starts from.

Named splits: train_sft (207,865 chats) and test_sft (23,110).
"""

from dpalign.data.report import ReadReport, Tally
from dpalign.data.rows import Conversation
from dpalign.data.sources import describe, read_source
from dpalign.rows import prompt_id


def read_ultrachat(source: str, split: str | None = None) -> tuple[list[Conversation], ReadReport]:
    """Each chat as one conversation: all turns but the last, and the last answer.

    Raises:
        ValueError: a row that is cut, lacks the column `messages`, or holds an unknown role.
    """
    rows: list[Conversation] = []
    tally = Tally()
    for row in read_source(source, split):
        tally.read += 1
        chat = row.chat("messages")
        if len(chat) < 2 or chat[-1]["role"] != "assistant" or chat[-2]["role"] != "user":
            tally.filtered["does not end with an answer"] += 1
        elif not chat[-1]["content"].strip():
            tally.filtered["empty response"] += 1
        elif not chat[-2]["content"].strip():
            tally.filtered["empty prompt"] += 1
        else:
            messages = chat[:-1]
            rows.append(
                {
                    "prompt_id": prompt_id(messages),
                    "messages": messages,
                    "response": chat[-1]["content"],
                    "origin": "sft",
                }
            )
    return rows, tally.report("ultrachat", describe(source, split), rows)
