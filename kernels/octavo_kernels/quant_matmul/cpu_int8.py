"""The CPU's int8 matmul: quantising rows and which tile runs where. Knows addresses, no tensors.

A row of codes takes `row_bytes(k)`: codes padded to cache lines, then a line with its scale.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from octavo_kernels.matmul.cpu import add_extras
from octavo_kernels.parallel import Kernel, device, kernel
from octavo_kernels.quant_matmul.cpu_dot import CpuPath
from octavo_kernels.quant_matmul.cpu_int8_tile import PANEL_WIDTH, TILE_ROWS, make_tiles
from octavo_kernels.silu_mul.cpu import gate_gelu, gate_silu
from octavo_kernels.simd import (
    LANES,
    add,
    first_lanes,
    fma,
    get_f32,
    get_i64,
    load_f32,
    load_f32_masked,
    maximum,
    mul,
    put_f32,
    reduce_add,
    reduce_max,
    splat,
    store_f32,
    store_f32_masked,
    sub,
)
from octavo_kernels.vectors import F32, VI32, f32x16, pointer, vector_op

_I8 = ir.IntType(8)

# The least scale: its inverse is finite and rows below 127 times it lose precision, not sense.
LEAST_SCALE = 1e-36
# 1.5 * 2**23 + 128: adding it leaves the nearest integer plus 128 in the lowest byte.
_ROUNDER = 12583040.0


def row_bytes(k: int) -> int:
    """Bytes from one row of codes to the next: an odd number of lines, which spreads over sets."""
    return ((k + 63) // 64 + 1 | 1) * 64


row_stride: Any = device(row_bytes)


@device
def scale_offset(k: int) -> int:
    """Bytes from a row's first code to its scale."""
    return (k + 63) // 64 * 64


@vector_op(types.void, types.int64, f32x16)
def _store_low_bytes(b: Any, a: Any) -> Any:
    """Stores the lowest byte of each of 16 float32."""
    kind = ir.VectorType(_I8, LANES)
    b.store(b.trunc(b.bitcast(a[1], VI32), kind), pointer(b, a[0], kind), align=1)


@device
def quantise_row(x: int, codes: int, k: int) -> None:
    """Row x [k] float32 -> codes [k] uint8 = round(x / scale) + 128, and scale = max |x| / 127.

    The scale of a row with NaN or infinity is NaN; its codes are arbitrary.
    """
    zero = splat(np.float32(0.0))
    top0, top1, top2, top3, poison = zero, zero, zero, zero, zero
    i = 0
    while i + 4 * LANES <= k:
        at = x + 4 * i
        a, b = load_f32(at), load_f32(at + 4 * LANES)
        c, d = load_f32(at + 8 * LANES), load_f32(at + 12 * LANES)
        top0 = maximum(maximum(a, sub(zero, a)), top0)
        top1 = maximum(maximum(b, sub(zero, b)), top1)
        top2 = maximum(maximum(c, sub(zero, c)), top2)
        top3 = maximum(maximum(d, sub(zero, d)), top3)
        # 0 unless one is NaN or infinite
        poison = fma(a, zero, fma(b, zero, fma(c, zero, fma(d, zero, poison))))
        i += 4 * LANES
    while i < k:
        a = load_f32_masked(x + 4 * i, first_lanes(k - i))
        top0 = maximum(maximum(a, sub(zero, a)), top0)
        poison = fma(a, zero, poison)
        i += LANES
    top = reduce_max(maximum(maximum(top0, top1), maximum(top2, top3)))
    scale = max(top / np.float32(127.0), np.float32(LEAST_SCALE))
    inverse, rounder = splat(np.float32(1.0) / scale), splat(np.float32(_ROUNDER))
    i = 0
    while i + LANES <= k:
        # Rounded twice, as x * inverse and then to an integer is anywhere else.
        _store_low_bytes(codes + i, add(mul(load_f32(x + 4 * i), inverse), rounder))
        i += LANES
    if i < k:
        rest = load_f32_masked(x + 4 * i, first_lanes(k - i))
        _store_low_bytes(codes + i, add(mul(rest, inverse), rounder))
    put_f32(codes + scale_offset(k), scale + reduce_add(poison))


@device
def quantise_rows(x: int, codes: int, first: int, end: int, k: int) -> None:
    """Rows first..end of x [*, k] float32 -> the same rows of codes."""
    for row in range(first, end):
        quantise_row(x + 4 * row * k, codes + row * row_stride(k), k)


