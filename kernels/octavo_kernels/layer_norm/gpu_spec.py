"""What tests and benchmarks need to know of layer_norm on a GPU; runs nothing."""

from __future__ import annotations

from typing import Any

import torch

from octavo_kernels.layer_norm.gpu import layer_norm
from octavo_kernels.layer_norm.reference import layer_norm_reference
from octavo_kernels.op import Case, OpSpec, Tol


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    inputs = {"x": normal(case.T, case.D) + 2, "weight": normal(case.D), "eps": 1e-5}
    if case.D != 100:
        inputs["bias"] = normal(case.D)
    if case.residual:
        inputs["residual"] = normal(case.T, case.D)
    return inputs


def _torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    if residual is not None:
        x = residual.add_(x)
    return torch.nn.functional.layer_norm(x, (x.shape[1],), weight, bias, eps)


def _spec(name: str, residual: int) -> OpSpec:
    sizes = [(0, 64), (1, 2), (1, 64), (19, 100), (37, 15), (3, 768), (2, 1500), (2, 4096)]
    return OpSpec(
        name=name,
        op=layer_norm,
        reference=layer_norm_reference,
        cases=tuple(Case(f"{t}x{d}", T=t, D=d, residual=residual) for t, d in sizes),
        make_inputs=make_inputs,
        tolerance={
            torch.float32: Tol(atol=2e-5, rtol=1e-5),
            # The interpreter truncates to bfloat16. A rounded sum, some units large, moves a
            # difference to the mean by its last place, whatever is left of the difference.
            torch.bfloat16: Tol(atol=2e-5 + 0.15 * residual, rtol=1.6e-2),
            torch.float16: Tol(atol=2e-5 + 0.012 * residual, rtol=1.2e-3),
        },
        devices=("cuda",),
        takes_out=True,
        mutated=("residual",) if residual else (),
        rows=("x", "residual") if residual else ("x",),
        bytes_moved=lambda case, itemsize: (2 + 2 * case.residual) * case.T * case.D * itemsize,
        baselines={"torch": _torch},
        bench_cases=tuple(
            Case(f"T{t}xD{d}", T=t, D=d, residual=residual)
            for d in (768, 4096)
            for t in (1, 64, 4096)
        ),
    )


SPECS = (_spec("layer_norm", 0), _spec("layer_norm_residual", 1))
