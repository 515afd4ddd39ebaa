"""What tests and benchmarks need to know of rms_norm on a GPU; runs nothing."""

from __future__ import annotations

from typing import Any

import torch

from octavo_kernels.op import Case, OpSpec, Tol
from octavo_kernels.rms_norm.gpu import rms_norm
from octavo_kernels.rms_norm.reference import rms_norm_reference


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    inputs = {"x": normal(case.T, case.D), "weight": normal(case.D), "eps": 1e-5}
    if case.residual:
        inputs["residual"] = normal(case.T, case.D)
    if case.D % 2 == 0:
        inputs["weight_offset"] = 1.0
    return inputs


def _torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    residual: torch.Tensor | None = None,
    weight_offset: float = 0.0,
) -> torch.Tensor:
    if residual is not None:
        x = residual.add_(x)
    return torch.nn.functional.rms_norm(x, (x.shape[1],), weight + weight_offset, eps)


def _spec(name: str, residual: int) -> OpSpec:
    sizes = [(0, 64), (1, 1), (1, 64), (19, 100), (37, 15), (3, 576), (2, 1500), (2, 4096)]
    return OpSpec(
        name=name,
        op=rms_norm,
        reference=rms_norm_reference,
        cases=tuple(Case(f"{t}x{d}", T=t, D=d, residual=residual) for t, d in sizes),
        make_inputs=make_inputs,
        tolerance={
            torch.float32: Tol(atol=3e-6, rtol=3e-6),
            # The interpreter truncates to bfloat16; with a residual both the sum and the result.
            torch.bfloat16: Tol(atol=1e-5, rtol=8e-3 * (1 + residual)),
            torch.float16: Tol(atol=1e-5, rtol=6e-4 * (1 + residual)),
        },
        devices=("cuda",),
        takes_out=True,
        mutated=("residual",) if residual else (),
        rows=("x", "residual") if residual else ("x",),
        bytes_moved=lambda case, itemsize: (2 + 2 * case.residual) * case.T * case.D * itemsize,
        baselines={"torch": _torch},
        bench_cases=tuple(
            Case(f"T{t}xD{d}", T=t, D=d, residual=residual)
            for d in (1024, 4096)
            for t in (1, 16, 64, 256, 4096)
        ),
    )


SPECS = (_spec("rms_norm", 0), _spec("rms_norm_residual", 1))
