"""The HTTP processes of one server among themselves: who tells whom to end, and what is counted.

The first process started the others and the engine, and hears the signals; it tells the others
over a socket each. Knows messages and processes; nothing of HTTP or requests. A server of one
process is a first process without others.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import mmap
import os
import signal
import struct
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from octavo.api.front import Siblings
from octavo.cli.api_child import ApiChild
from octavo.config import EngineConfig, ServerConfig
from octavo.observability.metrics import Metrics
from octavo.observability.series import Series, render_sum

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_ANSWER_SECONDS = 5.0  # for another process's share of the metrics
_LENGTH = struct.Struct("<I")


class Start(msgspec.Struct, frozen=True, tag="start"):
    """The first message: what to serve. ``number`` counts the HTTP processes; the first is 0."""

    number: int
    num_processes: int
    address: str
    counts: str
    config: EngineConfig
    server: ServerConfig


class End(msgspec.Struct, frozen=True, tag="end"):
    """A signal has come: the first asks to drain, the second for an end at once."""

    signal: str


class EngineEnded(msgspec.Struct, frozen=True, tag="engine_ended"):
    """The engine process has ended."""

    words: str


class TellSeries(msgspec.Struct, frozen=True, tag="tell_series"):
    """Asks for the process's own share of the metrics."""

    ask: int


class Metered(msgspec.Struct, frozen=True, tag="metered"):
    """The whole server's metrics, to the process that asked."""

    ask: int
    data: bytes


class Serving(msgspec.Struct, frozen=True, tag="serving"):
    """The process listens."""


class SeriesAre(msgspec.Struct, frozen=True, tag="series"):
    """The process's own share."""

    ask: int
    series: list[Series]


class TellMetrics(msgspec.Struct, frozen=True, tag="tell_metrics"):
    """Asks for the whole server's metrics."""

    ask: int


ToChild = Start | End | EngineEnded | TellSeries | Metered
ToFirst = Serving | SeriesAre | TellMetrics
_ENCODER = msgspec.msgpack.Encoder()
_TO_CHILD: msgspec.msgpack.Decoder[ToChild] = msgspec.msgpack.Decoder(ToChild)
_TO_FIRST: msgspec.msgpack.Decoder[ToFirst] = msgspec.msgpack.Decoder(ToFirst)


class Channel:
    """One end of the socket between the first process and another."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, message: ToChild | ToFirst) -> None:
        """To a process that has ended: nothing."""
        data = _ENCODER.encode(message)
        if not self._writer.is_closing():
            self._writer.write(_LENGTH.pack(len(data)) + data)

    async def start(self) -> Start | None:
        """The first message, of which everything follows; None when the first process ended."""
        data = await self.read()
        message = None if data is None else _TO_CHILD.decode(data)
        assert message is None or isinstance(message, Start), message
        return message

    async def read(self) -> bytes | None:
        """The next message; None when the other process has ended."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            return await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, OSError):
            return None


class Orders:
    """When to end: the first signal asks to drain, the second for an end at once."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def end(self, name: str) -> None:
        if self.first.is_set():
            log.info("%s again: ending at once", name)
            self.second.set()
        else:
            log.info("%s: ending", name)
            self.first.set()


class Counts:
    """What each process has in hand, in memory that all of them map. Each writes its own two
    numbers; a number is one aligned word, so nobody reads half of one."""

    def __init__(self, path: str, *, number: int, num_processes: int) -> None:
        with open(path, "a+b") as file:
            file.truncate(16 * num_processes)
            self._words = memoryview(mmap.mmap(file.fileno(), 16 * num_processes)).cast("q")
        self._own = 2 * number

    def set_requests(self, count: int) -> None:
        """HTTP requests that this process is answering."""
        self._words[self._own] = count

    def set_choices(self, count: int) -> None:
        """Engine requests that this process waits for."""
        self._words[self._own + 1] = count

    @property
    def num_requests(self) -> int:
        return sum(self._words[0::2])

    @property
    def num_choices(self) -> int:
        return sum(self._words[1::2])

    def clear(self, number: int) -> None:
        """A process has ended."""
        self._words[2 * number] = self._words[2 * number + 1] = 0


class Place(Siblings, Protocol):
    """A process's place among its siblings: the first's, or another's."""

    number: int
    orders: Orders
    counts: Counts

    async def serving(self, metrics: Metrics) -> None:
        """Told when this process is ready to listen; returns when all others are."""

    async def metrics(self) -> bytes:
        """The whole server's metrics. Raises TimeoutError."""

    def engine_died(self, reason: str) -> None:
        """Told when this process finds the engine dead."""

    async def ended(self, timeout: float) -> bool:
        """Told when this process has answered its last request. Waits for the others to end by
        themselves, at most ``timeout`` seconds; whether no process has failed."""


class _Counting:
    """What `octavo.api.front.Siblings` asks of the counts."""

    counts: Counts

    @property
    def num_requests(self) -> int:
        return self.counts.num_requests

    @property
    def num_choices(self) -> int:
        return self.counts.num_choices


