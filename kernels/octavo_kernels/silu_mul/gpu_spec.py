"""What tests and benchmarks need to know of the gated activations on a GPU; runs nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from octavo_kernels.op import Case, OpSpec, Tol
from octavo_kernels.silu_mul.gpu import gelu_mul, gelu_tanh_mul, silu_mul
from octavo_kernels.silu_mul.reference import (
    gelu_mul_reference,
    gelu_tanh_mul_reference,
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


def _torch_gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def _torch_gelu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate) * up


def _spec(
    op: Callable[..., Any], reference: Callable[..., Any], baseline: Callable[..., Any]
) -> OpSpec:
    sizes = [(0, 64, 1), (1, 1, 1), (1, 64, 60), (3, 100, 1), (13, 1536, 3), (30, 47, 1)]
    sizes += [(2, 2500, 1)]
    return OpSpec(
        name=op.__name__,
        op=op,
        reference=reference,
        cases=tuple(Case(f"{t}x{f}", T=t, F=f, spread=s) for t, f, s in sizes),
        make_inputs=make_inputs,
        tolerance={
            # 1 + erf cancels, and the exponential's argument is rounded
            torch.float32: Tol(atol=4e-6, rtol=1e-5),
            # the interpreter truncates to bfloat16
            torch.bfloat16: Tol(atol=4e-6, rtol=8e-3),
            torch.float16: Tol(atol=4e-6, rtol=6e-4),
        },
        devices=("cuda",),
        takes_out=True,
        rows=("x",),
        bytes_moved=lambda case, itemsize: 3 * case.T * case.F * itemsize,
        baselines={"torch": baseline},
        bench_cases=tuple(
            Case(f"T{t}xF{f}", T=t, F=f, spread=1)
            for f in (3072, 14336)
            for t in (1, 16, 64, 256, 4096)
        ),
    )


SPECS = (
    _spec(silu_mul, silu_mul_reference, _torch_silu),
    _spec(gelu_tanh_mul, gelu_tanh_mul_reference, _torch_gelu_tanh),
    _spec(gelu_mul, gelu_mul_reference, _torch_gelu),
)
