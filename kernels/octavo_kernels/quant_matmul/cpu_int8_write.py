"""Writes rows into the panels of an int8 weight; knows addresses, no tensors.

A row is first made codes + 128 in a scratch row of `row_bytes(k)`, then spread over its panel.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from octavo_kernels.parallel import device, kernel
from octavo_kernels.quant_matmul.cpu_int8 import quantise_row, row_stride, scale_offset
from octavo_kernels.simd import get_f32, put_f32
from octavo_kernels.vectors import I32, I64, pointer, vector_op

_I8 = ir.IntType(8)


@vector_op(types.int64, types.int64)
def _get_u8(b: Any, a: Any) -> Any:
    """One byte 0..255 at an address."""
    return b.zext(b.load(pointer(b, a[0], _I8), align=1), I64)


@vector_op(types.void, types.int64, types.int64)
def _put_u8(b: Any, a: Any) -> Any:
    """Stores the lowest byte."""
    b.store(b.trunc(a[1], _I8), pointer(b, a[0], _I8), align=1)


@vector_op(types.void, types.int64, types.int64)
def _put_i32(b: Any, a: Any) -> Any:
    """Stores the lowest 32 bits."""
    b.store(b.trunc(a[1], I32), pointer(b, a[0], I32), align=4)


@vector_op(types.void, types.int64, types.int64)
def _copy_flipped(b: Any, a: Any) -> Any:
    """_copy_flipped(to, from): four codes + 128 become four int8."""
    four = b.load(pointer(b, a[1], I32), align=4)
    b.store(b.xor(four, I32(0x80808080)), pointer(b, a[0], I32), align=4)


@device
def _place(
    codes: int,
    row_scale: float,
    data: int,
    scale: int,
    base: int,
    row: int,
    k: int,
    width: int,
    rows_each: int,
    halves: int,
) -> None:
    """Spreads one row of codes + 128 over its panel, and writes its scale and its sum."""
    half, inner = row // rows_each, row % rows_each
    panel, column = inner // width * halves + half, inner % width
    quads, step = (k + 3) // 4, 4 * width
    at = data + panel * quads * step + 4 * column
    for q in range(quads):
        _copy_flipped(at + q * step, codes + 4 * q)
    total = 0
    for i in range(k):
        total += _get_u8(codes + i)
    put_f32(scale + 4 * (panel * width + column), row_scale)
    _put_i32(base + 4 * (panel * width + column), -128 * (total - 128 * k))


@kernel
def write_floats(
    part: int,
    num_parts: int,
    rows: int,
    scratch: int,
    data: int,
    scale: int,
    base: int,
    num_rows: int,
    start: int,
    k: int,
    width: int,
    rows_each: int,
    halves: int,
) -> None:
    """rows [num_rows, k] float32, quantised; the scale of a row that is not finite is NaN."""
    codes = scratch + part * row_stride(k)
    for row in range(part * num_rows // num_parts, (part + 1) * num_rows // num_parts):
        quantise_row(rows + 4 * row * k, codes, k)
        found = get_f32(codes + scale_offset(k))
        _place(codes, found, data, scale, base, start + row, k, width, rows_each, halves)


@kernel
def write_codes(
    part: int,
    num_parts: int,
    rows: int,
    scales: int,
    scratch: int,
    data: int,
    scale: int,
    base: int,
    num_rows: int,
    start: int,
    k: int,
    width: int,
    rows_each: int,
    halves: int,
) -> None:
    """rows [num_rows, k] int8 and their scales [num_rows] float32, as they are."""
    codes = scratch + part * row_stride(k)
    for row in range(part * num_rows // num_parts, (part + 1) * num_rows // num_parts):
        for i in range(k):
            _put_u8(codes + i, _get_u8(rows + row * k + i) ^ 128)
        for i in range(k, (k + 3) // 4 * 4):
            _put_u8(codes + i, 128)
        found = get_f32(scales + 4 * row)
        _place(codes, found, data, scale, base, start + row, k, width, rows_each, halves)
