"""What tests and benchmarks need to know of row_copy; runs nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from octavo_kernels.op import Case, OpSpec, Tol
from octavo_kernels.row_copy import row_copy, row_copy_reference


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    def rows() -> Tensor:
        wide = torch.randn(case.T, case.D + case.apart, generator=generator)
        return wide.to(device, dtype)[:, : case.D]

    return {"x": rows(), "out": rows()}


SPEC = OpSpec(
    name="row_copy",
    op=row_copy,
    reference=row_copy_reference,
    cases=tuple(
        Case(f"{t}x{d}", T=t, D=d, apart=apart)
        for t, d, apart in ((0, 8, 0), (1, 1, 0), (1, 576, 64), (5, 33, 0), (130, 576, 1152))
    ),
    make_inputs=make_inputs,
    tolerance={torch.float32: Tol(0.0, 0.0)},
    mutated=("out",),
    bytes_moved=lambda case, itemsize: 2.0 * case.T * case.D * itemsize,
    baselines={"torch": row_copy_reference},
    bench_cases=tuple(Case(f"T{t}", T=t, D=576, apart=1152) for t in (1, 16, 256)),
)
