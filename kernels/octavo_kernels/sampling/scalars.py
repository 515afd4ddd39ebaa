"""Scalar operations of the sampling kernels, emitted as LLVM IR. Know numbers, not rows or tokens.

Loops over them vectorise, and since no operation is reassociated or contracted, a value has the
same bits in a vector loop and in a scalar one.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)

# exp(r) = 1 + r + r^2 * P(r) on |r| <= ln(2)/2, and log(1 + f) = f + f^2 * Q(f) on [-1/4, 1/2]:
# minimax fits, below 1e-8 before rounding.
_EXP = (0.5, 0.16666576266288757, 0.04166637361049652, 0.008363179862499237, 0.0013941117795184255)
_LOG = (
    -0.5,
    0.3333345055580139,
    -0.25000229477882385,
    0.19990992546081543,
    -0.16642938554286957,
    0.14467807114124298,
    -0.13192836940288544,
    0.10592105984687805,
    -0.046204276382923126,
)
_LN2_HIGH, _LN2_LOW = 0.693145751953125, 1.428606765330187e-06  # high part has 15 bits
_LN2 = 0.6931471805599453
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

MAX_KEY = 0x7F800000  # order_key(+inf); NaN lies above it or below MIN_KEY
MIN_KEY = -0x7F800001  # order_key(-inf)


def _scalar(result: Any, *arguments: Any) -> Callable[[Callable[[Any, Any], Any]], Any]:
    """Decorator: an emitter `(builder, values) -> value` becomes a numba intrinsic."""

    def make(emit: Callable[[Any, Any], Any]) -> Any:
        names = ", ".join(f"a{i}" for i in range(len(arguments)))

        def typer(*_: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                return emit(builder, args)

            return result(*arguments), codegen

        # numba reads the number of arguments off the signature, so it needs one with names.
        scope: dict[str, Any] = {"typer": typer}
        exec(f"def {emit.__name__}(context, {names}): return typer(context, {names})", scope)
        typed = scope[emit.__name__]
        typed.__module__, typed.__doc__ = emit.__module__, emit.__doc__
        return intrinsic(typed)

    return make


def _const(value: float) -> Any:
    return ir.Constant(_F32, struct.unpack("f", struct.pack("f", value))[0])


def _call(b: Any, name: str, *values: Any) -> Any:
    kind = ir.FunctionType(_F32, [_F32] * len(values))
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), values)


def _polynomial(b: Any, x: Any, coefficients: tuple[float, ...]) -> Any:
    y = _const(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        y = _call(b, "llvm.fma.f32", y, x, _const(c))
    return y


@_scalar(types.int32, types.float32)
def order_key(b: Any, a: Any) -> Any:
    """An integer that orders as the float does; both zeros have one key."""
    bits = b.bitcast(b.fadd(a[0], _const(0.0)), _I32)
    return b.xor(bits, b.and_(b.ashr(bits, _I32(31)), _I32(0x7FFFFFFF)))


@_scalar(types.float32, types.int32)
def key_value(b: Any, a: Any) -> Any:
    """The float of an order_key."""
    return b.bitcast(b.xor(a[0], b.and_(b.ashr(a[0], _I32(31)), _I32(0x7FFFFFFF))), _F32)


@_scalar(types.float32, types.float32)
def exp_negative(b: Any, a: Any) -> Any:
    """exp(x) for x <= 0 to 1 ulp; exactly 0 below -87 and for -inf."""
    x = a[0]
    low = b.fcmp_ordered("<", x, _const(-87.0))
    x = b.select(low, _const(-87.0), x)
    n = _call(b, "llvm.rint.f32", b.fmul(x, _const(1 / _LN2)))
    r = _call(b, "llvm.fma.f32", n, _const(-_LN2_HIGH), x)
    r = _call(b, "llvm.fma.f32", n, _const(-_LN2_LOW), r)
    tail = _call(b, "llvm.fma.f32", b.fmul(r, r), _polynomial(b, r, _EXP), r)
    scale = b.bitcast(b.shl(b.add(b.fptosi(n, _I32), _I32(127)), _I32(23)), _F32)
    return b.select(low, _const(0.0), b.fmul(b.fadd(tail, _const(1.0)), scale))


@_scalar(types.float32, types.uint32)
def exponential(b: Any, a: Any) -> Any:
    """A draw of the unit exponential from 32 random bits: -log((bits + 1/2) / 2^32).

    Near u = 1 it is computed from 1 - u, so that small draws, which win races, keep all digits.
    """
    bits = a[0]
    scale, half = _const(2.0**-32), _const(0.5)
    u = b.fmul(b.fadd(b.uitofp(bits, _F32), half), scale)
    rest = b.fmul(b.fadd(b.uitofp(b.not_(bits), _F32), half), scale)
    near_one = b.icmp_unsigned(">=", bits, _I32(0xC0000000))
    pattern = b.bitcast(u, _I32)
    k = b.ashr(b.sub(pattern, _I32(0x3F400000)), _I32(23))  # u = 2^k m with m in [3/4, 3/2)
    m = b.bitcast(b.sub(pattern, b.shl(k, _I32(23))), _F32)
    k = b.select(near_one, _I32(0), k)
    f = b.select(near_one, b.fneg(rest), b.fsub(m, _const(1.0)))
    log1p = _call(b, "llvm.fma.f32", b.fmul(f, f), _polynomial(b, f, _LOG), f)
    return b.fneg(_call(b, "llvm.fma.f32", b.sitofp(k, _F32), _const(_LN2), log1p))


@_scalar(types.int64, types.float32)
def fixed_point(b: Any, a: Any) -> Any:
    """x * 2^40 as an integer, for x in [0, 1]: sums of these are exact in any order."""
    return b.fptosi(b.fmul(a[0], _const(2.0**40)), _I64)


@_scalar(types.int32, types.float32)
def float_bits(b: Any, a: Any) -> Any:
    """The bits of a float; those of floats >= 0 order as the floats do."""
    return b.bitcast(a[0], _I32)


@_scalar(types.UniTuple(types.uint32, 4), *[types.uint32] * 6)
def philox(b: Any, a: Any) -> Any:
    """Philox4x32-10 of (c0, c1, c2, c3, k0, k1): four words of random bits."""
    c0, c1, c2, c3, k0, k1 = a
    for turn in range(10):
        if turn:
            k0 = b.add(k0, _I32(_PHILOX_KEY_STEPS[0]))
            k1 = b.add(k1, _I32(_PHILOX_KEY_STEPS[1]))
        high0, low0 = _wide_product(b, c0, _PHILOX_MULTIPLIERS[0])
        high1, low1 = _wide_product(b, c2, _PHILOX_MULTIPLIERS[1])
        c0, c1 = b.xor(b.xor(high1, c1), k0), low1
        c2, c3 = b.xor(b.xor(high0, c3), k1), low0
    return cgutils.pack_array(b, [c0, c1, c2, c3])


def _wide_product(b: Any, value: Any, multiplier: int) -> tuple[Any, Any]:
    product = b.mul(b.zext(value, _I64), _I64(multiplier))
    return b.trunc(b.lshr(product, _I64(32)), _I32), b.trunc(product, _I32)


@intrinsic
def address_of(typingctx: Any, dtype: Any, address: Any) -> Any:
    """Pointer to elements of `dtype` at an integer address, for `numba.carray`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[1], context.get_value_type(signature.return_type))

    return types.CPointer(dtype.dtype)(dtype, types.int64), codegen
