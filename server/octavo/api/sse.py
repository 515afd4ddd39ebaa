"""Server-sent events: framing, and a response that stops working when its client leaves.

Knows bytes and connections; nothing of what the events say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.api.generation import ClientGoneError, Usage, client_gone, while_connected
from octavo.api.live import Body, LiveStream

# The ASGI extension by which a server offers a `Body`: its scope's entry of this name.
DIRECT_BODY = "octavo.direct_body"
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


def last_event(
    make: Callable[..., Event], usage: Usage, *, has_usage: bool, has_spec_stats: bool
) -> bytes:
    """What a stream ends with: a chunk without choices of what was asked for of the whole answer,
    if anything was. ``make``: as `make_event`, of the fields that the chunk has besides."""
    if not (has_usage or has_spec_stats):
        return DONE
    event = make(spec_stats=usage.spec_stats) if has_spec_stats else make()
    return event([], usage.as_dict() if has_usage else None) + DONE


class ShortForm:
    """Frames the chunks that tell a choice's text and nothing else, which nearly all do: what
    `event` makes of them, encoded once around a hole for the text."""

    def __init__(self, event: Event, choice: Callable[[int, str], dict[str, Any]]) -> None:
        """``choice``: the chunk's choice, of an index and a text."""
        self._event = event
        self._choice = choice
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def __call__(self, index: int, text: str) -> bytes:
        around = self._around.get(index)
        if around is None:
            around = self._around[index] = self._find(index)
        return around[0] + _encode(text) + around[1]

    def _find(self, index: int) -> tuple[bytes, bytes]:
        # What differs between two texts is the hole: no text can occur elsewhere by chance.
        one, other = (self._event([self._choice(index, text)], None) for text in ("a", "b"))
        at = next(i for i, (x, y) in enumerate(zip(one, other, strict=True)) if x != y)
        return one[: at - 1], one[at + 2 :]


class EventStream(Response):
    """Sends a stream's events. When the client leaves, the stream is closed at once."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, stream: LiveStream) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body: Body | None = scope.get("extensions", {}).get(DIRECT_BODY)
        writing = asyncio.ensure_future(self._write(send, body))
        watching = asyncio.ensure_future(client_gone(Request(scope, receive)))
        try:
            await asyncio.wait((writing, watching), return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            for task in (writing, watching):
                task.cancel()
            self._stream.close()
            await asyncio.gather(writing, watching, return_exceptions=True)

    async def _write(self, send: Send, body: Body | None) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        if body is not None:
            self._stream.attach(body)
            await self._stream.end()
        else:
            while data := await self._stream.next():
                await send({"type": "http.response.body", "body": data, "more_body": True})
        self._stream.close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def start_stream(request: Request, stream: LiveStream) -> Response:
    """The response for ``stream``, which is started. What fails before its first event is raised
    here, so that it is answered with its own status. Raises `ClientGoneError` too."""
    try:
        stream.start()
        first = await while_connected(request, stream.first())
    except BaseException:
        stream.close()
        raise
    return EventStream(first, stream)


__all__ = ["DIRECT_BODY", "DONE", "ClientGoneError", "Event", "EventStream", "make_event"]


class Answer(Protocol):
    """One request's answer, which can be given whole or as events."""

    def live(self) -> LiveStream: ...

    async def whole(self) -> Response: ...


async def respond(request: Request, answer: Answer, *, is_streamed: bool) -> Response:
    """The answer in the form that was asked for; its work ends when the client leaves."""
    if is_streamed:
        return await start_stream(request, answer.live())
    return await while_connected(request, answer.whole())
