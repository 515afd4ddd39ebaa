"""Writes rows of floats, or of a file's blocks, into panels of `q8_64`; knows addresses alone.

Loading a model does this once for every weight of it, and must not take long.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

from llvmlite import ir
from numba.core import types

from octavo_kernels.parallel import Kernel, kernel
from octavo_kernels.quant_matmul.cpu_blocks_tile import FORMATS, Kind
from octavo_kernels.quant_matmul.cpu_records import fold, stack_bytes
from octavo_kernels.simd import LANES, first_lanes, get_f16, load_f32_masked, store_f32
from octavo_kernels.vectors import (
    F16,
    F32,
    I32,
    I64,
    VF32,
    VI32,
    emit_splat,
    pointer,
    vector_op,
)

Source = Literal["float32", "q4_0", "q4_1", "q8_0"]
_FORM = FORMATS["q8_64"]
_INF_BITS = 0x7F800000
_ROUNDER, _ROUNDER_BITS = 12582912.0, 0x4B400000  # as in `cpu_records`
_OCTETS = ir.VectorType(ir.IntType(8), LANES)


def _splat_int(value: int) -> Any:
    return ir.Constant(VI32, [value] * LANES)


def _spread(kind: Kind) -> Any:
    """Intrinsic spread(codes, scale, least, out): 32 codes of a file to 32 floats."""
    form = FORMATS[kind]

    def spread(b: Any, a: Any) -> Any:
        codes, scale, least, out = a
        for half in range(2):
            step = LANES * half if form.bits == 8 else 0
            octets = b.load(pointer(b, b.add(codes, I64(step)), _OCTETS), align=1)
            if form.bits == 8:
                wide = b.sext(octets, VI32)
            else:
                wide = b.lshr(b.zext(octets, VI32), _splat_int(4 * half))
                wide = b.sub(b.and_(wide, _splat_int(15)), _splat_int(form.zero))
            value = b.fmul(b.sitofp(wide, VF32), emit_splat(b, scale))
            if form.has_min:
                value = b.fadd(value, emit_splat(b, least))
            b.store(value, pointer(b, b.add(out, I64(4 * LANES * half)), VF32), align=4)

    spread.__name__ = f"spread_{kind}"
    return vector_op(types.void, types.int64, types.float32, types.float32, types.int64)(spread)


@vector_op(types.void, types.int64, types.int64, types.int64)
def _put_codes(b: Any, a: Any) -> Any:
    """put_codes(values, words, scale): 64 floats to the codes and the scale of an output's block.

    The scale is amax / 127 as a float16, codes are the nearest for it; where either would not be
    finite the scale is NaN.
    """
    values, first_word, scale = a
    zero, pieces = _splat_int(_FORM.zero), _FORM.block // LANES
    parts = [
        b.load(pointer(b, b.add(values, I64(4 * LANES * i)), VF32), align=4) for i in range(pieces)
    ]

    def larger(x: Any, y: Any) -> Any:
        return b.select(b.icmp_signed(">", x, y), x, y)

    top = None
    for part in parts:
        size = b.and_(b.bitcast(part, VI32), _splat_int(0x7FFFFFFF))
        top = size if top is None else larger(top, size)
    amax = b.bitcast(fold(b, top, larger), F32)
    half = b.fptrunc(b.fdiv(amax, F32(127.0)), F16)
    step = b.fpext(half, F32)
    is_fine = b.icmp_signed("<", b.bitcast(step, I32), I32(_INF_BITS))
    is_live = b.and_(is_fine, b.fcmp_ordered(">", step, F32(0.0)))
    inverse = b.select(is_live, b.fdiv(F32(1.0), step), F32(0.0))
    live, rounder = emit_splat(b, is_live), ir.Constant(VF32, [_ROUNDER] * LANES)
    for i, part in enumerate(parts):
        shifted = b.fadd(b.fmul(part, emit_splat(b, inverse)), rounder)
        code = b.add(b.sub(b.bitcast(shifted, VI32), _splat_int(_ROUNDER_BITS)), zero)
        # A scale that is rounded down to a subnormal leaves codes beyond 8 bits.
        code = b.select(b.icmp_signed("<", code, _splat_int(0)), _splat_int(0), code)
        code = b.select(b.icmp_signed(">", code, _splat_int(255)), _splat_int(255), code)
        octets = b.trunc(b.select(live, code, zero), _OCTETS)
        words = b.bitcast(octets, ir.VectorType(I32, LANES // 4))
        for word in range(LANES // 4):
            at = b.add(first_word, I64(4 * LANES * (LANES // 4 * i + word)))
            b.store(b.extract_element(words, I32(word)), pointer(b, at, I32), align=4)
    kept = b.select(is_fine, half, F16(float("nan")))
    b.store(kept, pointer(b, scale, F16), align=2)


@cache
def requantise_kernel(source: Source) -> Kernel:
    """Rows start..start + num_rows of a weight of k columns from rows of k floats or their blocks.

    Elements past k count as zero. Different rows may be written at once.
    """
    is_float = source == "float32"
    kind: Kind = "q8_0" if source == "float32" else source
    form, spread = FORMATS[kind], _spread(kind)
    file_bytes, has_min, filed = form.file_bytes, form.has_min, form.block
    head, block, piece_bytes = 2 * (1 + has_min), _FORM.block, _FORM.panel_bytes
    code_bytes, scratch = _FORM.code_bytes, stack_bytes(4 * block)

    def body(
        part: int, num_parts: int, rows: int, w: int, start: int, num_rows: int, k: int
    ) -> None:
        blocks, spot = (k + block - 1) // block, scratch()
        row_bytes = 4 * k if is_float else k // filed * file_bytes
        for row in range(part * num_rows // num_parts, (part + 1) * num_rows // num_parts):
            panel, lane = (start + row) // LANES, (start + row) % LANES
            piece = w + panel * blocks * piece_bytes
            at = rows + row * row_bytes
            for done in range(0, k, block):
                for i in range(0, block, LANES if is_float else filed):
                    left = k - done - i
                    if is_float:
                        value = load_f32_masked(at + 4 * i, first_lanes(left))
                        store_f32(spot + 4 * i, value)
                    elif left > 0:
                        scale = get_f16(at)
                        spread(at + head, scale, get_f16(at + 2), spot + 4 * i)
                        at += file_bytes
                    else:
                        empty = load_f32_masked(at, first_lanes(0))
                        store_f32(spot + 4 * i, empty)
                        store_f32(spot + 4 * (i + LANES), empty)
                _put_codes(spot, piece + 4 * lane, piece + code_bytes + 2 * lane)
                if is_float:
                    at += 4 * block
                piece += piece_bytes

    body.__name__ = f"requantise_{source}"
    return kernel(body)
