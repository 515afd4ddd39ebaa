"""The CPU matmul over panels of 4- and 8-bit blocks: which tile runs where.

Knows addresses, no tensors. Activations are records (`cpu_records`); a part of the matmul is a run
of panels, and a panel stays in the first-level cache while every chunk of rows meets it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba.core import types

from octavo_kernels.matmul.cpu import read_id, refuse_row
from octavo_kernels.parallel import Kernel, device, kernel
from octavo_kernels.quant_matmul.cpu_blocks_tile import (
    FORMATS,
    Kind,
    make_tiles,
    tile_height,
)
from octavo_kernels.quant_matmul.cpu_dot import CpuPath
from octavo_kernels.quant_matmul.cpu_records import (
    CHUNK_ROWS,
    block_quantiser,
    chunk_start,
    num_chunks,
    record_bytes,
    row_quantiser,
    stack_bytes,
)
from octavo_kernels.silu_mul.cpu import gate_gelu, gate_silu
from octavo_kernels.simd import (
    LANES,
    add,
    first_lanes,
    get_f16,
    get_i32,
    load_f32,
    load_f32_masked,
    put_f32,
    store_f32,
    store_f32_masked,
)
from octavo_kernels.vectors import F32, vector_op

# How far ahead of their sums tiles of fewer than _AHEAD_ROWS rows ask for weights: they wait for
# memory. Others have the time to ask for the panel after theirs.
_AHEAD_BYTES = 2560
_AHEAD_ROWS = 5
# The gate a matmul may end with; 0 is none.
SILU, GELU = 1, 2
_SUM_BYTES = 4 * LANES  # of a row in a tile's sums
_TILE_BYTES = CHUNK_ROWS * _SUM_BYTES  # of a tile's sums
# Of the sums of as many panels as a record takes. Behind them are those that they gate.
_SUMS_BYTES = max(form.block for form in FORMATS.values()) // LANES * _TILE_BYTES
_scratch = stack_bytes(2 * _SUMS_BYTES)
_quantise_32, _quantise_64 = block_quantiser(32), block_quantiser(64)


@vector_op(types.float32, types.int64)
def _to_f32(b: Any, a: Any) -> Any:
    return b.sitofp(a[0], F32)


@vector_op(types.float32, types.float32, types.float32, types.float32)
def _times_plus(b: Any, a: Any) -> Any:
    # The product of a half and a code of 8 bits is exact: fused or not is the same.
    return b.fadd(b.fmul(a[0], a[1]), a[2])


@device
def _rows_of_tile(left: int, most: int) -> int:
    """Of the next tile of a chunk with that many rows left, as even as can be."""
    return left if left <= most else left // ((left + most - 1) // most)


@device
def _gate(sums: int, panels: int, rows: int, gate: int) -> None:
    """sums = act(sums) * ups for some panels of a tile."""
    for panel in range(sums, sums + panels * _TILE_BYTES, _TILE_BYTES):
        for at in range(panel, panel + rows * _SUM_BYTES, _SUM_BYTES):
            value, up = load_f32(at), load_f32(at + _SUMS_BYTES)
            store_f32(at, gate_silu(value, up) if gate == SILU else gate_gelu(value, up))


@device
def _put(
    sums: int, stride: int, rows: int, row: int, column: int, n: int, out: int, bias: int, more: int
) -> None:
    """out = (sums + bias) + more over a tile at (row, column); either may be absent (address 0)."""
    mask = first_lanes(n - column)
    for r in range(rows):
        value, shift = load_f32(sums + r * stride), 4 * ((row + r) * n + column)
        if bias != 0:
            value = add(value, load_f32_masked(bias + 4 * column, mask))
        if more != 0:
            value = add(value, load_f32_masked(more + shift, mask))
        store_f32_masked(out + shift, value, mask)


@device
def _put_records(sums: int, rows: int, out: int, place: int, block: int, zero: int) -> None:
    """Quantises a tile's sums, those of a block, into records place.. of out."""
    to = out + place * (block + 8)
    for at in range(sums, sums + rows * _SUM_BYTES, _SUM_BYTES):
        if block == 32:
            _quantise_32(at, _TILE_BYTES, to, zero)
        else:
            _quantise_64(at, _TILE_BYTES, to, zero)
        to += block + 8


@cache
def _unit_runner(kind: Kind, path: CpuPath) -> Any:
    """Device function for a tile's rows and some panels side by side, and as many from `ups` on
    where that is not 0: the sums of a panel lie behind those of the one before it."""
    run_tile, piece_bytes = make_tiles(kind, path), FORMATS[kind].panel_bytes

    def run_unit(
        rows: int,
        at: int,
        x_stride: int,
        first: int,
        ups: int,
        panels: int,
        blocks: int,
        to: int,
        stride: int,
        ahead: int,
    ) -> None:
        # One place that calls: tiles are long to compile.
        for job in range(panels if ups == 0 else 2 * panels):
            is_up, which = (0, job) if ups == 0 else (job & 1, job >> 1)
            piece = (ups if is_up else first) + which * blocks * piece_bytes
            sums = to + which * _TILE_BYTES + is_up * _SUMS_BYTES
            run_tile(rows, at, x_stride, piece, blocks, sums, stride, ahead)

    run_unit.__qualname__ = f"run_unit_{kind}_{path}"
    return device(run_unit)


