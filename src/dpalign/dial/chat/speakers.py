"""Who answers in a chat: a model in this process, or a server of OpenAI's kind."""

import asyncio
import http.client
import json
import queue
import re
import threading
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine, Generator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from dpalign.dial.best_of import BestOf
from dpalign.dial.dial import Dial
from dpalign.dial.server.engine import GenerationError, Limits
from dpalign.dial.server.shapes import ApiError, ChatRequest, DialReply
from dpalign.paper.direction import Preference
from dpalign.paper.prompts import PreferenceTemplate
from dpalign.rows import Message
from dpalign.runs.errors import without_credentials

if TYPE_CHECKING:
    from dpalign.dial.server.service import Order, Service

_T = TypeVar("_T")
_Shape = TypeVar("_Shape", bound=BaseModel)

TIMEOUT: Final = 300.0
"""Seconds to wait while a server sends nothing."""


@dataclass(frozen=True)
class Ask:
    """The answers to draw for one prompt."""

    messages: Sequence[Message]
    """The chat, ending with the user's turn; the user's own system message first, if any."""
    preference: Preference | None
    """None: the plain model."""
    temperature: float
    seed: int
    max_tokens: int | None
    """None: as long as the model's context, or the server, allows."""
    best_of: int | None = None
    """Draw this many answers around the direction, and take the one that the reward model rates best at it."""
    spread: float | None = None
    """Degrees around the direction for best_of; None: the default."""
    n: int = 1
    """Answers; a chat takes one."""

    def body(self, model: str, *, in_template: bool = False) -> dict[str, Any]:
        """The body of a chat completion.

        Args:
            in_template: hand the direction to the chat template, for a server that is not `dpa serve`.
        """
        body: dict[str, Any] = {
            "model": model,
            "messages": list(self.messages),
            "temperature": self.temperature,
            "seed": self.seed,
            "stream": True,
        }
        more_than_one = self.n if self.n > 1 else None
        optional = {
            "n": more_than_one,
            "max_tokens": self.max_tokens,
            "best_of": self.best_of,
            "angle_spread": self.spread,
        }
        body |= {name: value for name, value in optional.items() if value is not None}
        if self.preference is not None:
            preference = {name: round(w, 6) + 0.0 for name, w in self.preference.weights.items()}
            body |= {"chat_template_kwargs": {"preference": preference}} if in_template else {"preference": preference}
        return body


@dataclass(frozen=True)
class Piece:
    """A new piece of an answer."""

    text: str = ""
    finish: str | None = None
    """At its end: stop, or length if it was cut."""
    warnings: Sequence[str] = ()
    choice: BestOf | None = None
    """At the end of an answer that is the best of several: how it was chosen."""


Pieces = Generator[Piece, None, None]
"""An answer as it is drawn; closing it stops it."""


class Speaker(ABC):
    """Answers one chat. Several threads ask it at a time when two directions are compared.

    Args:
        about: the model, as `GET /v1/dial` describes it.
    """

    def __init__(self, about: DialReply) -> None:
        self.about, self.name = about, about.model
        known = {name: name for name in get_args(PreferenceTemplate)}
        template = known.get(about.template, "fig1")
        # this dial only reads and warns; the model's own side writes the line
        dial = Dial(tuple(about.objectives), template, "zephyr", about.population, verbosity=about.verbosity or {})
        self.dial = dial if about.objectives else None

    @abstractmethod
    def stream(self, ask: Ask) -> Pieces:
        """Stream an answer; the speaker may be drawing another one too.

        Raises:
            ValueError: the model or the server refuses; says why.
        """

    @abstractmethod
    def rewards(self, messages: Sequence[Message], answer: str) -> Mapping[str, float]:
        """The rewards of an answer by objective, 0-100.

        Raises:
            ValueError: it cannot be scored; says why.
        """

    def close(self) -> None:  # noqa: B027  # a server is not ours to close
        """Let go of the model."""


# --- a model in this process ---


