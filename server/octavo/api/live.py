"""One streamed answer while it grows: engine news in, bytes of events out.

Knows choices, order and errors; nothing of what events say (`Events`) or of HTTP. News become
bytes in the turn of the loop that brings them and go straight to the connection: no task is woken
per token. What a client does not read yet waits as the engine told it, a few words per token, and
never more than its own requests may generate.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol

from octavo.api.errors import UnavailableError, to_api_error
from octavo.api.front import Front
from octavo.api.generation import Job
from octavo.engine.outputs import ChoiceDelta, ChoiceReader
from octavo.engine.protocols import EngineDeadError
from octavo.types import EngineOutput, FinishReason

_MOST_AT_ONCE = 64  # outputs read before the loop has its turn: a client that read nothing for long


class Events(Protocol):
    """What an endpoint says, in server-sent events. Has state: one per answer."""

    @property
    def has_short_form(self) -> bool:
        """Whether `of_text` may be used."""

    def of_delta(self, delta: ChoiceDelta) -> bytes:
        """What is new of a choice; may be nothing yet."""

    def of_text(self, index: int, text: str, token_id: int) -> bytes:
        """As `of_delta` of a choice's one new token and its text, from a prepared form."""

    def last(self) -> bytes:
        """What follows the last choice's end."""


class Body(Protocol):
    """The body of a begun response, written without waiting."""

    @property
    def is_paused(self) -> bool:
        """Whether the client reads too slowly: write nothing until the callback."""

    def write(self, data: bytes) -> None: ...

    def on_writable(self, callback: Callable[[], None] | None) -> None:
        """Calls it whenever `is_paused` ends, until told otherwise."""


class _ChoiceSink:
    """Where the engine puts one choice's news."""

    __slots__ = ("_index", "_put")

    def __init__(self, stream: LiveStream, index: int) -> None:
        self._put = stream.put
        self._index = index

    def put(self, output: EngineOutput) -> None:
        self._put(self._index, output)

    def fail(self, reason: str) -> None:
        self._put(self._index, EngineDeadError(reason))


class LiveStream:
    """All choices of one streamed answer. `start` it, take the `first` bytes, then either `attach`
    the connection's body and wait for the `end`, or take what is `next` until there is nothing."""

    def __init__(self, front: Front, job: Job, events: Events) -> None:
        self._front = front
        self._job = job
        self._events = events
        self._readers = [ChoiceReader(choice, tokenizer=front.tokenizer) for choice in job.choices]
        self._is_short = events.has_short_form
        self._sinks: dict[int, _ChoiceSink] = {}  # of choices that run
        self._backlog: deque[tuple[int, EngineOutput | Exception]] = deque()
        self._body: Body | None = None
        self._error: Exception | None = None
        self._is_over = False
        self._news = asyncio.Event()
        self._exit = ExitStack()

    # ---- life ------------------------------------------------------------------------------

    def start(self) -> None:
        """Asks the engine for all choices. Raises `EngineDeadError`."""
        self._exit.enter_context(self._front.lifecycle.active())
        for index, choice in enumerate(self._job.choices):
            self._sinks[index] = sink = _ChoiceSink(self, index)
            self._front.engine.attach(choice.request, sink)

    def close(self) -> None:
        """Aborts what still runs. May be called any number of times."""
        for index in list(self._sinks):
            self._leave(index)
        if self._body is not None:
            self._body.on_writable(None)
            self._body = None  # the connection's next response may have set its own by next time
        self._exit.close()

    def _leave(self, index: int) -> None:
        sink = self._sinks.pop(index)
        self._front.engine.detach(self._job.choices[index].request.request_id, sink)

    # ---- news in ---------------------------------------------------------------------------

    def put(self, index: int, news: EngineOutput | Exception) -> None:
        """Called by the engine's sinks, in order for each choice."""
        body = self._body
        if body is None or self._backlog or body.is_paused:
            self._backlog.append((index, news))
            if body is None:
                self._news.set()
            return
        if data := self._read(index, news):
            body.write(data)
        if self._error is not None or self._is_over:
            self._finish(body)

    def _read(self, index: int, news: EngineOutput | Exception) -> bytes:
        """The bytes for some news; an error is remembered and ends the stream."""
        if index not in self._sinks or self._error is not None:
            return b""  # computed before the engine heard of the end
        try:
            if isinstance(news, Exception):
                raise news
            if self._is_short:
                text = self._readers[index].read_text(news)
                if text is not None:
                    return self._events.of_text(index, text, news.new_token_ids[0])
            return self._read_whole(index, news)
        except Exception as error:  # told to this client alone, by `_finish` or `first`
            self._error = error
            for running in list(self._sinks):
                self._leave(running)
            return b""

    def _read_whole(self, index: int, output: EngineOutput) -> bytes:
        delta = self._readers[index].read(output)
        if delta.finish_reason is not None:
            self._leave(index)  # before the client hears of the end
        if delta.finish_reason is FinishReason.ABORT:
            raise UnavailableError(
                "The server ended the request: it is shutting down", code="aborted"
            )
        if self._front.metrics is not None and isinstance(delta.stop_reason, str):
            self._front.metrics.on_stop_string(self._job.choices[index].request.request_id)
        data = b"" if delta.is_empty else self._events.of_delta(delta)
        if not self._sinks:
            self._is_over = True
            data += self._events.last()
        return data

    # ---- bytes out -------------------------------------------------------------------------

    async def first(self) -> bytes:
        """The first bytes there are. What goes wrong before them is raised."""
        while not (data := self._take()):
            if self._error is not None:
                raise self._error
            await self._wait()
        return data

    async def next(self) -> bytes:
        """The next bytes there are; none at the end. An error has become an event."""
        while not (data := self._take()):
            if self._is_over:
                return b""
            if self._error is not None:
                return self._last_words()
            await self._wait()
        return data

    async def _wait(self) -> None:
        if not self._backlog:
            self._news.clear()
            await self._news.wait()

    def _take(self) -> bytes:
        num = min(len(self._backlog), _MOST_AT_ONCE)
        return b"".join([self._read(*self._backlog.popleft()) for _ in range(num)])

    def _last_words(self) -> bytes:
        assert self._error is not None
        self._is_over = True
        return b"data: " + to_api_error(self._error).body() + b"\n\n"

    def attach(self, body: Body) -> None:
        """From now on all bytes go to `body` by themselves."""
        self._body = body
        body.on_writable(self._catch_up)
        self._catch_up()

    async def end(self) -> None:
        """Waits until an attached body has been given everything."""
        while not self._is_over:
            self._news.clear()
            await self._news.wait()

    def _catch_up(self) -> None:
        body = self._body
        assert body is not None
        while self._backlog and not body.is_paused:
            if data := self._take():
                body.write(data)
        if (self._error is not None or self._is_over) and not body.is_paused:
            self._finish(body)

    def _finish(self, body: Body) -> None:
        if self._error is not None and not self._is_over:
            body.write(self._last_words())
        self._news.set()
