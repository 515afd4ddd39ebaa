"""Steps in flight, and what a broken device or a broken graph does to them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from octavo.types import DeviceLostError, ModelOutput, SchedulerOutput
from octavo.worker.gpu.executor import GpuExecutor, is_device_error

CUDA_ERROR = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")


class Runner:
    """Fails when told to."""

    def __init__(self) -> None:
        self.fails: dict[str, Exception] = {}
        self.calls: list[str] = []

    def _do(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fails:
            raise self.fails[name]

    def launch(self, step: SchedulerOutput) -> Any:
        self._do(f"launch {step.step}")
        return SimpleNamespace(step=step.step, request_ids=tuple(step.num_scheduled_tokens))

    def finish(self, flight: Any) -> ModelOutput:
        self._do(f"finish {flight.step}")
        return ModelOutput(step=flight.step)

    def capture_if_due(self) -> bool:
        self._do("capture if due")
        return False

    def capture_one(self) -> bool:
        self._do("capture")
        return False


def make() -> tuple[GpuExecutor, Runner]:
    runner: Any = Runner()
    return GpuExecutor(runner), runner


def step(number: int, *names: str) -> SchedulerOutput:
    return SchedulerOutput(step=number, num_scheduled_tokens=dict.fromkeys(names, 1))


def test_steps_end_in_the_order_of_their_launch() -> None:
    executor, runner = make()
    executor.submit(step(0, "a"))
    executor.submit(step(1, "a"))
    assert executor.collect().step == 0
    executor.submit(step(2, "a"))
    executor.close()
    steps = [call for call in runner.calls if call[-1].isdigit()]
    assert steps == ["launch 0", "launch 1", "finish 0", "launch 2", "finish 1", "finish 2"]


@pytest.mark.parametrize("where", ["launch 2", "finish 0", "capture if due", "capture"])
def test_a_lost_device_names_the_requests_of_all_steps_in_flight(where: str) -> None:
    executor, runner = make()
    executor.submit(step(0, "a", "b"))
    executor.submit(step(1, "b", "c"))
    runner.fails[where] = CUDA_ERROR
    with pytest.raises(DeviceLostError, match="illegal memory access") as raised:
        if where == "finish 0":
            executor.collect()
        elif where == "capture":
            executor.use_idle_time()
        else:
            executor.submit(step(2, "c", "d"))
    named = str(raised.value).split("in flight: ")[1]
    new = ["d"] if where in ("launch 2", "capture if due") else []
    assert sorted(named.split(", ")) == ["a", "b", "c", *new]
    assert raised.value.__cause__ is CUDA_ERROR
    executor.close()  # waits for nothing that will not come


def test_another_error_fails_its_step_alone() -> None:
    executor, runner = make()
    executor.submit(step(0, "a"))
    runner.fails["launch 1"] = ValueError("no such block")
    with pytest.raises(ValueError, match="no such block"):
        executor.submit(step(1, "b"))
    executor.submit(step(2, "c"))
    runner.fails["finish 0"] = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        executor.collect()
    assert executor.collect().step == 2


def test_closing_waits_for_every_step_whatever_it_raises(
    caplog: pytest.LogCaptureFixture,
) -> None:
    executor, runner = make()
    for number in range(3):
        executor.submit(step(number, "a"))
    runner.fails["finish 1"] = ValueError("no such row")
    executor.close()
    assert runner.calls[-3:] == ["finish 0", "finish 1", "finish 2"]
    assert "no such row" in caplog.text


def test_a_graph_that_cannot_be_captured_is_done_without(
    caplog: pytest.LogCaptureFixture,
) -> None:
    executor, runner = make()
    runner.fails["capture if due"] = runner.fails["capture"] = ValueError("not now")
    executor.submit(step(0, "a"))
    assert executor.use_idle_time()
    assert executor.collect().step == 0
    assert caplog.text.count("a graph could not be captured") == 2


def test_what_counts_as_a_broken_device() -> None:
    assert is_device_error(CUDA_ERROR)
    assert is_device_error(RuntimeError("CUDA error: unspecified launch failure"))
    assert not is_device_error(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_device_error(
        RuntimeError("CUDA error: operation failed due to a previous error during capture")
    )
    assert not is_device_error(RuntimeError("shapes do not match"))
    assert not is_device_error(ValueError("CUDA graphs need sizes"))
