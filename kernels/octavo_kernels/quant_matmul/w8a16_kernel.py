"""Triton: activations times 8-bit weights (e4m3 or int8), widened in registers."""

import triton.language as tl

from octavo_kernels.launch import jit
from octavo_kernels.quant_matmul.conversion_kernel import widen8
from octavo_kernels.quant_matmul.tile_kernel import (
    load_x,
    offsets,
    over_n,
    product,
    store_tile,
    tile_of,
    zero_tile,
)


@jit
def w8a16(
    x_ptr,  # [T, K] bf16, fp16, fp32
    words_ptr,  # [G, N, 64] int16
    scale_ptr,  # [S, ceil(N / ROWS)] fp32, S = 1 or G
    bias_ptr,  # [N] or None
    residual_ptr,  # [T, N] or None
    out_ptr,  # [T, N]
    num_rows,  # T
    N: tl.constexpr,
    K: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPED: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
    X_FIRST: tl.constexpr,
    UNROLL: tl.constexpr,
):
    # Grid: (tiles of T * tiles of N,)
    NUM_G: tl.constexpr = (K + 127) // 128
    NUM_SCALES: tl.constexpr = (N + ROWS - 1) // ROWS
    # The plain path computes in float32: the interpreter has no bf16 matmul.
    dtype: tl.constexpr = x_ptr.dtype.element_ty if FAST else tl.float32
    pid_m, pid_n = tile_of(tl.cdiv(num_rows, BLOCK_M), (N + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, 64)
    # Rows past the end repeat the last one: nothing is masked in the loop, nothing of them stored.
    x_ptrs = x_ptr + tl.minimum(m, num_rows - 1).to(tl.int64)[:, None] * K + j[None, :]
    n_in = n if N % BLOCK_N == 0 else tl.minimum(n, N - 1)
    word_ptrs = words_ptr + offsets(n_in, j, 64, X_FIRST)
    scale_ptrs = scale_ptr + n_in // ROWS
    scale = tl.load(scale_ptrs).to(tl.float32)
    acc = zero_tile(BLOCK_N, BLOCK_M, X_FIRST, tl.float32)
    for g in range(0, NUM_G, UNROLL):
        for u in tl.static_range(UNROLL):
            now = scale
            if GROUPED:  # asked for one group ahead, since it is not part of the pipeline
                scale = tl.load(scale_ptrs + tl.minimum(g + u + 1, NUM_G - 1) * NUM_SCALES)
                scale = scale.to(tl.float32)
            words = tl.load(word_ptrs)
            left = K - (g + u) * 128
            low = widen8(words, 0, KIND, dtype, FAST)
            x = load_x(x_ptrs, left, j, K % 128 == 0)
            part = zero_tile(BLOCK_N, BLOCK_M, X_FIRST, tl.float32)
            part = product(low, x.to(dtype), part, X_FIRST)
            high = widen8(words, 1, KIND, dtype, FAST)
            x = load_x(x_ptrs + 64, left - 64, j, K % 128 == 0)
            part = product(high, x.to(dtype), part, X_FIRST)
            # 128 elements in the matrix unit, then into float32: the same for every tile.
            acc = tl.fma(part, over_n(now, BLOCK_M, X_FIRST), acc)
            word_ptrs += N * 64
            x_ptrs += 128
    store_tile(acc, m, n, bias_ptr, residual_ptr, out_ptr, num_rows, N, X_FIRST)
