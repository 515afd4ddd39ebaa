"""The engine's two borders: who executes its steps, and how the front end sees it.

Knows the wire types only; each protocol has two implementations or more.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from octavo.types import EngineInfo, EngineOutput, EngineRequest, ModelOutput, SchedulerOutput


class Executor(Protocol):
    """Runs steps in the order submitted. `worker.executor` has the real ones (inline, threaded),
    `engine.fake` one without a model."""

    def submit(self, step: SchedulerOutput) -> None:
        """Queues a step and returns without waiting for it."""

    def collect(self) -> ModelOutput:
        """Result of the oldest submitted step; waits for it. A request that failed alone is in
        ``errors``; an exception means the step as a whole failed."""

    def use_idle_time(self) -> bool:
        """Does a short piece of work that waits for idle times; False if none is left."""

    def close(self) -> None:
        """Waits for what is running and frees the device."""


class EngineDeadError(RuntimeError):
    """The engine process is gone; nothing can be generated until it is restarted."""


class Sink(Protocol):
    """Takes the news of one request as they come. Runs on the loop and inside the engine's turn:
    must be quick and must not raise."""

    def put(self, output: EngineOutput) -> None:
        """The next output; the one with a ``finish_reason`` is the last."""

    def fail(self, reason: str) -> None:
        """The engine is dead; nothing follows."""


class Engine(Protocol):
    """What the HTTP front end and benchmarks talk to. `engine.async_engine` is the real one."""

    @property
    def info(self) -> EngineInfo: ...

    def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """News of a request until the output that carries ``finish_reason``. Closing the iterator
        early aborts the request. Raises `EngineDeadError`."""

    def attach(self, request: EngineRequest, sink: Sink) -> None:
        """As `generate`, into a sink. Raises `EngineDeadError`."""

    def detach(self, request_id: str, sink: Sink) -> None:
        """Tells ``sink`` nothing more, and aborts the request unless it has ended."""

    def abort(self, request_ids: Sequence[str]) -> None:
        """Ends requests wherever they are; unknown ids are ignored."""

    def check_health(self) -> None:
        """Raises `EngineDeadError` with the reason when the engine cannot make progress."""

    @property
    def num_unfinished(self) -> int: ...

    async def close(self) -> None: ...
