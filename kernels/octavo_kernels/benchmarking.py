"""Times an op that has passed its tests, beside its baselines; knows specs, files of none."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch

from octavo_kernels.op import Case, OpSpec
from octavo_kernels.testing import check_case, check_rows, inputs_for

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
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, function in contenders.items():
            time.sleep(_SETTLE_S)
            call = partial(function, **inputs[name])
            taken[name] += _times(call, seconds=seconds, device=device)
    found = []
    for name, values in taken.items():
        deciles = quantiles(values, n=10)
        found.append(
            Timing(
                contender=name,
                calls=len(values),
                median_s=median(values),
                p10_s=deciles[0],
                p90_s=deciles[-1],
            )
        )
    return found
