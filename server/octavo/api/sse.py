"""Server-sent events: framing, and a response that stops working when its client leaves.

Knows bytes and connections; nothing of what the events say.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.api.errors import to_api_error
from octavo.api.generation import ClientGoneError, client_gone, while_connected

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode

Event = Callable[[list[dict[str, Any]], dict[str, Any] | None], bytes]


def make_event(*, has_usage_key: bool, **fixed: Any) -> Event:
    """A function that frames chunks with ``choices`` and, in every chunk of a stream that was
    asked for it, ``usage``. ``fixed`` is encoded once."""
    head = b"data: " + _encode(fixed)[:-1] + b',"choices":'
    no_usage = b',"usage":null}\n\n' if has_usage_key else b"}\n\n"

    def event(choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        tail = no_usage if usage is None else b',"usage":' + _encode(usage) + b"}\n\n"
        return head + _encode(choices) + tail

    return event


class EventStream(Response):
    """Sends a generator's events. When the client leaves, the generator is closed at once."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        watching = asyncio.ensure_future(client_gone(Request(scope, receive)))
        try:
            await asyncio.wait((writing, watching), return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            for task in (writing, watching):
                task.cancel()
            await asyncio.gather(writing, watching, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        async with aclosing(self._rest):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            try:
                async for event in self._rest:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except Exception as error:  # the status is sent: the stream itself must tell
                body = b"data: " + to_api_error(error).body() + b"\n\n"
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def start_stream(request: Request, events: AsyncGenerator[bytes, None]) -> Response:
    """The response for ``events``. What fails before the first one is raised here, so that it
    is answered with its own status. Raises `ClientGoneError` too."""
    try:
        first = await while_connected(request, _first(events))
    except BaseException:
        await events.aclose()
        raise
    return EventStream(first, events)


async def _first(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events)


__all__ = ["DONE", "ClientGoneError", "Event", "EventStream", "make_event", "start_stream"]


class Answer(Protocol):
    """One request's answer, which can be given whole or as events."""

    def events(self) -> AsyncGenerator[bytes, None]: ...

    async def whole(self) -> Response: ...


async def respond(request: Request, answer: Answer, *, is_streamed: bool) -> Response:
    """The answer in the form that was asked for; its work ends when the client leaves."""
    if is_streamed:
        return await start_stream(request, answer.events())
    return await while_connected(request, answer.whole())
