"""What tests and benchmarks need to know of likeliest; runs nothing."""

from __future__ import annotations

from typing import Any

import torch

from octavo_kernels.likeliest import likeliest, likeliest_reference
from octavo_kernels.op import Case, OpSpec, Tol


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    logits = 4 * torch.randn(case.S, case.V, generator=generator) + case.shift
    return {
        "logits": logits.to(device, dtype),
        "places": torch.zeros(case.S, dtype=torch.int32, device=device),
        "probs": torch.zeros(case.S, dtype=dtype, device=device),
    }


SPEC = OpSpec(
    name="likeliest",
    op=likeliest,
    reference=likeliest_reference,
    cases=tuple(
        Case(f"{s}x{v}", S=s, V=v, shift=shift)
        for s, v, shift in (
            (0, 5, 0),
            (1, 1, -9),
            (1, 15, -50),
            (2, 16, 0),
            (3, 33, -99),
            (5, 300, 7),
            (17, 8192, 0),
        )
    ),
    make_inputs=make_inputs,
    tolerance={torch.float32: Tol(1e-6, 1e-5)},
    mutated=("places", "probs"),
    rows=("logits", "places", "probs"),
    bytes_moved=lambda case, itemsize: 1.0 * case.S * case.V * itemsize,
    baselines={"torch": likeliest_reference},
    bench_cases=tuple(Case(f"S{s}", S=s, V=8192, shift=0) for s in (1, 4, 16)),
)
