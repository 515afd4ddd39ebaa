"""Sixteen-lane vectors for CPU kernels, as numba values; knows LLVM, not what is computed.

LLVM splits a vector of 16 floats into what the core has: one AVX-512 register, two AVX, four NEON.
Each lane is rounded once per operation in IEEE order, so the bits do not depend on that split.
`fma` is fused on every machine. Addresses are integers in bytes and need no vector alignment.

    v = load_f32(x + 4 * i); acc = fma(v, splat(s), acc); store_f32(y + 4 * i, acc)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from octavo_kernels.parallel import device
from octavo_kernels.vectors import (
    F16,
    F32,
    I1,
    I16,
    I32,
    I64,
    VF16,
    VF32,
    VI16,
    VI32,
    f32x16,
    mask16,
    vector_op,
)
from octavo_kernels.vectors import LANES as LANES
from octavo_kernels.vectors import call_llvm as call_llvm
from octavo_kernels.vectors import emit_first_lanes as emit_first_lanes
from octavo_kernels.vectors import emit_load as emit_load
from octavo_kernels.vectors import emit_splat as emit_splat
from octavo_kernels.vectors import pointer as pointer

# ---- memory ----------------------------------------------------------------------------------


@vector_op(f32x16, types.int64)
def load_f32(b: Any, a: Any) -> Any:
    """16 float32 at an address."""
    return emit_load(b, a[0], "float32")


@vector_op(f32x16, types.int64)
def load_bf16(b: Any, a: Any) -> Any:
    """16 bfloat16 at an address, widened exactly."""
    return emit_load(b, a[0], "bfloat16")


@vector_op(f32x16, types.int64)
def load_f16(b: Any, a: Any) -> Any:
    """16 float16 at an address, widened exactly."""
    return emit_load(b, a[0], "float16")


@vector_op(types.void, types.int64, f32x16)
def store_f32(b: Any, a: Any) -> Any:
    """Stores 16 float32."""
    b.store(a[1], pointer(b, a[0], VF32), align=4)


@vector_op(types.void, types.int64, f32x16)
def store_f16(b: Any, a: Any) -> Any:
    """Stores 16 floats rounded to nearest even float16."""
    b.store(b.fptrunc(a[1], VF16), pointer(b, a[0], VF16), align=2)


def _round_bf16(b: Any, value: Any, int_type: Any, const: Callable[[int], Any]) -> Any:
    """Bits of value rounded to nearest even bfloat16, in the low half; NaN stays a quiet NaN."""
    bits = b.bitcast(value, int_type)
    odd = b.and_(b.lshr(bits, const(16)), const(1))
    rounded = b.lshr(b.add(b.add(bits, const(0x7FFF)), odd), const(16))
    quiet = b.or_(b.lshr(bits, const(16)), const(0x40))
    return b.select(b.fcmp_unordered("uno", value, value), quiet, rounded)


@vector_op(types.void, types.int64, f32x16)
def store_bf16(b: Any, a: Any) -> Any:
    """Stores 16 floats rounded to nearest even bfloat16."""
    half = _round_bf16(b, a[1], VI32, lambda c: ir.Constant(VI32, [c] * LANES))
    b.store(b.trunc(half, VI16), pointer(b, a[0], VI16), align=2)


@vector_op(types.float32, types.int64)
def get_f32(b: Any, a: Any) -> Any:
    """One float32 at an address."""
    return b.load(pointer(b, a[0], F32), align=4)


@vector_op(types.float32, types.int64)
def get_f16(b: Any, a: Any) -> Any:
    """One float16 at an address, widened."""
    return b.fpext(b.load(pointer(b, a[0], F16), align=2), F32)


@vector_op(types.float32, types.int64)
def get_bf16(b: Any, a: Any) -> Any:
    """One bfloat16 at an address, widened."""
    bits = b.zext(b.load(pointer(b, a[0], I16), align=2), I32)
    return b.bitcast(b.shl(bits, I32(16)), F32)


@vector_op(types.int64, types.int64)
def get_i32(b: Any, a: Any) -> Any:
    """One int32 at an address, sign-extended."""
    return b.sext(b.load(pointer(b, a[0], I32), align=4), I64)


@vector_op(types.int64, types.int64)
def get_i64(b: Any, a: Any) -> Any:
    """One int64 at an address."""
    return b.load(pointer(b, a[0], I64), align=8)


@vector_op(types.void, types.int64, types.float32)
def put_f32(b: Any, a: Any) -> Any:
    """Stores one float32."""
    b.store(a[1], pointer(b, a[0], F32), align=4)


@vector_op(types.void, types.int64, types.float32)
def put_f16(b: Any, a: Any) -> Any:
    """Stores one float rounded to float16."""
    b.store(b.fptrunc(a[1], F16), pointer(b, a[0], F16), align=2)


@vector_op(types.void, types.int64, types.float32)
def put_bf16(b: Any, a: Any) -> Any:
    """Stores one float rounded to bfloat16."""
    half = _round_bf16(b, a[1], I32, I32)
    b.store(b.trunc(half, I16), pointer(b, a[0], I16), align=2)


@vector_op(types.void, types.int64, types.int64)
def put_i32(b: Any, a: Any) -> Any:
    """Stores the low 32 bits of an integer."""
    b.store(b.trunc(a[1], I32), pointer(b, a[0], I32), align=4)


@vector_op(types.void, types.int64, types.int64)
def put_i64(b: Any, a: Any) -> Any:
    """Stores one int64."""
    b.store(a[1], pointer(b, a[0], I64), align=8)


@vector_op(types.void, types.int64, types.int64, types.int64)
def copy_bytes(b: Any, a: Any) -> Any:
    """copy_bytes(to, from, count): memcpy; the ranges must not overlap."""
    byte = ir.IntType(8)
    values = [pointer(b, a[0], byte), pointer(b, a[1], byte), a[2], I1(0)]
    call_llvm(b, "llvm.memcpy.p0.p0.i64", ir.VoidType(), values)


# ---- arithmetic ------------------------------------------------------------------------------


@vector_op(f32x16, types.float32)
def splat(b: Any, a: Any) -> Any:
    """All lanes equal to a float32."""
    return emit_splat(b, a[0])


@vector_op(f32x16, f32x16, f32x16, f32x16)
def fma(b: Any, a: Any) -> Any:
    """a * b + c rounded once, per lane."""
    return call_llvm(b, "llvm.fma.v16f32", VF32, list(a))


@vector_op(f32x16, f32x16, f32x16)
def add(b: Any, a: Any) -> Any:
    """a + b."""
    return b.fadd(a[0], a[1])


@vector_op(f32x16, f32x16, f32x16)
def sub(b: Any, a: Any) -> Any:
    """a - b."""
    return b.fsub(a[0], a[1])


@vector_op(f32x16, f32x16, f32x16)
def mul(b: Any, a: Any) -> Any:
    """a * b."""
    return b.fmul(a[0], a[1])


@vector_op(f32x16, f32x16, f32x16)
def div(b: Any, a: Any) -> Any:
    """a / b."""
    return b.fdiv(a[0], a[1])


@vector_op(f32x16, f32x16)
def sqrt(b: Any, a: Any) -> Any:
    """Square root, correctly rounded."""
    return call_llvm(b, "llvm.sqrt.v16f32", VF32, list(a))


@vector_op(f32x16, f32x16, f32x16)
def maximum(b: Any, a: Any) -> Any:
    """a where a > b, else b: a NaN in a is dropped, one in b stays."""
    return b.select(b.fcmp_ordered(">", a[0], a[1]), a[0], a[1])


@vector_op(f32x16, f32x16, f32x16)
def minimum(b: Any, a: Any) -> Any:
    """a where a < b, else b: a NaN in a is dropped, one in b stays."""
    return b.select(b.fcmp_ordered("<", a[0], a[1]), a[0], a[1])


# ---- masks and lanes -------------------------------------------------------------------------


@vector_op(mask16, types.int64)
def first_lanes(b: Any, a: Any) -> Any:
    """True in lanes below count; count may be any integer."""
    return emit_first_lanes(b, a[0])


@vector_op(mask16, f32x16, f32x16)
def less(b: Any, a: Any) -> Any:
    """a < b per lane; False on NaN."""
    return b.fcmp_ordered("<", a[0], a[1])


@vector_op(mask16, f32x16, f32x16)
def equal(b: Any, a: Any) -> Any:
    """a == b per lane; False on NaN."""
    return b.fcmp_ordered("==", a[0], a[1])


@vector_op(f32x16, mask16, f32x16, f32x16)
def select(b: Any, a: Any) -> Any:
    """a where mask, else b."""
    return b.select(a[0], a[1], a[2])


@vector_op(f32x16, types.int64, mask16)
def load_f32_masked(b: Any, a: Any) -> Any:
    """float32 where the mask is set, 0 elsewhere; memory outside the mask is not touched."""
    values = [pointer(b, a[0], VF32), I32(4), a[1], ir.Constant(VF32, None)]
    return call_llvm(b, "llvm.masked.load.v16f32.p0", VF32, values)


@vector_op(types.void, types.int64, f32x16, mask16)
def store_f32_masked(b: Any, a: Any) -> Any:
    """Stores the lanes where the mask is set; other memory is not touched."""
    values = [a[1], pointer(b, a[0], VF32), I32(4), a[2]]
    call_llvm(b, "llvm.masked.store.v16f32.p0", ir.VoidType(), values)


@vector_op(types.float32, f32x16, types.int64)
def lane(b: Any, a: Any) -> Any:
    """One lane."""
    return b.extract_element(a[0], a[1])


def _reduce(b: Any, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Folds the halves together, 8 + 8, 4 + 4, 2 + 2, 1 + 1: one fixed tree."""
    width = LANES
    while width > 1:
        width //= 2
        undefined = ir.Constant(vector.type, ir.Undefined)
        parts = [
            b.shuffle_vector(
                vector,
                undefined,
                ir.Constant(ir.VectorType(I32, width), list(range(at, at + width))),
            )
            for at in (0, width)
        ]
        vector = combine(*parts)
    return b.extract_element(vector, I32(0))


