"""The only border between processes: typed messages over Unix sockets. Knows no room's insides.

Messages are msgpack of the frozen types in `octavo.types`, decoded against their declared types,
so a field that does not fit is an error here and nowhere later. Each direction is batched: one
`Step` per engine step, one `AddRequests` per turn of the front end's loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import zmq

from octavo.engine.owners import Owners
from octavo.types import EngineInfo, EngineOutputs, EngineRequest


class AddRequests(msgspec.Struct, frozen=True, tag="add"):
    """Requests to run, in the order the engine shall see them (a fork after its parent)."""

    requests: tuple[EngineRequest, ...]


class AbortRequests(msgspec.Struct, frozen=True, tag="abort"):
    """Requests to end; unknown ids are ignored."""

    request_ids: tuple[str, ...]


class FrontEndGone(msgspec.Struct, frozen=True, tag="gone"):
    """Another front end has ended: nobody waits for its requests."""

    number: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine can generate its first token."""

    info: EngineInfo


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine could not start. ``is_user_error``: the options are wrong, not the program."""

    message: str
    is_user_error: bool


class Step(msgspec.Struct, frozen=True, tag="step"):
    """News of one engine step."""

    outputs: EngineOutputs


class Dead(msgspec.Struct, frozen=True, tag="dead"):
    """The engine cannot go on and its process ends."""

    reason: str


# As plain integers: pyzmq's are enumerations, whose arithmetic takes microseconds.
_POLLIN, _NO_WAIT = int(zmq.POLLIN), int(zmq.NOBLOCK)

ToEngine = AddRequests | AbortRequests | FrontEndGone
ToFrontEnd = Ready | Failed | Step | Dead

_ENCODER = msgspec.msgpack.Encoder()
_TO_ENGINE: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_TO_FRONT_END: msgspec.msgpack.Decoder[ToFrontEnd] = msgspec.msgpack.Decoder(ToFrontEnd)


def encode(message: ToEngine | ToFrontEnd) -> bytes:
    """Bytes of one message."""
    return _ENCODER.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    """Front end -> engine. Raises `msgspec.ValidationError` on anything else."""
    return _TO_ENGINE.decode(data)


def decode_to_front_end(data: bytes) -> ToFrontEnd:
    """Engine -> front end. Raises `msgspec.ValidationError` on anything else."""
    return _TO_FRONT_END.decode(data)


def open_socket(context: zmq.Context[Any], address: str, *, bind: bool) -> Any:
    """One end of the pair of sockets at `address` (``ipc://path``); the front end binds.

    Queues are without a limit on purpose: what may wait is bounded by the requests that the front
    end accepted, and a socket that blocks would stop the engine for its slowest reader.
    """
    socket = context.socket(zmq.PAIR)
    socket.set(zmq.SNDHWM, 0)
    socket.set(zmq.RCVHWM, 0)
    socket.set(zmq.LINGER, 0)
    if bind:
        socket.bind(address)
    else:
        socket.set(zmq.RECONNECT_IVL, 5)  # ms; the front end may bind a little later
        socket.connect(address)
    return socket


class EngineEnd:
    """The engine's end of a pair per front end. News of a request go to the one that added it."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._sockets: dict[int, Any] = {}  # by the front end's number
        self._owners = Owners() if len(addresses) > 1 else None
        self._poller = zmq.Poller()
        for number, address in enumerate(addresses):
            self._sockets[number] = open_socket(self._context, address, bind=False)
            self._poller.register(self._sockets[number], zmq.POLLIN)

    def receive(self, *, wait: bool) -> list[AddRequests | AbortRequests]:
        """All messages that have come; with ``wait``, at least one."""
        while not (messages := self._take()) and wait:
            self._poller.poll()
        return messages

    def _take(self) -> list[AddRequests | AbortRequests]:
        messages: list[AddRequests | AbortRequests] = []
        for number, socket in list(self._sockets.items()):
            # Asked first: most often nothing has come, and an exception takes longer to make.
            while not socket.closed and socket.get(zmq.EVENTS) & _POLLIN:
                message = decode_to_engine(socket.recv(_NO_WAIT))
                if isinstance(message, FrontEndGone):
                    message = AbortRequests(self._drop(message.number))
                elif self._owners is not None and isinstance(message, AddRequests):
                    self._owners.add(message.requests, owner=number)
                messages.append(message)
        return messages

    def _drop(self, number: int) -> tuple[str, ...]:
        """Forgets a front end; the ids of its requests."""
        if (socket := self._sockets.pop(number, None)) is not None:
            self._poller.unregister(socket)
            socket.close(linger=0)
        return () if self._owners is None else self._owners.of(number)

    def send(self, message: ToFrontEnd) -> None:
        if self._owners is not None and isinstance(message, Step):
            for number, share in self._owners.shares(message.outputs, owners=self._sockets).items():
                self._sockets[number].send(encode(Step(share)))
        else:
            data = encode(message)
            for socket in self._sockets.values():
                socket.send(data)

    def close(self) -> None:
        """Sends what is queued, for at most a second."""
        for socket in self._sockets.values():
            socket.close(linger=1000)
        self._context.term()


class FrontEnd:
    """The front end's end of the pair, for the asyncio loop that runs.

    The loop watches the socket's descriptor, which tells of a change once: whoever uses the socket
    hears of it in the loop's place, so each use looks whether a message has come.
    """

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = open_socket(self._context, address, bind=True)
        self._loop = asyncio.get_running_loop()
        self._descriptor: int = self._socket.get(zmq.FD)
        self._waiter: asyncio.Future[None] | None = None
        self._loop.add_reader(self._descriptor, self._look)

    def send(self, message: ToEngine) -> None:
        """Sends now: there is no high-water mark, so the socket takes it."""
        self._socket.send(encode(message), _NO_WAIT)
        self._look()

    async def receive(self) -> ToFrontEnd:
        """The next message; gives the loop no turn if it has come. For one reader at a time."""
        while not self._socket.get(zmq.EVENTS) & _POLLIN:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return decode_to_front_end(self._socket.recv(_NO_WAIT))

    def _look(self) -> None:
        # Asked in any case: it is what makes the descriptor quiet again.
        has_message = self._socket.get(zmq.EVENTS) & _POLLIN
        if has_message and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        if not self._socket.closed:
            self._loop.remove_reader(self._descriptor)
            self._socket.close(linger=0)
            self._context.term()
