"""What tests and benchmarks need to know of block_copy on a GPU; runs nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from octavo_kernels.block_copy.gpu import block_copy
from octavo_kernels.block_copy.reference import block_copy_reference
from octavo_kernels.op import Case, OpSpec, Tol


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    shapes = [(case.B, 2, case.width, 3), (case.B, case.width), (case.B, 2, case.width, 3)]
    blocks = torch.randperm(case.B, generator=generator)[: 2 * case.n]
    index = torch.int32 if case.n % 2 else torch.int64
    return {
        "caches": [torch.randn(*s, generator=generator).to(device, dtype) for s in shapes],
        "src": blocks[: case.n].to(device, index),
        "dst": blocks[case.n :].to(device, index),
    }


def _copy(caches: list[Tensor], *, src: Tensor, dst: Tensor) -> tuple[Tensor, ...]:
    block_copy(caches, src=src, dst=dst)
    return tuple(caches)


def _reference(caches: list[Tensor], *, src: Tensor, dst: Tensor) -> tuple[Tensor, ...]:
    block_copy_reference(caches, src=src, dst=dst)
    return tuple(caches)


def _torch(caches: list[Tensor], *, src: Tensor, dst: Tensor) -> None:
    for cache in caches:
        cache[dst.long()] = cache[src.long()]


SPEC = OpSpec(
    name="block_copy",
    op=_copy,
    reference=_reference,
    cases=(
        Case("none", B=4, width=16, n=0),
        Case("one", B=2, width=1, n=1),
        Case("odd", B=24, width=33, n=12),
        Case("long", B=5, width=3000, n=2),
        Case("wide", B=7, width=64, n=3),
    ),
    make_inputs=make_inputs,
    tolerance={dtype: Tol(0.0, 0.0) for dtype in (torch.float32, torch.bfloat16, torch.float16)},
    devices=("cuda",),
    mutated=("caches",),
    bytes_moved=lambda case, itemsize: 2.0 * 13 * case.width * case.n * itemsize,
    baselines={"torch": _torch},
    bench_cases=tuple(Case(f"n{n}", B=256, width=16384, n=n) for n in (1, 16, 128)),
)
