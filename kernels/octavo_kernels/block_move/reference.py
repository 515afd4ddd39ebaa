"""Moves between caches and slots in plain torch. Knows block numbers, not what blocks hold.

A slot is one block of every cache, one after the other, as 64-bit words. Its sum is that of all
words, each with its halves mixed and times an odd number of its place, mod 2^64: any single wrong
word changes it for certain, anything else but for one case in 2^64 or so. It is the same in
whatever order it is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WORD_BYTES = 8
# The odd number of word i is (i + 1) * GOLDEN, its halves mixed, with the last bit set.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
LOW_HALF = 0xFFFFFFFF


def block_words(cache: Tensor) -> int:
    """Words of a cache's block. Raises ValueError for a cache that cannot be moved in words."""
    num_bytes = cache.numel() // cache.shape[0] * cache.element_size()
    if num_bytes % WORD_BYTES or not cache.is_contiguous():
        raise ValueError(
            f"caches must be contiguous, their blocks of a multiple of {WORD_BYTES} bytes, "
            f"got {tuple(cache.shape)} of {cache.dtype}"
        )
    return num_bytes // WORD_BYTES


def slot_words(caches: Sequence[Tensor]) -> int:
    """Words of a slot. Raises ValueError as `block_words`."""
    return sum(block_words(cache) for cache in caches)


def _mixed(words: Tensor) -> Tensor:
    """A one-to-one map: the low half also depends on the high one, so that no bit is top in all
    its products."""
    return words ^ ((words >> 32) & LOW_HALF)


def block_move_reference(
    caches: Sequence[Tensor], *, slots: Sequence[Tensor] | Tensor, moves: Tensor, to_slots: bool
) -> Tensor:
    """See `block_move`."""
    weights = _mixed(torch.arange(1, slot_words(caches) + 1) * GOLDEN) | 1
    sums = []
    for block, slot, tag in moves.tolist():
        at = 0
        for cache in caches:
            words = cache[block].view(-1).view(torch.int64)
            part = slots[slot][at : at + len(words)]
            target, source = (part, words) if to_slots else (words, part)
            target.copy_(source)
            at += len(words)
        total = int((_mixed(slots[slot]) * weights).sum()) + tag
        sums.append((total + 2**63) % 2**64 - 2**63)
    return torch.tensor(sums, dtype=torch.int64)