@vector_op(types.float32, f32x16)
def reduce_add(b: Any, a: Any) -> Any:
    """Sum of the lanes by halving, in a fixed order."""
    return _reduce(b, a[0], b.fadd)


@vector_op(types.float32, f32x16)
def reduce_max(b: Any, a: Any) -> Any:
    """Greatest lane; meant for vectors without NaN."""
    return _reduce(b, a[0], lambda x, y: b.select(b.fcmp_ordered(">", x, y), x, y))


# ---- exponential -----------------------------------------------------------------------------


_ROUNDER = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits


@vector_op(f32x16, f32x16)
def _power_of_two(b: Any, a: Any) -> Any:
    """2**n from n + _ROUNDER, n integral in [-126, 127]; the bits above n shift out."""
    biased = b.add(b.bitcast(a[0], VI32), ir.Constant(VI32, [127] * LANES))
    return b.bitcast(b.shl(biased, ir.Constant(VI32, [23] * LANES)), VF32)


@vector_op(f32x16, f32x16)
def _expm1_over_r2(b: Any, a: Any) -> Any:
    """(e**r - 1 - r) / r**2 for |r| <= ln(2)/2, interpolated at Chebyshev nodes; 0.2 ulp off."""
    terms = [0.5, 0.16666576266288757, 0.04166655242443085]
    terms += [0.00836323294788599, 0.0013926250394433737]
    value: Any = ir.Constant(VF32, [terms[-1]] * LANES)
    for term in reversed(terms[:-1]):
        constant = ir.Constant(VF32, [term] * LANES)
        value = call_llvm(b, "llvm.fma.v16f32", VF32, [value, a[0], constant])
    return value


