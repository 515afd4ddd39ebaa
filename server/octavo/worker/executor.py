"""Runs steps in submission order, in the caller's thread or in one of its own. Knows no step's
content."""

from __future__ import annotations

import queue
import threading
import weakref
from collections import deque
from typing import Protocol

from octavo.types import ModelOutput, SchedulerOutput

_Steps = queue.SimpleQueue[SchedulerOutput | None]
_Results = queue.SimpleQueue[ModelOutput | BaseException]


class StepRunner(Protocol):
    """What an executor drives; `ModelRunner` is one."""

    def execute(self, step: SchedulerOutput) -> ModelOutput: ...

    def use_idle_time(self) -> bool:
        """As `Executor`'s; called while no step runs, from any thread."""


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

    def use_idle_time(self) -> bool:
        return self._runner.use_idle_time()

    def close(self) -> None:
        self._waiting.clear()


class ThreadExecutor:
    """Runs steps in one thread of its own while the caller schedules the next; kernels release
    the interpreter lock."""

    def __init__(self, runner: StepRunner) -> None:
        self._runner = runner
        self._steps: _Steps = queue.SimpleQueue()
        self._results: _Results = queue.SimpleQueue()
        self._num_in_flight = 0
        # The thread does not know this object: dropping it frees the model. At the interpreter's
        # end too, as a thread that is ended in the middle of native code takes the process down.
        self._thread = threading.Thread(
            target=_work,
            args=(runner, self._steps, self._results),
            name="octavo-worker",
            daemon=True,
        )
        self._thread.start()
        self._end = weakref.finalize(self, _end, self._thread, self._steps)

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

    def use_idle_time(self) -> bool:
        assert self._num_in_flight == 0, "there is no idle time while a step is in flight"
        return self._runner.use_idle_time()

    def close(self) -> None:
        """Waits for submitted steps; their results are dropped."""
        self._end()


def _work(runner: StepRunner, steps: _Steps, results: _Results) -> None:
    while (step := steps.get()) is not None:
        try:
            results.put(runner.execute(step))
        except BaseException as error:  # the collector raises it in the engine's thread
            results.put(error)


def _end(thread: threading.Thread, steps: _Steps) -> None:
    steps.put(None)
    if thread is not threading.current_thread():  # where a garbage collection may run
        thread.join()
