"""Runs steps in submission order, in the caller's thread or in one of its own. Knows no step's
content."""

from __future__ import annotations

import atexit
import queue
import threading
from collections import deque
from typing import Protocol

from octavo.types import ModelOutput, SchedulerOutput


class StepRunner(Protocol):
    """What an executor drives; `ModelRunner` is one."""

    def execute(self, step: SchedulerOutput) -> ModelOutput: ...


class InlineExecutor:
    """Runs a step when its result is collected: no threads, one order of events. For tests and
    for callers that have nothing else to do."""

    def __init__(self, runner: StepRunner) -> None:
        self._runner = runner
        self._waiting: deque[SchedulerOutput] = deque()

    def submit(self, step: SchedulerOutput) -> None:
        self._waiting.append(step)

    def collect(self) -> ModelOutput:
        assert self._waiting, "collect without submit"
        return self._runner.execute(self._waiting.popleft())

    def close(self) -> None:
        self._waiting.clear()


class ThreadExecutor:
    """Runs steps in one thread of its own while the caller schedules the next; kernels release
    the interpreter lock."""

    def __init__(self, runner: StepRunner) -> None:
        self._runner = runner
        self._steps: queue.SimpleQueue[SchedulerOutput | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[ModelOutput | BaseException] = queue.SimpleQueue()
        self._num_in_flight = 0
        self._thread = threading.Thread(target=self._work, name="octavo-worker", daemon=True)
        self._thread.start()
        # A thread that the interpreter ends in the middle of native code takes the process down.
        atexit.register(self.close)

    def _work(self) -> None:
        while (step := self._steps.get()) is not None:
            try:
                self._results.put(self._runner.execute(step))
            except BaseException as error:  # the collector raises it in the engine's thread
                self._results.put(error)

    def submit(self, step: SchedulerOutput) -> None:
        assert self._thread.is_alive(), "submit after close"
        self._num_in_flight += 1
        self._steps.put(step)

    def collect(self) -> ModelOutput:
        assert self._num_in_flight > 0, "collect without submit"
        self._num_in_flight -= 1
        result = self._results.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        """Waits for submitted steps; their results are dropped."""
        atexit.unregister(self.close)
        self._steps.put(None)
        self._thread.join()
