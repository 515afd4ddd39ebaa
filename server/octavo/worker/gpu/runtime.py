"""What a GPU does beside running kernels: copies, events, captured graphs. Knows no step.

`CudaRuntime` is a CUDA device. `HostRuntime` stands in where kernels run in Triton's interpreter:
everything has happened when a call returns, and a graph is the work itself, done again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A mark in the order of the device's work."""

    def record(self) -> None:
        """Sets the mark behind all work launched so far."""

    def wait(self) -> None:
        """Holds up the host until the device has passed the mark."""

    def is_done(self) -> bool:
        """Whether it has; True for one never recorded."""


class Graph(Protocol):
    """Captured work, on the tensors that it was captured with."""

    def replay(self) -> None: ...


class Runtime(Protocol):
    """One device and its order of work. All work goes to one stream, in the order launched."""

    @property
    def device(self) -> torch.device: ...

    def host_tensor(self, size: int, dtype: torch.dtype) -> Tensor:
        """[size] on the host, which copies from and to the device need not wait for."""

    def event(self) -> Event: ...

    def capture(self, work: Callable[[], None]) -> Graph:
        """What ``work`` would launch, kept to be launched again. It allocates from memory that
        captured graphs share, so it must return nothing and leave its results in tensors that
        existed before; it must have run once before, outside a capture."""


class _HostEvent:
    def record(self) -> None:
        return

    def wait(self) -> None:
        return

    def is_done(self) -> bool:
        return True


class _HostGraph:
    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work

    def replay(self) -> None:
        self._work()


class HostRuntime:
    """`Runtime` of Triton's interpreter, whose device memory is the host's."""

    device = torch.device("cpu")

    def host_tensor(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype)

    def event(self) -> Event:
        return _HostEvent()

    def capture(self, work: Callable[[], None]) -> Graph:
        return _HostGraph(work)


class _CudaEvent:
    def __init__(self) -> None:
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def record(self) -> None:
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()

    def is_done(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]


class CudaRuntime:
    """`Runtime` of the current CUDA device; for one thread, which works on its current stream."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def host_tensor(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, pin_memory=True)

    def event(self) -> Event:
        return _CudaEvent()

    def capture(self, work: Callable[[], None]) -> Graph:
        # Not `torch.cuda.graph`: it waits for the device, and steps are running there.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph
