"""A request's bytes to a checked body. Knows sizes, JSON and pydantic; nothing of fields."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, TypeVar

from pydantic import BaseModel
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from octavo.api.errors import ApiError, shown, to_api_error
from octavo.api.generation import ClientGoneError

B = TypeVar("B", bound=BaseModel)
Handler = Callable[[Request], Awaitable[Response]]

# An answer that nobody receives; the number is what proxies log for a client that left.
_CLIENT_GONE = 499


async def read_body(request: Request, *, limit: int) -> bytes:
    """The whole body, of at most ``limit`` bytes. Raises `ApiError` (413, 415),
    `ClientGoneError`."""
    if (coding := request.headers.get("content-encoding", "identity")).lower() != "identity":
        raise ApiError(
            f"Request bodies must be sent without a Content-Encoding, got {shown(coding)}",
            status=415,
            code="unsupported_encoding",
        )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large(limit: int) -> ApiError:
    # Closing tells a client that is still sending to stop.
    return ApiError(
        f"The request body is larger than the {limit} bytes allowed",
        status=413,
        code="request_too_large",
        headers={"Connection": "close"},
    )


async def read_json(request: Request, *, limit: int) -> Any:
    """The body's JSON. Raises `ApiError` (400, 413)."""
    body = await read_body(request, limit=limit)
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(
            f"The request body is not valid UTF-8: {error.reason} at byte {error.start}",
            code="invalid_json",
        ) from error
    try:
        # NaN and Infinity pass here, to be refused with the name of their field.
        return from_json(body, allow_inf_nan=True, cache_strings="keys")
    except ValueError as error:
        raise ApiError(
            f"The request body is not valid JSON: {error}", code="invalid_json"
        ) from error


async def read_model(request: Request, schema: type[B], *, limit: int) -> B:
    """The body as ``schema``. Raises `ApiError` and pydantic's ValidationError."""
    return schema.model_validate(await read_json(request, limit=limit))


def answering(handler: Handler) -> Handler:
    """``handler`` with whatever it raises answered in OpenAI's envelope."""

    @wraps(handler)
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientGoneError:
            return Response(status_code=_CLIENT_GONE)
        except Exception as error:  # to_api_error logs what is not the client's doing
            return to_api_error(error).response()

    return endpoint


def documented(*schemas: type[BaseModel]) -> dict[str, Any]:
    """The ``requestBody`` of /docs for an endpoint that reads its body itself."""
    bodies = [schema.model_json_schema() for schema in schemas]
    schema: dict[str, Any] = bodies[0] if len(bodies) == 1 else {"anyOf": bodies}
    content = {"application/json": {"schema": _inlined(schema, schema.get("$defs", {}))}}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(node: Any, definitions: dict[str, Any]) -> Any:
    """The schema without references, which would point nowhere in the whole description."""
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    definitions = node.get("$defs", definitions)
    if "$ref" in node:
        return _inlined(definitions[node["$ref"].rsplit("/", 1)[-1]], definitions)
    return {key: _inlined(value, definitions) for key, value in node.items() if key != "$defs"}
