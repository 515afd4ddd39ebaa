"""Moves blocks between several buffers and slots, and sums their bits. Knows nothing of what they
hold."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from octavo_kernels.block_move.reference import GOLDEN, LOW_HALF
from octavo_kernels.parallel import kernel
from octavo_kernels.simd import get_i64, put_i64


@kernel
def move_blocks(part, num_parts, caches, num_caches, slots, slot_words, moves, count, way, sums):
    """caches [C, 2]: address and words of a block; moves [n, 3]: block, slot, tag; sums [n].
    way 1 is to the slots, 0 back. A move is one part's alone."""
    for move in range(part, count, num_parts):
        block, slot = get_i64(moves + 24 * move), get_i64(moves + 24 * move + 8)
        total = get_i64(moves + 24 * move + 16)
        in_slot = slots + slot * slot_words * 8
        weight = 0
        for cache in range(num_caches):
            words = get_i64(caches + 16 * cache + 8)
            in_cache = get_i64(caches + 16 * cache) + block * words * 8
            source = in_cache if way == 1 else in_slot
            target = in_slot if way == 1 else in_cache
            for i in range(words):
                word = get_i64(source + 8 * i)
                put_i64(target + 8 * i, word)
                weight += GOLDEN
                odd = (weight ^ ((weight >> 32) & LOW_HALF)) | 1
                total += (word ^ ((word >> 32) & LOW_HALF)) * odd
            in_slot += words * 8
        put_i64(sums + 8 * move, total)
