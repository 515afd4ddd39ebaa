"""The CPU matmul over packed panels: which tile runs where. Knows addresses, no tensors.

A panel is [K, NR] of the weight, contiguous, NR outputs wide. A part is a run of panels; inside
one, a panel is read from memory once and every tile of rows is computed from it.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from octavo_kernels.matmul.tile import ITEM_BYTES, make_tiles
from octavo_kernels.parallel import Kernel, device, kernel
from octavo_kernels.simd import (
    LANES,
    add,
    first_lanes,
    get_bf16,
    get_f16,
    get_f32,
    get_i32,
    get_i64,
    load_f32_masked,
    put_f32,
    put_i64,
    store_f32_masked,
)

# Panel width in vectors -> rows of the largest register tile: 8 x 48 fills 27 of AVX-512's 32
# registers, 6 x 16 fills 15 of AVX2's 16 (as pairs) and 29 of NEON's 32 (as quadruples).
TILE_ROWS = {3: 8, 1: 6}
# A slice of a panel that stays in a core's second-level cache while all rows pass over it.
_SLICE_BYTES = 320 * 1024


@device
def add_extras(
    out: int, rows: int, columns: int, out_stride: int, bias: int, residual: int
) -> None:
    """out = (out + bias) + residual over one tile; either may be absent (address 0)."""
    for r in range(rows):
        for c in range(0, columns, LANES):
            mask = first_lanes(columns - c)
            at = r * out_stride + 4 * c
            value = load_f32_masked(out + at, mask)
            if bias != 0:
                value = add(value, load_f32_masked(bias + 4 * c, mask))
            if residual != 0:
                value = add(value, load_f32_masked(residual + at, mask))
            store_f32_masked(out + at, value, mask)


@cache
def matmul_kernel(dtype: str, vectors: int) -> Kernel:
    """The matmul kernel for one weight type and panel width (in 16-lane vectors)."""
    tile_rows = TILE_ROWS[vectors]
    run_tile = make_tiles(tile_rows, vectors, dtype)
    width = LANES * vectors
    row_bytes = width * ITEM_BYTES[dtype]
    slice_rows = _SLICE_BYTES // row_bytes // 4 * 4

    def body(
        part: int,
        num_parts: int,
        x: int,
        w: int,
        out: int,
        bias: int,
        residual: int,
        num_rows: int,
        n: int,
        k: int,
    ) -> None:
        num_panels = (n + width - 1) // width
        first, end = part * num_panels // num_parts, (part + 1) * num_panels // num_parts
        num_tiles = (num_rows + tile_rows - 1) // tile_rows
        step = slice_rows if num_tiles > 1 else k
        for panel in range(first, end):
            columns = min(width, n - panel * width)
            panel_out = out + 4 * panel * width
            for start in range(0, max(k, 1), max(step, 1)):
                depth = min(step, k - start)
                panel_w = w + (panel * k + start) * row_bytes
                for tile in range(num_tiles):
                    # Even tiles: 16 rows over 6-row tiles are 6, 5, 5 rather than 6, 6, 4.
                    row = tile * num_rows // num_tiles
                    rows = (tile + 1) * num_rows // num_tiles - row
                    tile_out = panel_out + row * n * 4
                    run_tile(
                        rows,
                        x + (row * k + start) * 4,
                        k * 4,
                        panel_w,
                        depth,
                        tile_out,
                        n * 4,
                        columns,
                        start,
                        panel_w + depth * row_bytes + (tile & 1) * (depth * row_bytes // 2),
                    )
                    if start + depth >= k and (bias != 0 or residual != 0):
                        left = bias + 4 * panel * width if bias != 0 else 0
                        right = residual + (tile_out - out) if residual != 0 else 0
                        add_extras(tile_out, rows, columns, n * 4, left, right)

    body.__name__ = f"matmul_{dtype}_{width}"
    return kernel(body)


@device
def read_id(at: int, num_bytes: int, n: int) -> int:
    """The id of 4 or 8 bytes at an address, or -1 for one outside [0, n)."""
    index = get_i64(at) if num_bytes == 8 else get_i32(at)
    return index if 0 <= index < n else -1


@device
def refuse_row(out: int, k: int, status: int) -> None:
    """Makes a row of k floats NaN, so that what depends on it is seen to be wrong."""
    put_i64(status, 1)
    for i in range(k):
        put_f32(out + 4 * i, np.float32(np.nan))


@cache
def gather_kernel(dtype: str) -> Kernel:
    """The kernel that reads rows back out of panels, for one weight type."""
    get = {"float32": get_f32, "bfloat16": get_bf16, "float16": get_f16}[dtype]
    item = ITEM_BYTES[dtype]

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
        width: int,
        status: int,
    ) -> None:
        for row in range(part * num_rows // num_parts, (part + 1) * num_rows // num_parts):
            index = read_id(ids + id_stride * row, id_bytes, n)
            if index < 0:
                refuse_row(out + 4 * row * k, k, status)
                continue
            source = w + (index // width * k * width + index % width) * item
            for i in range(k):
                put_f32(out + 4 * (row * k + i), get(source + i * width * item))

    body.__name__ = f"gather_rows_{dtype}"
    return kernel(body)
