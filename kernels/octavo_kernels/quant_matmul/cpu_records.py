"""Activations quantised in blocks of 32 for the CPU's matmul over blocks; knows no weight.

A record is a row's block of 32 elements of K in 40 bytes: 32 int8 codes, the float32 scale, and
what the weights' zero point asks for: the int32 that takes it off every sum (-zero times the sum
of the codes), or where it is 0 the float32 sum of what the codes stand for, for minima.

Records lie [chunk][block][row of chunk]. Up to 16 rows are one chunk; more are as few chunks of at
most 12 as there can be, as even as that allows: those that a tile of the matmul takes.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from octavo_kernels.parallel import device, kernel
from octavo_kernels.rms_norm.cpu import inverse_rms, sum_squares
from octavo_kernels.simd import (
    LANES,
    first_lanes,
    load_f32,
    load_f32_masked,
    mul,
    splat,
)
from octavo_kernels.vectors import (
    F32,
    I32,
    I64,
    VF32,
    VI32,
    emit_splat,
    f32x16,
    pointer,
    vector_op,
)

BLOCK = 32
RECORD_BYTES = 40
CHUNK_ROWS = 16  # at most
_FULL_ROWS = 12  # at most, where there are several chunks
# Rows that end where a line of memory does: two threads do not write one.
_LINE_ROWS = 8

_SMALLEST_BITS = 0x04000000  # 2**-119 = 1.5e-36, below which 127 / x would soon be infinite
_INF_BITS = 0x7F800000
_ROUNDER = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits
_ROUNDER_BITS = 0x4B400000


def _splat_int(value: int) -> Any:
    return ir.Constant(VI32, [value] * LANES)


def _fold(b: Any, vector: Any, combine: Any) -> Any:
    width = LANES
    while width > 1:
        width //= 2
        kind = ir.VectorType(I32, width)
        halves = [
            b.shuffle_vector(vector, vector, ir.Constant(kind, list(range(at, at + width))))
            for at in (0, width)
        ]
        vector = combine(*halves)
    return b.extract_element(vector, I32(0))


@vector_op(types.void, f32x16, f32x16, types.int64, types.int64)
def quantise_block(b: Any, a: Any) -> Any:
    """quantise_block(v0, v1, record, zero): 32 floats to a record for weights of that zero.

    scale = amax / 127, code = round(x * (127 / amax)) to even; a NaN or an infinity makes the
    scale NaN, and magnitudes below 1.5e-36 count as zero.
    """
    values, record, zero = a[:2], a[2], b.trunc(a[3], I32)
    sizes = [b.and_(b.bitcast(v, VI32), _splat_int(0x7FFFFFFF)) for v in values]

    def larger(x: Any, y: Any) -> Any:
        return b.select(b.icmp_signed(">", x, y), x, y)

    # Of magnitudes as integers: no order of comparing loses a NaN.
    top = _fold(b, larger(*sizes), larger)
    amax = b.bitcast(top, F32)
    is_finite = b.icmp_signed("<", top, I32(_INF_BITS))
    is_live = b.and_(is_finite, b.icmp_signed(">=", top, I32(_SMALLEST_BITS)))
    inverse = b.select(is_live, b.fdiv(F32(127.0), amax), F32(0.0))
    scale = b.select(is_live, b.fdiv(amax, F32(127.0)), F32(0.0))
    scale = b.select(is_finite, scale, F32(float("nan")))
    rounder = ir.Constant(VF32, [_ROUNDER] * LANES)
    codes = []
    for index, value in enumerate(values):
        shifted = b.fadd(b.fmul(value, emit_splat(b, inverse)), rounder)
        codes.append(b.sub(b.bitcast(shifted, VI32), _splat_int(_ROUNDER_BITS)))
        small = b.trunc(codes[-1], ir.VectorType(ir.IntType(8), LANES))
        b.store(small, pointer(b, b.add(record, I64(LANES * index)), small.type), align=1)
    total = _fold(b, b.add(*codes), b.add)
    b.store(scale, pointer(b, b.add(record, I64(32)), F32), align=4)
    meant = b.bitcast(b.fmul(b.sitofp(total, F32), scale), I32)
    last = b.select(b.icmp_signed("==", zero, I32(0)), meant, b.mul(total, b.neg(zero)))
    b.store(last, pointer(b, b.add(record, I64(36)), I32), align=4)


@device
def num_chunks(num_rows):
    return 1 if num_rows <= CHUNK_ROWS else (num_rows + _FULL_ROWS - 1) // _FULL_ROWS


@device
def chunk_start(chunk, num_rows):
    """The first row of a chunk."""
    return chunk * num_rows // num_chunks(num_rows)


@device
def chunk_height(chunk, num_rows):
    """How many rows a chunk has."""
    return chunk_start(chunk + 1, num_rows) - chunk_start(chunk, num_rows)


@device
def _chunk_of(row, num_rows):
    return ((row + 1) * num_chunks(num_rows) - 1) // num_rows


@device
def _first_row(part, num_parts, num_rows):
    lines = (num_rows + _LINE_ROWS - 1) // _LINE_ROWS
    return min(part * lines // num_parts * _LINE_ROWS, num_rows)


@device
def quantise_rows(x, records, num_rows, k, zero, first, end):
    """Records of rows first..end of x [num_rows, k]."""
    blocks, left = (k + BLOCK - 1) // BLOCK, k % BLOCK
    for row in range(first, end):
        chunk = _chunk_of(row, num_rows)
        start, height = chunk_start(chunk, num_rows), chunk_height(chunk, num_rows)
        to = records + (start * blocks + row - start) * RECORD_BYTES
        step = height * RECORD_BYTES
        at = x + 4 * row * k
        for _ in range(k // BLOCK):
            quantise_block(load_f32(at), load_f32(at + 64), to, zero)
            at += 4 * BLOCK
            to += step
        if left != 0:
            low = load_f32_masked(at, first_lanes(left))
            high = load_f32_masked(at + 64, first_lanes(left - LANES))
            quantise_block(low, high, to, zero)


def num_parts(num_rows: int, threads: int) -> int:
    """Of a launch over rows that does not share lines among threads."""
    return min(-(-num_rows // _LINE_ROWS), threads)


@kernel
def quantise_blocks(part, num_parts, x, records, num_rows, k, zero):
    """Quantises rows [num_rows, k] into records for weights of a zero."""
    first, end = _first_row(part, num_parts, num_rows), _first_row(part + 1, num_parts, num_rows)
    quantise_rows(x, records, num_rows, k, zero, first, end)


@kernel
def normalise_blocks(part, num_parts, x, weight, records, num_rows, k, zero, eps: float):
    """RMS normalisation of rows as `rms_norm` has it, to the bit, quantised into records."""
    blocks, left = (k + BLOCK - 1) // BLOCK, k % BLOCK
    first, end = _first_row(part, num_parts, num_rows), _first_row(part + 1, num_parts, num_rows)
    for row in range(first, end):
        chunk = _chunk_of(row, num_rows)
        start, height = chunk_start(chunk, num_rows), chunk_height(chunk, num_rows)
        to = records + (start * blocks + row - start) * RECORD_BYTES
        step = height * RECORD_BYTES
        at, by = x + 4 * row * k, weight
        factor = splat(inverse_rms(sum_squares(at, 0, k), k, eps))
        for _ in range(k // BLOCK):
            low = mul(mul(load_f32(at), factor), load_f32(by))
            high = mul(mul(load_f32(at + 64), factor), load_f32(by + 64))
            quantise_block(low, high, to, zero)
            at += 4 * BLOCK
            by += 4 * BLOCK
            to += step
        if left != 0:
            some, more = first_lanes(left), first_lanes(left - LANES)
            low = mul(mul(load_f32_masked(at, some), factor), load_f32_masked(by, some))
            high = mul(mul(load_f32_masked(at + 64, more), factor), load_f32_masked(by + 64, more))
            quantise_block(low, high, to, zero)
