"""What tests and benchmarks need to know of the gated activations; runs nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from octavo_kernels.op import Case, OpSpec, Tol
from octavo_kernels.silu_mul import (
    gelu_tanh_mul,
    gelu_tanh_mul_reference,
    silu_mul,
    silu_mul_reference,
)


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    # wide enough that the exponential meets both of its ends
    x = torch.randn(case.T, 2 * case.F, generator=generator) * case.spread
    return {"x": x.to(device, dtype)}


def _torch_silu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _torch_gelu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def _spec(
    op: Callable[..., Any], reference: Callable[..., Any], baseline: Callable[..., Any]
) -> OpSpec:
    sizes = [(0, 64, 1), (1, 1, 1), (1, 64, 60), (3, 100, 1), (63, 1536, 3), (200, 47, 1)]
    return OpSpec(
        name=op.__name__,
        op=op,
        reference=reference,
        cases=tuple(Case(f"{t}x{f}", T=t, F=f, spread=s) for t, f, s in sizes),
        make_inputs=make_inputs,
        tolerance={torch.float32: Tol(atol=2e-6, rtol=3e-6)},
        takes_out=True,
        rows=("x",),
        bytes_moved=lambda case, itemsize: 3 * case.T * case.F * itemsize,
        baselines={"torch": baseline},
        bench_cases=tuple(Case(f"T{t}", T=t, F=1536, spread=1) for t in (1, 16, 128, 512, 4096)),
    )


SPECS = (
    _spec(silu_mul, silu_mul_reference, _torch_silu),
    _spec(gelu_tanh_mul, gelu_tanh_mul_reference, _torch_gelu),
)
