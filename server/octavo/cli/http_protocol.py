"""HTTP/1.1 as uvicorn speaks it, with bounds on what a connection may make us keep before there is
a request, and OpenAI's envelope where there is none to be. Knows bytes, not what requests mean."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from octavo.api.errors import ApiError
from octavo.api.sse import DIRECT_BODY

MAX_HEAD_BYTES = 64 * 1024  # of one request: its URL, or its headers and trailers
LINGER_SECONDS = 1.0  # between our last word on a connection and its close


class DirectBody:
    """The body of one response, written past ASGI's `send` once that has begun it. Implements
    `octavo.api.live.Body`."""

    __slots__ = ("_cycle", "_protocol")

    def __init__(self, protocol: HttpProtocol, cycle: RequestResponseCycle) -> None:
        self._protocol = protocol
        self._cycle = cycle

    @property
    def is_paused(self) -> bool:
        return self._cycle.flow.write_paused

    def write(self, data: bytes) -> None:
        cycle = self._cycle
        if cycle.disconnected or cycle.response_complete:
            return
        assert cycle.response_started and cycle.chunked_encoding
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def on_writable(self, callback: Callable[[], None] | None) -> None:
        self._protocol.on_writable = callback


class HttpProtocol(HttpToolsProtocol):
    """One connection. The parser collects a header until it ends, and uvicorn any number of them:
    without a bound a client could fill the memory with a request that never begins."""

    _num_silent = 0  # bytes since the parser last told us of anything: it is collecting them
    _num_head = 0
    _said_last_word = False
    on_writable: Callable[[], None] | None = None

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.on_writable is not None:
            self.on_writable()

    def on_headers_complete(self) -> None:
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:  # the newest request's, also behind one still answered
            scope: dict[str, Any] = self.cycle.scope  # type: ignore[assignment]
            scope["extensions"] = {DIRECT_BODY: DirectBody(self, self.cycle)}

    def data_received(self, data: bytes) -> None:
        if self._said_last_word:
            return
        self._num_silent += len(data)
        super().data_received(data)
        ended = self._said_last_word or self.transport.is_closing()
        if self._num_silent > MAX_HEAD_BYTES and not ended:
            self.send_400_response("")

    def eof_received(self) -> None:
        if self._said_last_word:
            self.transport.close()

    def on_message_begin(self) -> None:
        self._num_silent = self._num_head = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(name, value)
        super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._num_silent = 0
        super().on_body(body)

    def _count(self, *parts: bytes) -> None:
        self._num_silent = 0
        self._num_head += sum(map(len, parts))
        if self._num_head > MAX_HEAD_BYTES:
            raise ValueError("too large a head")  # the parser stops: `send_400_response`

    def send_400_response(self, msg: str) -> None:
        error = ApiError("The request is not valid HTTP", code="invalid_http")
        if max(self._num_head, self._num_silent) > MAX_HEAD_BYTES:
            error = ApiError(
                f"The request's URL and headers are larger than the {MAX_HEAD_BYTES} bytes allowed",
                status=431,
                code="request_too_large",
            )
        status, body = HTTPStatus(error.status), error.body()
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\n"
            "content-type: application/json\r\n"
            f"content-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode("ascii") + body)
        cycle = self.cycle
        if self.pipeline or (cycle and cycle.response_started and not cycle.response_complete):
            self.transport.close()  # an answer is still being written, into which ours fell
            return
        if cycle and not cycle.response_started:  # the request ends here, unanswered by the app
            cycle.disconnected = True
            cycle.message_event.set()
        self._linger()

    def _linger(self) -> None:
        """Ends the connection without losing what we said: closing it while the client still sends
        would reset it, and a reset discards what the client has not read yet."""
        self._said_last_word = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)
