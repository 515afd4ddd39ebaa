"""The CPU matmul over panels of 4- and 8-bit blocks: which tile runs where.

Knows addresses, no tensors. Activations are quantised by a launch of their own, into records laid
out tile by tile; a part of the matmul is a run of panels, and a panel stays in the first-level
cache while every tile of rows is computed from it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba.core import types

from octavo_kernels.matmul.cpu import add_extras, read_id, refuse_row
from octavo_kernels.parallel import Kernel, device, kernel
from octavo_kernels.quant_matmul.cpu_blocks_tile import (
    BLOCK,
    FORMATS,
    RECORD_BYTES,
    TILE_ROWS,
    Kind,
    make_quantiser,
    make_tiles,
)
from octavo_kernels.quant_matmul.cpu_dot import CpuPath
from octavo_kernels.silu_mul.cpu import gate_gelu, gate_silu
from octavo_kernels.simd import (
    LANES,
    first_lanes,
    get_f16,
    get_i32,
    load_f32,
    load_f32_masked,
    put_f32,
    store_f32,
)
from octavo_kernels.vectors import F32, vector_op

# How far ahead of their sums tiles of fewer than _AHEAD_ROWS rows ask for weights: they wait for
# memory. Others have the time to ask for the panel after theirs.
_AHEAD_BYTES = 2560
_AHEAD_ROWS = 5
# The gate a matmul may end with; 0 is none.
SILU, GELU = 1, 2


@vector_op(types.float32, types.int64)
def _to_f32(b: Any, a: Any) -> Any:
    return b.sitofp(a[0], F32)


@vector_op(types.float32, types.float32, types.float32, types.float32)
def _times_plus(b: Any, a: Any) -> Any:
    # The product of a half and a code of 8 bits is exact: fused or not is the same.
    return b.fadd(b.fmul(a[0], a[1]), a[2])


@device
def _gate(out: int, rows: int, out_stride: int, up: int, gate: int) -> None:
    """out = act(out) * up over one tile of 16 outputs; rows of up are dense."""
    for r in range(rows):
        at = out + r * out_stride
        value, other = load_f32(at), load_f32(up + r * 4 * LANES)
        store_f32(at, gate_silu(value, other) if gate == SILU else gate_gelu(value, other))


@cache
def _quantiser(zero: int, tile_rows: int) -> Any:
    """Device function that quantises rows first..end of [T, K] into [tile][block][row of tile]."""
    quantise = make_quantiser(zero)

    def run(x: int, records: int, num_rows: int, k: int, first: int, end: int) -> None:
        num_tiles = (num_rows + tile_rows - 1) // tile_rows
        blocks, left = (k + BLOCK - 1) // BLOCK, k % BLOCK
        tile, row, rows = 0, 0, num_rows // num_tiles
        for index in range(first, end):
            while index >= row + rows:
                tile += 1
                row = tile * num_rows // num_tiles
                rows = (tile + 1) * num_rows // num_tiles - row
            spot = records + (row * blocks + index - row) * RECORD_BYTES
            source = x + 4 * index * k
            for block in range(k // BLOCK):
                at = source + 4 * BLOCK * block
                quantise(load_f32(at), load_f32(at + 64), spot + block * rows * RECORD_BYTES)
            if left != 0:
                at = source + 4 * (k - left)
                low = load_f32_masked(at, first_lanes(left))
                high = load_f32_masked(at + 64, first_lanes(left - LANES))
                quantise(low, high, spot + (blocks - 1) * rows * RECORD_BYTES)

    run.__qualname__ = f"quantise_{zero}_{tile_rows}"
    return device(run)


@cache
def quantise_kernel(zero: int, tile_rows: int) -> Kernel:
    """Quantises rows [T, K] into records for weights of that zero and tiles of those rows."""
    quantise_rows = _quantiser(zero, tile_rows)

    def body(part: int, num_parts: int, x: int, records: int, num_rows: int, k: int) -> None:
        first, end = part * num_rows // num_parts, (part + 1) * num_rows // num_parts
        quantise_rows(x, records, num_rows, k, first, end)

    body.__name__ = f"quantise_blocks_{zero}_{tile_rows}"
    return kernel(body)


@cache
def matmul_kernel(kind: Kind, path: CpuPath) -> Kernel:
    """The matmul of records with panels of one kind, on one path; gated or not.

    With x (address 0 if records are ready) every part first makes records of its own, one behind
    the other: shorter than a launch that does it for all, where rows are few.
    With a gate (SILU or GELU, else 0) the panels hold G and then U, [n, K] each with n % 16 == 0,
    and out is act(x @ G^T) * (x @ U^T); `ups` has room for a tile of 16 outputs for each part.
    """
    run_tile = make_tiles(kind, path)
    tile_rows, piece_bytes = TILE_ROWS[path], FORMATS[kind].panel_bytes
    quantise_rows = _quantiser(FORMATS[kind].zero, tile_rows)

    def body(
        part: int,
        num_parts: int,
        x: int,
        records: int,
        w: int,
        out: int,
        bias: int,
        residual: int,
        ups: int,
        num_rows: int,
        n: int,
        k: int,
        gate: int,
    ) -> None:
        blocks = (k + BLOCK - 1) // BLOCK
        if x != 0:
            records += part * num_rows * blocks * RECORD_BYTES
            quantise_rows(x, records, num_rows, k, 0, num_rows)
        num_panels = (n + LANES - 1) // LANES
        num_tiles = (num_rows + tile_rows - 1) // tile_rows
        panel_bytes = blocks * piece_bytes
        ahead = _AHEAD_BYTES if num_rows < _AHEAD_ROWS else panel_bytes
        up = ups + part * tile_rows * 4 * LANES
        for panel in range(part * num_panels // num_parts, (part + 1) * num_panels // num_parts):
            columns = min(LANES, n - panel * LANES)
            offset = 4 * panel * LANES
            panel_w = w + panel * panel_bytes
            for tile in range(num_tiles):
                row = tile * num_rows // num_tiles
                rows = (tile + 1) * num_rows // num_tiles - row
                spot = out + offset + row * n * 4
                source = records + row * blocks * RECORD_BYTES
                to, stride = spot, n * 4
                # One place that calls: tiles are long to compile.
                for half in range(1 if gate == 0 else 2):
                    half_w = panel_w + half * num_panels * panel_bytes
                    run_tile(rows, source, half_w, blocks, to, stride, columns, ahead)
                    to, stride = up, 4 * LANES
                if gate != 0:
                    _gate(spot, rows, n * 4, up, gate)
                if bias != 0 or residual != 0:
                    left = bias + offset if bias != 0 else 0
                    right = residual + (spot - out) if residual != 0 else 0
                    add_extras(spot, rows, columns, n * 4, left, right)

    body.__name__ = f"matmul_blocks_{kind}_{path}"
    return kernel(body)


@cache
def gather_kernel(kind: Kind) -> Kernel:
    """The kernel that reads rows back out of panels, exactly."""
    form = FORMATS[kind]
    code_bytes, piece_bytes, zero = form.code_bytes, form.panel_bytes, form.zero
    bits, has_min = form.bits, form.has_min
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
        blocks = (k + BLOCK - 1) // BLOCK
        for row in range(part * num_rows // num_parts, (part + 1) * num_rows // num_parts):
            index = read_id(ids + id_stride * row, id_bytes, n)
            if index < 0:
                refuse_row(out + 4 * row * k, k, status)
                continue
            source = w + index // LANES * blocks * piece_bytes
            lane = index % LANES
            for block in range(blocks):
                piece = source + block * piece_bytes
                scale = get_f16(piece + code_bytes + 2 * lane)
                least = np.float32(0.0)
                if has_min:
                    least = get_f16(piece + code_bytes + 2 * LANES + 2 * lane)
                left = min(BLOCK, k - block * BLOCK)
                at = out + 4 * (row * k + block * BLOCK)
                for word_index in range(BLOCK // codes_per_word):
                    word = get_i32(piece + 64 * word_index + 4 * lane)
                    for byte in range(4):
                        code = (word >> (8 * byte)) & code_mask
                        i = 4 * word_index + byte
                        if i < left:
                            value = _times_plus(scale, _to_f32(code - zero), least)
                            put_f32(at + 4 * i, value)
                        if bits == 4 and i + BLOCK // 2 < left:
                            code = (word >> (8 * byte + 4)) & code_mask
                            value = _times_plus(scale, _to_f32(code - zero), least)
                            put_f32(at + 4 * i + 2 * BLOCK, value)

    body.__name__ = f"gather_blocks_{kind}"
    return kernel(body)
