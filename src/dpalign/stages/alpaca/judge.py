"""AlpacaEval 2's weighted annotator, as a client of any OpenAI-compatible server.

The judge sees the instruction and both answers, called m and M, in an order drawn by instruction. It
answers with one token, whose log-probabilities give P(m) / (P(m) + P(M)): so a preference lies in
[1, 2], 1 where the reference is certain to win and 2 where the system is. An answer that cannot be read
so is a failure with a reason, never a preference.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from dpalign.data.sources import shorten
from dpalign.paper.direction import rng_for
from dpalign.run.ledger import hash_of
from dpalign.stages.alpaca.client import Client, Endpoint
from dpalign.stages.alpaca.prompt import fill

FIRST, SECOND = "m", "M"
TOP: Final = 5
"""Tokens whose log-probabilities are asked for (the official annotator's)."""


@dataclass(frozen=True)
class Pair:
    """An answer beside the reference's to the same instruction."""

    index: int
    instruction: str
    output: str
    reference: str


@dataclass(frozen=True)
class Judgement:
    """What a judge made of a pair: a preference in [1, 2], or the reason why there is none."""

    preference: float | None
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    """For the record: what it answered, which answer stood first, tokens billed."""


class Judge(Protocol):
    """Compares answers with a reference's, for money."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that a judgement depends on beside the pair; a judge of another identity is asked anew."""
        ...

    @property
    def name(self) -> str: ...

    def ask(self, pairs: Sequence[Pair], keep: Callable[[Pair, Judgement], None]) -> None:
        """Judge each pair, and hand each judgement to `keep` as soon as it is there, from any thread.

        Raises:
            ValueError: the judge cannot be asked (further); what `keep` was given stays.
        """
        ...


def key_of(identity: Mapping[str, Any], pair: Pair) -> str:
    """What a judgement is kept under: the same pair before the same judge is never paid for twice."""
    return hash_of([dict(identity), pair.instruction, pair.output, pair.reference])


class LogprobJudge:
    """The weighted annotator on a server's /chat/completions.

    Args:
        model: as the server calls it.
        template: see `prompt.py`.
        seed: of the order of the answers.
        extra: more fields of the request's body, such as {"chat_template_kwargs": {"enable_thinking": false}}.
        workers: requests at a time.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        template: str,
        *,
        seed: int = 0,
        extra: Mapping[str, Any] | None = None,
        workers: int = 4,
    ) -> None:
        self.client = Client(endpoint)
        self.model, self.template, self.seed, self.workers = model, template, seed, workers
        self.extra = dict(extra or {})

    @property
    def name(self) -> str:
        return self.model

    @property
    def identity(self) -> Mapping[str, Any]:
        """The server's address is not in it: the same model elsewhere is the same judge."""
        return {
            "annotator": "logprobs-v1",
            "model": self.model,
            "prompt": hash_of(self.template)[:16],
            "order_seed": self.seed,
            "extra": self.extra,
        }

    def ask(self, pairs: Sequence[Pair], keep: Callable[[Pair, Judgement], None]) -> None:
        """See `Judge.ask`. After an interruption the answers under way are waited for and kept: they are paid."""
        self.client.stop.clear()

        def one(pair: Pair) -> None:
            if self.client.stop.is_set():
                return
            try:
                keep(pair, self.judge(pair))
            except BaseException:
                self.client.stop.set()  # before this thread takes the next pair
                raise

        with ThreadPoolExecutor(self.workers) as pool:
            asked = [pool.submit(one, pair) for pair in pairs]
            try:
                for done in as_completed(asked):
                    done.result()
            except BaseException:
                self.client.stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def judge(self, pair: Pair) -> Judgement:
        """One request, and its answer read."""
        reference_first = reference_stands_first(self.seed, pair.instruction)
        shown = (pair.reference, pair.output) if reference_first else (pair.output, pair.reference)
        reply = self.client.post(self.body(pair.instruction, *shown))
        first = "reference" if reference_first else "output"
        if reply.status != 200:
            return Judgement(None, shorten(reply.body, 300), {"first": first})
        share, reason, details = read_reply(reply.body)
        details = {"first": first, "url": self.client.endpoint.url, **details}
        if share is None:
            return Judgement(None, self.client.endpoint.redacted(reason), details)
        return Judgement(2 - share if reference_first else 1 + share, details=details)

    def body(self, instruction: str, output_1: str, output_2: str) -> dict[str, Any]:
        """The request: one token, and its likeliest alternatives."""
        return {
            "model": self.model,
            "messages": fill(self.template, instruction, output_1, output_2),
            "max_tokens": 1,
            "temperature": 1.0,  # the distribution as it is, where a server reports it after the temperature
            "logprobs": True,
            "top_logprobs": TOP,
            **self.extra,
        }


def reference_stands_first(seed: int, instruction: str) -> bool:
    """The order of the answers: drawn by instruction, so that all systems meet the judge in the same order."""
    return bool(rng_for("alpaca-eval order", seed, instruction).random() < 0.5)


def read_reply(body: str) -> tuple[float | None, str, dict[str, Any]]:
    """P(m) / (P(m) + P(M)) of a completion's first token; or None and the reason; and what to put on record."""
    try:
        reply = json.loads(body)
        choice = reply["choices"][0]
    except (ValueError, KeyError, TypeError, IndexError):
        return None, f"no completion in the answer: {shorten(repr(body), 120)}", {}
    details = _billed(reply)
    try:
        tokens = choice["logprobs"]["content"][0]["top_logprobs"]
        logprob = {str(token["token"]): float(token["logprob"]) for token in tokens}
    except (KeyError, TypeError, IndexError, ValueError):
        return None, "no log-probabilities in the answer (the judge must support logprobs and top_logprobs)", details
    details["top"] = {token: value if math.isfinite(value) else None for token, value in logprob.items()}
    named = {token: logprob[token] for token in (FIRST, SECOND) if token in logprob}
    if not named:
        return None, f"neither m nor M among the likeliest tokens: {', '.join(map(repr, logprob)) or 'none'}", details
    bad = [value for value in named.values() if math.isnan(value) or value > 1e-3]
    if bad or max(named.values()) == -math.inf:
        return None, f"log-probabilities that are none: {', '.join(f'{t!r} {v}' for t, v in named.items())}", details
    # The one that is not listed has no share, as in the official annotator.
    highest = max(named.values())
    weight = {token: math.exp(value - highest) for token, value in named.items()}
    return weight.get(FIRST, 0.0) / sum(weight.values()), "", details


def _billed(reply: Any) -> dict[str, Any]:
    usage = reply.get("usage") if isinstance(reply, dict) else None
    if not isinstance(usage, dict):
        return {}
    counted = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    return {name: count for name, count in counted.items() if isinstance(count, int)}
