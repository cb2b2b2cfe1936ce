"""Chats as tokens: the same in training, sampling and serving.

The policy's chat template writes a prompt as text, BOS and all other special tokens included; the text is tokenized
unchanged. An answer continues its prompt's tokens as in the tokens of the whole text. The template's marks inside a
message are plain text (`engines/forged.py`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, Self, TypeVar

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from dpalign.chat import OwnChat, Place, PromptStyle, Switch, styled_template
from dpalign.engines.engine import Answer
from dpalign.engines.forged import Guard
from dpalign.engines.sandbox import REFUSALS, Unbounded, render
from dpalign.engines.templates import Turn, find_marks, find_own_chat, find_turn
from dpalign.paper.prompts import Level, PreferenceTemplate
from dpalign.rows import Message
from dpalign.runs.modelfolder import Marks

_Row = TypeVar("_Row", bound=Mapping[str, Any])


def marks_of(tokenizer: PreTrainedTokenizerBase) -> Marks:
    """The tokens that a chat template may write."""
    named: dict[str, str] = dict(tokenizer.special_tokens_map)
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special} | set(named.values())
    return Marks(named, frozenset({token.content for token in added} | special), frozenset(special))


def keep_own_chat(
    tokenizer: PreTrainedTokenizerBase,
    switches: Mapping[str, Switch],
    source: str,
    preference_template: PreferenceTemplate | None = None,
    objectives: Sequence[str] | None = None,
    levels: Sequence[Level] = (),
    place: Place | None = None,
) -> OwnChat:
    """Put the dial in front of a tokenizer's own chat template; a dial that is already there is replaced.

    Args:
        source: the model's name, for messages.
        preference_template, objectives, levels: see `OwnChat.template`; None writes a template that takes no direction.
        place: see `find_own_chat`.

    Raises:
        ValueError: the template cannot carry a dial.
    """
    own = find_own_chat(_template_of(tokenizer), marks_of(tokenizer), switches, source, place)
    tokenizer.chat_template = own.template(preference_template, objectives, levels)
    return own


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], ask: bool = True, **given: Any) -> str:
    """A chat as text, up to the start of an answer if `ask`.

    Raises:
        ValueError: the chat template refuses the chat or the direction.
        Unbounded: the chat template does not end.
    """
    guard_of(tokenizer)  # tries the template within bounds first: transformers has none
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask, **given)
    except REFUSALS as error:
        raise ValueError(f"the model's chat template refuses this: {error}") from error
    return text


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **given: Any) -> list[int]:
    """A prompt as a policy reads it, up to the start of its answer; the chat template writes all special tokens.

    Args:
        given: the template's arguments beside the chat, such as preference.

    Raises:
        ValueError: the chat template refuses the chat or the direction; see `Guard` too.
    """
    guard = guard_of(tokenizer)
    contents, held = guard.hide([message["content"] for message in messages])
    return guard.ids(chat_text(tokenizer, with_contents(messages, contents), **given), held)


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that has all its special tokens in it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def continued(
    tokenizer: PreTrainedTokenizerBase, prompt: str, rest: str, held: Mapping[str, str] | None = None
) -> tuple[list[int], list[int]]:
    """The tokens of a prompt, and those of the text after it.

    The prompt's tokens are those that sampling begins with. The rest is tokenized as in the whole text. If a token
    would cross the border, it is tokenized as after a line break, or else by itself.

    Args:
        held: the marks that placeholders stand for (`Guard.hide`).
    """
    guard, held = guard_of(tokenizer), held or {}
    prompt_tokens = guard.ids(prompt, held)
    for before in (prompt, "\n"):
        known = prompt_tokens if before == prompt else guard.ids(before, held)
        whole = guard.ids(before + rest, held)
        if whole[: len(known)] == known:
            return prompt_tokens, whole[len(known) :]
    return prompt_tokens, guard.ids(rest, held)


def row_ids(tokenizer: PreTrainedTokenizerBase, turn: Turn, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """The tokens of a training row's prompt, and those of its answer with the answer's end.

    Args:
        turn: of the tokenizer's chat template (`turn_of`).
        row: of `rows.CONVERSATIONS`.

    Raises:
        ValueError: the chat template refuses the chat; see `Guard` too.
    """
    guard, messages = guard_of(tokenizer), row["messages"]
    (answer, *contents), held = guard.hide([row["response"], *(message["content"] for message in messages)])
    prompt = chat_text(tokenizer, with_contents(messages, contents))
    return continued(tokenizer, prompt, turn.written(answer), held)


def with_contents(messages: Sequence[Message], contents: Sequence[str]) -> list[Message]:
    """The messages with these texts in place of their own."""
    return [{**message, "content": content} for message, content in zip(messages, contents, strict=True)]


def guard_of(tokenizer: PreTrainedTokenizerBase, tags: frozenset[str] | None = None) -> Guard:
    """The guard that keeps the marks of a tokenizer's chats out of their messages.

    Args:
        tags: the texts that separate turns, beside special tokens; None finds them in the chat template.

    Raises:
        Unbounded: the chat template does not end.
    """
    return _guard(tokenizer, _template_of(tokenizer), tags)


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template: Any = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


@lru_cache(maxsize=16)
def _guard(tokenizer: PreTrainedTokenizerBase, template: str | None, tags: frozenset[str] | None) -> Guard:
    """Cached by template: a tokenizer with another template gets another guard."""
    known = marks_of(tokenizer)
    if tags is None:
        tags = frozenset()
        if template is not None:
            try:
                tags = find_marks(lambda messages, ask: render(template, messages, ask, **known.named), known)
            except Unbounded as error:
                raise Unbounded(f"{tokenizer.name_or_path}: {error}") from error
    marks = known.special | tags
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    tokens = {tokenizer.convert_tokens_to_ids(mark) for mark in marks if mark in added} - {tokenizer.unk_token_id}
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    loose = {mark for mark in marks if mark not in added or added[mark].normalized}
    normalize = normalizer.normalize_str if normalizer is not None else None
    return Guard(lambda text: ids_of(tokenizer, text), marks, tokens, normalize, loose)


def counting_marks(rows: Iterable[_Row], guard: Guard, say: Callable[[str], object]) -> Iterator[_Row]:
    """Yield the rows unchanged; after the last, say how many hold marks of a chat in their texts.

    Args:
        rows: with `messages`, and answers under `response`, or `chosen` and `rejected`.
    """
    marked = total = 0
    first = ""
    for row in rows:
        answers = (row[key] for key in ("response", "chosen", "rejected") if key in row)
        mark = guard.first([*(message["content"] for message in row["messages"]), *answers])
        marked, total, first = marked + (mark is not None), total + 1, first or mark or ""
        yield row
    if marked:
        say(f"{marked:,} of {total:,} rows hold special tokens or turn tags, such as {first!r}: read as plain text")


def turn_of(tokenizer: PreTrainedTokenizerBase) -> Turn:
    """What a tokenizer's chat template writes around an answer.

    Raises:
        ValueError: see `find_turn`.
    """
    return find_turn(lambda messages, ask: chat_text(tokenizer, messages, ask), marks_of(tokenizer))


def end_ids(tokenizer: PreTrainedTokenizerBase, config: GenerationConfig | None) -> list[int]:
    """The tokens that end an answer: the chat template's, the tokenizer's and the model's.

    Args:
        config: the model's; None if it has none.

    Raises:
        Unbounded: the chat template does not end.
    """
    named = getattr(config, "eos_token_id", None)
    listed = [*(named if isinstance(named, list) else [named])]
    stop = tokenizer.eos_token_id
    if tokenizer.chat_template is not None:
        try:
            stop = tokenizer.convert_tokens_to_ids(turn_of(tokenizer).stop)
        except Unbounded:
            raise
        except ValueError:
            pass  # somebody else's template, which is used as it is
    return [token for token in dict.fromkeys([stop, tokenizer.eos_token_id, *listed]) if token is not None]


def spare_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A token to fill a classifier's batches with: pad, unknown, or a special token that the chat template lacks.

    It is neither EOS nor BOS: a classifier scores a text at its last token that is not a pad.

    Raises:
        ValueError: the tokenizer has none.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    spare = [token for token in reversed(special) if token not in str(tokenizer.chat_template)]
    for token in (tokenizer.pad_token, tokenizer.unk_token, *spare):
        if token not in (None, tokenizer.eos_token, tokenizer.bos_token):
            return str(token)
    raise ValueError(
        f"{tokenizer.name_or_path}: its pad token is {tokenizer.pad_token!r}, its end-of-text token "
        f"{tokenizer.eos_token!r}, and it has no other special token to fill a batch with; give it a pad token"
    )


def generation_config(folder: str) -> GenerationConfig | None:
    """The generation config of a model folder or hub name; None if it has none."""
    try:
        config: GenerationConfig = GenerationConfig.from_pretrained(folder)
    except OSError:
        return None
    return config


class PromptReader:
    """Prompts as a policy reads them, and answers as it ends them. It holds the tokenizer, not the weights.

    Args:
        tokenizer: with the policy's chat template.
        ends: the tokens that end an answer.
        own: the model's own chat template, if it is kept.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], own: OwnChat | None = None) -> None:
        self.tokenizer, self.ends, self.own = tokenizer, tuple(ends), own

    @classmethod
    def load(
        cls,
        folder: str,
        own_chat: Mapping[str, Switch] | None = None,
        style: PromptStyle = "own",
        *,
        place: Place | None = None,
        trust_remote_code: bool = False,
    ) -> Self:
        """Load the reader of a policy folder or hub name.

        Args:
            own_chat: the switches of the model's own chat template (`model.chat = "model"`), which is kept even if
                the folder is no policy of ours; None reads the folder's template as it is.
            style: the chat format that replaces the folder's template, unless it is "own".
            place: where the model's own template has the dial's line; None finds out.

        Raises:
            ValueError: the model's own template cannot carry a dial; a style that the tokenizer cannot write.
        """
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if style != "own":
            tokenizer.chat_template = styled_template(style, tokenizer.bos_token, tokenizer.eos_token)
        own = None if own_chat is None else keep_own_chat(tokenizer, own_chat, folder, place=place)
        return cls(tokenizer, end_ids(tokenizer, generation_config(folder)), own)

    @property
    def stop(self) -> tuple[str, ...]:
        """The tokens that end an answer, as text."""
        return tuple(self.tokenizer.convert_ids_to_tokens(list(self.ends)))

    @cached_property
    def turn(self) -> Turn:
        """What the chat template writes around an answer; only an end token if that cannot be found."""
        try:
            return turn_of(self.tokenizer)
        except ValueError:  # somebody else's template, which is used as it is
            end = str(self.tokenizer.convert_ids_to_tokens(self.ends[0]))
            return Turn("", end, end)

    @property
    def lead(self) -> str:
        """The text that the chat template writes between a prompt and an answer: it is no part of the answer's text."""
        return self.turn.lead

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        return prompt_ids(self.tokenizer, messages)

    def prompt_tokens(self, messages: Sequence[Message]) -> int:
        """The length of a prompt."""
        return len(self.prompt_ids(messages))

    def answered(self, messages: Sequence[Message], answer: str, ended: bool) -> tuple[list[int], list[int]]:
        """The tokens of a prompt, and those of an answer's text after it, with its end if it has `ended`.

        The text is tokenized again, as in training: a model may have sampled the same text as other tokens.
        """
        guard = guard_of(self.tokenizer)
        (text, *contents), held = guard.hide([answer, *(message["content"] for message in messages)])
        written = self.turn.written(text)
        prompt = chat_text(self.tokenizer, with_contents(messages, contents))
        return continued(self.tokenizer, prompt, written if ended else written.removesuffix(self.turn.end), held)

    def answer(self, ids: Sequence[int]) -> Answer:
        """The answer that sampled tokens make."""
        finished = bool(ids) and ids[-1] in self.ends
        text: str = self.tokenizer.decode(list(ids[:-1] if finished else ids), skip_special_tokens=True)
        return Answer(text.removeprefix(self.lead), len(ids), finished)
