"""Triton: activations times 4-bit weights in groups of 32, 64, 128 or a whole row."""

import triton
import triton.language as tl

from octavo_kernels.launch import jit
from octavo_kernels.quant_matmul.conversion_kernel import magic_of, widen4
from octavo_kernels.quant_matmul.tile_kernel import (
    load_x,
    offsets,
    over_n,
    product,
    store_tile,
    tile_of,
    zero_tile,
)


@triton.jit
def _scale(scale_ptrs, index, N: tl.constexpr, S: tl.constexpr):
    """Row `index` of the scales (the last one beyond)."""
    return tl.load(scale_ptrs + tl.minimum(index, S - 1) * N).to(tl.float32)


@triton.jit
def _plane(
    words, pair, PLANE: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr, X_FIRST: tl.constexpr
):
    """Plane PLANE of words less the zero points in pair [BLOCK_N]."""
    zero = magic_of((pair & 0xFF).to(tl.int16), DTYPE, FAST)
    if X_FIRST:
        return widen4(words, tl.broadcast_to(zero[None, :], words.shape), PLANE, DTYPE, FAST)
    else:
        return widen4(words, tl.broadcast_to(zero[:, None], words.shape), PLANE, DTYPE, FAST)


@triton.jit
def _scale_in(pair, SCALE: tl.constexpr):
    """The scales in pair [BLOCK_N]."""
    return (pair >> 16).to(tl.int16).to(SCALE, bitcast=True).to(tl.float32)


@jit
def w4a16(
    x_ptr,  # [T, K] bf16, fp16, fp32
    words_ptr,  # [G, N, 32] int16
    scale_ptr,  # [S, N]; with zero points int32: zero + (16 bits of scale << 16)
    bias_ptr,  # [N] or None
    residual_ptr,  # [T, N] or None
    out_ptr,  # [T, N]
    num_rows,  # T
    N: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    PER: tl.constexpr,  # scales for 128 elements of K: 4, 2, 1
    PAIRED: tl.constexpr,  # the scales' type where they come with zero points, else None
    FAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
    X_FIRST: tl.constexpr,
    UNROLL: tl.constexpr,
):
    # Grid: (tiles of T * tiles of N,)
    NUM_G: tl.constexpr = (K + 127) // 128
    # The plain path computes in float32: the interpreter has no bf16 matmul.
    dtype: tl.constexpr = x_ptr.dtype.element_ty if FAST else tl.float32
    pid_m, pid_n = tile_of(tl.cdiv(num_rows, BLOCK_M), (N + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, 32)
    # Rows past the end repeat the last one: nothing is masked in the loop, nothing of them stored.
    x_ptrs = x_ptr + tl.minimum(m, num_rows - 1).to(tl.int64)[:, None] * K + j[None, :]
    n_in = n if N % BLOCK_N == 0 else tl.minimum(n, N - 1)
    word_ptrs = words_ptr + offsets(n_in, j, 32, X_FIRST)
    scale_ptrs = scale_ptr + n_in
    if PAIRED is None:
        next0 = _scale(scale_ptrs, 0, N, S)
        next1 = next0 if PER == 1 else _scale(scale_ptrs, 1, N, S)
        next2 = next0 if PER < 4 else _scale(scale_ptrs, 2, N, S)
        next3 = next0 if PER < 4 else _scale(scale_ptrs, 3, N, S)
    acc = zero_tile(BLOCK_N, BLOCK_M, X_FIRST, tl.float32)
    for g in range(0, NUM_G, UNROLL):
        for u in tl.static_range(UNROLL):
            first = (g + u) * PER
            if PAIRED is None:
                scale0, scale1, scale2, scale3 = next0, next1, next2, next3
                # Asked for one group ahead, since scales alone are not part of the pipeline.
                if S > 1:
                    next0 = _scale(scale_ptrs, first + PER, N, S)
                    if PER > 1:
                        next1 = _scale(scale_ptrs, first + PER + 1, N, S)
                    if PER > 2:
                        next2 = _scale(scale_ptrs, first + PER + 2, N, S)
                        next3 = _scale(scale_ptrs, first + PER + 3, N, S)
            words = tl.load(word_ptrs)
            part = zero_tile(BLOCK_N, BLOCK_M, X_FIRST, tl.float32)
            for plane in tl.static_range(4):
                left = K - (g + u) * 128 - plane * 32
                x = load_x(x_ptrs + plane * 32, left, j, K % 128 == 0)
                if PAIRED is None:
                    codes = widen4(words, None, plane, dtype, FAST)
                else:
                    if plane * PER % 4 == 0:
                        at = tl.minimum(first + plane * PER // 4, S - 1)
                        pair = tl.load(scale_ptrs + at * N)
                    codes = _plane(words, pair, plane, dtype, FAST, X_FIRST)
                part = product(codes, x.to(dtype), part, X_FIRST)
                if (plane + 1) * PER % 4 == 0:
                    if PAIRED is not None:
                        scale = _scale_in(pair, PAIRED)
                    elif plane * PER < 4:
                        scale = scale0
                    elif plane * PER < 8:
                        scale = scale1
                    elif plane * PER < 12:
                        scale = scale2
                    else:
                        scale = scale3
                    acc = tl.fma(part, over_n(scale, BLOCK_M, X_FIRST), acc)
                    part = zero_tile(BLOCK_N, BLOCK_M, X_FIRST, tl.float32)
            word_ptrs += N * 32
            x_ptrs += 128
    store_tile(acc, m, n, bias_ptr, residual_ptr, out_ptr, num_rows, N, X_FIRST)
