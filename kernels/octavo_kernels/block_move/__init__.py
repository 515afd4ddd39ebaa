"""Blocks of caches to and from slots of host memory, with sums over their bits. Knows block and
slot numbers, not requests.

Here on a CPU; `block_move.gpu` does the same for the caches of a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo_kernels import parallel
from octavo_kernels.block_move import cpu
from octavo_kernels.block_move.reference import block_move_reference, block_words, slot_words
from octavo_kernels.op import require_device

__all__ = ["block_move", "block_move_reference", "kernels", "slot_words", "warm"]


def block_move(caches: Sequence[Tensor], *, slots: Tensor, moves: Tensor, to_slots: bool) -> Tensor:
    """Moves blocks into slots or, if not ``to_slots``, back: for each move its block of every
    cache, one after the other. Returns [n] int64: the sum of what was moved (see `reference`) plus
    the move's tag, mod 2^64.

    caches: tensors [B, ...], contiguous; slots: [S, W] int64, W = `slot_words` (caches). moves:
    [n, 3] int64 of block, slot and tag; no block and no slot twice. Raises ValueError for what does
    not fit, before anything is written.
    """
    words = slot_words(caches)
    for tensor in (*caches, slots, moves):
        require_device("block_move", tensor)
    if slots.dtype != torch.int64 or slots.shape[1:] != (words,) or not slots.is_contiguous():
        raise ValueError(
            f"slots must be [S, {words}] int64, contiguous, got {tuple(slots.shape)} {slots.dtype}"
        )
    if moves.dtype != torch.int64 or moves.dim() != 2 or moves.shape[1] != 3:
        raise ValueError(f"moves must be [n, 3] int64, got {tuple(moves.shape)} {moves.dtype}")
    num_moves, moves = moves.shape[0], moves.contiguous()
    sums = torch.empty(num_moves, dtype=torch.int64)
    if num_moves == 0:
        return sums
    for column, limit in ((0, min(cache.shape[0] for cache in caches)), (1, slots.shape[0])):
        low, high = (int(bound) for bound in moves[:, column].aminmax())
        if low < 0 or high >= limit:
            raise ValueError(
                f"{('block', 'slot')[column]} numbers must be 0 to {limit - 1}, got {low} to {high}"
            )
    table = torch.tensor([(cache.data_ptr(), block_words(cache)) for cache in caches])
    cpu.move_blocks(
        min(num_moves, parallel.num_threads()),
        table.data_ptr(),
        len(caches),
        slots.data_ptr(),
        words,
        moves.data_ptr(),
        num_moves,
        int(to_slots),
        sums.data_ptr(),
    )
    return sums


def kernels() -> tuple[parallel.Kernel, ...]:
    """What a server with a host tier calls."""
    return (cpu.move_blocks,)


def warm() -> None:
    """Compile the kernel or load it from disk."""
    for kernel in kernels():
        assert kernel.address