@kernel
def quantise_kernel(part: int, num_parts: int, x: int, codes: int, num_rows: int, k: int) -> None:
    """x [num_rows, k] float32 -> rows of codes."""
    first, end = part * num_rows // num_parts, (part + 1) * num_rows // num_parts
    quantise_rows(x, codes, first, end, k)


@device
def _gate(
    out: int, up: int, rows: int, columns: int, out_stride: int, up_stride: int, is_gelu: int
) -> None:
    """out = silu(out) * up, or gelu(out) * up, over one tile."""
    for r in range(rows):
        for c in range(0, columns, LANES):
            at, up_at = out + r * out_stride + 4 * c, up + r * up_stride + 4 * c
            is_whole, mask = c + LANES <= columns, first_lanes(columns - c)
            if is_whole:
                value, factor = load_f32(at), load_f32(up_at)
            else:
                value, factor = load_f32_masked(at, mask), load_f32_masked(up_at, mask)
            gated = gate_gelu(value, factor) if is_gelu != 0 else gate_silu(value, factor)
            if is_whole:
                store_f32(at, gated)
            else:
                store_f32_masked(at, gated, mask)


@cache
def matmul_kernel(path: CpuPath) -> Kernel:
    """The matmul kernel of a path: w in panels, float32 rows or codes of rows, plain or gated."""
    width, tile_rows = PANEL_WIDTH[path], TILE_ROWS[path]
    run_tile = make_tiles(path)

    def body(
        part: int,
        num_parts: int,
        x: int,
        codes: int,
        scratch: int,
        w: int,
        base: int,
        w_scale: int,
        out: int,
        bias: int,
        residual: int,
        num_rows: int,
        n: int,
        k: int,
        halves: int,
        is_gelu: int,
    ) -> None:
        panels, quads, stride = (n + width - 1) // width, (k + 3) // 4, row_stride(k)
        first, end = part * panels // num_parts, (part + 1) * panels // num_parts
        if x != 0:  # few rows: quantised by every part for itself, sooner than by one for all
            codes += part * num_rows * stride
            quantise_rows(x, codes, 0, num_rows, k)
        ups, up_stride = scratch + part * tile_rows * width * 4, width * 4
        num_tiles, panel_bytes = (num_rows + tile_rows - 1) // tile_rows, quads * width * 4
        for step in range(first * halves, end * halves):
            panel, is_up = step // halves, step % halves == 1
            columns = min(width, n - panel * width)
            panel_out, panel_w = out + 4 * panel * width, w + step * panel_bytes
            left = bias + 4 * panel * width if bias != 0 else 0
            for tile in range(num_tiles):
                row = tile * num_rows // num_tiles
                rows = (tile + 1) * num_rows // num_tiles - row
                tile_out = panel_out + row * n * 4
                run_tile(
                    rows,
                    codes + row * stride,
                    stride,
                    scale_offset(k),
                    panel_w,
                    quads,
                    base + step * width * 4,
                    w_scale + step * width * 4,
                    ups if is_up else tile_out,
                    up_stride if is_up else n * 4,
                    columns,
                    panel_w + panel_bytes + (tile & 1) * (panel_bytes // 2),
                )
                if is_up:
                    _gate(tile_out, ups, rows, columns, n * 4, up_stride, is_gelu)
                if bias != 0 or residual != 0:
                    right = residual + (tile_out - out) if residual != 0 else 0
                    add_extras(tile_out, rows, columns, n * 4, left, right)

    body.__name__ = f"matmul_int8_{path}"
    return kernel(body)


@vector_op(types.float32, types.int64)
def _get_i8(b: Any, a: Any) -> Any:
    """One int8 at an address as a float."""
    return b.sitofp(b.load(pointer(b, a[0], _I8), align=1), F32)


@kernel
def gather_kernel(
    part: int,
    num_parts: int,
    w: int,
    w_scale: int,
    ids: int,
    out: int,
    num_rows: int,
    k: int,
    width: int,
) -> None:
    """Rows of codes times their scales, out of panels."""
    panel_bytes = (k + 3) // 4 * width * 4
    for row in range(part * num_rows // num_parts, (part + 1) * num_rows // num_parts):
        index = get_i64(ids + 8 * row)
        source = w + index // width * panel_bytes + index % width * 4
        scale = get_f32(w_scale + 4 * index)
        for i in range(k):
            code = _get_i8(source + i // 4 * (4 * width) + i % 4)
            put_f32(out + 4 * (row * k + i), code * scale)
