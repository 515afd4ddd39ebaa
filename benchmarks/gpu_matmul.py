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
# As in a step: a launch starts while its predecessor ends, and asks for its weights.
_LINEAR = partial(gpu.linear, use_pdl=True)
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
        for name, (n, k) in SHAPES.items():
            case = f"{name} M={rows}"
            with recorder.case("matmul", case):
                weights = _weights(n, k)
                x = _random(rows, k)
                recorder.measure(
                    "matmul",
                    case,
                    _on_each(_LINEAR, x, weights),
                    baselines={"cuBLAS": _on_each(torch.nn.functional.linear, x, weights)},
                    bytes_moved=2 * (n * k + rows * (n + k)),
                    flops=2 * rows * n * k,
                    seconds=seconds,
                )
                del weights
        _run_step(recorder, rows, seconds)
        _run_fused(recorder, rows, seconds)
    if not is_short:
        _run_prefill(recorder, seconds)


def _run_step(recorder: Recorder, rows: int, seconds: float) -> None:
    """One step's matmuls in order: every layer's four and the head, all weights their own."""
    case = f"8B, M={rows}"
    with recorder.case("matmuls of a step", case):
        layer = [SHAPES[name] for name in ("qkv", "o", "gate-up", "down")]
        sizes = [*layer * LAYERS, SHAPES["head"]]
        weights = [_random(n, k) for n, k in sizes]
        xs = {k: _random(rows, k) for _, k in sizes}

        def step(linear: Callable[..., Any]) -> None:
            for weight in weights:
                linear(xs[weight.shape[1]], weight)

        recorder.measure(
            "matmuls of a step",
            case,
            [partial(step, _LINEAR)],
            baselines={"cuBLAS": [partial(step, torch.nn.functional.linear)]},
            bytes_moved=sum(2 * n * k for n, k in sizes),
            seconds=seconds,
        )


def _run_fused(recorder: Recorder, rows: int, seconds: float) -> None:
    """Gate and residual in the matmul's epilogue."""
    n, k = SHAPES["gate-up"]
    case = f"gate-up + silu M={rows}"
    with recorder.case("matmul", case):
        x, weights = _random(rows, k), _weights(n, k)
        calls = _on_each(partial(_LINEAR, activation="silu_mul"), x, weights)
        recorder.measure("matmul", case, calls, bytes_moved=2 * n * k, seconds=seconds)
        del weights, calls
    n, k = SHAPES["down"]
    case = f"down + residual M={rows}"
    with recorder.case("matmul", case):
        x, weights, residual = _random(rows, k), _weights(n, k), _random(rows, n)
        calls = _on_each(partial(_LINEAR, residual=residual), x, weights)
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
