"""OpenAI's chat completions as they come in and go out, with the fields that turn the dial.

A field that OpenAI knows and this server cannot honour is refused unless it asks for nothing; what changes no answer is
taken and ignored; any other field is an error that names the nearest known one.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from dpalign.dial.server.generation import Finish
from dpalign.dial.server.refusals import Refusal
from dpalign.paper.direction import name_hint
from dpalign.rows import Message

IGNORED: Final = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
"""Fields of OpenAI's that change no answer here."""

REFUSED: Final[Mapping[str, tuple[Any, ...]]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of OpenAI's that would change the answer, with the values beside null that ask for nothing."""

_STRICT = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


def _whole(text: str) -> str:
    """Refuse half of a surrogate pair, which JSON can spell and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no text") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    """One turn; `developer` is another word for `system`."""

    model_config = _STRICT
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]

    def plain(self, place: int) -> Message:
        """The turn as the chat template takes it."""
        for name, value in (self.model_extra or {}).items():
            if name not in ("name", "refusal", "annotations") and value not in (None, []):
                what = f"messages.{place}.{name}"
                raise Refusal(400, f"{what}: this server reads role and content alone", param=what, code="unsupported")
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


StopString = Annotated[Text, Field(min_length=1, max_length=256)]
Messages = Annotated[list[ChatMessage], Field(min_length=1)]


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions."""

    model_config = _STRICT
    model: str = Field(description="The model's name, with a direction if any: mine, mine@-30, mine@helpfulness=1")
    messages: Messages
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    preference: Any = Field(None, description="Weights by objective, of any length")
    angle: Any = Field(None, description="Degrees, where the model weighs two objectives")
    chat_template_kwargs: Any = Field(None, description="preference or angle, as vLLM's server takes them")
    best_of: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Draw so many answers and return the one that the reward model rates best as asked"
    )
    angle_spread: Annotated[float, Field(ge=0, le=180)] | None = Field(
        None, description="Degrees around the direction within which best_of draws"
    )

    def check_fields(self) -> None:
        """Refuse what this server cannot honour.

        Raises:
            Refusal: naming the field, and the nearest known one where nobody knows it.
        """
        for name, value in (self.model_extra or {}).items():
            if name in IGNORED:
                continue
            if name not in REFUSED:
                known = [*type(self).model_fields, *IGNORED, *REFUSED]
                hint = name_hint(name, known).partition(";")[0]
                raise Refusal(400, f"unknown field {name!r} ({hint})", param=name, code="unknown_field")
            if not _asks_for_nothing(value, REFUSED[name]):
                more = "; an objective's weight goes into preference" if name == "verbosity" else ""
                raise Refusal(400, f"{name} is not supported{more}", param=name, code="unsupported")

    def stops(self) -> tuple[str, ...]:
        match self.stop:
            case None:
                return ()
            case str():
                return (self.stop,)
            case _:
                return tuple(self.stop)


def _asks_for_nothing(value: object, neutral: Sequence[Any]) -> bool:
    """Whether a field of OpenAI's is null or neutral; false is no 0, and 0.0 is."""
    alike = (type(value), int) if isinstance(value, float) else (type(value),)
    return value is None or any(type(nothing) in alike and value == nothing for nothing in neutral)


class RewardRequest(BaseModel):
    """The body of POST /v1/rewards."""

    model_config = ConfigDict(extra="forbid", strict=True)
    messages: Messages
    response: Text


def plain_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """The chat as the template takes it.

    Raises:
        Refusal: it does not end with the user's turn, or holds more than text.
    """
    if messages[-1].role != "user":
        raise Refusal(
            400,
            f"the last message is the {messages[-1].role}'s; end with the user's",
            param="messages",
            code="invalid_value",
        )
    return [message.plain(i) for i, message in enumerate(messages)]


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def choice(index: int, text: str, finish: Finish) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": finish}


def piece(index: int, delta: Mapping[str, str], finish: Finish | None = None) -> dict[str, Any]:
    return {"index": index, "delta": dict(delta), "logprobs": None, "finish_reason": finish}
