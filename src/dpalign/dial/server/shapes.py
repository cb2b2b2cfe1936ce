"""OpenAI's chat completions: requests, responses and errors, with the fields that turn the dial.

A field that OpenAI knows and this server cannot honour is refused, unless its value asks for nothing. A field that
changes no answer is taken and ignored. Any other field is an error that names the nearest known one.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, NoReturn, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from dpalign.dial import TEMPERATURE
from dpalign.dial.best_of import BestOf
from dpalign.dial.server.engine import Finish
from dpalign.paper.direction import Arc, Population, name_hint, objective_count
from dpalign.rows import Message
from dpalign.train.contract import Length, Verbosity, population_from_json

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
    "web_search_options": (),
}
"""Fields of OpenAI's that would change the answer, with the values beside null that ask for nothing."""

_LONGEST: Final = 100
"""Characters of a field's name that are read."""

_STRICT = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
_CLOSED = ConfigDict(extra="forbid", strict=True)

# --- errors ---

_SHOWN: Final = 1000
"""Characters of a message that a client sees: it may repeat what the client sent."""
_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error as a client reads it: {"error": {message, type, param, code}}."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def json(self) -> str:
        """The error as JSON in ASCII, so that any text from a client can be shown to it."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        param = None if self.param is None else self.param[:_SHOWN]
        error = {"message": self.message[:_SHOWN], "type": kind, "param": param, "code": self.code}
        return json.dumps({"error": error})


def _refuse(message: str, field: str | None = None, code: str = "invalid_value") -> NoReturn:
    """Fail a validation with an error of ours."""
    raise PydanticCustomError(code, "{message}", {"message": message, "field": field})


_FAULTS: Final = {
    "true or false": ("bool_type",),
    "a whole number": ("int_type", "int_from_float", "int_parsing_size"),
    "a finite number": ("float_type", "finite_number"),
    "text": ("string_type", "string_unicode"),
    "a list": ("list_type",),
    "an object": ("dict_type", "model_type", "model_attributes_type"),
    "at least {ge}": ("greater_than_equal",),
    "above {gt}": ("greater_than",),
    "at most {le}": ("less_than_equal",),
    "below {lt}": ("less_than",),
    "{expected}": ("literal_error",),
    "at least {min_length} long": ("too_short", "string_too_short"),
    "at most {max_length} long": ("too_long", "string_too_long"),
}
"""What a value must be, and pydantic's error types that say it is not."""


def fault_words(fault: Mapping[str, Any]) -> str:
    """Say what is wrong with a field, in our words: pydantic's own words name our classes."""
    context: Mapping[str, Any] = fault.get("ctx", {})
    match fault["type"]:
        case "missing":
            return "is missing"
        case "value_error":
            return f"is {context['error']}"
        case kind:
            words = next((words for words, kinds in _FAULTS.items() if kind in kinds), "another value")
            return f"must be {words.format_map(context)}"


# --- requests ---


def _whole(text: str) -> str:
    """Refuse half of a surrogate pair and NUL: JSON can spell them, and they are no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no text") from None
    if "\0" in text:
        raise ValueError("the character NUL, which is no text")
    return text


Text = Annotated[str, AfterValidator(_whole)]


class TextPart(BaseModel):
    model_config = _CLOSED
    type: Literal["text"]
    text: Text


def _parts(content: object) -> object:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class ChatMessage(BaseModel):
    """One turn; `developer` is another word for `system`."""

    model_config = _STRICT
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[TextPart],
        Field(min_length=1, fail_fast=True),
        BeforeValidator(_parts, json_schema_input_type=str | list[TextPart]),
    ]

    @model_validator(mode="after")
    def _text_alone(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name not in ("name", "refusal", "annotations") and value not in (None, []):
                _refuse(f"{name} in a message: this server reads role and content alone", name, "unsupported")
        return self

    def plain(self) -> Message:
        """The turn as the chat template takes it."""
        text = "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


def _ends_with_the_user(messages: list[ChatMessage]) -> list[ChatMessage]:
    if messages[-1].role != "user":
        _refuse(f"the last message is the {messages[-1].role}'s; end with the user's")
    if not messages[-1].plain()["content"].strip():
        _refuse("the last message is empty; end with a question")
    return messages


# stop at the first fault: building an error for each of many would delay all other clients
Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True), AfterValidator(_ends_with_the_user)]


def _listed(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


StopString = Annotated[Text, Field(min_length=1, max_length=256)]
StopStrings = Annotated[
    list[StopString], Field(max_length=4), BeforeValidator(_listed, json_schema_input_type=str | list[str])
]


class StreamOptions(BaseModel):
    model_config = _CLOSED
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TemplateArguments(BaseModel):
    """preference or angle as vLLM's own server takes them."""

    model_config = _CLOSED
    preference: Any = None
    angle: Any = None


