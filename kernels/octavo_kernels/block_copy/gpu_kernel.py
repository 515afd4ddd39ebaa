"""Copies equal-sized blocks within many buffers of a GPU. Knows nothing of what they hold."""

from __future__ import annotations

import triton.language as tl

from octavo_kernels.launch import jit


@jit
def copy_blocks(
    caches_ptr,  # [C] int64 addresses of [B, BLOCK_UNITS] units
    src,  # [n] integers; not "_ptr": their alignment decides nothing
    dst,  # [n] integers
    num_pairs,  # n
    num_blocks,  # B
    UNIT: tl.constexpr,  # the integer type that blocks are a multiple of
    BLOCK_UNITS: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # bytes that every cache starts at a multiple of
):
    # grid: (C * n * cdiv(BLOCK_UNITS, CHUNK),); one program copies one chunk of one block
    PARTS: tl.constexpr = (BLOCK_UNITS + CHUNK - 1) // CHUNK
    program = tl.program_id(0)
    pair = program // PARTS % num_pairs
    source = tl.load(src + pair).to(tl.int64)
    target = tl.load(dst + pair).to(tl.int64)
    cols = program % PARTS * CHUNK + tl.arange(0, CHUNK)
    mask = cols < BLOCK_UNITS
    address = tl.load(caches_ptr + program // PARTS // num_pairs)
    cache = tl.multiple_of(address.to(tl.pointer_type(UNIT)), ALIGNMENT)
    if (source >= 0) & (source < num_blocks) & (target >= 0) & (target < num_blocks):
        units = tl.load(cache + source * BLOCK_UNITS + cols, mask=mask)
        tl.store(cache + target * BLOCK_UNITS + cols, units, mask=mask)
