"""The input of a reward model: a chat and an answer as tokens, and the chat template for it in the model's folder.

`dpa-v1` and `world-v1` are our forms (`paper.prompts`); `chat` is the model's own chat template. No form shows the
direction: it is not in the chat that a user sees.
"""

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from dpalign.paper.prompts import (
    Message,
    RewardInput,
    RewardTemplate,
    render_reward_input,
    reward_input_frame,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pair = tuple[Sequence[Message], str]
"""A prompt and an answer to it."""

_PROBE: Final[list[Message]] = [
    {"role": "system", "content": "Speak of quokkas."},
    {"role": "user", "content": "What is tea?"},
    {"role": "assistant", "content": "A drink of wombats."},
]
_TAG: Final = re.compile(r"\[/?[A-Z]+\]")
"""A turn's mark in our own forms. Their words, such as "User:", may be part of any text."""
_TRIED: Final[Sequence[list[Message]]] = (
    _PROBE[1:],
    [*_PROBE[1:], {"role": "user", "content": "And\ncoffee?"}, {"role": "assistant", "content": "[Another] one."}],
)
"""Chats with an answer on which a template is compared with our own Python."""


class TooLong(ValueError):
    """A chat with its answer exceeds the reward model's context."""


class InputReader:
    """Turns a chat and an answer into the tokens that a reward model reads.

    Args:
        source: the model's name, for messages.

    Raises:
        ValueError: the form is `chat`, and the tokenizer has no chat template, or one that cannot show an answer.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", form: RewardInput, source: str) -> None:
        from dpalign.engines.tokens import guard_of

        self.tokenizer, self.form, self.source = tokenizer, form, source
        own_tags = None if form == "chat" else frozenset(_TAG.findall("".join(reward_input_frame(_PROBE[1:2], form))))
        self.guard = guard_of(tokenizer, own_tags)
        self.takes_system = form == "chat" and self._takes_system()

    def ids(self, pair: Pair) -> list[int]:
        """Return the tokens of a chat and an answer.

        Raises:
            ValueError: the chat does not alternate, or the template refuses it; see `engines.forged.Guard` too.
        """
        (answer, *contents), held = self.guard.hide([pair[1], *(message["content"] for message in pair[0])])
        messages: list[Message] = [
            {**message, "content": content} for message, content in zip(pair[0], contents, strict=True)
        ]
        if self.form == "chat":
            chat: list[Message] = [*self._seen(messages), {"role": "assistant", "content": answer}]
            return self.guard.ids(self._applied(chat, tokenize=False), held) if held else self._applied(chat)
        text = render_reward_input(messages, answer, self.form)
        ids: list[int] = self.tokenizer(text)["input_ids"]
        if held:  # keep the tokens that the tokenizer adds to a text
            plain = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            start = next(i for i in range(len(ids)) if ids[i : i + len(plain)] == plain)
            ids = [*ids[:start], *self.guard.ids(text, held), *ids[start + len(plain) :]]
        return ids

    def key(self, messages: Sequence[Message]) -> str:
        """Return a key that all answers to a prompt share."""
        if self.form != "chat":
            return reward_input_frame(messages, self.form)[0]
        return json.dumps([[message["role"], message["content"]] for message in messages])

    def _takes_system(self) -> bool:
        if not self.tokenizer.chat_template:
            raise ValueError(
                f'{self.source}: input "chat" means the model\'s own chat template, and its tokenizer has none; '
                'if it reads one of our forms, say so: input = "dpa-v1" or "world-v1"'
            )
        shown = self._applied(_PROBE[1:], tokenize=False)
        if any(message["content"] not in shown for message in _PROBE[1:]):
            raise ValueError(f"{self.source}: its chat template does not show the question and the answer: {shown!r}")
        try:
            return _PROBE[0]["content"] in self._applied(_PROBE, tokenize=False)
        except ValueError:
            return False

    def _seen(self, messages: Sequence[Message]) -> list[Message]:
        """Return the chat as the template takes it: without a system turn, the system's text opens the first turn."""
        if self.takes_system or not messages or messages[0]["role"] != "system":
            return list(messages)
        system, *others = messages
        if not others or not system["content"]:
            return list(others)
        first: Message = {"role": others[0]["role"], "content": f"{system['content']}\n\n{others[0]['content']}"}
        return [first, *others[1:]]

    def _applied(self, messages: Sequence[Message], *, tokenize: bool = True) -> Any:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=tokenize, return_dict=False)
        except (TemplateError, ValueError, TypeError) as error:
            raise ValueError(f"{self.source}: its chat template cannot write this chat: {error}") from error