class TextOptions(BaseModel):
    """verbosity as OpenAI's responses API spells it."""

    model_config = _CLOSED
    verbosity: Verbosity | None = None


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions."""

    model_config = _STRICT
    model: str = Field(description="The model's name, with a direction if any: mine, mine@-30, mine@helpfulness=1")
    messages: Messages
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopStrings | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    preference: Any = Field(None, description="Weights by objective, of any length")
    angle: Any = Field(None, description="Degrees, where the model weighs two objectives")
    chat_template_kwargs: TemplateArguments | None = None
    verbosity: Verbosity | None = Field(None, description="How long an answer is to be, where dpa.json has lengths")
    text: TextOptions | None = None
    best_of: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Draw this many answers and return the one that the reward model rates best as asked"
    )
    angle_spread: Annotated[float, Field(ge=0, le=180)] | None = Field(
        None, description="Degrees around the direction within which best_of draws"
    )

    @model_validator(mode="after")
    def _honoured(self) -> Self:
        """Refuse what this server cannot honour."""
        for name, value in (self.model_extra or {}).items():
            if name in IGNORED:
                continue
            if name not in REFUSED:
                known = [*type(self).model_fields, *IGNORED, *REFUSED]
                name = name[:_LONGEST]  # a search for the nearest name takes seconds if it is long
                hint = name_hint(name, known).partition(";")[0]
                _refuse(f"unknown field {name!r} ({hint})", name, "unknown_field")
            if not _asks_for_nothing(value, REFUSED[name]):
                _refuse(f"{name} is not supported", name, "unsupported")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            _refuse("max_tokens and max_completion_tokens differ", "max_tokens")
        if self.best_of is None and self.angle_spread is not None:
            _refuse("angle_spread goes with best_of", "angle_spread")
        if self.best_of is not None and (self.n or 1) != 1:
            _refuse("best_of returns one answer; leave n at 1", "best_of")
        return self


def _asks_for_nothing(value: object, neutral: Sequence[Any]) -> bool:
    """Whether a field of OpenAI's is null or neutral. false does not count as 0; 0.0 does."""
    types = (type(value), int) if isinstance(value, float) else (type(value),)
    return value is None or any(type(nothing) in types and value == nothing for nothing in neutral)


class RewardRequest(BaseModel):
    """The body of POST /v1/rewards."""

    model_config = _CLOSED
    messages: Messages
    response: Text


Points = dict[str, Annotated[float, Field(ge=-1e6, le=1e6)]]
"""Rewards by objective."""


class TasteChoice(BaseModel):
    """A choice between two answers, by their rewards."""

    model_config = _CLOSED
    preferred: Points
    other: Points


class TasteRequest(BaseModel):
    """The body of POST /v1/taste."""

    model_config = _CLOSED
    choices: Annotated[list[TasteChoice], Field(min_length=1, max_length=100)]


# --- responses: a field that is not set is not sent ---


class DialReply(BaseModel):
    """The reply of GET /v1/dial: what a client needs to draw the dial and to ask. Unknown values are null."""

    model: str
    objectives: list[str]
    arc: tuple[float, float] | None = None
    trained: dict[str, Any] | None = Field(None, description="The directions trained on, as `dpa.json` has them")
    template: str | None = None
    front: list[dict[str, Any]] | None = None
    verbosity: dict[Verbosity, Length] | None = None
    rewards: bool = True
    max_best_of: int = 0
    temperature: float = TEMPERATURE
    note: str | None = None
    questions: list[str] = []

    @field_validator("trained")
    @classmethod
    def _of_the_objectives(cls, trained: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        _population(trained, len(info.data.get("objectives", ())))
        return trained

    @property
    def population(self) -> Population | None:
        """The directions trained on; None where they are unknown."""
        found = _population(self.trained, len(self.objectives))
        return Arc(*self.arc) if found is None and self.arc is not None else found


def _population(trained: Mapping[str, Any] | None, objectives: int) -> Population | None:
    try:
        found = None if trained is None else population_from_json(trained, objectives)
    except TypeError as error:
        raise ValueError(f"{trained}: {error}") from error
    if found is not None and objective_count(found) != objectives:
        raise ValueError(f"directions of {objective_count(found)} objectives for {objectives} objectives")
    return found


class TasteReply(BaseModel):
    """The reply of POST /v1/taste: a person's direction, estimated from choices."""

    preference: dict[str, float]
    angle: float | None = Field(None, description="Degrees, where the model weighs two objectives")
    within: float = Field(description="Degrees around the direction that hold 90% of the posterior")
    words: str
    next: list[dict[str, float]] | None = Field(
        None, description="The two directions between which the next choice says most; null where one alone is trained"
    )


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int) -> Self:
        return cls(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class Choice(BaseModel):
    """One answer, whole in `message` or in part in `delta`."""

    index: int
    message: dict[str, str | None] | None = None
    delta: dict[str, str] | None = None
    logprobs: None = None
    finish_reason: Finish | None


class Completion(BaseModel):
    """A completion, or a chunk of one."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage | None = None
    preference: dict[str, float] | None = Field(None, description="The direction as it was read, normalised")
    warnings: list[str] = []
    best_of: BestOf | None = Field(None, description="How the answer was chosen, if it is the best of several")
