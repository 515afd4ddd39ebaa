"""What tests and benchmarks need to know of block_move; runs nothing."""

from __future__ import annotations

from typing import Any

import torch

from octavo_kernels.block_move import block_move, block_move_reference
from octavo_kernels.op import Case, OpSpec, Tol


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    """C caches of B blocks, every other of them twice as wide, S slots and n moves; any bits."""
    widths = [case.width * (1 + index % 2) for index in range(case.C)]
    shapes = [(case.B, width, 2) for width in widths] + [(case.S, 2 * sum(widths))]
    bits = [torch.randint(-(2**62), 2**62, s, generator=generator).to(device) for s in shapes]
    blocks = torch.randperm(case.B, generator=generator)[: case.n]
    slots = torch.randperm(case.S, generator=generator)[: case.n]
    tags = torch.randint(-(2**62), 2**62, (case.n,), generator=generator)
    return {
        "caches": bits[:-1],
        "slots": bits[-1],
        "moves": torch.stack([blocks, slots, tags], dim=1).to(device),
        "to_slots": case.way == "save",
    }


def _bytes(case: Case, itemsize: int) -> float:
    return float(2 * 8 * 3 * case.width * case.C * case.n)


SPEC = OpSpec(
    name="block_move",
    op=block_move,
    reference=block_move_reference,
    cases=tuple(
        Case(f"{name}-{way}", way=way, **sizes)
        for way in ("save", "load")
        for name, sizes in (
            ("none", {"B": 2, "S": 2, "C": 2, "width": 8, "n": 0}),
            ("odd", {"B": 9, "S": 5, "C": 3, "width": 33, "n": 4}),
            ("long", {"B": 3, "S": 40, "C": 2, "width": 1500, "n": 3}),
        )
    ),
    make_inputs=make_inputs,
    tolerance={torch.float32: Tol(0.0, 0.0)},  # of bits, whatever they stand for
    mutated=("caches", "slots"),
    bytes_moved=_bytes,
    bench_cases=tuple(
        Case(f"{way}-n{n}", way=way, B=64, S=64, C=60, width=512, n=n)
        for way in ("save", "load")
        for n in (1, 16)
    ),
)
