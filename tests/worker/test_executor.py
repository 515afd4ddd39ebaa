"""Both executors: order, errors, closing."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

from octavo.types import ModelOutput, SchedulerOutput
from octavo.worker.executor import InlineExecutor, ThreadExecutor


class Recorder:
    """Runs steps by noting who ran which."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def execute(self, step: SchedulerOutput) -> ModelOutput:
        self.seen.append((step.step, threading.get_ident()))
        if step.step == 2:
            raise RuntimeError("step 2 is broken")
        return ModelOutput(step=step.step)

    def use_idle_time(self) -> bool:
        self.seen.append((-1, threading.get_ident()))
        return len(self.seen) < 3


@pytest.mark.parametrize("kind", [InlineExecutor, ThreadExecutor])
def test_results_come_in_order_and_errors_with_their_step(
    kind: type[InlineExecutor | ThreadExecutor],
) -> None:
    runner = Recorder()
    executor = kind(runner)
    for number in range(4):
        executor.submit(SchedulerOutput(step=number))
    assert [executor.collect().step for _ in range(2)] == [0, 1]
    with pytest.raises(RuntimeError, match="step 2 is broken"):
        executor.collect()
    assert executor.collect().step == 3
    executor.close()
    assert [step for step, _ in runner.seen] == [0, 1, 2, 3]
    threads = {thread for _, thread in runner.seen}
    assert len(threads) == 1
    assert (threading.get_ident() in threads) == (kind is InlineExecutor)


@pytest.mark.parametrize("kind", [InlineExecutor, ThreadExecutor])
def test_idle_time_is_the_runners_to_use(kind: type[InlineExecutor | ThreadExecutor]) -> None:
    executor = kind(runner := Recorder())
    executor.submit(SchedulerOutput(step=0))
    executor.collect()
    assert [executor.use_idle_time() for _ in range(2)] == [True, False]
    assert [step for step, _ in runner.seen] == [0, -1, -1]


def test_closing_waits_for_what_was_submitted() -> None:
    runner = Recorder()
    executor = ThreadExecutor(runner)
    for number in range(2):
        executor.submit(SchedulerOutput(step=number))
    executor.close()
    assert len(runner.seen) == 2
    with pytest.raises(AssertionError):
        executor.submit(SchedulerOutput(step=5))


@pytest.mark.parametrize("kind", [InlineExecutor, ThreadExecutor])
def test_collect_needs_a_step(kind: type[InlineExecutor | ThreadExecutor]) -> None:
    executor = kind(Recorder())
    with pytest.raises(AssertionError, match="collect without submit"):
        executor.collect()
    executor.close()


def test_dropping_an_executor_ends_its_thread_and_frees_what_it_ran() -> None:
    runner = Recorder()
    executor = ThreadExecutor(runner)
    executor.submit(SchedulerOutput(step=0))
    executor.collect()
    thread, freed = executor._thread, weakref.ref(runner)
    del executor, runner
    gc.collect()
    assert not thread.is_alive()
    assert freed() is None
