"""A policy in Python: load it, turn its dial, read its answers and their rewards.

    from dpalign import Policy

    with Policy.load("mine") as policy:
        for answer in policy.sample("Why is the sky blue?", angle=-30, n=4):
            print(answer.text, answer.rewards)

It is the service behind `dpa serve` and `dpa chat`, without HTTP: the same request gets the same answer.
"""

import asyncio
import sys
import threading
import warnings
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, TypeVar, cast, overload

from dpalign.dial import TEMPERATURE
from dpalign.dial.best_of import BestOf
from dpalign.dial.chat.speakers import Ask, Local, open_local
from dpalign.dial.export.source import find_source
from dpalign.dial.rewards import OWN_MODULE
from dpalign.dial.server.engine import Limits, collect
from dpalign.dial.server.shapes import ApiError
from dpalign.dial.taste import Estimate
from dpalign.engines.knobs import Engines
from dpalign.paper.direction import Preference
from dpalign.paper.prompts import RewardInput
from dpalign.rows import Message
from dpalign.train.contract import FILE, FrontPoint

Prompt: TypeAlias = str | Sequence[Message]
"""A question, or a chat that ends with the user's turn."""
Direction: TypeAlias = Mapping[str, float] | str | Preference
"""Weights by objective, the paper's arithmetic as text, or a `Preference`."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Answer:
    """One answer of a policy."""

    text: str
    tokens: int
    """Generated tokens, including the end of the answer; for the best of several, those of all answers."""
    finished: bool
    """False: cut at max_new_tokens."""
    rewards: Mapping[str, float] | None
    """By objective, 0-100; None without a reward model."""
    direction: Preference | None
    """The requested direction; None for a plain answer."""
    choice: BestOf | None = None
    """How the answer was chosen, if it is the best of several."""


class Policy:
    """A policy in this process, with its dial and its reward model, if it has one.

    It holds the model until `close`, the end of a `with`, or until nothing refers to it.
    """

    def __init__(self, speaker: Local, rows: int) -> None:
        self._speaker, self._service, self._rows = speaker, speaker.service, rows
        self.name = speaker.name
        self._held = weakref.finalize(self, _let_go, speaker)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        reward: bool | str | Path | Sequence[str] = True,
        engine: Literal["transformers", "vllm", "auto"] = "transformers",
        dtype: str = "auto",
        rows: int = 64,
        reward_template: RewardInput | None = None,
        max_model_len: int | None = None,
        engines: Engines | None = None,
    ) -> Self:
        """Load an export, a run's last policy, or a finished policy's folder.

        Args:
            reward: True takes the rewards inside the export or those of the run, but no function from outside this
                package. False takes none. Else a reward folder, `module:function`, or a list of NAME=SOURCE.
            engine: draws the answers; "auto" takes vLLM if it is installed.
            dtype: type of the weights; "auto" keeps the stored type.
            rows: answers decoded side by side.
            reward_template: how the reward model reads a chat; None: as the folder says.
            max_model_len: most tokens of a prompt and its answer, with vLLM.
            engines: vLLM's share of the GPUs, such as `Engines(gpu_memory=0.5)`.

        Raises:
            ValueError: an unusable folder or a missing package; names it.
        """
        limits = Limits(max_n=rows, max_concurrent=rows, max_queue=sys.maxsize)
        options: dict[str, Any] = {"engine": engine, "dtype": dtype, "rows": rows, "engines": engines}
        options |= {"reward_template": reward_template, "max_model_len": max_model_len}
        given = [reward] if isinstance(reward, str | Path) else reward
        chosen = _rewards_of_run(Path(path)) if given is True else given and [*map(str, given)]
        return cls(open_local(Path(path), limits, reward=chosen, **options), rows)

    @property
    def objectives(self) -> tuple[str, ...]:
        """The objectives that a direction weighs; empty for a model without a dial."""
        return self._service.dial.objectives

    @property
    def arc(self) -> tuple[float, float] | None:
        """The trained range (low, high) in degrees; None unless it is an arc."""
        return self._service.dial.arc

    @property
    def front(self) -> tuple[FrontPoint, ...]:
        """The mean rewards measured on validation prompts, one point per direction."""
        return self._service.dial.front

    @overload  # to a type checker a text is also a sequence of texts; the first match counts
    def sample(  # type: ignore[overload-overlap]
        self,
        prompt: Prompt,
        *,
        angle: float | None = None,
        preference: Direction | None = None,
        n: int = 1,
        temperature: float = TEMPERATURE,
        max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> list[Answer]: ...

    @overload
    def sample(
        self,
        prompt: Sequence[Prompt],
        *,
        angle: float | None = None,
        preference: Direction | None = None,
        n: int = 1,
        temperature: float = TEMPERATURE,
        max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> list[list[Answer]]: ...

    def sample(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        angle: float | None = None,
        preference: Direction | None = None,
        n: int = 1,
        temperature: float = TEMPERATURE,
        max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> list[Answer] | list[list[Answer]]:
        """Draw n answers to a prompt, or to each of several prompts.

        The answers to a prompt depend on the seed, not on the other prompts. A direction outside the trained range
        gives a warning.

        Args:
            prompt: a question, a chat that ends with the user's turn, or a list of either.
            angle: the direction in degrees, with two objectives.
            preference: the direction in another form. Without either the model answers plainly.
            temperature: 0 takes the likeliest token each time.
            max_new_tokens: cut longer answers; None: 2048, or fewer if the context ends before.

        Raises:
            ValueError: a direction, a chat or a number that the model cannot take.
        """
        if not 1 <= n <= self._rows:
            raise ValueError(f"n is {n}: 1 to {self._rows} answers are decoded side by side; load with rows={n}")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; give at least 1, or None")
        several = _is_several(prompt)
        prompts = cast("Sequence[Prompt]", prompt) if several else [cast("Prompt", prompt)]
        direction = self._direction(angle, preference)
        asks = [Ask(_chat(one), direction, temperature, seed, max_new_tokens, n=n) for one in prompts]
        answers = self._answers(asks)
        return answers if several else answers[0]

    def best_of(
        self,
        prompt: Prompt,
        n: int,
        *,
        angle: float | None = None,
        preference: Direction | None = None,
        spread: float | None = None,
        temperature: float = TEMPERATURE,
        max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> Answer:
        """Draw n answers around a direction; return the one that the reward model rates best at it.

        Args:
            spread: degrees around the direction; None: 10.

        Raises:
            ValueError: no reward model or no direction, or what `sample` refuses.
        """
        direction = self._direction(angle, preference)
        self._require_rewards()
        if direction is None:
            raise ValueError(f"best_of ranks answers by a direction; give an angle or a preference ({self._known})")
        ask = Ask(_chat(prompt), direction, temperature, seed, max_new_tokens, best_of=n, spread=spread)
        return self._answers([ask])[0][0]

    def score(self, prompt: Prompt, texts: Sequence[str]) -> list[dict[str, float]]:
        """Return the rewards of answers to a prompt, by objective.

        Raises:
            ValueError: no reward model, or it cannot read the chat.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts is one text, {texts[:40]!r}; give a list")
        self._require_rewards()
        return self._wait(self._rewards(_chat(prompt), texts))

    def taste(self, choices: Sequence[tuple[Answer, Answer]]) -> Estimate:
        """Estimate a person's own direction from their choices; the estimate names the two directions to compare next.

        Args:
            choices: pairs of answers to one question, the preferred one first; empty before the first choice.

        Raises:
            ValueError: no dial, or an answer without rewards.
        """
        if not self.objectives:
            raise ValueError(f"{self.name} takes no directions: no {FILE} beside its weights; `dpa export` writes one")
        for i, pair in enumerate(choices):
            if any(answer.rewards is None for answer in pair):
                raise ValueError(
                    f"choice {i}: an answer has no rewards; load a reward model: Policy.load(..., reward=DIR)"
                )
        rewards = [(preferred.rewards or {}, other.rewards or {}) for preferred, other in choices]
        return Estimate.of(self._service.dial, rewards)

    def close(self) -> None:
        """Let go of the model; a second call does nothing."""
        self._held()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        dial = self._service.dial
        range_ = f", {dial.trained}" if dial.trained else ""
        return f"Policy({self.name!r}: {self._known}{range_})"

    @property
    def _known(self) -> str:
        return ", ".join(self.objectives) or "no directions"

    def _direction(self, angle: float | None, preference: Direction | None) -> Preference | None:
        dial = self._service.dial
        if angle is None and preference is None:
            return None
        if not dial.objectives:
            raise ValueError(f"{self.name} takes no directions: no {FILE} beside its weights; `dpa export` writes one")
        if isinstance(preference, Preference):
            preference = preference.weights
        if isinstance(preference, str) and angle is None:
            return dial.parse(preference)
        return dial.read(preference, angle)

    def _require_rewards(self) -> None:
        if self._service.rewards is None:
            raise ValueError(f'{self.name} was loaded without a reward model; name one: Policy.load(..., reward="DIR")')

    def _answers(self, asks: Sequence[Ask]) -> list[list[Answer]]:
        drawn = self._wait(self._draw_all(asks))
        for warning in dict.fromkeys(warning for _, words in drawn for warning in words):
            warnings.warn(warning, stacklevel=3)
        return [answers for answers, _ in drawn]

    async def _draw_all(self, asks: Sequence[Ask]) -> list[tuple[list[Answer], Sequence[str]]]:
        """Draw all asks at once; an error in one cancels the others."""
        tasks = [asyncio.ensure_future(self._draw(ask)) for ask in asks]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _draw(self, ask: Ask) -> tuple[list[Answer], Sequence[str]]:
        """Return the answers to one ask, and its warnings."""
        async with self._speaker.placed(ask) as order, aclosing(self._service.answers(order)) as stream:
            drawn = await collect(stream, ask.n)
        if ask.best_of is not None:
            rewards: list[Any] = [new.report and dict(new.report.rewards) for new in drawn]
        elif self._service.rewards is not None:
            rewards = await self._rewards(ask.messages, [new.text for new in drawn])
        else:
            rewards = [None] * len(drawn)
        answers = [
            Answer(new.text, new.tokens, new.finish == "stop", earned, ask.preference, new.report)
            for new, earned in zip(drawn, rewards, strict=True)
        ]
        return answers, order.warnings

    async def _rewards(self, messages: Sequence[Message], texts: Sequence[str]) -> list[dict[str, float]]:
        assert self._service.rewards is not None
        return [self._service.rewards.named(reward_K) for reward_K in await self._service.scores(messages, texts)]

    def _wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run work on the model's own thread; return its result."""
        if not self._held.alive:
            work.close()
            raise ValueError(f"{self.name} is closed; load it again")
        try:
            return self._speaker.wait(work)
        except ApiError as error:
            raise ValueError(str(error)) from None


def _let_go(speaker: Local) -> None:
    """Close the model. The model's own thread cannot wait for itself, so there another thread closes it."""
    if threading.current_thread() is speaker.thread:
        threading.Thread(target=speaker.close).start()
    else:
        speaker.close()


def _rewards_of_run(path: Path) -> list[str]:
    """Return the reward sources of the run that a path is or lies in; empty without a run or if a reward is missing."""
    with suppress(ValueError):  # no model, or one without a dial: `open_service` reports it
        source = find_source(path)
        records, sources = source.contract.rewards, {name: str(folder) for name, folder in source.rewards.items()}
        for record in records:
            if record.kind == "function" and record.source.startswith(OWN_MODULE):
                sources[record.name] = record.source
        if not records:
            return list(sources.values())
        if all(record.name in sources for record in records):
            return [f"{record.name}={sources[record.name]}" for record in records]
    return []


def _is_several(prompt: Prompt | Sequence[Prompt]) -> bool:
    """Whether the argument is a list of prompts. An empty list is one, a chat is not."""
    return not isinstance(prompt, str) and not (len(prompt) and isinstance(prompt[0], Mapping))


def _chat(prompt: Prompt) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
