"""What tests and benchmarks need to know of block_move; runs nothing."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from octavo_kernels.block_move.gpu import block_move
from octavo_kernels.block_move.reference import block_move_reference
from octavo_kernels.op import Case, OpSpec, Tol


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    """C caches of B blocks, S slots and n moves; any bits, every block and slot at most once."""
    words = case.width

    def bits(*shape: int) -> Tensor:
        return torch.randint(-(2**62), 2**62, shape, generator=generator)

    def on_host(words: Tensor) -> Tensor:
        return words.pin_memory() if device.type == "cuda" else words

    blocks = torch.randperm(case.B, generator=generator)[: case.n]
    slots = torch.randperm(case.S, generator=generator)[: case.n]
    tags = torch.randint(-(2**62), 2**62, (case.n,), generator=generator)
    return {
        "caches": [bits(case.B, 2, words // 2).to(device) for _ in range(case.C)],
        "slots": [on_host(bits(case.C * words)) for _ in range(case.S)],
        "moves": torch.stack([blocks, slots, tags], dim=1).to(device),
        "to_slots": case.way == "save",
    }


@functools.cache
def _addresses(starts: tuple[int, ...], device: str) -> Tensor:
    """As `gpu.addresses_of`, and made once: a benchmark captures the calls that follow."""
    return torch.tensor(starts, dtype=torch.int64, device=device)


def _move(caches: list[Tensor], *, slots: list[Tensor], moves: Tensor, to_slots: bool) -> Tensor:
    return block_move(
        caches,
        cache_addresses=_addresses(tuple(map(Tensor.data_ptr, caches)), str(moves.device)),
        slot_addresses=_addresses(tuple(map(Tensor.data_ptr, slots)), str(moves.device)),
        moves=moves,
        to_slots=to_slots,
    )


def _reference(
    caches: list[Tensor], *, slots: list[Tensor], moves: Tensor, to_slots: bool
) -> Tensor:
    return block_move_reference(caches, slots=slots, moves=moves, to_slots=to_slots).to(
        moves.device
    )


def _bytes(case: Case, itemsize: int) -> float:
    return float(2 * 8 * case.width * case.C * case.n)


SPEC = OpSpec(
    name="block_move",
    op=_move,
    reference=_reference,
    cases=tuple(
        Case(f"{name}-{way}", way=way, **sizes)
        for way in ("save", "load")
        for name, sizes in (
            ("none", {"B": 2, "S": 2, "C": 2, "width": 8, "n": 0}),
            ("odd", {"B": 9, "S": 5, "C": 4, "width": 34, "n": 4}),
            ("long", {"B": 3, "S": 3, "C": 2, "width": 1500, "n": 2}),
        )
    ),
    make_inputs=make_inputs,
    tolerance={torch.float32: Tol(0.0, 0.0)},  # of bits, whatever they stand for
    devices=("cuda",),
    mutated=("caches", "slots"),
    bytes_moved=_bytes,
    bench_cases=tuple(
        Case(f"{way}-n{n}", way=way, B=64, S=64, C=64, width=4096, n=n)
        for way in ("save", "load")
        for n in (1, 16)
    ),
)
