"""Decode matmuls of an 8B model beside cuBLAS, weights cold in L2, and prefill ones at one size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_recorder import Recorder, times_to_fill
from octavo_kernels.matmul import gpu

LAYERS = 32
SHAPES = {  # weights [N, K]
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate-up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}


def _random(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.bfloat16, device="cuda")


def _weights(n: int, k: int) -> list[Tensor]:
    return [_random(n, k) / k**0.5 for _ in range(times_to_fill(2 * n * k))]


def _on_each(
    function: Callable[..., Any], x: Tensor, weights: list[Tensor]
) -> list[Callable[[], Any]]:
    return [partial(function, x, weight) for weight in weights]


def run_matmul(recorder: Recorder, *, is_short: bool) -> None:
    seconds = 0.15 if is_short else 0.4
    for rows in (1, 16):
        us: dict[str, dict[str, float]] = {"octavo": {}, "cuBLAS": {}}
        for name, (n, k) in SHAPES.items():
            case = f"{name} M={rows}"
            with recorder.case("matmul", case):
                weights = _weights(n, k)
                x = _random(rows, k)
                row = recorder.measure(
                    "matmul",
                    case,
                    _on_each(gpu.linear, x, weights),
                    baselines={"cuBLAS": _on_each(torch.nn.functional.linear, x, weights)},
                    bytes_moved=2 * (n * k + rows * (n + k)),
                    flops=2 * rows * n * k,
                    seconds=seconds,
                )
                us["octavo"][name] = row["us"]
                us["cuBLAS"][name] = row["baselines"]["cuBLAS"]["us"]
                del weights
        _keep_step(recorder, rows, us)
        _run_fused(recorder, rows, seconds)
    if not is_short:
        _run_prefill(recorder, seconds)


def _keep_step(recorder: Recorder, rows: int, us: dict[str, dict[str, float]]) -> None:
    """One step's matmuls: every layer's four and the head, by their medians."""
    case = f"8B, M={rows}"
    with recorder.case("matmuls of a step", case):
        total = {
            who: sum(each[name] * (1 if name == "head" else LAYERS) for name in SHAPES) / 1e6
            for who, each in us.items()
        }
        own, theirs = ({f"{key}_s": s for key in ("median", "p10", "p90")} for s in total.values())
        num_bytes = sum(
            2 * n * k * (1 if name == "head" else LAYERS) for name, (n, k) in SHAPES.items()
        )
        recorder.keep_times(
            "matmuls of a step",
            case,
            own,
            baselines={"cuBLAS": theirs},
            bytes_moved=num_bytes,
            ms=round(total["octavo"] * 1e3, 3),
        )


def _run_fused(recorder: Recorder, rows: int, seconds: float) -> None:
    """Gate and residual in the matmul's epilogue."""
    n, k = SHAPES["gate-up"]
    case = f"gate-up + silu M={rows}"
    with recorder.case("matmul", case):
        x, weights = _random(rows, k), _weights(n, k)
        calls = _on_each(partial(gpu.linear, activation="silu_mul"), x, weights)
        recorder.measure("matmul", case, calls, bytes_moved=2 * n * k, seconds=seconds)
        del weights, calls
    n, k = SHAPES["down"]
    case = f"down + residual M={rows}"
    with recorder.case("matmul", case):
        x, weights, residual = _random(rows, k), _weights(n, k), _random(rows, n)
        calls = _on_each(partial(gpu.linear, residual=residual), x, weights)
        recorder.measure("matmul", case, calls, bytes_moved=2 * n * k, seconds=seconds)
        del weights, calls


def _run_prefill(recorder: Recorder, seconds: float) -> None:
    for rows in (64, 256, 2048):
        for name in ("qkv", "gate-up", "down"):
            n, k = SHAPES[name]
            case = f"{name} M={rows}"
            with recorder.case("matmul", case):
                weights, x = _weights(n, k), _random(rows, k)
                recorder.measure(
                    "matmul",
                    case,
                    _on_each(gpu.linear, x, weights),
                    baselines={"cuBLAS": _on_each(torch.nn.functional.linear, x, weights)},
                    bytes_moved=2 * (n * k + rows * (n + k)),
                    flops=2 * rows * n * k,
                    seconds=seconds,
                )
                del weights