class Local(Speaker):
    """The server's own service, on an event loop in a thread. A question gets the same answer as over HTTP.

    Args:
        service: not started yet; closed with the speaker.
    """

    def __init__(self, service: "Service") -> None:
        super().__init__(service.described())
        self.service = service
        self.dial = service.dial if service.dial.objectives else None
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="chat", daemon=True)
        self.thread.start()
        self.wait(service.generator.start())

    def stream(self, ask: Ask) -> Pieces:
        pieces: queue.SimpleQueue[Piece | Exception | None] = queue.SimpleQueue()
        drawing = asyncio.run_coroutine_threadsafe(self._draw(ask, pieces), self.loop)
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            drawing.cancel()

    async def _draw(self, ask: Ask, pieces: "queue.SimpleQueue[Piece | Exception | None]") -> None:
        try:
            async with self.placed(ask) as order, aclosing(self.service.answers(order)) as stream:
                async for deltas in stream:
                    for delta in deltas:
                        pieces.put(Piece(delta.text, delta.finish, choice=delta.report))
            pieces.put(None)
        except (ApiError, GenerationError) as error:
            cure = "; /clear begins a new chat" if getattr(error, "code", "") == "context_length_exceeded" else ""
            pieces.put(ValueError(f"{error}{cure}"))
        except Exception as error:
            pieces.put(error)

    @asynccontextmanager
    async def placed(self, ask: Ask) -> AsyncIterator["Order"]:
        """Yield the order for the service, while it holds a place in line.

        Raises:
            ApiError, ValueError: says what is wrong with the ask.
        """
        body = ask.body(self.name)
        wanted = body.pop("max_tokens", None)  # a chat grows: cut at the context, where the server would refuse
        try:
            request = ChatRequest.model_validate(body)
        except ValidationError as error:
            fault = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None
        async with self.service.placed(request) as order:
            longest = self.service.generator.context - len(order.prompt)
            tokens = order.sampling.max_tokens if wanted is None else min(wanted, longest)
            yield replace(order, sampling=replace(order.sampling, max_tokens=tokens))

    def rewards(self, messages: Sequence[Message], answer: str) -> Mapping[str, float]:
        if self.service.rewards is None:
            raise ValueError("no reward model here; name one with --reward")
        return self.service.rewards.named(self.wait(self.service.scores(messages, [answer]))[0])

    def close(self) -> None:
        self.wait(self.service.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run work on the loop and return its result. If the wait is interrupted, the work is cancelled."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        finally:
            future.cancel()


def open_local(model: Path, limits: Limits, *, threads: int = 0, **options: Any) -> Local:
    """Load a model in this process, without progress bars of its libraries.

    Args:
        threads: CPU threads; 0 leaves the choice to torch.
        options: see `open_service`.

    Raises:
        ValueError: names the folder and says what is wrong with it, or names a package that is not installed.
    """
    from dpalign.dial.export.source import require_sound
    from dpalign.dial.server.service import open_service
    from dpalign.runs.environment import settle_threads
    from dpalign.stages.stage import installed

    require_sound(model)
    with installed():
        settle_threads(threads, for_torch=True)
        from transformers.utils import logging

        logging.disable_progress_bar()
        return Local(open_service(model, limits, **options))


# --- a server ---


class Remote(Speaker):
    """A server: `dpa serve`, or any that speaks OpenAI's chat completions.

    `dpa serve` describes its dial at /v1/dial and takes `preference` in the request. For other servers the user names
    the objectives, and the direction goes in `chat_template_kwargs`. vLLM's server hands those to the model's own
    template. It would ignore an unknown field at the top, and silently answer as the plain model.

    Args:
        url: the server's base, with or without /v1.
        model: the name to ask for (default: the server's own).
        objectives: the model's, if the server does not name them.
        key: sent as a bearer token; messages name the variable `key_name` instead of it.

    Raises:
        ValueError: there is no such server at the URL, or it refuses the key.
    """

    def __init__(
        self, url: str, *, model: str | None = None, objectives: Sequence[str] = (), key: str | None, key_name: str
    ) -> None:
        self.base = base_of(url, key_name)
        self.key, self.key_name = key, key_name
        self.http = urllib.request.build_opener(_NoRedirect)
        described = self._described()
        self.ours = described is not None
        super().__init__(described or DialReply(model=model or self._first_model(), objectives=list(objectives)))
        self.name = model or self.name

    def stream(self, ask: Ask) -> Pieces:
        body = ask.body(self.name, in_template=not self.ours)
        with closing(self._open("/chat/completions", body)) as reply:
            yield from self._pieces(reply)

    def _pieces(self, reply: http.client.HTTPResponse) -> Pieces:
        """The server-sent events of a streamed answer."""
        finished = False
        try:
            for line in reply:
                data = line.removeprefix(b"data:").strip()
                if data == line.strip():
                    continue  # a comment, or the empty line between events
                if data == b"[DONE]":
                    if not finished:  # some servers give no reason for the end
                        yield Piece(finish="stop")
                    return
                chunk = self._object(data, "a chunk of the answer")
                if "error" in chunk:
                    raise ValueError(f"{self.base}: {_message(chunk)}")
                choice: dict[str, Any] = next(iter(chunk.get("choices") or []), {})
                finished = finished or choice.get("finish_reason") is not None
                yield Piece(
                    (choice.get("delta") or {}).get("content") or "",
                    choice.get("finish_reason"),
                    tuple(map(str, chunk.get("warnings") or ())),
                    self._read(BestOf, chunk["best_of"], " best_of") if chunk.get("best_of") else None,
                )
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"{self.base}: the answer broke off ({error})") from error
        if not finished:
            raise ValueError(f"{self.base}: the answer broke off: the connection was lost")

    def rewards(self, messages: Sequence[Message], answer: str) -> Mapping[str, float]:
        rewards = self._get("/rewards", {"messages": list(messages), "response": answer}).get("rewards")
        wanted = () if self.dial is None else self.dial.objectives
        if not isinstance(rewards, dict) or not all(isinstance(rewards.get(name), int | float) for name in wanted):
            raise ValueError(f"{self.base}/rewards: no rewards of {', '.join(wanted)} there: {str(rewards)[:80]}")
        return {name: float(rewards[name]) for name in wanted}

    def _described(self) -> DialReply | None:
        """The reply of /v1/dial; None from a server that does not know it."""
        try:
            reply = self._get("/dial")
        except _Refused as refused:
            if refused.status in (404, 405):
                return None
            raise
        return self._read(DialReply, reply, "/dial") if reply.get("objectives") else None

    def _read(self, shape: type[_Shape], content: object, where: str) -> _Shape:
        try:
            return shape.model_validate(content)
        except ValidationError as error:
            fault = error.errors()[0]
            at = ".".join(map(str, fault["loc"]))
            raise ValueError(f"{self.base}{where}: {at}: {fault['msg']}") from None

    def _first_model(self) -> str:
        models = self._get("/models").get("data") or ()
        names = [model["id"] for model in models if isinstance(model, dict) and "id" in model]
        if not names:
            raise ValueError(f"{self.base}/models lists no model; name one with --model")
        return str(names[0])

    def _get(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object of a reply."""
        with closing(self._open(path, body)) as reply:
            try:
                data = reply.read()
            except (OSError, http.client.HTTPException) as error:
                raise ValueError(f"{self.base}{path}: the reply broke off ({error})") from error
        return self._object(data, f"{path}: the reply")

    def _object(self, data: bytes, what: str) -> dict[str, Any]:
        try:
            content = json.loads(data)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            cure = "is this the base of an OpenAI-compatible server?"
            raise ValueError(f"{self.base}: {what} is no JSON object: {data[:80]!r}; {cure}")
        return content

    def _open(self, path: str, body: Mapping[str, Any] | None = None) -> http.client.HTTPResponse:
        """An open reply of status 200.

        Raises:
            ValueError: the server is unreachable or refuses. The message never holds the key.
        """
        headers = {"Content-Type": "application/json", "User-Agent": "dpalign"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            reply: http.client.HTTPResponse = self.http.open(
                urllib.request.Request(self.base + path, data, headers), timeout=TIMEOUT
            )
            return reply
        except urllib.error.HTTPError as error:
            with error:
                raise _Refused(f"{self.base}{path}: {self._reason(error)}", error.code) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ValueError(f"{self.base}: unreachable ({reason}); is the URL right, and is the server up?") from None

    def _reason(self, error: urllib.error.HTTPError) -> str:
        """Why a server refused."""
        try:
            reason = _message(json.loads(error.read()))
        except (OSError, ValueError, http.client.HTTPException):
            reason = str(error.reason)
        if error.code in (401, 403):
            reason += f"; the key (${self.key_name}) is {'refused' if self.key else 'not set'}"
        if 300 <= error.code < 400:
            there = without_credentials(str(error.headers.get("Location"))).partition("?")[0]
            reason += f"; it redirects to {there}: give that URL, if it is the one you mean"
        reason = reason.replace(self.key, "[the key]") if self.key else reason
        return f"HTTP {error.code}: {reason[:300]}"


def base_of(url: str, key_name: str) -> str:
    """The base of a server's API, with /v1.

    Raises:
        ValueError: it is no URL, or it may hold a secret, which no message and no record may show.
    """
    if not re.match(r"https?://[^/]", url):
        raise ValueError(f"--url {without_credentials(url)}: give the base of a server, such as http://127.0.0.1:8000")
    if "@" in url or "?" in url:
        shown = re.sub(r"//.*@", "//***@", url).partition("?")[0]
        raise ValueError(f"--url {shown}: without a user, a password or a query; the key goes in ${key_name}")
    return re.sub(r"(/v1)?(/chat/completions)?/*$", "", url) + "/v1"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: the key would go with it."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class _Refused(ValueError):
    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def _message(reply: Any) -> str:
    """The words of an error in OpenAI's shape, or in vLLM's."""
    error = reply.get("error", reply) if isinstance(reply, dict) else reply
    return str(error.get("message", error) if isinstance(error, dict) else error)
