"""What tests and benchmarks need to know of block_copy; runs nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from octavo_kernels.block_copy import block_copy, block_copy_reference
from octavo_kernels.op import Case, OpSpec, Tol


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    shapes = [(case.B, 2, case.width, 3), (case.B, case.width)]
    blocks = torch.randint(case.B, (2, case.n), generator=generator)
    return {
        "caches": [torch.randn(*s, generator=generator).to(device, dtype) for s in shapes],
        "src": blocks[0],
        "dst": blocks[1],
    }


def _copy(caches: list[Tensor], *, src: Tensor, dst: Tensor) -> tuple[Tensor, ...]:
    block_copy(caches, src=src, dst=dst)
    return tuple(caches)


def _reference(caches: list[Tensor], *, src: Tensor, dst: Tensor) -> tuple[Tensor, ...]:
    block_copy_reference(caches, src=src, dst=dst)
    return tuple(caches)


def _torch(caches: list[Tensor], *, src: Tensor, dst: Tensor) -> None:
    for cache in caches:
        cache[dst] = cache[src]


SPEC = OpSpec(
    name="block_copy",
    op=_copy,
    reference=_reference,
    cases=(
        Case("none", B=4, width=16, n=0),
        Case("one", B=2, width=1, n=1),
        Case("chain", B=5, width=33, n=40),
        Case("long", B=40, width=20000, n=9),
    ),
    make_inputs=make_inputs,
    tolerance={dtype: Tol(0.0, 0.0) for dtype in (torch.float32, torch.bfloat16, torch.float16)},
    mutated=("caches",),
    bytes_moved=lambda case, itemsize: 2.0 * 7 * case.width * case.n * itemsize,
    baselines={"torch": _torch},
    bench_cases=tuple(Case(f"n{n}", B=256, width=3072, n=n) for n in (1, 16, 128)),
)
