"""A chat with a server: `dpa serve`, or any that speaks OpenAI's chat completions.

Ours tells its dial at /v1/dial and takes `preference` in the request. Others tell nothing: their objectives are named
by hand, and the direction goes in `chat_template_kwargs`, where vLLM's server hands it to the model's own template. An
unknown field at the top would be ignored there, and give the plain model in silence.
"""

import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any, Final

from dpalign.dial.best_of import BestOf
from dpalign.dial.chat.speakers import Ask, Piece, Pieces
from dpalign.dial.dial import Dial
from dpalign.paper.prompts import PreferenceTemplate
from dpalign.rows import Message
from dpalign.stages.alpaca.client import NoRedirect

TIMEOUT: Final = 300.0
"""Seconds without a word from the server."""


class Remote:
    """A `Speaker` behind HTTP.

    Args:
        url: the server's base, with or without /v1.
        model: the name to ask for (default: the server's own).
        objectives: of the model, where the server does not tell them.
        key: sent as a bearer token; `key_from` names where it came from, for messages.

    Raises:
        ValueError: no server of this kind there, or it refuses the key.
    """

    def __init__(
        self, url: str, *, model: str | None = None, objectives: Sequence[str] = (), key: str | None, key_from: str
    ) -> None:
        if not re.match(r"https?://[^/]", url):
            raise ValueError(f"--url {url}: give the base of a server, such as http://127.0.0.1:8000")
        self.base = re.sub(r"(/v1)?(/chat/completions)?/*$", "", url) + "/v1"
        self.key, self.key_from = key, key_from
        self._open = urllib.request.build_opener(NoRedirect).open
        told = self._told()
        self.ours = told is not None
        if told is None:
            self.dial = _dial_of(objectives, None)
            self.name, self.scores, self.max_best_of = model or self._first_model(), False, 0
            return
        try:
            self.dial = _dial_of(told["objectives"], told.get("arc"), told.get("template"))
            self.name, self.scores = model or str(told["model"]), bool(told.get("rewards", True))
            self.max_best_of = int(told.get("max_best_of") or 0)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{self.base}/dial: tells no dial ({type(error).__name__}: {error})") from error

    def stream(self, ask: Ask) -> Pieces:
        """See `Speaker.stream`."""
        body: dict[str, Any] = {
            "model": self.name,
            "messages": list(ask.messages),
            "temperature": ask.temperature,
            "seed": ask.seed,
            "stream": True,
        }
        if ask.max_tokens is not None:
            body["max_tokens"] = ask.max_tokens
        if ask.best_of is not None:
            body["best_of"] = ask.best_of
            if ask.spread is not None:
                body["angle_spread"] = ask.spread
        if ask.preference is not None:
            preference = {name: round(w, 6) + 0.0 for name, w in ask.preference.weights.items()}
            body |= {"preference": preference} if self.ours else {"chat_template_kwargs": {"preference": preference}}
        reply = self._ask("/chat/completions", body)
        with closing(reply):
            yield from self._pieces(reply)

    def _pieces(self, reply: Any) -> Pieces:
        finished = False
        try:
            for line in reply:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    if not finished:  # some servers say no more than this
                        yield Piece(finish="stop")
                    return
                chunk = self._chunk(data)
                if "error" in chunk:
                    raise ValueError(f"{self.base}: {_message(chunk)}")
                choice: dict[str, Any] = next(iter(chunk.get("choices") or []), {})
                text = (choice.get("delta") or {}).get("content") or ""
                finished = finished or choice.get("finish_reason") is not None
                warnings = tuple(map(str, chunk.get("warnings") or ()))
                chosen = BestOf.model_validate(chunk["best_of"]) if chunk.get("best_of") else None
                yield Piece(text, choice.get("finish_reason"), warnings, chosen)
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"{self.base}: the answer broke off ({error})") from error
        if not finished:
            raise ValueError(f"{self.base}: the answer broke off: the connection was lost")

    def _chunk(self, data: bytes) -> dict[str, Any]:
        try:
            chunk = json.loads(data)
        except ValueError:
            chunk = None
        if not isinstance(chunk, dict):
            raise ValueError(f"{self.base}: a chunk of the answer is no JSON object: {data[:80]!r}")
        return chunk

    def rewards(self, messages: Sequence[Message], answer: str) -> Mapping[str, float]:
        """See `Speaker.rewards`."""
        told = self._json("/rewards", {"messages": list(messages), "response": answer})
        found = told.get("rewards") if isinstance(told, dict) else None
        wanted = () if self.dial is None else self.dial.objectives
        if not isinstance(found, dict) or not all(isinstance(found.get(name), int | float) for name in wanted):
            raise ValueError(f"{self.base}/rewards: no rewards of {', '.join(wanted)} there: {str(told)[:80]}")
        return {name: float(found[name]) for name in wanted}

    def close(self) -> None:
        """Nothing stays open between answers."""

    def _told(self) -> dict[str, Any] | None:
        """What /v1/dial says; None from a server that does not know it."""
        try:
            told = self._json("/dial")
        except _Refused as refused:
            if refused.status in (404, 405):
                return None
            raise
        return told if isinstance(told, dict) and told.get("objectives") else None

    def _first_model(self) -> str:
        told = self._json("/models")
        listed = told.get("data") if isinstance(told, dict) else None
        named = [one["id"] for one in listed or () if isinstance(one, dict) and "id" in one]
        if not named:
            raise ValueError(f"{self.base}/models lists no model; name one with --model")
        return str(named[0])

    def _json(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """What a reply says.

        Raises:
            ValueError: it is refused, breaks off, or is no JSON.
        """
        with closing(self._ask(path, body)) as reply:
            try:
                text = reply.read()
            except (OSError, http.client.HTTPException) as error:
                raise ValueError(f"{self.base}{path}: the reply broke off ({error})") from error
        try:
            return json.loads(text)
        except ValueError:
            where = f"{self.base}{path}"
            raise ValueError(f"{where}: no JSON there; is this the base of an OpenAI-compatible server?") from None

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """An open reply of status 200."""
        headers = {"Content-Type": "application/json", "User-Agent": "dpalign"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, headers)
        try:
            return self._open(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            with error:
                raise _Refused(f"{self.base}{path}: {self._said(error)}", error.code) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ValueError(f"{self.base}: unreachable ({reason}); is the URL right, and is the server up?") from None

    def _said(self, error: urllib.error.HTTPError) -> str:
        try:
            text = error.read().decode("utf-8", errors="replace")
            said = _message(json.loads(text))
        except (OSError, ValueError, http.client.HTTPException):
            said = str(error.reason)
        if error.code in (401, 403):
            said += f"; the key (${self.key_from}) is {'refused' if self.key else 'not set'}"
        if 300 <= error.code < 400:
            said += f"; it redirects to {error.headers.get('Location')}: give that URL, if it is the one you mean"
        said = said.replace(self.key, "[the key]") if self.key else said
        return f"HTTP {error.code}: {said[:300]}"


class _Refused(ValueError):
    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def _dial_of(objectives: Sequence[str], arc: Sequence[float] | None, template: str | None = None) -> Dial | None:
    """A dial that reads and warns; the line itself is written where the model is."""
    if not objectives:
        return None
    low_high = None if arc is None else (float(arc[0]), float(arc[1]))
    known: PreferenceTemplate = "world-v1" if template == "world-v1" else "dpa-v1" if template == "dpa-v1" else "fig1"
    return Dial(tuple(objectives), known, "zephyr", low_high)


def _message(said: Any) -> str:
    """The words of an error in OpenAI's shape, or in vLLM's."""
    error = said.get("error", said) if isinstance(said, dict) else said
    return str(error.get("message", error) if isinstance(error, dict) else error)
