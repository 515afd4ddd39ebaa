"""Dense matmul tiles in Triton and what may follow a product; knows no layer and no model.

Bits: every output is one float32 accumulator that walks K in ascending order, nothing split, so
tile, stages and warps may be chosen by speed alone. The product is rounded to the output's dtype
before bias, gate or residual, which are float32 with one more rounding: the same steps that
`finish_kernel` takes after a product computed elsewhere.
"""

import triton
import triton.language as tl

from octavo_kernels.launch import jit
from octavo_kernels.silu_mul.gpu_kernel import activate


@triton.jit
def _tile_of(num_rows, NUM_N: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """Row tile and column tile: GROUP_M row tiles share each stretch of weights while in L2."""
    program = tl.program_id(0)
    num_m = tl.cdiv(num_rows, BLOCK_M)
    return place_of(program, num_m, NUM_N, GROUP_M)


@triton.jit
def place_of(program, num_m, NUM_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The program-th of num_m * NUM_N tiles as (row tile, column tile)."""
    group = program // (GROUP_M * NUM_N)
    first_m = group * GROUP_M
    size = tl.minimum(num_m - first_m, GROUP_M)
    inside = program - group * (GROUP_M * NUM_N)
    return first_m + inside % size, inside // size


@triton.jit
def _multiply(x, w, acc, SWAP: tl.constexpr):
    """acc + x [M, K] @ w [N, K]^T; with SWAP acc is [N, M] and the weights are the tall operand."""
    if SWAP:
        return tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    else:
        return tl.dot(x, tl.trans(w), acc, input_precision="ieee")


@triton.jit
def _load_tile(
    pointers, in_rows, columns, k, K: tl.constexpr, EVEN: tl.constexpr, POLICY: tl.constexpr
):
    """[R, BLOCK_K] from column k on, zero outside; EVEN: K is a multiple of BLOCK_K."""
    if EVEN:
        return tl.load(pointers, mask=in_rows[:, None], other=0.0, eviction_policy=POLICY)
    else:
        mask = in_rows[:, None] & (columns < K - k)[None, :]
        return tl.load(pointers, mask=mask, other=0.0, eviction_policy=POLICY)


@triton.jit
def _wait_for_x(w_ptr, columns, K: tl.constexpr, PREFETCH: tl.constexpr):
    """Asks L2 for the tile's first PREFETCH weight columns, then waits for the launch before."""
    if PREFETCH > 0:
        LINE: tl.constexpr = 1024 // w_ptr.dtype.element_ty.primitive_bitwidth
        lines = tl.arange(0, PREFETCH // LINE) * LINE
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [(w_ptr + columns.to(tl.int64)[:, None] * K + lines[None, :]).to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def add_bias(value, bias_ptr, columns, in_columns):
    bias = tl.load(bias_ptr + columns, mask=in_columns, other=0.0)
    return value + bias.to(tl.float32)[None, :]


@jit
def linear_kernel(
    x_ptr,  # [T, K]
    w_ptr,  # [N, K]
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
    SWAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,  # weight columns asked for before the launch before has ended
):
    """out = round(round(x @ w^T) + bias + residual)."""
    # Grid (row tiles * column tiles,): one tile of out per program.
    EVEN: tl.constexpr = K % BLOCK_K == 0
    # Weights of one row tile are read once; of several, again from L2.
    W_POLICY: tl.constexpr = "evict_first" if BLOCK_M <= 64 else ""
    tile_m, tile_n = _tile_of(num_rows, (N + BLOCK_N - 1) // BLOCK_N, BLOCK_M, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    in_rows = rows < num_rows
    in_columns = columns < N
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * K + inner[None, :]
    w_ptrs = w_ptr + columns.to(tl.int64)[:, None] * K + inner[None, :]
    if PDL:
        _wait_for_x(w_ptr, tl.minimum(columns, N - 1), K, PREFETCH)
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = _load_tile(x_ptrs, in_rows, inner, k, K, EVEN, "evict_last")
        w = _load_tile(w_ptrs, in_columns, inner, k, K, EVEN, W_POLICY)
        acc = _multiply(x, w, acc, SWAP)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    if SWAP:
        acc = tl.trans(acc)
    value = acc.to(out_ptr.dtype.element_ty).to(tl.float32)
    if HAS_BIAS:
        value = add_bias(value, bias_ptr, columns, in_columns)
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    if HAS_RESIDUAL:
        value += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def gated_linear_kernel(
    x_ptr,  # [T, K]
    w_ptr,  # [2F, K]: F rows of the gate, then F rows of up
    bias_ptr,  # [2F]
    out_ptr,  # [T, F]
    num_rows,
    F: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SWAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """out = round(activation(round(x @ gate^T) + bias) * (round(x @ up^T) + bias))."""
    # Grid (row tiles * column tiles of F,): one tile of out per program, from two of weights.
    EVEN: tl.constexpr = K % BLOCK_K == 0
    W_POLICY: tl.constexpr = "evict_first" if BLOCK_M <= 64 else ""
    tile_m, tile_n = _tile_of(num_rows, (F + BLOCK_N - 1) // BLOCK_N, BLOCK_M, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    in_rows = rows < num_rows
    in_columns = columns < F
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * K + inner[None, :]
    gate_ptrs = w_ptr + columns.to(tl.int64)[:, None] * K + inner[None, :]
    up_ptrs = w_ptr + (columns + F).to(tl.int64)[:, None] * K + inner[None, :]
    if PDL:
        _wait_for_x(w_ptr, tl.minimum(columns, F - 1), K, PREFETCH)
    if SWAP:
        gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = gate
    for k in range(0, K, BLOCK_K):
        x = _load_tile(x_ptrs, in_rows, inner, k, K, EVEN, "evict_last")
        w = _load_tile(gate_ptrs, in_columns, inner, k, K, EVEN, W_POLICY)
        gate = _multiply(x, w, gate, SWAP)
        w = _load_tile(up_ptrs, in_columns, inner, k, K, EVEN, W_POLICY)
        up = _multiply(x, w, up, SWAP)
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
    if SWAP:
        gate = tl.trans(gate)
        up = tl.trans(up)
    gate = gate.to(out_ptr.dtype.element_ty).to(tl.float32)
    up = up.to(out_ptr.dtype.element_ty).to(tl.float32)
    if HAS_BIAS:
        gate = add_bias(gate, bias_ptr, columns, in_columns)
        up = add_bias(up, bias_ptr + F, columns, in_columns)
    value = activate(gate, ACTIVATION) * up
    at = rows.to(tl.int64)[:, None] * F + columns[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def finish_kernel(
    product_ptr,  # [T, N]; the gate and up halves of [T, 2N] with an activation
    bias_ptr,  # [N] or [2N]
    residual_ptr,  # [T, N]
    out_ptr,  # [T, N]
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,  # "" for none
):
    """What the kernels above do after rounding a product, for a product that lies in memory."""
    # Grid (T, column blocks): BLOCK columns of one row per program.
    WIDTH: tl.constexpr = N if ACTIVATION == "" else 2 * N
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < N
    product_ptr += row * WIDTH
    value = tl.load(product_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION != "":
        up = tl.load(product_ptr + N + columns, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            up += tl.load(bias_ptr + N + columns, mask=mask, other=0.0).to(tl.float32)
        value = activate(value, ACTIVATION) * up
    if HAS_RESIDUAL:
        at = residual_ptr + row * N + columns
        value += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + columns, value.to(out_ptr.dtype.element_ty), mask=mask)
