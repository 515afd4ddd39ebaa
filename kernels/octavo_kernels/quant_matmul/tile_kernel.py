"""Triton: what the quantised matmuls share: which tile a program has, rows of x, the epilogue."""

import triton
import triton.language as tl


@triton.jit
def tile_of(num_m, NUM_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Program -> (tile of T, tile of N): GROUP_M tiles of T share weights while these are in L2."""
    pid = tl.program_id(0)
    first = pid // (GROUP_M * NUM_N) * GROUP_M
    size = tl.minimum(num_m - first, GROUP_M)
    inside = pid % (GROUP_M * NUM_N)
    return first + inside % size, inside // size


@triton.jit
def load_x(x_ptrs, k_left, j, WHOLE: tl.constexpr):
    """A tile of x whose columns j exist while j < k_left; zero beyond."""
    if WHOLE:
        return tl.load(x_ptrs)
    return tl.load(x_ptrs, mask=(j < k_left)[None, :], other=0.0)


@triton.jit
def store_tile(acc, m, n, bias_ptr, residual_ptr, out_ptr, num_rows, N: tl.constexpr):
    """acc [BLOCK_N, BLOCK_M] float32 (+ bias [N]) (+ residual [T, N]) -> out [T, N]."""
    at = m[None, :].to(tl.int64) * N + n[:, None]
    live = (m < num_rows)[None, :] & (n < N)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=live)
