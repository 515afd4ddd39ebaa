"""Moves blocks between many buffers of a GPU and slots of the host. Knows nothing of what they
hold."""

from __future__ import annotations

import triton
import triton.language as tl

from octavo_kernels.block_move.reference import GOLDEN, LOW_HALF
from octavo_kernels.launch import jit

_GOLDEN = tl.constexpr(GOLDEN)
_LOW_HALF = tl.constexpr(LOW_HALF)


@triton.jit
def _mixed(words):
    return words ^ ((words >> 32) & _LOW_HALF)


@jit
def move_blocks(
    caches_ptr,  # [C] int64 addresses of [B, BLOCK_WORDS] int64
    slots_ptr,  # [S] int64 addresses of [C * BLOCK_WORDS] int64
    moves,  # [n, 3] int64: block, slot, tag; not "_ptr": loads come behind saves, anywhere
    sums_ptr,  # [n] int64, 0 before
    num_caches,  # C
    num_blocks,  # B
    num_slots,  # S
    TO_SLOTS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # bytes that every cache and slot starts at a multiple of
):
    # grid: (n * C * cdiv(BLOCK_WORDS, CHUNK),); one program moves one chunk of one block
    PARTS: tl.constexpr = (BLOCK_WORDS + CHUNK - 1) // CHUNK
    program = tl.program_id(0)
    move = (program // PARTS // num_caches).to(tl.int64)
    cache = (program // PARTS % num_caches).to(tl.int64)
    block = tl.load(moves + move * 3)
    slot = tl.load(moves + move * 3 + 1)
    cols = program % PARTS * CHUNK + tl.arange(0, CHUNK)
    mask = cols < BLOCK_WORDS
    if (block >= 0) & (block < num_blocks) & (slot >= 0) & (slot < num_slots):
        there = tl.load(caches_ptr + cache).to(tl.pointer_type(tl.int64))
        on_gpu = tl.multiple_of(there, ALIGNMENT) + block * BLOCK_WORDS + cols
        there = tl.load(slots_ptr + slot).to(tl.pointer_type(tl.int64))
        place = cache * BLOCK_WORDS + cols  # [CHUNK] int64, in the slot
        on_host = tl.multiple_of(there, ALIGNMENT) + place
        if TO_SLOTS:
            words = tl.load(on_gpu, mask=mask, other=0)
            tl.store(on_host, words, mask=mask)
        else:
            words = tl.load(on_host, mask=mask, other=0)
            tl.store(on_gpu, words, mask=mask)
        weights = _mixed((place + 1) * _GOLDEN) | 1
        total = tl.sum(tl.where(mask, _mixed(words) * weights, 0))
        if program % (PARTS * num_caches) == 0:
            total += tl.load(moves + move * 3 + 2)
        # In whatever order they come, integers wrap the same way; and nobody waits for the bus.
        tl.atomic_add(sums_ptr + move, total, sem="relaxed")
