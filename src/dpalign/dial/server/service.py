"""A request becomes an order, and an order is answered: the direction, the prompt, a place in line, the engine.

Every fault of a request is found before a token is drawn.
"""

import asyncio
import math
import secrets
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter, time
from typing import Any, Literal

from dpalign.dial import TEMPERATURE
from dpalign.dial.best_of import SPREAD, draw_best
from dpalign.dial.dial import Dial
from dpalign.dial.export.card_figures import front_of
from dpalign.dial.export.source import find_model, find_source
from dpalign.dial.export.verbosity import lengths_of
from dpalign.dial.rewards import open_scorer
from dpalign.dial.server.engine import (
    Array,
    Delta,
    Generator,
    Limits,
    Rewards,
    Sampling,
    collect,
    engine_of,
)
from dpalign.dial.server.shapes import ApiError, ChatRequest, DialReply, TasteReply, TemplateArguments
from dpalign.dial.taste import Choice, Estimate
from dpalign.engines.knobs import Engines
from dpalign.paper.direction import Preference
from dpalign.paper.prompts import RewardInput
from dpalign.rewards.inputs import TooLong
from dpalign.rows import Message
from dpalign.runs.modelfolder import require_weights
from dpalign.train.contract import FILE, read_contract


@dataclass(frozen=True)
class Order:
    """A request that will be answered."""

    messages: Sequence[Message]
    prompt: Sequence[int]
    sampling: Sampling
    preference: Preference | None
    warnings: Sequence[str]
    best_of: int | None = None
    spread: float = SPREAD
    """Degrees around the direction, for best_of."""
    began: float = 0.0
    """When the request came, by perf_counter."""


class Service:
    """One model behind the API.

    Args:
        temperature: the default of a request.
    """

    def __init__(
        self,
        name: str,
        dial: Dial,
        generator: Generator,
        limits: Limits,
        *,
        rewards: Rewards | None = None,
        temperature: float = TEMPERATURE,
    ) -> None:
        self.name, self.dial, self.generator, self.limits, self.rewards = name, dial, generator, limits, rewards
        self.temperature = temperature
        self.line = Line(limits.max_concurrent, limits.max_queue)
        self.scoring = Line(4, limits.max_queue)
        self.on_work: Callable[[str, float], None] = lambda what, amount: None
        """Called with each amount of work: prompt_tokens, generated_tokens, scored_answers, first_token_seconds."""
        self.created = int(time())
        self.closing = False
        """The server takes no new requests."""
        self.max_prompt = min(limits.max_prompt or generator.context, generator.context - 1)
        self.max_characters = self.max_prompt * (1 + max(map(len, generator.prompts.tokenizer.get_vocab())))
        """Most characters of a chat. More do not fit, even in the longest tokens with a space between them."""

    def now(self) -> dict[str, float]:
        load = {f"engine_{name}": value for name, value in self.generator.load.items()}
        return {"requests_running": self.line.running, "requests_waiting": self.line.waiting, **load}

    def described(self) -> DialReply:
        """What a client needs to draw the dial and to ask."""
        return DialReply(
            **self.dial.to_json(),
            model=self.name,
            rewards=self.rewards is not None,
            max_best_of=0 if self.rewards is None else self.limits.max_n,
            temperature=self.temperature,
            note=self.dial.note,
            questions=list(self.dial.questions),
        )

    def taste(self, choices: Sequence[Choice]) -> TasteReply:
        """Estimate a person's direction from choices between answers.

        Raises:
            ApiError: the model takes no directions, or the rewards are of other objectives.
        """
        if not self.dial.objectives:
            raise ApiError(404, "this model takes no directions", code="no_dial")
        try:
            own = Estimate.of(self.dial, choices)
        except ValueError as error:
            raise ApiError(400, str(error), param="choices", code="invalid_value") from None
        return TasteReply(
            preference=own.direction.weights,
            angle=self.dial.angle_of(own.direction),
            within=own.within,
            words=own.words,
            next=None if own.next is None else [direction.weights for direction in own.next],
        )

    async def close(self) -> None:
        await self.generator.close()
        if self.rewards is not None:
            self.rewards.close()

    # --- request -> order ---

    @asynccontextmanager
    async def placed(self, request: ChatRequest) -> AsyncIterator[Order]:
        """Check a request against the model and the limits; yield its order while it holds a place in line.

        The prompt is tokenized once the request has its place, because all requests share one thread for that.

        Raises:
            ApiError: the request is wrong, or the line is full.
        """
        began = perf_counter()
        preference = self.direction(request)
        messages = [message.plain() for message in request.messages]
        if (characters := sum(len(message["content"]) for message in messages)) > self.max_characters:
            what = f"{characters} characters; no more than {self.max_characters} fit in {self.max_prompt} tokens"
            raise ApiError(400, what, param="messages", code="context_length_exceeded")
        if request.best_of is not None:
            self._check_best_of(request.best_of, preference)
        warning = None if preference is None else self.dial.warning(preference)
        spread = SPREAD if request.angle_spread is None else request.angle_spread
        warnings = [] if warning is None else [warning]
        async with self.line.place():
            prompt = await self._prompt(messages, preference)
            sampling = self._sampling(request, len(prompt))
            yield Order(messages, prompt, sampling, preference, warnings, request.best_of, spread, began)

    def direction(self, request: ChatRequest) -> Preference | None:
        """The direction that a request asks for, from any of its fields.

        Raises:
            ApiError: another model's name, two directions, or one that cannot be read.
        """
        name, at, words = request.model.partition("@")
        if name != self.name:
            raise unknown_model(name, self.name, "model")
        fields: dict[str, Any] = {}
        for source in (request, request.chat_template_kwargs or TemplateArguments()):
            for field in ("preference", "angle"):
                value = getattr(source, field)
                if value is not None and field in fields:
                    raise ApiError(400, f"{field} is given twice", param="chat_template_kwargs", code="preference")
                if value is not None:
                    fields[field] = value
        lengths = {request.verbosity, None if request.text is None else request.text.verbosity} - {None}
        if len(lengths) > 1:
            raise ApiError(400, "verbosity and text.verbosity differ; give one", param="text", code="preference")
        if lengths:
            fields["verbosity"] = lengths.pop()
        first = next(iter(fields), None)
        if at and first:
            what = f"the model's name gives a direction, and {first} another; give one"
            raise ApiError(400, what, param=first, code="preference")
        try:
            return self.dial.parse(words) if at else self.dial.read(**fields)
        except ValueError as error:
            raise ApiError(400, str(error), param="model" if at else first, code="preference") from None

    async def _prompt(self, messages: Sequence[Message], preference: Preference | None) -> list[int]:
        try:
            ids = await self.generator.prompts.ids(messages, None if preference is None else preference.weights)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from None
        if len(ids) > self.max_prompt:
            what = f"the prompt is {len(ids)} tokens long; at most {self.max_prompt} are taken"
            raise ApiError(400, what, param="messages", code="context_length_exceeded")
        return ids

    def _sampling(self, request: ChatRequest, prompt: int) -> Sampling:
        field = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        tokens = request.max_tokens or request.max_completion_tokens
        room = self.generator.context - prompt
        if tokens is not None and tokens > self.limits.max_tokens:
            what = f"{field} {tokens}: this server gives at most {self.limits.max_tokens}"
            raise ApiError(400, what, param=field, code="invalid_value")
        if tokens is not None and tokens > room:
            what = f"a prompt of {prompt} tokens and {tokens} more exceed the context of {self.generator.context}"
            raise ApiError(400, what, param=field, code="context_length_exceeded")
        n = request.n or 1
        if n > self.limits.max_n:
            raise ApiError(400, f"n {n}: at most {self.limits.max_n}", param="n", code="invalid_value")
        return Sampling(
            max_tokens=tokens or min(self.limits.max_tokens, room),
            n=n,
            temperature=self.temperature if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=secrets.randbits(63) if request.seed is None else request.seed,
            stop=tuple(request.stop or ()),
        )

    def _check_best_of(self, best_of: int, preference: Preference | None) -> None:
        if self.rewards is None:
            problem = "best_of needs a reward model, and this server has none; start it with --reward"
        elif preference is None:
            problem = f"best_of ranks answers by a direction; give a preference ({', '.join(self.dial.objectives)})"
        elif best_of > self.limits.max_n:
            problem = f"best_of {best_of}: at most {self.limits.max_n}"
        else:
            return
        raise ApiError(400, problem, param="best_of", code="invalid_value")

    # --- order -> answers ---

    async def answers(self, order: Order) -> AsyncGenerator[list[Delta], None]:
        """The answers to an order, in pieces."""
        first = True
        pieces = self._stream(order.prompt, order.sampling) if order.best_of is None else self._best(order)
        async with aclosing(pieces):
            async for deltas in pieces:
                if first:
                    self.on_work("first_token_seconds", perf_counter() - order.began)
                    first = False
                yield deltas

    async def _stream(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[list[Delta], None]:
        """Stream the engine's deltas, and count their tokens."""
        self.on_work("prompt_tokens", len(prompt))
        async with aclosing(self.generator.stream(prompt, sampling)) as stream:
            async for deltas in stream:
                self.on_work("generated_tokens", sum(delta.tokens for delta in deltas))
                yield deltas

    async def _best(self, order: Order) -> AsyncGenerator[list[Delta], None]:
        """Yield the best of `best_of` answers drawn around the direction, whole."""
        assert order.preference is not None
        assert order.best_of is not None

        async def draw(near: Preference, n: int, seed: int) -> list[Delta]:
            prompt = await self._prompt(order.messages, near)
            longest = min(order.sampling.max_tokens, self.generator.context - len(prompt))
            sampling = replace(order.sampling, n=n, seed=seed, max_tokens=longest)
            async with aclosing(self._stream(prompt, sampling)) as stream:
                return await collect(stream, n)

        score = partial(self.scores, order.messages)
        seed = order.sampling.seed
        yield [await draw_best(self.dial, order.preference, order.best_of, order.spread, seed, draw=draw, score=score)]

    async def scores(self, messages: Sequence[Message], answers: Sequence[str]) -> Array:
        """reward_NK of answers.

        Raises:
            ApiError: there is no reward model, or it cannot read the chat.
        """
        if self.rewards is None:
            raise ApiError(404, "no reward model here; start the server with --reward", code="no_reward_model")
        try:
            reward_NK = await self.rewards.score(messages, answers)
        except TooLong as error:
            raise ApiError(400, str(error), param="messages", code="context_length_exceeded") from None
        except ValueError as error:
            raise ApiError(400, f"the reward model: {error}", param="messages", code="invalid_value") from None
        self.on_work("scored_answers", len(answers))
        return reward_NK


def open_service(
    path: Path,
    limits: Limits,
    *,
    name: str | None = None,
    rows: int,
    engine: str = "transformers",
    dtype: str = "auto",
    engines: Engines | None = None,
    max_model_len: int | None = None,
    reward: Sequence[str] | Literal[False] = (),
    reward_template: RewardInput | None = None,
    temperature: float = TEMPERATURE,
    refuse_marks: bool = False,
) -> Service:
    """Load the model at a path: an export, a policy's folder, a run's folder, or a model that takes no directions.

    Args:
        name: the model's name for clients; None takes the folder's.
        rows: answers decoded side by side.
        reward: see `dial.rewards.open_scorer`; empty loads those inside the model's folder; False loads none.
        engine, dtype, engines, max_model_len: see `open_generator`.
        refuse_marks: see `Prompts`.

    Raises:
        ValueError: names the folder, and says what is wrong with it.
    """
    own, model, contract_folder = find_model(path)
    contract = read_contract(contract_folder)
    rewards = None
    if contract is None:
        if reward:
            raise ValueError(f"--reward: {model} has no {FILE} that says which heads its objectives read")
        dial = Dial((), "fig1", "zephyr")
    else:
        dial = Dial.of(contract)
        if not dial.front:
            source = find_source(path)
            dial = replace(dial, front=front_of(source), verbosity=lengths_of(source))
        if reward is not False:
            scorer = open_scorer(model, contract, reward, template=reward_template, dtype=dtype)
            rewards = None if scorer is None else Rewards(scorer, contract)
    generator = open_generator(
        model, engine=engine, rows=rows, dtype=dtype, engines=engines, max_model_len=max_model_len
    )
    generator.prompts.refuses_marks = refuse_marks
    return Service(name or own.replace("@", "-"), dial, generator, limits, rewards=rewards, temperature=temperature)


def open_generator(
    model: Path,
    *,
    engine: str = "transformers",
    rows: int,
    dtype: str = "auto",
    engines: Engines | None = None,
    max_model_len: int | None = None,
) -> Generator:
    """Load a policy folder into an engine, not started yet.

    Args:
        engine: transformers, vllm or auto.
        rows: answers decoded side by side.
        engines: vLLM's share of the GPUs.
        max_model_len: tokens of a prompt and its answer, with vLLM.

    Raises:
        ValueError: the engine cannot run this model here, or the folder lacks safetensors.
    """
    require_weights(model)
    match engine_of(engine):
        case "vllm":
            from dpalign.dial.server.vllm_engine import VllmGenerator

            settings = engines or Engines()
            return VllmGenerator(str(model), rows=rows, settings=settings, dtype=dtype, max_model_len=max_model_len)
        case _:
            from dpalign.dial.server.transformers_engine import BatchingGenerator

            return BatchingGenerator(str(model), rows=rows, dtype=dtype)


def unknown_model(name: str, known: str, param: str | None = None) -> ApiError:
    return ApiError(404, f"no model {name[:100]!r} here; there is {known!r}", param=param, code="model_not_found")


class Line:
    """Lets `concurrent` requests in at a time, in the order they came; `queue` more may wait."""

    def __init__(self, concurrent: int, queue: int) -> None:
        self.concurrent, self.queue = concurrent, queue
        self.places = asyncio.Semaphore(concurrent)
        self.running = self.waiting = 0
        self.stays: deque[float] = deque([1.0], maxlen=32)
        """Seconds that the last requests took."""

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold one place during a `with`.

        Raises:
            ApiError: on entering, when the line is full; says when to try again.
        """
        if self.places.locked() and self.waiting >= self.queue:
            stay = sum(self.stays) / len(self.stays)
            seconds = max(1, min(60, math.ceil(stay * (self.waiting + 1) / self.concurrent)))
            what = "the server is busy and its queue is full"
            raise ApiError(429, what, code="queue_full", headers={"Retry-After": str(seconds)})
        self.waiting += 1
        try:
            await self.places.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        began = perf_counter()
        try:
            yield
        finally:
            self.stays.append(perf_counter() - began)
            self.running -= 1
            self.places.release()
