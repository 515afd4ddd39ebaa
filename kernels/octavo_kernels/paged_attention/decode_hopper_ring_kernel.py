"""What feeds the Hopper decode kernel: units of a plan, rings of tiles, their copies by TMA.

A producer warp runs ahead of everything else, across the borders of units; a cache of e4m3 passes
through a warpgroup that widens it tile by tile. Knows nothing of attention's arithmetic.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)

from octavo_kernels.paged_attention.decode_kernel import _unit_tiles

LANES = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))  # of the producer warp
RENAMED = gl.constexpr(hasattr(tma, "async_load"))  # after Triton 3.6
copy_box = tma.async_load if RENAMED.value else tma.async_copy_global_to_shared


@gluon.jit
def _request(requests_ptr, row):
    """A row of `AttentionPlan.requests`."""
    at = requests_ptr + 8 * row
    return (
        gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3),
        gl.load(at + 4), gl.load(at + 5), gl.load(at + 6), gl.load(at + 7),
    )  # fmt: skip


@gluon.jit
def first_unit(programs_ptr, requests_ptr, step, last_program):
    """Where this program begins and how many tiles it has; it does those of `step` programs."""
    p = gl.program_id(0) * step
    program = programs_ptr + 4 * p
    row, head, part = gl.load(program), gl.load(program + 1), gl.load(program + 2)
    end = gl.load(programs_ptr + 4 * gl.minimum(p + step, last_program) + 3)
    todo = end - gl.load(program + 3)
    if todo <= 0:
        row = 0  # the row may not exist
    unit = _request(requests_ptr, row)
    return row, head, gl.where(part < 0, unit[5], part), todo, unit


@gluon.jit
def next_unit(requests_ptr, row, head, part, more, unit, K: gl.constexpr):
    """The unit after this one; where there is no `more`, numbers without meaning."""
    request, start, query_len, keys, first, own, stop, partial = unit
    part += 1
    if part >= stop:
        head += 1
        if head >= K:
            head = 0
            if more:
                row += 1
                request, start, query_len, keys, first, own, stop, partial = _request(
                    requests_ptr, row
                )
        part = own
    return row, head, part, (request, start, query_len, keys, first, own, stop, partial)


@gluon.jit
def wait(ring, count):
    """Waits until place `count` of a ring of barriers is full."""
    mbarrier.wait(ring.index(count % ring.shape[0]), (count // ring.shape[0]) & 1)


@gluon.jit
def wait_empty(ring, count):
    """Waits until what was in place `count` of a ring before has been taken."""
    mbarrier.wait(ring.index(count % ring.shape[0]), ((count // ring.shape[0]) & 1) ^ 1)


@gluon.jit
def arrive(ring, count):
    mbarrier.arrive(ring.index(count % ring.shape[0]))


@gluon.jit
def _block_numbers(table_ptr, table_stride, request, tile, keys, more, TILE: gl.constexpr,
                   BLOCK: gl.constexpr):  # fmt: skip
    """The numbers of a tile's blocks, lane i of a warp has block i's; -1 for one past the keys.

    In lanes, not in scalars, because those would be waited for where they are loaded.
    """
    lane = gl.arange(0, 32, LANES)
    block = tile * (TILE // BLOCK) + lane
    there = (lane < TILE // BLOCK) & (block * BLOCK < keys)
    table = table_ptr + request.to(gl.int64) * table_stride
    return gl.load(table + block, mask=there & more, other=-1)


@gluon.jit
def _copy_tile(desc, smem, full, empty, rows, count, BLOCK: gl.constexpr):
    """Copies tile number `count`, a block at a time: its cache rows from lane i's on."""
    STAGES: gl.constexpr = smem.shape[0]
    TILE: gl.constexpr = smem.shape[1]
    BYTES: gl.constexpr = TILE * smem.shape[2] * smem.dtype.primitive_bitwidth // 8
    wait_empty(empty, count)
    ready = full.index(count % STAGES)
    to = smem.index(count % STAGES)
    mbarrier.expect(ready, BYTES)
    for i in gl.static_range(TILE // BLOCK):
        copy_box(desc, [rows[i], 0], ready, to.slice(i * BLOCK, BLOCK))


@gluon.jit
def produce(k_desc, v_desc, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
             table_ptr, requests_ptr, programs_ptr, table_stride, step, last_program,
             K: gl.constexpr, BLOCK: gl.constexpr, PARTITION: gl.constexpr,
             WINDOW: gl.constexpr):  # fmt: skip
    """The producer warp: K and V tiles of this program's units; block numbers a tile ahead."""
    TILE: gl.constexpr = k_smem.shape[1]
    row, head, part, todo, unit = first_unit(programs_ptr, requests_ptr, step, last_program)
    tile, last = _unit_tiles(part, unit[2], unit[3], TILE, PARTITION, WINDOW)
    numbers = _block_numbers(table_ptr, table_stride, unit[0], tile, unit[3], todo > 0, TILE, BLOCK)
    for count in range(todo):
        # A negative row lies outside the cache, and what lies outside is copied as 0.
        lane_rows = (numbers * K + head) * BLOCK
        rows = ()
        for i in gl.static_range(TILE // BLOCK):
            rows = rows + (gl.sum(gl.where(gl.arange(0, 32, LANES) == i, lane_rows, 0), 0),)
        _copy_tile(k_desc, k_smem, k_full, k_empty, rows, count, BLOCK)
        _copy_tile(v_desc, v_smem, v_full, v_empty, rows, count, BLOCK)
        more = count + 1 < todo
        tile += 1
        if tile >= last:
            row, head, part, unit = next_unit(requests_ptr, row, head, part, more, unit, K)
            tile, last = _unit_tiles(part, unit[2], unit[3], TILE, PARTITION, WINDOW)
        numbers = _block_numbers(table_ptr, table_stride, unit[0], tile, unit[3], more, TILE, BLOCK)


@gluon.jit
def _widen_tile(codes, codes_full, codes_empty, smem, full, empty, count,
                LAYOUT: gl.constexpr):  # fmt: skip
    """e4m3 to 16 bits, exactly.

    A code with its sign extended, shifted to where exponent and mantissa belong; then a mask, and
    a power of two that makes up for the biases. NaN, which no cache holds, becomes 480.
    """
    wait(codes_full, count)
    x = codes.index(count % codes.shape[0]).load(LAYOUT)
    arrive(codes_empty, count)
    if smem.dtype == gl.bfloat16:
        ASM: gl.constexpr = """{ .reg .b32 t, p, z;
            mov.b32 p, 0x7B807B80; mov.b32 z, 0x80008000;
            prmt.b32 t, $2, 0, 0x9180; shl.b32 t, t, 4; and.b32 t, t, 0x87F087F0;
            fma.rn.bf16x2 $0, t, p, z;
            prmt.b32 t, $2, 0, 0xB3A2; shl.b32 t, t, 4; and.b32 t, t, 0x87F087F0;
            fma.rn.bf16x2 $1, t, p, z; }"""
    else:
        ASM: gl.constexpr = """{ .reg .b32 t, p, z;
            mov.b32 p, 0x5C005C00; mov.b32 z, 0x80008000;
            prmt.b32 t, $2, 0, 0x9180; shl.b32 t, t, 7; and.b32 t, t, 0xBF80BF80;
            fma.rn.f16x2 $0, t, p, z;
            prmt.b32 t, $2, 0, 0xB3A2; shl.b32 t, t, 7; and.b32 t, t, 0xBF80BF80;
            fma.rn.f16x2 $1, t, p, z; }"""
    wide = gl.inline_asm_elementwise(ASM, "=r,=r,r", [x], dtype=smem.dtype, is_pure=True, pack=4)
    wait_empty(empty, count)
    smem.index(count % smem.shape[0]).store(wide)
    fence_async_shared()
    arrive(full, count)


@gluon.jit
def widen(k_codes, v_codes, k_codes_full, k_codes_empty, v_codes_full, v_codes_empty,
           k_smem, v_smem, k_full, k_empty, v_full, v_empty, requests_ptr, programs_ptr, step,
           last_program):  # fmt: skip
    """The warpgroup that widens tiles on their way to the consumer."""
    H: gl.constexpr = k_smem.shape[2]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // H, H // 8], [4, 1], [1, 0])
    _, _, _, todo, _ = first_unit(programs_ptr, requests_ptr, step, last_program)
    for count in range(todo):
        _widen_tile(k_codes, k_codes_full, k_codes_empty, k_smem, k_full, k_empty, count, LAYOUT)
        _widen_tile(v_codes, v_codes_full, v_codes_empty, v_smem, v_full, v_empty, count, LAYOUT)


@gluon.jit
def ring_barriers(STAGES: gl.constexpr):
    """Barriers of a ring: full, empty."""
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    return full, empty