@device
def exp(x: Any) -> Any:
    """e**x per lane, within 2 ulp, subnormals included; 0 at -inf, inf at inf, NaN at NaN."""
    # Ordered so that a NaN in x survives; beyond these bounds the result is 0 or inf anyway.
    x = maximum(splat(np.float32(-104.0)), minimum(splat(np.float32(89.0)), x))
    rounder = splat(np.float32(_ROUNDER))
    n = sub(fma(x, splat(np.float32(1.4426950408889634)), rounder), rounder)
    # x - n * ln(2), ln(2) in two pieces so that the first product's error is kept
    r = fma(n, splat(np.float32(-0.6931471824645996)), x)
    r = fma(n, splat(np.float32(1.904654323148236e-09)), r)
    y = add(splat(np.float32(1.0)), fma(mul(r, r), _expm1_over_r2(r), r))
    # Two factors: 2**n alone leaves the normal range at both ends.
    low = fma(n, splat(np.float32(0.5)), rounder)
    high = add(sub(n, sub(low, rounder)), rounder)
    return mul(mul(y, _power_of_two(low)), _power_of_two(high))


@device
def exp_flushed(x: Any) -> Any:
    """e**x per lane for x <= 0, within 2 ulp; 0 below -87, where results near subnormal begin.

    For softmax: subnormals cost a hundred cycles each and weigh nothing beside the largest 1.
    """
    rounder = splat(np.float32(_ROUNDER))
    shifted = fma(x, splat(np.float32(1.4426950408889634)), rounder)
    n = sub(shifted, rounder)
    r = fma(n, splat(np.float32(-0.6931471824645996)), x)
    r = fma(n, splat(np.float32(1.904654323148236e-09)), r)
    y = add(splat(np.float32(1.0)), fma(mul(r, r), _expm1_over_r2(r), r))
    kept = mul(y, _power_of_two(shifted))
    return select(less(x, splat(np.float32(-87.0))), splat(np.float32(0.0)), kept)
