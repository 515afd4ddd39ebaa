"""Moves between caches and slots in plain torch. Knows block numbers, not what blocks hold.

A slot is one block of every cache, one after the other, as 64-bit words. Its sum is that of all
words, each with its halves mixed and times an odd number of its place, mod 2^64: any single wrong
word changes it for certain, anything else but for one case in 2^64 or so. It is of the same bits
in whatever order it is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WORD_BYTES = 8
# The odd number of word i is (i + 1) * GOLDEN, its halves mixed, with the last bit set.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
LOW_HALF = 0xFFFFFFFF


def slot_words(caches: Sequence[Tensor]) -> int:
    """Words of a slot. Raises ValueError for a cache that cannot be moved in words."""
    total = 0
    for cache in caches:
        num_bytes = cache[0].numel() * cache.element_size()
        if num_bytes % WORD_BYTES or not cache.is_contiguous():
            raise ValueError(
                f"caches must be contiguous, their blocks of a multiple of {WORD_BYTES} bytes, "
                f"got {tuple(cache.shape)} of {cache.dtype}"
            )
        total += num_bytes // WORD_BYTES
    return total


def word_weights(num_words: int) -> Tensor:
    """[num_words] int64, all odd."""
    weights = torch.arange(1, num_words + 1, dtype=torch.int64) * GOLDEN
    return _mixed(weights) | 1


def _mixed(words: Tensor) -> Tensor:
    """A one-to-one map: the low half also depends on the high one, so that no bit is top in all
    its products."""
    return words ^ ((words >> 32) & LOW_HALF)


def slot_sum(slot: Tensor, *, weights: Tensor) -> int:
    """The sum of a slot [W] int64, as an int64; ``weights`` are `word_weights` of W."""
    return int((_mixed(slot) * weights).sum())


def save_block(caches: Sequence[Tensor], *, block: int, slot: Tensor) -> None:
    """Copies a block of every cache [B, ...] into ``slot`` [W] int64."""
    for part, words in _parts(caches, block, slot):
        words.copy_(part)


def load_block(caches: Sequence[Tensor], *, block: int, slot: Tensor) -> None:
    """Copies ``slot`` [W] int64 into a block of every cache [B, ...]."""
    for part, words in _parts(caches, block, slot):
        part.copy_(words)


def _parts(caches: Sequence[Tensor], block: int, slot: Tensor) -> list[tuple[Tensor, Tensor]]:
    parts, at = [], 0
    for cache in caches:
        words = cache[block].view(-1).view(torch.int64)
        parts.append((words, slot[at : at + len(words)]))
        at += len(words)
    return parts


def block_move_reference(
    caches: Sequence[Tensor], *, slots: Sequence[Tensor], moves: Tensor, to_slots: bool
) -> Tensor:
    """See `block_move.gpu.block_move`; ``slots`` are the slots themselves."""
    weights = word_weights(slot_words(caches))
    sums = []
    for block, slot, tag in moves.tolist():
        move = save_block if to_slots else load_block
        move(caches, block=block, slot=slots[slot])
        total = (slot_sum(slots[slot], weights=weights) + tag + 2**63) % 2**64 - 2**63
        sums.append(total)
    return torch.tensor(sums, dtype=torch.int64)
