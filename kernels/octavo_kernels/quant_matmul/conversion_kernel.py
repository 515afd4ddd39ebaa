"""Triton: codes in 16-bit words to exact floats, two at once where the type has 16 bits.

A word holds one element of every plane (see weight.py). The quick path works on two words in a
register with PTX; the plain path is for float32 and for the interpreter and gives the same values.
"""

import triton
import triton.language as tl

TWO_TO_120 = tl.constexpr(1.329227995784916e36)


@triton.constexpr_function
def _asm(kind, plane, dtype, has_zero):
    """PTX for two words in $1 (and 128 or 1024 + zero twice in $2) to two floats in $0."""
    is_bf16 = str(dtype) == "bf16"
    kind_x2 = "bf16x2" if is_bf16 else "f16x2"
    # OR-ed onto a small integer, gives 128 + integer in bf16, 1024 + integer in fp16.
    magic = "0x43004300" if is_bf16 else "0x64006400"
    minus_one = "0xBF80BF80" if is_bf16 else "0xBC00BC00"
    if kind == "fp8":
        # Exponent and mantissa to the top of a float's mantissa and the foot of its exponent,
        # then a power of two for the difference of biases: right for subnormal codes too.
        move = {(0, True): "shl.b32 t, $1, 4;", (1, True): "shr.b32 t, $1, 4;"}
        move |= {(0, False): "shl.b32 t, $1, 7;", (1, False): "shr.b32 t, $1, 1;"}
        mask, power = ("0x07F007F0", "0x7B807B80") if is_bf16 else ("0x3F803F80", "0x5C005C00")
        sign = "shl.b32 s, $1, 8;" if plane == 0 else "mov.b32 s, $1;"
        body = (
            f"{move[plane, is_bf16]} {sign} and.b32 t, t, {mask};"
            f" lop3.b32 t, s, 0x80008000, t, 0xEA;"
            f" mov.b32 s, {power}; mov.b32 c, 0x80008000; fma.rn.{kind_x2} $0, t, s, c;"
        )
    elif kind == "int8":
        # Two's complement: the low seven bits less 128 if the top bit is set.
        move = "mov.b32 s, $1;" if plane == 0 else "shr.b32 s, $1, 8;"
        body = (
            f"{move} mov.b32 c, {magic}; lop3.b32 t, s, 0x007F007F, c, 0xEA;"
            f" lop3.b32 s, s, 0x00800080, c, 0xEA;"
            f" mov.b32 c, {minus_one}; fma.rn.{kind_x2} $0, s, c, t;"
        )
    else:
        zero = "$2" if has_zero else ("0x43084308" if is_bf16 else "0x64086408")
        body = (
            f"shr.b32 t, $1, {4 * plane}; mov.b32 c, {magic};"
            f" lop3.b32 t, t, 0x000F000F, c, 0xEA; mov.b32 s, {zero};"
            f" mov.b32 c, {minus_one}; fma.rn.{kind_x2} $0, s, c, t;"
        )
    return "{ .reg .b32 t, s, c; " + body + " }"


@triton.jit
def widen8(words, PLANE: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """Words [.., ..] int16 -> plane 0 or 1 of "fp8" or "int8" codes as DTYPE, same shape."""
    if FAST:
        return tl.inline_asm_elementwise(
            _asm(KIND, PLANE, DTYPE, False),
            "=r,r",
            [words],
            dtype=DTYPE.value,
            is_pure=True,
            pack=2,
        )
    code = (words.to(tl.int32) >> (8 * PLANE)) & 0xFF
    if KIND == "fp8":
        bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
        return (bits.to(tl.float32, bitcast=True) * TWO_TO_120).to(DTYPE)
    return (((code + 128) & 0xFF) - 128).to(tl.float32).to(DTYPE)


@triton.jit
def magic_of(zero, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """Zero points as `widen4` takes them away."""
    if not FAST:
        return zero.to(tl.float32)
    elif DTYPE.is_bf16():
        return (zero.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True)
    else:
        return (zero.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)


@triton.jit
def widen4(words, zero, PLANE: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """Words [R, C] int16 -> plane 0..3 less zero (`magic_of`, [R, C]; None for 8) as DTYPE."""
    if FAST:
        if zero is None:
            return tl.inline_asm_elementwise(
                _asm("int4", PLANE, DTYPE, False),
                "=r,r",
                [words],
                dtype=DTYPE.value,
                is_pure=True,
                pack=2,
            )
        else:
            return tl.inline_asm_elementwise(
                _asm("int4", PLANE, DTYPE, True),
                "=r,r,r",
                [words, zero],
                dtype=DTYPE.value,
                is_pure=True,
                pack=2,
            )
    code = ((words.to(tl.int32) >> (4 * PLANE)) & 0xF).to(tl.float32)
    if zero is None:
        return (code - 8.0).to(DTYPE)
    else:
        return (code - zero).to(DTYPE)
