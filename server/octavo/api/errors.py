"""Everything that goes wrong, in OpenAI's envelope. The only place that maps errors to statuses.

Knows HTTP statuses and pydantic's findings; nothing of endpoints.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from octavo.engine.outputs import RequestFailedError
from octavo.engine.protocols import EngineDeadError

log = logging.getLogger(__name__)

_MAX_SHOWN = 80  # characters of a wrong value that are shown


class ApiError(Exception):
    """A request the server answers with an error. ``param``: the field at fault."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """``{"error": {"message", "type", "param", "code"}}``"""
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return msgspec.json.encode({"error": error})

    def response(self) -> Response:
        return Response(
            self.body(), self.status, headers=self.headers, media_type="application/json"
        )


class ModelNotFoundError(ApiError):
    def __init__(self, model: str, *, known: tuple[str, ...]) -> None:
        super().__init__(
            f"The model {model!r} does not exist; this server has: {', '.join(known)}",
            status=404,
            param="model",
            code="model_not_found",
        )


class UnavailableError(ApiError):
    """503: try again in ``retry_after`` seconds."""

    def __init__(self, message: str, *, code: str, retry_after: int = 1) -> None:
        super().__init__(
            message,
            status=503,
            kind="server_error",
            code=code,
            headers={"Retry-After": str(retry_after)},
        )


class ContextLengthError(ApiError):
    """The prompt, or the prompt with what is to be generated, does not fit the context."""

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


def shown(value: Any) -> str:
    """A wrong value as it is shown to the client: short, on one line."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def from_validation(error: ValidationError) -> ApiError:
    """The first finding: which field, what was got, what is allowed."""
    finding = error.errors(include_url=False)[0]
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in finding["loc"])[1:]
    kind, got = finding["type"], finding["input"]
    if kind == "extra_forbidden":
        return ApiError(f"{path} is not a known parameter", param=path, code="unknown_parameter")
    if kind == "missing":
        return ApiError(f"{path} is required", param=path, code="missing_required_parameter")
    if kind == "wrong":  # found by a check of the whole body: our own words say it all
        context = finding["ctx"]
        path = f"{path}.{context['param']}" if path else context["param"]
        return ApiError(context["reason"], param=path)
    if kind == "value_error":
        message = finding["msg"].removeprefix("Value error, ")
        return ApiError(message if not path else f"{path}: {message}", param=path or None)
    message = finding["msg"].removeprefix("Input ")
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        message = "should be a JSON object"
    where = path or "the request body"
    return ApiError(f"{where} {message}, got {shown(got)}", param=path or None)


def to_api_error(error: Exception) -> ApiError:
    """Any exception as what the client may know of it; what is our fault is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return from_validation(error)
    if isinstance(error, RequestFailedError):
        if error.is_bad_request:
            return ApiError(str(error))
        return ApiError(str(error), status=500, kind="server_error", code="request_failed")
    if isinstance(error, EngineDeadError):
        log.error("the engine is dead: %s", error)
        # Not the reason itself, which may name other clients' requests.
        message = "The engine is not running; the server's log has the reason"
        return UnavailableError(message, code="engine_dead")
    log.error("unexpected error while answering a request", exc_info=error)
    return ApiError(
        "The server failed to answer; its log has the reason",
        status=500,
        kind="server_error",
        code="internal_error",
    )


def for_route(error: HTTPException, *, method: str, path: str) -> ApiError:
    """What routing found wrong with a request."""
    messages = {
        404: f"There is no {shown(path)} on this server",
        405: f"{method} is not allowed on {shown(path)}; allowed: "
        f"{(error.headers or {}).get('Allow', 'nothing')}",
    }
    codes = {404: "unknown_url", 405: "method_not_allowed"}
    return ApiError(
        messages.get(error.status_code, str(error.detail)),
        status=error.status_code,
        code=codes.get(error.status_code),
        headers=error.headers,
    )
