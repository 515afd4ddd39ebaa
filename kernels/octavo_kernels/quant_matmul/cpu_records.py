"""Activations quantised in blocks for the CPU's matmul over blocks; knows no weight.

A record is a row's block of 32 or 64 elements of K: as many int8 codes, the float32 scale, and
what the weights' zero point asks for: the int32 that takes it off every sum (-zero times the sum
of the codes), or where it is 0 the float32 sum of what the codes stand for, for minima.

Records lie [chunk][block][row of chunk]. A chunk has at most 12 rows, which a tile of the matmul
may take; there are as few as that allows, as even as can be.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import cache, reduce
from typing import Any

from llvmlite import ir
from numba.core import types

from octavo_kernels.native import intrinsic
from octavo_kernels.parallel import Kernel, device, kernel
from octavo_kernels.rms_norm.cpu import inverse_rms, sum_squares
from octavo_kernels.simd import (
    LANES,
    first_lanes,
    load_f32,
    load_f32_masked,
    mul,
    splat,
    store_f32,
)
from octavo_kernels.vectors import (
    F32,
    I32,
    I64,
    VF32,
    VI32,
    emit_splat,
    pointer,
    vector_op,
)

CHUNK_ROWS = 12  # at most
# Rows that end where a line of memory does: two threads do not write one.
_LINE_ROWS = 8

_SMALLEST_BITS = 0x04000000  # 2**-119 = 1.5e-36, below which 127 / x would soon be infinite
_INF_BITS = 0x7F800000
_ROUNDER = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits
_ROUNDER_BITS = 0x4B400000


def record_bytes(block: int) -> int:
    """Of a record of so many elements."""
    return block + 8


def _splat_int(value: int) -> Any:
    return ir.Constant(VI32, [value] * LANES)


def fold(b: Any, vector: Any, combine: Any) -> Any:
    """LLVM: one int32 of a vector's, combined in halves."""
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


@cache
def stack_bytes(count: int) -> Any:
    """Intrinsic without arguments: the address of so many bytes on the stack, on a line of its
    own."""

    def scratch(typingctx):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            with builder.goto_entry_block():
                place = builder.alloca(ir.ArrayType(ir.IntType(8), count))
                place.align = 64
            return builder.ptrtoint(place, I64)

        return types.int64(), codegen

    return intrinsic(scratch)


@cache
def block_quantiser(block: int) -> Any:
    """Device function quantise(at, stride, record, zero): floats to a record for weights of a zero.

    16 floats lie at `at`, 16 more `stride` bytes on, and so forth.
    scale = amax / 127, code = round(x * (127 / amax)) to even; a NaN or an infinity makes the
    scale NaN, and magnitudes below 1.5e-36 count as zero.
    """

    def quantise(b: Any, a: Any) -> Any:
        at, stride, record = a[:3]
        zero = b.trunc(a[3], I32)
        places = [b.add(at, b.mul(stride, I64(i))) for i in range(block // LANES)]
        values = [b.load(pointer(b, place, VF32), align=4) for place in places]
        sizes = [b.and_(b.bitcast(v, VI32), _splat_int(0x7FFFFFFF)) for v in values]

        def larger(x: Any, y: Any) -> Any:
            return b.select(b.icmp_signed(">", x, y), x, y)

        # Of magnitudes as integers: no order of comparing loses a NaN.
        top = fold(b, reduce(larger, sizes), larger)
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
        total = fold(b, reduce(b.add, codes), b.add)
        b.store(scale, pointer(b, b.add(record, I64(block)), F32), align=4)
        meant = b.bitcast(b.fmul(b.sitofp(total, F32), scale), I32)
        last = b.select(b.icmp_signed("==", zero, I32(0)), meant, b.mul(total, b.neg(zero)))
        b.store(last, pointer(b, b.add(record, I64(block + 4)), I32), align=4)

    quantise.__name__ = f"quantise_{block}"
    return vector_op(types.void, types.int64, types.int64, types.int64, types.int64)(quantise)


@device
def num_chunks(num_rows):
    return (num_rows + CHUNK_ROWS - 1) // CHUNK_ROWS


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


@cache
def row_quantiser(block: int) -> Any:
    """Device function quantise_rows(x, records, num_rows, k, zero, first, end): records of rows
    first..end of x [num_rows, k]."""
    quantise, scratch = block_quantiser(block), stack_bytes(4 * block)
    size = record_bytes(block)

    def quantise_rows(x, records, num_rows, k, zero, first, end):
        blocks, left, spot = (k + block - 1) // block, k % block, scratch()
        for row in range(first, end):
            chunk = _chunk_of(row, num_rows)
            start, height = chunk_start(chunk, num_rows), chunk_height(chunk, num_rows)
            to = records + (start * blocks + row - start) * size
            at = x + 4 * row * k
            for _ in range(k // block):
                quantise(at, 4 * LANES, to, zero)
                at += 4 * block
                to += height * size
            if left != 0:
                for i in range(0, block, LANES):
                    store_f32(spot + 4 * i, load_f32_masked(at + 4 * i, first_lanes(left - i)))
                quantise(spot, 4 * LANES, to, zero)

    quantise_rows.__qualname__ = f"quantise_rows_{block}"
    return device(quantise_rows)


def num_parts(num_rows: int, threads: int) -> int:
    """Of a launch over rows that does not share lines among threads."""
    return min(-(-num_rows // _LINE_ROWS), threads)


@cache
def quantise_kernel(block: int) -> Kernel:
    """Quantises rows [num_rows, k] into records for weights of a zero."""
    quantise_rows = row_quantiser(block)

    def body(part, num_parts, x, records, num_rows, k, zero):
        first = _first_row(part, num_parts, num_rows)
        end = _first_row(part + 1, num_parts, num_rows)
        quantise_rows(x, records, num_rows, k, zero, first, end)

    body.__name__ = f"quantise_blocks_{block}"
    return kernel(body)


@cache
def normalise_kernel(block: int) -> Kernel:
    """RMS normalisation of rows as `rms_norm` has it, to the bit, quantised into records."""
    quantise, scratch = block_quantiser(block), stack_bytes(4 * block)
    size = record_bytes(block)

    def body(part, num_parts, x, weight, records, num_rows, k, zero, eps: float):
        blocks, spot = (k + block - 1) // block, scratch()
        first = _first_row(part, num_parts, num_rows)
        end = _first_row(part + 1, num_parts, num_rows)
        for row in range(first, end):
            chunk = _chunk_of(row, num_rows)
            start, height = chunk_start(chunk, num_rows), chunk_height(chunk, num_rows)
            to = records + (start * blocks + row - start) * size
            at, by = x + 4 * row * k, weight
            factor = splat(inverse_rms(sum_squares(at, 0, k), k, eps))
            for done in range(0, k, block):
                for i in range(0, block, LANES):
                    if k - done - i >= LANES:
                        value, gain = load_f32(at + 4 * i), load_f32(by + 4 * i)
                    else:
                        some = first_lanes(k - done - i)
                        value = load_f32_masked(at + 4 * i, some)
                        gain = load_f32_masked(by + 4 * i, some)
                    store_f32(spot + 4 * i, mul(mul(value, factor), gain))
                quantise(spot, 4 * LANES, to, zero)
                at += 4 * block
                by += 4 * block
                to += height * size

    body.__name__ = f"normalise_blocks_{block}"
    return kernel(body)
