"""Moves whole cache blocks to and from host memory, on the GPU's stream. Knows block and slot
numbers, not requests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo_kernels.block_move.gpu_kernel import move_blocks
from octavo_kernels.block_move.reference import WORD_BYTES, block_words
from octavo_kernels.launch import launch

_VECTOR_BYTES = 16
_CHUNK = 1024  # words


def addresses_of(tensors: Sequence[Tensor], *, device: torch.device | str) -> Tensor:
    """[n] int64 on the device: where the tensors start. Waits for the device: not for a step."""
    starts = [0 if tensor.is_meta else tensor.data_ptr() for tensor in tensors]
    return torch.tensor(starts, dtype=torch.int64, device=device)


def block_move(
    caches: Sequence[Tensor],
    *,
    cache_addresses: Tensor,
    slot_addresses: Tensor,
    moves: Tensor,
    to_slots: bool,
) -> Tensor:
    """Moves blocks into slots or, if not ``to_slots``, back: for each move its block of every
    cache, one after the other. Returns [n] int64: the sum of what was moved (see `reference`)
    plus the move's tag, mod 2^64.

    caches: tensors [B, ...] of one size, contiguous; cache_addresses: [C] int64, `addresses_of`
    them. slot_addresses: [S] int64, slots of C blocks each in memory that the GPU can reach: pinned
    memory of the host, which the kernel reads and writes across the bus. All starts are multiples
    of 16 bytes. moves: [n, 3] int64 of block, slot and tag; no block and no slot twice; a move with
    a number outside is skipped, with sum 0. Nothing is read by the host. Raises ValueError for what
    does not fit otherwise.
    """
    sizes = {(cache.shape[0], block_words(cache)) for cache in caches}
    if len(sizes) > 1 or cache_addresses.shape != (len(caches),):
        raise ValueError(
            f"caches must be of one size, with an address each, got {sorted(sizes)} and "
            f"{tuple(cache_addresses.shape)}"
        )
    ((num_blocks, words),) = sizes
    if moves.dtype != torch.int64 or moves.dim() != 2 or moves.shape[1] != 3:
        raise ValueError(f"moves must be [n, 3] int64, got {tuple(moves.shape)} {moves.dtype}")
    sums = torch.zeros(moves.shape[0], dtype=torch.int64, device=moves.device)
    chunk = min(1 << (words - 1).bit_length(), _CHUNK)
    launch(
        move_blocks,
        (moves.shape[0] * len(caches) * -(-words // chunk),),
        cache_addresses,
        slot_addresses,
        moves.contiguous(),
        sums,
        len(caches),
        num_blocks,
        slot_addresses.shape[0],
        TO_SLOTS=to_slots,
        BLOCK_WORDS=words,
        CHUNK=chunk,
        ALIGNMENT=_VECTOR_BYTES if words % 2 == 0 else WORD_BYTES,
        num_warps=4,
    )
    return sums