_DPA_V1: Final = """\
{{- @RATE@ -}}
{%- for turn in chat.turns -%}
  {{- "\\n\\n" ~ turn["role"] | capitalize ~ ": " ~ turn["content"] -}}
{%- endfor -%}
{{- " [/INST]" -}}
"""

_WORLD_V1: Final = """\
{%- for turn in chat.turns -%}
  {{- ("rate: " if turn["role"] == "user" else "answer: ") ~ turn["content"] ~ "\\n" -}}
{%- endfor -%}
{{- "score:" -}}
"""

_TURNS: Final = """\
{#- The input of a reward model: a chat whose last turn is the answer to be scored. System messages are not shown. -#}
{%- set chat = namespace(turns=[]) -%}
{%- for message in messages if message["role"] != "system" -%}
  {%- if message["role"] != ("user" if loop.index0 is even else "assistant") -%}
    {{- raise_exception("turn " ~ loop.index0 ~ " is the " ~ message["role"] ~ "'s; a chat goes user, assistant") -}}
  {%- endif -%}
  {%- set chat.turns = chat.turns + [message] -%}
{%- endfor -%}
{%- if not chat.turns or chat.turns[-1]["role"] != "assistant" -%}
  {{- raise_exception("the last message must be the assistant's: the answer to be scored") -}}
{%- endif -%}
"""


def reward_chat_template(form: RewardTemplate, opening: str = "") -> str:
    """Return a chat template in Jinja that writes exactly `render_reward_input`.

    Args:
        opening: Jinja before all else, such as `{{- bos_token -}}`.
    """
    match form:
        case "dpa-v1":
            rate = reward_input_frame([{"role": "user", "content": ""}], form)[0].partition("\n\n")[0]
            body = _DPA_V1.replace("@RATE@", json.dumps(rate))
        case "world-v1":
            body = _WORLD_V1
    return _TURNS + opening + body


def template_for(tokenizer: "PreTrainedTokenizerBase", form: RewardInput) -> str | None:
    """Return the chat template for a reward model's folder; None keeps the tokenizer's own.

    Applied by the tokenizer, it gives the same tokens as `InputReader`, including the start of text. If none that is
    tried does so, one with the start of text is returned all the same.
    """
    if form == "chat":
        return None
    openings = ("", "{{- bos_token -}}\n", "{{- bos_token ~ ' ' -}}\n") if tokenizer.bos_token else ("",)
    own = tokenizer.chat_template
    try:
        for opening in openings:
            tokenizer.chat_template = reward_chat_template(form, opening)
            if all(_same_tokens(tokenizer, form, chat) for chat in _TRIED):
                return str(tokenizer.chat_template)
    finally:
        tokenizer.chat_template = own
    return reward_chat_template(form, openings[min(1, len(openings) - 1)])


def _same_tokens(tokenizer: "PreTrainedTokenizerBase", form: RewardInput, chat: Sequence[Message]) -> bool:
    applied = tokenizer.apply_chat_template(list(chat), tokenize=True, return_dict=False)
    return bool(applied == InputReader(tokenizer, form, "").ids((chat[:-1], chat[-1]["content"])))
