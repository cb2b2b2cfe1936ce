"""Asking a server that bills each answer: one POST of JSON, tried again only while nothing was answered.

Refusals that pass (HTTP 408, 409, 425, 429, 5xx, a connection that fails or times out) are tried again
after a growing pause, or after what `Retry-After` asks for. All others are final. A redirect is not
followed: the key would go with it.
"""

import email.utils
import http.client
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from dpalign.data.sources import shorten
from dpalign.paper.direction import rng_for

LONGEST_PAUSE: Final = 60.0
"""Seconds of the longest pause that we choose."""
LONGEST_WISH: Final = 600.0
"""Seconds of the longest pause that a server may ask for: beyond that we stop, and the user comes back later."""
PASSING: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
OURS_TO_MEND: Final = frozenset({401, 402, 403, 404, 405})
"""Refusals that no other request would escape."""


class Unavailable(ValueError):
    """The server cannot be asked now, or not like this; what was answered before is kept."""


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask."""

    url: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    """Seconds for one answer."""
    tries: int = 7
    pause: float = 1.0
    """Seconds before the second try; doubled for each further one."""
    key_from: str = ""
    """The environment variable that the key came from, for messages: never the key."""

    def redacted(self, text: str) -> str:
        """A server's words without the key, which some repeat."""
        return text.replace(self.key, "[the key]") if self.key else text


@dataclass(frozen=True)
class Reply:
    """What the server answered for good: 200 with a body, or a refusal of this very request."""

    status: int
    body: str


class Client:
    """One server, asked from several threads. `stop` ends all pauses: those who wait give up."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.stop = threading.Event()
        self.reached = False
        """It has answered something, so a refused connection may be a restart and is worth a pause."""
        self._open = urllib.request.build_opener(NoRedirect).open

    def post(self, body: Mapping[str, Any]) -> Reply:
        """The server's answer.

        Raises:
            Unavailable: no answer after all tries, or a refusal that concerns every request.
        """
        said = ""
        for attempt in range(self.endpoint.tries):
            wish: float | None = None
            try:
                return self._once(body)
            except urllib.error.HTTPError as error:
                self.reached = True
                said = f"HTTP {error.code}: {self._message(error)}"
                if error.code in OURS_TO_MEND or 300 <= error.code < 400:
                    self._give_up(said + self._advice(error))
                if error.code not in PASSING:
                    return Reply(error.code, said)
                wish = retry_after(error.headers.get("Retry-After"))
            except urllib.error.URLError as error:
                said = str(error.reason)
                if not self.reached and isinstance(error.reason, ConnectionRefusedError | socket.gaierror):
                    self._give_up(f"unreachable ({said}); is the URL right, and is the server up?")
            except (OSError, http.client.HTTPException) as error:
                said = str(error) or type(error).__name__
            if wish is not None and wish > LONGEST_WISH:
                self._give_up(f"{said}; it asks to wait {wish:.0f} s")
            if attempt + 1 < self.endpoint.tries and self.stop.wait(self._pause(attempt) if wish is None else wish):
                break
        self._give_up(f"no answer after {attempt + 1} tries, the last: {said}")

    def _once(self, body: Mapping[str, Any]) -> Reply:
        headers = {"Content-Type": "application/json", "User-Agent": "dpalign"}
        if self.endpoint.key:
            headers["Authorization"] = f"Bearer {self.endpoint.key}"
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.endpoint.url, data, headers, method="POST")
        with self._open(request, timeout=self.endpoint.timeout) as reply:
            text = reply.read().decode("utf-8", errors="replace")
        self.reached = True
        return Reply(200, text)

    def _pause(self, attempt: int) -> float:
        """Doubling, and spread over half of itself, so that threads do not come back all at once."""
        spread = rng_for("pause", attempt, threading.get_ident() % 2**31).random()
        return float(min(LONGEST_PAUSE, self.endpoint.pause * 2**attempt) * (0.5 + 0.5 * spread))

    def _message(self, error: urllib.error.HTTPError) -> str:
        """What the body says of an error, in the form of OpenAI's or as it stands."""
        try:
            text = error.read().decode("utf-8", errors="replace")
        except (OSError, http.client.HTTPException):
            text = ""
        try:
            said = json.loads(text)["error"]
            text = str(said["message"] if isinstance(said, dict) else said)
        except (ValueError, KeyError, TypeError):
            pass
        return shorten(self.endpoint.redacted(text.strip() or error.reason), 300)

    def _advice(self, error: urllib.error.HTTPError) -> str:
        match error.code:
            case 401 | 403:
                where = f" (${self.endpoint.key_from})" if self.endpoint.key_from else ""
                return f"; the key{where} is {'refused' if self.endpoint.key else 'not set'}"
            case 404 | 405:
                return "; is the URL the base of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1?"
            case code if 300 <= code < 400:
                return f"; it redirects to {error.headers.get('Location')}: give that URL, if it is the one you mean"
        return ""

    def _give_up(self, said: str) -> NoReturn:
        self.stop.set()
        raise Unavailable(f"{self.endpoint.url}: {self.endpoint.redacted(said)}")


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: the key would go with it."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def retry_after(header: str | None, now: float | None = None) -> float | None:
    """The seconds of a Retry-After header, a number or a date; None where it says neither."""
    if header is None:
        return None
    try:
        return max(0.0, float(header)) if float(header) == float(header) else None
    except ValueError:
        pass
    try:
        then = email.utils.parsedate_to_datetime(header).timestamp()
    except (TypeError, ValueError):
        return None
    return max(0.0, then - (time.time() if now is None else now))
