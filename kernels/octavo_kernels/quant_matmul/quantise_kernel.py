"""Triton: rows of activations to 8-bit codes and scales, in the order of 8-bit weights."""

import triton
import triton.language as tl

from octavo_kernels.launch import jit

E4M3_MAX = tl.constexpr(448.0)
INT8_MAX = tl.constexpr(127.0)


@triton.jit
def _code(value, KIND: tl.constexpr):
    """float32 within the codes' range -> the nearest code, ties to even, as int32 0..255."""
    if KIND == "int8":
        # 1.5 * 2**23: the sum's last bits are the rounded integer.
        return (value + 12582912.0).to(tl.int32, bitcast=True) & 0xFF
    size = tl.abs(value)
    bits = size.to(tl.int32, bitcast=True)
    # Subnormal codes count 2**-9; the others are float32 less 20 bits of mantissa, rebiased.
    small = (size + 16384.0).to(tl.int32, bitcast=True) & 0xFF
    large = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    code = tl.where(size < 0.015625, small, tl.minimum(large, 0x7E))
    code = tl.where(value == value, code, 0x7F)
    return code | ((value.to(tl.int32, bitcast=True) >> 24) & 0x80)


@jit
def quantise_rows(
    x_ptr,  # [T, K] bf16, fp16, fp32
    words_ptr,  # [T, G, 64] int16: two codes each
    scale_ptr,  # [T, 1 or G] fp32
    K: tl.constexpr,
    KIND: tl.constexpr,
    GROUPED: tl.constexpr,
    PADDED_G: tl.constexpr,
):
    # Grid: (T,)
    NUM_G: tl.constexpr = (K + 127) // 128
    row = tl.program_id(0).to(tl.int64)
    top: tl.constexpr = E4M3_MAX if KIND == "fp8" else INT8_MAX
    g = tl.arange(0, PADDED_G)[:, None]
    j = tl.arange(0, 64)[None, :]
    k = g * 128 + j
    low = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    high = tl.load(x_ptr + row * K + k + 64, mask=k + 64 < K, other=0.0).to(tl.float32)
    either = tl.maximum(tl.abs(low), tl.abs(high), propagate_nan=tl.PropagateNan.ALL)
    biggest = tl.max(either, 1)
    bad = tl.max((either != either).to(tl.int32), 1)
    if not GROUPED:
        biggest = tl.broadcast_to(tl.max(biggest, 0)[None], [PADDED_G])
        bad = tl.broadcast_to(tl.max(bad, 0)[None], [PADDED_G])
    scale = tl.where(biggest > 0, tl.div_rn(biggest, tl.full([PADDED_G], top, tl.float32)), 1.0)
    scale = tl.where(bad > 0, float("nan"), scale)
    spread = tl.broadcast_to(scale[:, None], [PADDED_G, 64])
    first = _code(tl.div_rn(low, spread), KIND)
    second = _code(tl.div_rn(high, spread), KIND)
    tl.store(
        words_ptr + row * (NUM_G * 64) + g * 64 + j,
        (first | (second << 8)).to(tl.int16),
        mask=g < NUM_G,
    )
    group = tl.arange(0, PADDED_G)
    if GROUPED:
        tl.store(scale_ptr + row * NUM_G + group, scale, mask=group < NUM_G)
    else:
        tl.store(scale_ptr + row + group, scale, mask=group < 1)
