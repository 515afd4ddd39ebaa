"""The engine as the HTTP front end sees it: one asyncio object over the engine process.

Knows requests, news and the process's life; knows nothing of text, HTTP or scheduling.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from octavo.engine import ipc
from octavo.engine.protocols import EngineDeadError, Sink
from octavo.types import EngineInfo, EngineOutput, EngineOutputs, EngineRequest

_PROCESS_POLL_SECONDS = 0.5
_STEPS_A_TURN = 4
_STALL_TOKENS = 256  # a step may take its stall time for each of these that it may hold

log = logging.getLogger(__name__)


class EngineStartError(RuntimeError):
    """The engine did not start. ``is_user_error``: because of the options it was given."""

    def __init__(self, message: str, *, is_user_error: bool) -> None:
        super().__init__(message)
        self.is_user_error = is_user_error


class Observer(Protocol):
    """Hears what goes into the engine and what comes out. Runs on the loop: must be quick."""

    def on_request(self, request: EngineRequest) -> None: ...

    def on_outputs(self, outputs: EngineOutputs, now: float) -> None: ...


class EngineHandle(Protocol):
    """The engine's process as a front end needs it: `octavo.engine.launch.EngineProcess`, or what
    the process that started it tells of it."""

    @property
    def exit_code(self) -> int | None: ...

    @property
    def exit_words(self) -> str: ...

    def close(self) -> None:
        """Ends it, if that is ours to do."""


class RequestStream:
    """News of one request, in order; ends after the output with a ``finish_reason``.

    Leaving early (`aclose`, a cancelled wait, or dropping the object) aborts the request.
    """

    def __init__(self, engine: AsyncEngine, request_id: str, inbox: _Inbox) -> None:
        self._engine = engine
        self._request_id = request_id
        self._inbox: _Inbox | None = inbox

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> EngineOutput:
        inbox = self._inbox
        if inbox is None:
            raise StopAsyncIteration
        try:
            output = await inbox.next()
        except BaseException:
            await self.aclose()
            raise
        if output.finish_reason is not None:
            self._inbox = None
        return output

    async def aclose(self) -> None:
        """Aborts the request unless it has ended. May be called any number of times."""
        self._leave()

    def _leave(self) -> None:
        if self._inbox is not None:
            self._engine.detach(self._request_id, self._inbox)
            self._inbox = None

    def __del__(self) -> None:
        self._leave()


class _Inbox:
    """A queue with one reader that can be closed with an error."""

    __slots__ = ("_error", "_outputs", "_waiter")

    def __init__(self) -> None:
        self._outputs: deque[EngineOutput] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._error: str | None = None

    def put(self, output: EngineOutput) -> None:
        self._outputs.append(output)
        self._wake()

    def fail(self, reason: str) -> None:
        self._error = reason
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> EngineOutput:
        while not self._outputs:
            if self._error is not None:
                raise EngineDeadError(self._error)
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._outputs.popleft()


class AsyncEngine:
    """`octavo.engine.protocols.Engine` over the engine process.

    Made and used on one asyncio loop. `stall_seconds`: how long running requests may go without
    any step before the engine counts as unhealthy, for each 256 tokens of the step budget: a long
    prompt in one step is no stall. A usual step takes a second at the very most.
    """

    def __init__(
        self, process: EngineHandle, *, address: str, stall_seconds: float = 120.0
    ) -> None:
        """``address``: where the engine process looks for this front end."""
        self._process = process
        self._stall_seconds = stall_seconds
        self._front = ipc.FrontEnd(address)
        self._sinks: dict[str, Sink] = {}
        self._leaving: set[str] = set()  # aborted by their readers, not yet ended by the engine
        self._outbox: list[EngineRequest] = []
        self._observers: list[Observer] = []
        self._info: EngineInfo | None = None
        self._dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task[None]] = []
        self._last_progress = 0.0
        self._is_closed = False

    # ---- life ------------------------------------------------------------------------------

    async def start(self) -> EngineInfo:
        """Waits until the engine can generate. Raises `EngineStartError`."""
        message = await _first_message(self._front, self._process)
        if isinstance(message, ipc.Failed):
            raise EngineStartError(message.message, is_user_error=message.is_user_error)
        assert isinstance(message, ipc.Ready), message
        self._info = message.info
        self._stall_seconds *= max(1.0, message.info.max_num_batched_tokens / _STALL_TOKENS)
        self._tasks = [
            asyncio.create_task(self._receive(), name="engine-receive"),
            asyncio.create_task(self._watch(), name="engine-watch"),
        ]
        return message.info

    async def close(self) -> None:
        """Ends the engine process; streams still open raise `EngineDeadError`."""
        if self._is_closed:
            return
        self._is_closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._die("the engine was shut down")
        self._front.close()
        await asyncio.to_thread(self._process.close)

    async def wait_dead(self) -> str:
        """Waits until the engine is dead; the reason."""
        return await asyncio.shield(self._dead)

    # ---- requests --------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None, "start() first"
        return self._info

    @property
    def num_unfinished(self) -> int:
        return len(self._sinks) + len(self._leaving)

    def subscribe(self, observer: Observer) -> None:
        """`observer` hears every request and every step from now on."""
        self._observers.append(observer)

    def generate(self, request: EngineRequest) -> RequestStream:
        """Queues `request` now; its news come from the stream. Raises `EngineDeadError`, or
        ValueError when a request of that id is still running."""
        inbox = _Inbox()
        self.attach(request, inbox)
        return RequestStream(self, request.request_id, inbox)

    def attach(self, request: EngineRequest, sink: Sink) -> None:
        """As `generate`, but `sink` is told the news, in the turn of the loop that brings them."""
        self._check_alive()
        if request.request_id in self._sinks or request.request_id in self._leaving:
            raise ValueError(f"request_id {request.request_id!r} is already running")
        if not self.num_unfinished:
            self._last_progress = time.monotonic()
        self._sinks[request.request_id] = sink
        if not self._outbox:  # one message for all requests of this turn of the loop
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(request)
        for observer in self._observers:
            observer.on_request(request)

    def detach(self, request_id: str, sink: Sink) -> None:
        """Tells `sink` nothing more. Its request is aborted unless it has ended."""
        if self._sinks.get(request_id) is sink:
            self.abort([request_id])
            del self._sinks[request_id]
            self._leaving.add(request_id)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Ends requests: each stream gets a last output from the engine. Unknown ids and those
        that have ended are ignored."""
        live = tuple(i for i in request_ids if i in self._sinks)
        if live and not self._dead.done():
            self._flush()
            self._front.send(ipc.AbortRequests(live))

    def drop_front_end(self, number: int) -> None:
        """Tells the engine that another front end has ended; it ends that one's requests."""
        if not self._dead.done():
            self._front.send(ipc.FrontEndGone(number))

    def abort_all(self) -> None:
        """Ends every request that runs; each stream gets its last output."""
        self.abort(list(self._sinks))

    def check_health(self) -> None:
        """Raises `EngineDeadError` when the process is gone or requests make no progress."""
        self._check_alive()
        stalled = time.monotonic() - self._last_progress
        if self.num_unfinished and stalled > self._stall_seconds:
            raise EngineDeadError(
                f"{self.num_unfinished} requests are running and the engine has not finished a "
                f"step for {stalled:.0f} seconds"
            )

    def _check_alive(self) -> None:
        if self._dead.done():
            raise EngineDeadError(self._dead.result())

    def _flush(self) -> None:
        requests, self._outbox = self._outbox, []  # first: what cannot be sent must not stay
        if requests and not self._dead.done():
            self._front.send(ipc.AddRequests(tuple(requests)))

    # ---- what comes back -------------------------------------------------------------------

    async def _receive(self) -> None:
        num_steps = 0
        try:
            while not isinstance(message := await self._front.receive(), ipc.Dead):
                if isinstance(message, ipc.Step):
                    self._dispatch(message.outputs)
                    # While messages are waiting, receive() does not yield: the readers, signals
                    # and new requests must have their turn all the same. Not after each, though:
                    # what is written in one turn is sent at once, so who is behind catches up.
                    num_steps += 1
                    if num_steps % _STEPS_A_TURN == 0:
                        await asyncio.sleep(0)
            self._die(message.reason)
        except Exception as error:
            # A message that cannot be read, or an observer that raised: nobody hears the engine.
            log.error("the engine's messages cannot be read", exc_info=error)
            self._die(f"the front end failed: {error!r}")

    def _dispatch(self, outputs: EngineOutputs) -> None:
        now = self._last_progress = time.monotonic()
        for observer in self._observers:
            observer.on_outputs(outputs, now)
        for output in outputs.outputs:
            sink = self._sinks.get(output.request_id)
            if sink is None:  # its reader has left
                if output.finish_reason is not None:
                    self._leaving.discard(output.request_id)
                continue
            if output.finish_reason is not None:
                del self._sinks[output.request_id]
            sink.put(output)

    async def _watch(self) -> None:
        while self._process.exit_code is None:
            await asyncio.sleep(_PROCESS_POLL_SECONDS)
        await asyncio.sleep(_PROCESS_POLL_SECONDS)  # its last words may still be in the socket
        self._die(f"the engine process ended ({self._process.exit_words})")

    def _die(self, reason: str) -> None:
        if not self._dead.done():
            self._dead.set_result(reason)
        sinks, self._sinks = self._sinks, {}  # first: a sink that is told may detach others
        for sink in sinks.values():
            sink.fail(self._dead.result())
        self._leaving.clear()
        self._outbox.clear()


async def _first_message(front: ipc.FrontEnd, process: EngineHandle) -> ipc.ToFrontEnd:
    receive = asyncio.ensure_future(front.receive())
    try:
        while True:
            exited = process.exit_code is not None
            done, _ = await asyncio.wait([receive], timeout=_PROCESS_POLL_SECONDS)
            if done:
                return receive.result()
            if exited:  # before the wait: its last words have had their time
                raise EngineStartError(
                    f"the engine process ended while starting ({process.exit_words})",
                    is_user_error=False,
                )
    finally:
        receive.cancel()
