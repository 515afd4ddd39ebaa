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
def over_n(values, BLOCK_M: tl.constexpr, X_FIRST: tl.constexpr):
    """One value for each row of the weight, spread over a tile of the result.

    Tiles of the result are [BLOCK_N, BLOCK_M], the weight being the first operand (its codes never
    leave the registers on their way into wgmma), or [BLOCK_M, BLOCK_N] where X_FIRST: a warp's mma
    then has 8 rows of the weight instead of 16, and a small matrix twice the warps.
    """
    if X_FIRST:
        return tl.broadcast_to(values[None, :], [BLOCK_M, values.shape[0]])
    else:
        return tl.broadcast_to(values[:, None], [values.shape[0], BLOCK_M])


@triton.jit
def over_m(values, X_FIRST: tl.constexpr):
    """One value for each row of x, as `over_n`, ready to be spread."""
    if X_FIRST:
        return values[:, None]
    else:
        return values[None, :]


@triton.jit
def offsets(n, j, WIDTH: tl.constexpr, X_FIRST: tl.constexpr):
    """Offsets of elements j in rows n of a group, [BLOCK_N, J] or its transpose."""
    if X_FIRST:
        return n.to(tl.int64)[None, :] * WIDTH + j[:, None]
    else:
        return n.to(tl.int64)[:, None] * WIDTH + j[None, :]


@triton.jit
def product(codes, x, part, X_FIRST: tl.constexpr):
    """part + codes (as `offsets` laid them) times x [BLOCK_M, J]."""
    if X_FIRST:
        return tl.dot(x, codes, part, input_precision="ieee", out_dtype=part.dtype)
    else:
        return tl.dot(codes, tl.trans(x), part, input_precision="ieee", out_dtype=part.dtype)


@triton.jit
def zero_tile(
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, X_FIRST: tl.constexpr, DTYPE: tl.constexpr
):
    """A tile of the result, all zero."""
    if X_FIRST:
        return tl.zeros([BLOCK_M, BLOCK_N], DTYPE)
    else:
        return tl.zeros([BLOCK_N, BLOCK_M], DTYPE)


@triton.jit
def store_tile(
    acc, m, n, bias_ptr, residual_ptr, out_ptr, num_rows, N: tl.constexpr, X_FIRST: tl.constexpr
):
    """acc float32 (+ bias [N]) (+ residual [T, N]) -> out [T, N]."""
    if X_FIRST:
        m, n = m[:, None], n[None, :]
    else:
        m, n = m[None, :], n[:, None]
    at = m.to(tl.int64) * N + n
    live = (m < num_rows) & (n < N)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=live)