@cache
def matmul_kernel(kind: Kind, path: CpuPath) -> Kernel:
    """The matmul of records with panels of one kind, on one path; gated or not.

    With x (address 0 if records are ready) every part first makes records of its own, one behind
    the other: shorter than a launch that does it for all, where rows are few.
    With a gate (SILU or GELU, else 0) the panels hold G and then U, [n, K] each with n % 16 == 0,
    and out is act(x @ G^T) * (x @ U^T). With a gate and a next_block (else 0), n % next_block == 0
    and out are records of that, for weights of such blocks and of next_zero.
    """
    run_unit, tile_rows = _unit_runner(kind, path), tile_height(kind, path)
    form = FORMATS[kind]
    piece_bytes, zero, block = form.panel_bytes, form.zero, form.block
    quantise_rows, size = row_quantiser(block), record_bytes(block)

    def body(
        part: int,
        num_parts: int,
        x: int,
        records: int,
        w: int,
        out: int,
        bias: int,
        residual: int,
        num_rows: int,
        n: int,
        k: int,
        gate: int,
        next_block: int,
        next_zero: int,
    ) -> None:
        blocks = (k + block - 1) // block
        if x != 0:
            records += part * num_rows * blocks * size
            quantise_rows(x, records, num_rows, k, zero, 0, num_rows)
        num_panels, panel_bytes = (n + LANES - 1) // LANES, blocks * piece_bytes
        next_panel = _AHEAD_BYTES if num_rows < _AHEAD_ROWS else panel_bytes
        sums, chunks = _scratch(), num_chunks(num_rows)
        step = 1 if next_block == 0 else next_block // LANES
        units = num_panels // step
        for unit in range(part * units // num_parts, (part + 1) * units // num_parts):
            panel, start = unit * step, 0
            is_direct = gate == 0 and n - panel * LANES >= LANES
            for chunk in range(chunks):
                end = num_rows if chunks == 1 else chunk_start(chunk + 1, num_rows)
                row = start
                while row < end:
                    rows = _rows_of_tile(end - row, tile_rows)
                    at = records + (start * blocks + row - start) * size
                    spot, stride = sums, _SUM_BYTES
                    if is_direct:
                        spot, stride = out + 4 * (row * n + panel * LANES), 4 * n
                    # Once is enough, and in vain for later chunks costs a tenth of their time.
                    ahead = next_panel if row == 0 else 0
                    x_stride, piece = (end - start) * size, w + panel * panel_bytes
                    ups = 0 if gate == 0 else piece + num_panels * panel_bytes
                    run_unit(rows, at, x_stride, piece, ups, step, blocks, spot, stride, ahead)
                    if gate != 0:
                        _gate(sums, step, rows, gate)
                    if next_block != 0:
                        place = start * (n // next_block) + unit * (end - start) + row - start
                        _put_records(sums, rows, out, place, next_block, next_zero)
                    elif not is_direct or bias != 0 or residual != 0:
                        _put(spot, stride, rows, row, panel * LANES, n, out, bias, residual)
                    row += rows
                start = end

    body.__name__ = f"matmul_blocks_{kind}_{path}"
    return kernel(body)


@cache
def gather_kernel(kind: Kind) -> Kernel:
    """The kernel that reads rows back out of panels, exactly."""
    form = FORMATS[kind]
    code_bytes, piece_bytes, zero = form.code_bytes, form.panel_bytes, form.zero
    bits, has_min, block = form.bits, form.has_min, form.block
    codes_per_word, code_mask = 32 // bits, (1 << bits) - 1

    def body(
        part: int,
        num_parts: int,
        w: int,
        ids: int,
        id_stride: int,
        id_bytes: int,
        out: int,
        num_rows: int,
        n: int,
        k: int,
        status: int,
    ) -> None:
        blocks = (k + block - 1) // block
        for row in range(part * num_rows // num_parts, (part + 1) * num_rows // num_parts):
            wanted = read_id(ids + id_stride * row, id_bytes, n)
            if wanted < 0:
                refuse_row(out + 4 * row * k, k, status)
                continue
            source = w + wanted // LANES * blocks * piece_bytes
            lane = wanted % LANES
            for index in range(blocks):
                piece = source + index * piece_bytes
                scale = get_f16(piece + code_bytes + 2 * lane)
                least = np.float32(0.0)
                if has_min:
                    least = get_f16(piece + code_bytes + 2 * LANES + 2 * lane)
                left = min(block, k - index * block)
                at = out + 4 * (row * k + index * block)
                for word_index in range(block // codes_per_word):
                    word = get_i32(piece + 64 * word_index + 4 * lane)
                    for byte in range(4):
                        code = (word >> (8 * byte)) & code_mask
                        i = 4 * word_index + byte
                        if i < left:
                            value = _times_plus(scale, _to_f32(code - zero), least)
                            put_f32(at + 4 * i, value)
                        if bits == 4 and i + block // 2 < left:
                            code = (word >> (8 * byte + 4)) & code_mask
                            value = _times_plus(scale, _to_f32(code - zero), least)
                            put_f32(at + 4 * i + 2 * block, value)

    body.__name__ = f"gather_blocks_{kind}"
    return kernel(body)
