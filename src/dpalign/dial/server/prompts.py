"""Chats to tokens, by the chat template of the model's own folder."""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from dpalign.rows import Message


class Prompts:
    """Writes prompts in a thread of its own: a long one does not hold up the answers that are being sent."""

    def __init__(self, folder: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="prompts")

    async def ids(self, messages: Sequence[Message], preference: Mapping[str, float] | None) -> list[int]:
        """A prompt up to where its answer begins; the template writes the direction and all special tokens.

        Raises:
            ValueError: the template refuses the chat or the direction.
        """
        return await asyncio.get_running_loop().run_in_executor(self.thread, self._ids, messages, preference)

    def _ids(self, messages: Sequence[Message], preference: Mapping[str, float] | None) -> list[int]:
        asked: dict[str, Any] = {} if preference is None else {"preference": dict(preference)}
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, **asked
            )
        except TemplateError as error:
            raise ValueError(f"the model's chat template refuses this: {error}") from error
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def close(self) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)
