"""The matmul of many rows for Hopper: tiles come by the copy engine, programs stay for several.

The same order and the same roundings as in gpu_kernel, and so the same bits; a program begins to
load its next tile while it finishes one.
"""

import triton
import triton.language as tl

from octavo_kernels.launch import jit
from octavo_kernels.matmul.gpu_kernel import add_bias, place_of
from octavo_kernels.silu_mul.gpu_kernel import activate


@triton.jit
def _at_and_mask(tile_m, tile_n, num_rows, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Offsets of a tile of [T, N] and which of them exist; its columns, and which exist."""
    rows = tile_m * BM + tl.arange(0, BM)
    columns = tile_n * BN + tl.arange(0, BN)
    in_columns = columns < N
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    return at, (rows < num_rows)[:, None] & in_columns[None, :], columns, in_columns


@jit
def linear_tma_kernel(
    x_desc,  # [T, K] by [BLOCK_M, BLOCK_K]
    w_desc,  # [N, K] by [BLOCK_N, BLOCK_K]
    bias_ptr,  # [N]
    residual_ptr,  # [T, N]
    out_ptr,  # [T, N]
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """out = round(round(x @ w^T) + bias + residual)."""
    # Grid (programs that fit at once,): each takes every num_programs-th tile of out.
    NUM_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    num_m = tl.cdiv(num_rows, BLOCK_M)
    for tile in tl.range(tl.program_id(0), num_m * NUM_N, tl.num_programs(0), flatten=True):
        tile_m, tile_n = place_of(tile, num_m, NUM_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([tile_m * BLOCK_M, k])
            w = w_desc.load([tile_n * BLOCK_N, k])
            acc = tl.dot(x, w.T, acc, input_precision="ieee")
        at, mask, columns, in_columns = _at_and_mask(tile_m, tile_n, num_rows, N, BLOCK_M, BLOCK_N)
        value = acc.to(out_ptr.dtype.element_ty).to(tl.float32)
        if HAS_BIAS:
            value = add_bias(value, bias_ptr, columns, in_columns)
        if HAS_RESIDUAL:
            value += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def gated_linear_tma_kernel(
    x_desc,  # [T, K] by [BLOCK_M, BLOCK_K]
    w_desc,  # [2F, K] by [BLOCK_N, BLOCK_K]: F rows of the gate, then F rows of up
    bias_ptr,  # [2F]
    out_ptr,  # [T, F]
    num_rows,
    F: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """out = round(activation(round(x @ gate^T) + bias) * (round(x @ up^T) + bias))."""
    # Grid (programs that fit at once,): each takes every num_programs-th tile of out.
    NUM_N: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    num_m = tl.cdiv(num_rows, BLOCK_M)
    for tile in tl.range(tl.program_id(0), num_m * NUM_N, tl.num_programs(0), flatten=True):
        tile_m, tile_n = place_of(tile, num_m, NUM_N, GROUP_M)
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([tile_m * BLOCK_M, k])
            w = w_desc.load([tile_n * BLOCK_N, k])
            gate = tl.dot(x, w.T, gate, input_precision="ieee")
            w = w_desc.load([F + tile_n * BLOCK_N, k])
            up = tl.dot(x, w.T, up, input_precision="ieee")
        at, mask, columns, in_columns = _at_and_mask(tile_m, tile_n, num_rows, F, BLOCK_M, BLOCK_N)
        gate = gate.to(out_ptr.dtype.element_ty).to(tl.float32)
        up = up.to(out_ptr.dtype.element_ty).to(tl.float32)
        if HAS_BIAS:
            gate = add_bias(gate, bias_ptr, columns, in_columns)
            up = add_bias(up, bias_ptr + F, columns, in_columns)
        value = activate(gate, ACTIVATION) * up
        tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=mask)
