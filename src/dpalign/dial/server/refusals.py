"""Errors in OpenAI's shape: whatever goes wrong, a client reads {"error": {message, type, param, code}}."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from dpalign.dial.server.gate import Busy
from dpalign.dial.server.generation import Closing, GenerationError

log = logging.getLogger("dpalign.dial")

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """A request that is answered with an error."""

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

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return json_response(self.body(), self.status, self.headers)


def json_response(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII: what a client sent can be shown to it whatever it is."""
    return Response(json.dumps(body), status, dict(headers or {}), media_type="application/json")


def closing() -> Refusal:
    return Refusal(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "30"})


def refusal_of(error: Exception) -> Refusal:
    """What a client is told of an error; ours keep their details to the log."""
    match error:
        case Refusal():
            return error
        case Busy():
            return Refusal(429, str(error), code="queue_full", headers={"Retry-After": str(error.retry_after)})
        case Closing():
            return closing()
        case GenerationError():
            return Refusal(500, str(error), code="generation_failed")
        case RequestValidationError():
            return _invalid(error.errors())
        case HTTPException():
            return Refusal(error.status_code, str(error.detail), headers=error.headers)
        case _:
            log.error("a request failed", exc_info=error)
            return Refusal(500, "the server failed on this request; see its log", code="internal_error")


def _invalid(errors: Sequence[Mapping[str, Any]]) -> Refusal:
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "json_invalid" or not where:
        return Refusal(400, f"the body is no JSON object that can be read: {first['msg']}", code="invalid_json")
    return Refusal(400, f"{where}: {first['msg']}", param=where, code="invalid_value")


def install(app: FastAPI) -> None:
    """Have an app answer every error in this shape."""

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code in (404, 405):
            what = f"{request.method} {request.url.path}: {error.detail}"
            error = Refusal(error.status_code, what, headers=error.headers)
        return refusal_of(error).response()

    for kind in (Refusal, Busy, GenerationError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
