"""Runs steps on a GPU in the order submitted, several in flight. Knows no step's content.

There is no thread: launching a step takes the host less time than running it takes the GPU.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

import torch

from octavo.types import DeviceLostError, ModelOutput, SchedulerOutput
from octavo.worker.gpu.runner import GpuRunner, InFlight

_log = logging.getLogger(__name__)


class GpuExecutor:
    """`engine.protocols.Executor` of a GPU.

    A Python error fails its step alone. An error of the device leaves it unusable, whoever's fault
    it was: `DeviceLostError` then names the requests of every step in flight.
    """

    def __init__(self, runner: GpuRunner) -> None:
        self._runner = runner
        self._inflight: deque[InFlight] = deque()

    def submit(self, step: SchedulerOutput) -> None:
        try:
            self._inflight.append(self._runner.launch(step))
        except Exception as error:
            self._raise_if_lost(error, tuple(step.num_scheduled_tokens))
            raise
        self._capture(self._runner.capture_if_due)

    def collect(self) -> ModelOutput:
        assert self._inflight, "collect without submit"
        step = self._inflight.popleft()
        try:
            return self._runner.finish(step)
        except Exception as error:
            self._raise_if_lost(error, step.request_ids)
            raise

    def use_idle_time(self) -> bool:
        """Captures one more graph, if one is missing."""
        return self._capture(self._runner.capture_one)

    def close(self) -> None:
        """Waits for submitted steps; their results are dropped, and why they failed is logged."""
        while self._inflight:
            try:
                self.collect()
            except Exception as error:
                _log.error("a step failed while the engine was closed", exc_info=error)

    def _capture(self, capture: Callable[[], bool]) -> bool:
        """A graph that cannot be captured is done without."""
        try:
            return capture()
        except Exception as error:
            self._raise_if_lost(error, ())
            _log.warning("a graph could not be captured", exc_info=error)
            return True

    def _raise_if_lost(self, error: Exception, request_ids: tuple[str, ...]) -> None:
        """Of the failing step, whose requests are given; those behind it are lost with it."""
        if not is_device_error(error):
            return
        ids = dict.fromkeys(request_ids)
        for step in self._inflight:
            ids |= dict.fromkeys(step.request_ids)
        self._inflight.clear()
        named = ", ".join(ids) or "none"
        raise DeviceLostError(f"the GPU failed ({error}); requests in flight: {named}") from error


def is_device_error(error: Exception) -> bool:
    """Whether it is CUDA's word that its context is broken, from torch or from Triton.

    Too little memory breaks nothing, nor does a graph that could not be captured.
    """
    if isinstance(error, torch.OutOfMemoryError) or "captur" in str(error):
        return False
    is_cuda = isinstance(error, RuntimeError) and "CUDA" in str(error)
    return is_cuda or isinstance(error, torch.AcceleratorError)