class FirstPlace(_Counting):
    """The process that hears signals and holds the others."""

    number = 0

    def __init__(
        self, children: Sequence[ApiChild], *, counts: Counts, starts: Sequence[Start]
    ) -> None:
        self.orders = Orders()
        self.counts = counts
        self._children = list(children)
        self._starts = starts
        self._channels: dict[int, Channel] = {}
        self._readers: list[asyncio.Task[None]] = []
        self._telling: set[asyncio.Task[None]] = set()
        self._num_serving = 0
        self._news = asyncio.Event()
        self._has_failed = False
        self._own: Metrics | None = None
        self._asks = itertools.count()
        self._answers: dict[int, list[list[Series]]] = {}
        self.on_lost: Callable[[int], None] = lambda number: None

    async def open(self) -> None:
        """Tells the others what to serve, and hears signals from now on."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        for child, start in zip(self._children, self._starts, strict=True):
            channel = Channel(*await asyncio.open_connection(sock=child.channel))
            self._channels[child.number] = channel
            channel.send(start)
            self._readers.append(asyncio.create_task(self._read(child, channel)))

    def _on_signal(self, number: int) -> None:
        self._end_all(signal.Signals(number).name)

    def _end_all(self, why: str) -> None:
        for channel in self._channels.values():
            channel.send(End(why))
        self.orders.end(why)

    def engine_died(self, reason: str) -> None:
        for channel in self._channels.values():
            channel.send(EngineEnded(reason))

    async def _read(self, child: ApiChild, channel: Channel) -> None:
        while (data := await channel.read()) is not None:
            message = _TO_FIRST.decode(data)
            if isinstance(message, Serving):
                self._num_serving += 1
            elif isinstance(message, SeriesAre):
                if message.ask in self._answers:
                    self._answers[message.ask].append(message.series)
            else:
                telling = asyncio.create_task(self._tell_metrics(channel, message.ask))
                self._telling.add(telling)  # the loop alone would not keep it
                telling.add_done_callback(self._telling.discard)
            self._news.set()
        del self._channels[child.number]
        child.stop_listening()
        while (code := child.exit_code) is None:
            await asyncio.sleep(_POLL_SECONDS)
        if code != 0 or not self.orders.first.is_set():
            self._lose(child.number, code)
        self.counts.clear(child.number)
        self._news.set()

    def _lose(self, number: int, code: int) -> None:
        """A process has ended by itself: its requests are lost, the others' are answered."""
        self._has_failed = True
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        log.critical("HTTP process %d has ended (%s)", number, how)
        self.on_lost(number)
        if not self.orders.first.is_set():
            self._end_all("no server without it")

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._news.clear()
            await self._news.wait()

    async def serving(self, metrics: Metrics) -> None:
        self._own = metrics
        await self._until(lambda: self._num_serving == len(self._children) or self._has_failed)

    async def metrics(self) -> bytes:
        """Raises TimeoutError when another process does not tell its share."""
        assert self._own is not None
        if not self._channels:
            return self._own.render()
        ask = next(self._asks)
        answers = self._answers[ask] = [self._own.series()]
        for channel in self._channels.values():
            channel.send(TellSeries(ask))
        try:
            await asyncio.wait_for(
                self._until(lambda: len(answers) > len(self._channels)), _ANSWER_SECONDS
            )
        finally:
            del self._answers[ask]
        return render_sum(answers)

    async def _tell_metrics(self, channel: Channel, ask: int) -> None:
        with contextlib.suppress(TimeoutError):  # which the asker finds by itself
            channel.send(Metered(ask, await self.metrics()))

    async def ended(self, timeout: float) -> bool:
        try:
            await asyncio.wait_for(asyncio.gather(*self._readers), timeout)
        except TimeoutError:
            log.warning("%d HTTP processes did not end in time", len(self._channels))
            return False
        return not self._has_failed


class ChildPlace(_Counting):
    """One of the others. Raises nothing when the first process ends: it ends as well, at once."""

    def __init__(self, channel: Channel, number: int, *, counts: Counts) -> None:
        self.number = number
        self.orders = Orders()
        self.counts = counts
        self.engine = DistantEngine()
        self._channel = channel
        self._own: Metrics | None = None
        self._asks = itertools.count()
        self._answers: dict[int, asyncio.Future[bytes]] = {}
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while (data := await self._channel.read()) is not None:
            message = _TO_CHILD.decode(data)
            if isinstance(message, End):
                self.orders.end(message.signal)
            elif isinstance(message, EngineEnded):
                self.engine.end(message.words)
            elif isinstance(message, TellSeries):
                series = [] if self._own is None else self._own.series()
                self._channel.send(SeriesAre(message.ask, series))
            else:
                assert isinstance(message, Metered), message
                answer = self._answers.get(message.ask)  # None: it was given up
                if answer is not None and not answer.done():
                    answer.set_result(message.data)
        os._exit(1)  # the first process is gone, and the engine with it

    async def serving(self, metrics: Metrics) -> None:
        self._own = metrics
        self._channel.send(Serving())

    async def metrics(self) -> bytes:
        """Raises TimeoutError when the first process does not tell them."""
        ask = next(self._asks)
        self._answers[ask] = asyncio.get_running_loop().create_future()
        self._channel.send(TellMetrics(ask))
        try:
            return await asyncio.wait_for(self._answers[ask], 2 * _ANSWER_SECONDS)
        finally:
            del self._answers[ask]

    def engine_died(self, reason: str) -> None:
        """The first process finds out for itself."""

    async def ended(self, timeout: float) -> bool:
        self._reader.cancel()
        return True


class DistantEngine:
    """The engine process as the first process tells of it. Implements
    `octavo.engine.async_engine.EngineHandle`."""

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self.exit_words = "it still runs"

    def end(self, words: str) -> None:
        self.exit_code, self.exit_words = 1, words

    def close(self) -> None:
        """It is the first process's to end."""
