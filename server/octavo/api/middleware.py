"""What happens around every endpoint: request ids, API keys, request counts. Knows ASGI only.

Plain ASGI, no BaseHTTPMiddleware: streams pass through without a task or queue per chunk.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.api.errors import ApiError
from octavo.api.front import Metrics

_GUARDED = "/v1"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
# Counting these would drown the others in probes.
_NOT_COUNTED = {"/metrics", "/health", "/ready", "/load", "/ping", "/version"}


class RootPath:
    """Tells routes and /docs the prefix a proxy serves us under, stripped by it or not."""

    def __init__(self, app: ASGIApp, *, path: str) -> None:
        self._app = app
        self._path = path.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope.get("root_path"):
            scope["root_path"] = self._path
        await self._app(scope, receive, send)


class RequestIds:
    """Gives every request an id, the client's if it sent one, and tells it in the answer."""

    def __init__(self, app: ASGIApp, *, answer: bool) -> None:
        self._app = app
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id if self._answer else send)


class ApiKeys:
    """Answers 401 to requests under /v1 without one of the keys as bearer token."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] == "OPTIONS" or not self._is_guarded(scope):
            await self._app(scope, receive, send)
            return
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._knows(key.strip()):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            "An API key is required: send it as 'Authorization: Bearer KEY'"
            if not key
            else "The API key is not valid for this server",
            status=401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)

    def _is_guarded(self, scope: Scope) -> bool:
        path: str = scope["path"]
        root: str = scope.get("root_path", "")
        if root and path.startswith(root + "/"):  # as routing takes it off: whole segments only
            path = path.removeprefix(root)
        return path == _GUARDED or path.startswith(_GUARDED + "/")

    def _knows(self, key: str) -> bool:
        # Every key is compared, in constant time: how long it takes tells nothing.
        digest = hashlib.sha256(key.encode("latin-1")).digest()  # headers' bytes, as they came
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(found)


class RequestCounts:
    """Tells the metrics of each answered request."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _NOT_COUNTED:
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        status = 500  # unless an answer was begun

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            self._metrics.observe_http(
                handler=getattr(scope.get("route"), "path", "none"),
                method=scope["method"],
                status=status,
                seconds=time.monotonic() - start,
            )
