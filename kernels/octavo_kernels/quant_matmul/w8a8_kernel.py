"""Triton: 8-bit activations times 8-bit weights in the matrix unit, e4m3 or int8."""

import triton.language as tl

from octavo_kernels.launch import jit
from octavo_kernels.quant_matmul.tile_kernel import (
    offsets,
    over_m,
    over_n,
    product,
    store_tile,
    tile_of,
    zero_tile,
)


@jit
def w8a8(
    x_ptr,  # [T, G, 128] e4m3 or int8, interleaved like the weight
    x_scale_ptr,  # [T, 1 or G] fp32
    codes_ptr,  # [G, N, 128] as x
    scale_ptr,  # [S, ceil(N / ROWS)] float, S = 1 or G
    bias_ptr,  # [N] or None
    residual_ptr,  # [T, N] or None
    out_ptr,  # [T, N]
    num_rows,  # T
    N: tl.constexpr,
    NUM_G: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
    X_FIRST: tl.constexpr,
    UNROLL: tl.constexpr,
):
    # Grid: (tiles of T * tiles of N,)
    NUM_SCALES: tl.constexpr = (N + ROWS - 1) // ROWS
    pid_m, pid_n = tile_of(tl.cdiv(num_rows, BLOCK_M), (N + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, 128)
    # Rows past the end repeat the last one: nothing is masked in the loop, nothing of them stored.
    row = tl.minimum(m, num_rows - 1).to(tl.int64)
    x_ptrs = x_ptr + row[:, None] * (NUM_G * 128) + j[None, :]
    n_in = n if N % BLOCK_N == 0 else tl.minimum(n, N - 1)
    code_ptrs = codes_ptr + offsets(n_in, j, 128, X_FIRST)
    scale_ptrs = scale_ptr + n_in // ROWS
    x_scale_ptrs = x_scale_ptr + (row * NUM_G if GROUPED else row)
    scale, x_scale = tl.load(scale_ptrs).to(tl.float32), tl.load(x_scale_ptrs)
    sums = zero_tile(BLOCK_N, BLOCK_M, X_FIRST, tl.int32)
    acc = zero_tile(BLOCK_N, BLOCK_M, X_FIRST, tl.float32)
    for g in range(0, NUM_G, UNROLL):
        for u in tl.static_range(UNROLL):
            codes = tl.load(code_ptrs)
            x = tl.load(x_ptrs)
            if KIND == "int8":
                sums = product(codes, x, sums, X_FIRST)  # exact
            else:
                # The matrix unit keeps few bits of e4m3 sums: 128 elements there, then float32.
                factor = over_n(scale, BLOCK_M, X_FIRST)
                if GROUPED:
                    factor = factor * over_m(x_scale, X_FIRST)
                    later = tl.minimum(g + u + 1, NUM_G - 1)
                    scale = tl.load(scale_ptrs + later * NUM_SCALES).to(tl.float32)
                    x_scale = tl.load(x_scale_ptrs + later)
                part = zero_tile(BLOCK_N, BLOCK_M, X_FIRST, tl.float32)
                part = product(codes, x, part, X_FIRST)
                acc = tl.fma(part, factor, acc)
            code_ptrs += N * 128
            x_ptrs += 128
    if KIND == "int8":
        acc = sums.to(tl.float32) * over_n(scale, BLOCK_M, X_FIRST)
    if not GROUPED:
        acc = acc * over_m(x_scale, X_FIRST)
    store_tile(acc, m, n, bias_ptr, residual_ptr, out_ptr, num_rows, N, X_FIRST)
