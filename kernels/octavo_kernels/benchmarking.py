"""Times an op that has passed its tests, beside its baselines; knows specs, files of none.

On a GPU calls are captured into CUDA graphs, so that what is timed is the device and not Python.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch

from octavo_kernels.op import Case, OpSpec
from octavo_kernels.testing import check_case, check_rows, inputs_for

_REPLAY_S = 3e-4  # a graph is worth replaying from here: events resolve half a microsecond
_MAX_CALLS = 64  # in one graph
_MIN_REPLAYS = 9

# Longer than another library's threads spin after their last work: a contender must not be timed
# against the previous one's idle loop.
_SETTLE_S = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds per call of one contender on one case."""

    contender: str  # "octavo" or the baseline's name
    calls: int
    median_s: float
    p10_s: float
    p90_s: float


def assert_green(spec: OpSpec, dtype: torch.dtype, *, device: str = "cpu") -> None:
    """Runs every test case of the op; a red op is not timed."""
    for case in spec.cases:
        check_case(spec, case, dtype, device)
        if spec.rows:
            check_rows(spec, case, dtype, device)


def _sync(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def _times(call: Callable[[], Any], *, seconds: float, device: str) -> list[float]:
    """Durations of single calls for about `seconds`, after two that warm up; at least 5."""
    for _ in range(2):
        call()
    _sync(device)
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        _sync(device)
        taken.append(time.perf_counter() - start)
    return taken


class Captured:
    """Calls in a CUDA graph, in turn and repeated until a replay is long enough to be timed.

    Several calls on inputs of their own keep those inputs cold in L2. Raises what a call raises,
    and RuntimeError for a call that cannot be captured (one that waits for the device).
    """

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        for call in calls:
            call()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        self.num_calls = len(calls)
        once = self._capture(calls)
        rounds = max(1, min(int(_REPLAY_S / once) + 1, _MAX_CALLS // len(calls)))
        if rounds > 1:
            self._graph = torch.cuda.CUDAGraph()
            self.num_calls = rounds * len(calls)
            self._capture(list(calls) * rounds)

    def _capture(self, calls: Sequence[Callable[[], Any]]) -> float:
        # By hand: torch.cuda.graph() also collects garbage and empties the allocator's cache, which
        # takes longer than a tuner's timing.
        stream: Any = torch.cuda.Stream  # untyped in some versions
        stream = stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Another thread may allocate meanwhile.
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                for call in calls:
                    call()
            finally:
                self._graph.capture_end()
        torch.cuda.synchronize()
        self.seconds()  # the first replay uploads the graph
        return self.seconds() * self.num_calls

    def seconds(self) -> float:
        """Of one call, in one replay."""
        return _between_events(self._graph.replay) / self.num_calls


class Issued:
    """One call, not captured: for what takes much longer than its launch.

    In a graph a copy between two tensors becomes the copy engine's, which is slower than a kernel.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self.seconds()

    def seconds(self) -> float:
        return _between_events(self._call)


def _between_events(work: Callable[[], Any]) -> float:
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def timings(contenders: Mapping[str, Captured | Issued], *, seconds: float) -> list[Timing]:
    """Of contenders that run in turn for about `seconds` in all, 9 times at least."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < _MIN_REPLAYS or time.perf_counter() < end:
        for name, contender in contenders.items():
            taken[name].append(contender.seconds())
        rounds += 1
    return [summary(name, values) for name, values in taken.items()]


def summary(contender: str, seconds: Sequence[float]) -> Timing:
    """Median and deciles of at least two durations."""
    deciles = quantiles(seconds, n=10, method="inclusive")
    return Timing(
        contender=contender,
        calls=len(seconds),
        median_s=median(seconds),
        p10_s=deciles[0],
        p90_s=deciles[-1],
    )


def time_case(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    rounds: int = 3,
    seconds: float = 0.05,
) -> list[Timing]:
    """The op and its baselines in turn, `rounds` times for `seconds` each; the op first."""
    contenders: dict[str, Callable[..., Any]] = {"octavo": spec.op, **spec.baselines}
    inputs = {name: inputs_for(spec, case, dtype, device) for name in contenders}
    if torch.device(device).type == "cuda":
        graphs = {n: Captured([partial(f, **inputs[n])]) for n, f in contenders.items()}
        return timings(graphs, seconds=rounds * seconds * len(graphs))
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, function in contenders.items():
            time.sleep(_SETTLE_S)
            call = partial(function, **inputs[name])
            taken[name] += _times(call, seconds=seconds, device=device)
    return [summary(name, values) for name, values in taken.items()]
