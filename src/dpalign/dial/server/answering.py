"""From a checked request to its answers: the direction, the prompt, a place in line, the generator.

What is wrong with a request is found here and said before a token is drawn.
"""

import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter, time
from typing import Any

from dpalign.dial.best_of import SPREAD, Best, draw_best
from dpalign.dial.dial import Dial
from dpalign.dial.server.gate import Gate
from dpalign.dial.server.generation import Delta, Drawn, Generator, Sampling, collect
from dpalign.dial.server.limits import Limits
from dpalign.dial.server.metrics import Metrics
from dpalign.dial.server.protocol import ChatRequest, plain_messages
from dpalign.dial.server.refusals import Refusal
from dpalign.dial.server.rewards import Rewards, TooLong
from dpalign.paper.direction import Preference
from dpalign.rows import Message


@dataclass(frozen=True)
class Order:
    """A request that will be answered."""

    messages: Sequence[Message]
    prompt: Sequence[int]
    sampling: Sampling
    preference: Preference | None
    warnings: Sequence[str]
    best_of: int | None = None
    spread: float = 0.0


class Service:
    """One model behind the API.

    Args:
        temperature: of a request that states none.
        spread: degrees around the direction for best_of in a request that states none.
    """

    def __init__(
        self,
        name: str,
        dial: Dial,
        generator: Generator,
        limits: Limits,
        *,
        rewards: Rewards | None = None,
        temperature: float = 0.7,
        spread: float = SPREAD,
    ) -> None:
        self.name, self.dial, self.generator, self.limits, self.rewards = name, dial, generator, limits, rewards
        self.temperature, self.spread = temperature, spread
        self.gate = Gate(limits.max_concurrent, limits.max_queue)
        self.scoring = Gate(4, limits.max_queue)
        self.metrics = Metrics(self.now)
        self.created = int(time())
        self.max_best_of = 0 if rewards is None else limits.max_n
        """Answers that best_of may choose from; 0 without a reward model, which would choose."""
        self.max_prompt = min(limits.max_prompt or generator.context, generator.context - 1)

    def now(self) -> dict[str, float]:
        load = {f"engine_{name}": value for name, value in self.generator.load.items()}
        return {"requests_running": self.gate.running, "requests_waiting": self.gate.waiting, **load}

    def direction(self, body: ChatRequest) -> Preference | None:
        """The direction that a request asks for, wherever it says so.

        Raises:
            Refusal: another model's name, two directions, or none that can be read.
        """
        name, at, words = body.model.partition("@")
        if name != self.name:
            raise Refusal(
                404, f"no model {name[:100]!r} here; there is {self.name!r}", param="model", code="model_not_found"
            )
        asked: dict[str, Any] = {"preference": body.preference, "angle": body.angle}
        if body.chat_template_kwargs is not None:
            asked |= _as_kwargs(body.chat_template_kwargs, asked)
        given = [field for field, value in asked.items() if value is not None]
        if at and given:
            raise Refusal(
                400,
                f"the model's name gives a direction, and {given[0]} another; give one",
                param=given[0],
                code="preference",
            )
        try:
            return self.dial.parse(words) if at else self.dial.read(**asked)
        except ValueError as error:
            raise Refusal(400, str(error), param="model" if at else given[0], code="preference") from None

    async def read(self, body: ChatRequest) -> Order:
        """Check a request against model and limits.

        Raises:
            Refusal: and why.
        """
        body.check_fields()
        preference = self.direction(body)
        messages = plain_messages(body.messages)
        warning = None if preference is None else self.dial.warning(preference)
        prompt = await self._prompt(messages, preference)
        sampling = self._sampling(body, len(prompt))
        order = Order(messages, prompt, sampling, preference, [] if warning is None else [warning])
        if body.best_of is None:
            if body.angle_spread is not None:
                raise Refusal(400, "angle_spread goes with best_of", param="angle_spread", code="invalid_value")
            return order
        self._check_best_of(body, preference)
        spread = self.spread if body.angle_spread is None else body.angle_spread
        return replace(order, best_of=body.best_of, spread=spread)

    async def _prompt(self, messages: Sequence[Message], preference: Preference | None) -> list[int]:
        try:
            ids = await self.generator.prompt_ids(messages, None if preference is None else preference.weights)
        except ValueError as error:
            raise Refusal(400, str(error), param="messages", code="invalid_value") from None
        if len(ids) > self.max_prompt:
            raise Refusal(
                400,
                f"the prompt is {len(ids)} tokens long; at most {self.max_prompt} are taken",
                param="messages",
                code="context_length_exceeded",
            )
        return ids

    def _sampling(self, body: ChatRequest, prompt: int) -> Sampling:
        if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
            raise Refusal(400, "max_tokens and max_completion_tokens differ", param="max_tokens", code="invalid_value")
        param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        asked = body.max_tokens or body.max_completion_tokens
        room = self.generator.context - prompt
        if asked is not None and asked > self.limits.max_tokens:
            most = self.limits.max_tokens
            raise Refusal(400, f"{param} {asked}: this server gives at most {most}", param=param, code="invalid_value")
        if asked is not None and asked > room:
            raise Refusal(
                400,
                f"a prompt of {prompt} tokens and {asked} more exceed the model's context of {self.generator.context}",
                param=param,
                code="context_length_exceeded",
            )
        n = body.n or 1
        if n > self.limits.max_n:
            raise Refusal(400, f"n {n}: at most {self.limits.max_n}", param="n", code="invalid_value")
        return Sampling(
            max_tokens=asked or min(self.limits.max_tokens, room),
            n=n,
            temperature=self.temperature if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=secrets.randbits(63) if body.seed is None else body.seed,
            stop=body.stops(),
        )

    def _check_best_of(self, body: ChatRequest, preference: Preference | None) -> None:
        best_of, problem = body.best_of or 0, None
        if self.rewards is None:
            problem = "best_of needs a reward model, and this server has none; start it with --reward"
        elif preference is None:
            problem = f"best_of ranks answers by a direction; give a preference ({', '.join(self.dial.objectives)})"
        elif best_of > self.limits.max_n:
            problem = f"best_of {best_of}: at most {self.limits.max_n}"
        elif (body.n or 1) != 1:
            problem = "best_of returns one answer; leave n at 1"
        if problem is not None:
            raise Refusal(400, problem, param="best_of", code="invalid_value")

    async def answers(self, order: Order) -> AsyncGenerator[list[Delta], None]:
        """The answers to an order in pieces; it holds a place at the gate until it is finished or closed."""
        asked = perf_counter()
        async with self.gate.enter(), aclosing(self.generator.stream(order.prompt, order.sampling)) as stream:
            self.metrics.prompt_tokens.inc(len(order.prompt))
            first = True
            async for news in stream:
                if first:
                    self.metrics.first.observe(perf_counter() - asked)
                    first = False
                self.metrics.generated_tokens.inc(sum(delta.tokens for delta in news))
                yield news

    async def best(self, order: Order) -> Best:
        """The best of `best_of` answers drawn around the direction, by the reward model at the direction itself."""
        assert order.preference is not None
        assert order.best_of is not None

        async def draw(near: Preference, n: int, seed: int) -> list[Drawn]:
            return await self._whole(order, near, replace(order.sampling, n=n, seed=seed))

        async with self.gate.enter():
            return await draw_best(
                self.dial,
                order.preference,
                order.best_of,
                order.spread,
                order.sampling.seed,
                draw=draw,
                score=partial(self.scores, order.messages),
            )

    async def _whole(self, order: Order, near: Preference, sampling: Sampling) -> list[Drawn]:
        """The answers at one direction of several."""
        prompt = await self._prompt(order.messages, near)
        room = self.generator.context - len(prompt)
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, room))
        self.metrics.prompt_tokens.inc(len(prompt))
        async with aclosing(self.generator.stream(prompt, sampling)) as stream:
            collected = await collect(stream, sampling.n)
        self.metrics.generated_tokens.inc(sum(answer.tokens for answer in collected))
        return collected

    async def scores(self, messages: Sequence[Message], answers: Sequence[str]) -> Any:
        """reward_NK of answers.

        Raises:
            Refusal: the reward model cannot read the chat.
        """
        assert self.rewards is not None
        try:
            reward_NK = await self.rewards.score(messages, answers)
        except TooLong as error:
            raise Refusal(400, str(error), param="messages", code="context_length_exceeded") from None
        except ValueError as error:
            raise Refusal(400, f"the reward model: {error}", param="messages", code="invalid_value") from None
        self.metrics.scored.inc(len(answers))
        return reward_NK


def _as_kwargs(given: object, asked: Mapping[str, Any]) -> dict[str, Any]:
    """preference and angle as vLLM's server takes them.

    Raises:
        Refusal: there is anything else among them, or they are given twice.
    """
    where = "chat_template_kwargs"
    if not isinstance(given, Mapping):
        raise Refusal(400, f"{where} is no object; give preference or angle in it", param=where, code="invalid_value")
    for name, value in given.items():
        if name not in asked:
            raise Refusal(400, f"{where}.{name}: known: {', '.join(asked)}", param=where, code="unknown_field")
        if value is not None and asked[name] is not None:
            raise Refusal(400, f"{name} is given twice", param=where, code="preference")
    return {name: value for name, value in given.items() if value is not None}
