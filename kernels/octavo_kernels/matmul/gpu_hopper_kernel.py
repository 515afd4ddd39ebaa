"""Gluon kernel of the matmul of few rows for Hopper: weights stream through a ring of tiles.

A producer warp copies tiles of weights, and of x, into the ring by TMA and never stops between
tiles of the output; one warpgroup multiplies them where they lie. The weights are the tall operand
of a wgmma, whose 64 rows need not all be used: a tile may have as many rows as spreads the work
evenly over the multiprocessors. One float32 accumulator walks K in ascending order and what follows
is as in gpu_kernel, and so are the bits.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo_kernels.silu_mul.gpu_kernel import activate

RENAMED = hasattr(tma, "async_load")  # after Triton 3.6
copy_box = tma.async_load if RENAMED else tma.async_copy_global_to_shared
WGMMA_ROWS = gl.constexpr(64)


@gluon.jit
def _num_steps(num_m, NUM_N: gl.constexpr, NUM_K: gl.constexpr):
    """Steps of BLOCK_K of all tiles of out that this program takes."""
    programs = gl.num_programs(0)
    return (num_m * NUM_N - gl.program_id(0) + programs - 1) // programs * NUM_K


@gluon.jit
def _place(step, num_m, NUM_K: gl.constexpr):
    """Row tile, column tile and step of K of this program's step."""
    tile = gl.program_id(0) + step // NUM_K * gl.num_programs(0)
    return tile % num_m, tile // num_m, step % NUM_K


@gluon.jit
def _copy_weights(w_desc, w_smem, full, step, num_m, N: gl.constexpr, NUM_K: gl.constexpr,
                  ROWS: gl.constexpr, X_BYTES: gl.constexpr, GATED: gl.constexpr):  # fmt: skip
    """Starts the copy of a step's weights, and says what will come with them."""
    STAGES: gl.constexpr = full.shape[0]
    PARTS: gl.constexpr = w_smem.shape[0] // STAGES
    BOX: gl.constexpr = w_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = w_desc.block_type.shape[1]
    _, tile_n, k = _place(step, num_m, NUM_K)
    slot = step % STAGES
    bar = full.index(slot)
    mbarrier.expect(bar, PARTS * ROWS * BLOCK_K * 2 + X_BYTES)
    for part in gl.static_range(PARTS):
        row = tile_n * ROWS + part * N if GATED else (tile_n * PARTS + part) * ROWS
        smem = w_smem.index(slot * PARTS + part)
        for at in gl.static_range(0, ROWS, BOX):
            copy_box(w_desc, [row + at, k * BLOCK_K], bar, smem.slice(at, BOX))


@gluon.jit
def _copy_x(x_desc, x_smem, full, step, num_m, NUM_K: gl.constexpr):
    STAGES: gl.constexpr = full.shape[0]
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    tile_m, _, k = _place(step, num_m, NUM_K)
    slot = step % STAGES
    copy_box(x_desc, [tile_m * BLOCK_M, k * BLOCK_K], full.index(slot), x_smem.index(slot))


@gluon.jit
def _produce(x_desc, w_desc, x_smem, w_smem, full, empty, num_m, N: gl.constexpr,
             NUM_N: gl.constexpr, NUM_K: gl.constexpr, ROWS: gl.constexpr, GATED: gl.constexpr,
             PDL: gl.constexpr):  # fmt: skip
    """The warp that fills the ring. The first weights need not wait for the launch before."""
    STAGES: gl.constexpr = full.shape[0]
    X_BYTES: gl.constexpr = x_smem.shape[1] * x_smem.shape[2] * 2
    steps = _num_steps(num_m, NUM_N, NUM_K)
    first = gl.minimum(steps, STAGES)
    for step in range(first):
        _copy_weights(w_desc, w_smem, full, step, num_m, N, NUM_K, ROWS, X_BYTES, GATED)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for step in range(first):
        _copy_x(x_desc, x_smem, full, step, num_m, NUM_K)
    for step in range(first, steps):
        mbarrier.wait(empty.index(step % STAGES), (step // STAGES & 1) ^ 1)
        _copy_weights(w_desc, w_smem, full, step, num_m, N, NUM_K, ROWS, X_BYTES, GATED)
        _copy_x(x_desc, x_smem, full, step, num_m, NUM_K)


@gluon.jit
def _start(w_smem, x_smem, full, step, acc, part: gl.constexpr):
    """Starts a step's product for a part of the tile's rows, once its operands are there."""
    STAGES: gl.constexpr = full.shape[0]
    PARTS: gl.constexpr = w_smem.shape[0] // STAGES
    slot = step % STAGES
    if part == 0:
        mbarrier.wait(full.index(slot), step // STAGES & 1)
    x = x_smem.index(slot).permute((1, 0))
    return warpgroup_mma(w_smem.index(slot * PARTS + part), x, acc, is_async=True)


@gluon.jit
def _multiply(w_smem, x_smem, full, empty, step, NUM_K: gl.constexpr, A: gl.constexpr):
    """A tile's sums [64, BLOCK_M] of its parts (zeros: no second), from `step` of the ring on."""
    STAGES: gl.constexpr = full.shape[0]
    PARTS: gl.constexpr = w_smem.shape[0] // STAGES
    BLOCK_M: gl.constexpr = x_smem.shape[1]
    one = gl.zeros([WGMMA_ROWS, BLOCK_M], gl.float32, A)
    two = one
    for k in range(NUM_K):
        one = _start(w_smem, x_smem, full, step + k, one, 0)
        if PARTS == 2:
            two = _start(w_smem, x_smem, full, step + k, two, 1)
            one, two = warpgroup_mma_wait(0, deps=(one, two))
        else:
            one = warpgroup_mma_wait(0, deps=(one,))
        # Nothing runs across steps: the weights are what is waited for, and ptxas would put a wait
        # behind every wgmma of some forms of this loop (its note C7514).
        mbarrier.arrive(empty.index((step + k) % STAGES))
    return one, two


@gluon.jit
def _round(acc, bias_ptr, n, in_n, dtype: gl.constexpr, HAS_BIAS: gl.constexpr):
    """The product as the output's dtype holds it, in float32, then the bias."""
    value = acc.to(dtype).to(gl.float32)
    if HAS_BIAS:
        value = value + gl.load(bias_ptr + n, mask=in_n, other=0.0).to(gl.float32)[:, None]
    return value


@gluon.jit
def _consume(bias_ptr, residual_ptr, out_ptr, x_smem, w_smem, full, empty, num_rows, num_m,
             N: gl.constexpr, NUM_N: gl.constexpr, NUM_K: gl.constexpr, ROWS: gl.constexpr,
             HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr, ACTIVATION: gl.constexpr,
             PDL: gl.constexpr):  # fmt: skip
    """The warpgroup that multiplies and writes."""
    BLOCK_M: gl.constexpr = x_smem.shape[1]
    GATED: gl.constexpr = ACTIVATION != ""
    SPANS: gl.constexpr = 1 if GATED else w_smem.shape[0] // full.shape[0]  # of ROWS rows
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    r = gl.arange(0, WGMMA_ROWS, gl.SliceLayout(1, A))
    if PDL:
        gdc_wait()
    for step in range(0, _num_steps(num_m, NUM_N, NUM_K), NUM_K):
        tile_m, tile_n, _ = _place(step, num_m, NUM_K)
        m = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, A))
        n = tile_n * (ROWS * SPANS) + r
        at = m.to(gl.int64)[None, :] * N + n[:, None]
        in_n = (r < ROWS) & (n < N)
        mask = in_n[:, None] & (m < num_rows)[None, :]
        also_in_n = (r < ROWS) & (n + ROWS < N)
        also_mask = also_in_n[:, None] & (m < num_rows)[None, :]
        if HAS_RESIDUAL:  # asked for before it is needed
            residual = gl.load(residual_ptr + at, mask=mask, other=0.0)
            if SPANS == 2:
                also_residual = gl.load(residual_ptr + at + ROWS, mask=also_mask, other=0.0)
        one, two = _multiply(w_smem, x_smem, full, empty, step, NUM_K, A)
        value = _round(one, bias_ptr, n, in_n, dtype, HAS_BIAS)
        if GATED:
            up = _round(two, bias_ptr, n + N, in_n, dtype, HAS_BIAS)
            value = activate(value, ACTIVATION) * up
        if HAS_RESIDUAL:
            value += residual.to(gl.float32)
        gl.store(out_ptr + at, value.to(dtype), mask=mask)
        if SPANS == 2:
            value = _round(two, bias_ptr, n + ROWS, also_in_n, dtype, HAS_BIAS)
            if HAS_RESIDUAL:
                value += also_residual.to(gl.float32)
            gl.store(out_ptr + at + ROWS, value.to(dtype), mask=also_mask)


@gluon.jit(do_not_specialize=["num_rows"])
def linear_hopper_kernel(
    x_desc,  # [T, K] by [BLOCK_M, BLOCK_K]
    w_desc,  # [N, K], or [2N, K] with an activation, by [BOX, BLOCK_K]; BOX divides ROWS
    bias_ptr,  # [N] or [2N]
    residual_ptr,  # [T, N]
    out_ptr,  # [T, N]
    num_rows,
    N: gl.constexpr,
    K: gl.constexpr,
    ROWS: gl.constexpr,  # of weights, up to 64, that one wgmma multiplies
    PARTS: gl.constexpr,  # 1 or 2 times ROWS in a tile; with an activation 2: gate, up
    STAGES: gl.constexpr,
    SINGLE: gl.constexpr,  # whether T is at most BLOCK_M
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr,  # "" for none
    PDL: gl.constexpr,
):
    """out = round(round(x @ w^T) + bias + residual), or the gated form of gpu_kernel."""
    # Grid: (programs,), any number; each takes every num_programs-th tile of out.
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    GATED: gl.constexpr = ACTIVATION != ""
    WIDTH: gl.constexpr = ROWS if GATED else ROWS * PARTS  # columns of out in a tile
    NUM_N: gl.constexpr = (N + WIDTH - 1) // WIDTH
    NUM_K: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    dtype: gl.constexpr = x_desc.dtype
    w_shape: gl.constexpr = gl.NVMMASharedLayout.get_default_for([WGMMA_ROWS, BLOCK_K], dtype)
    x_shape: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_K], dtype)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    w_smem = gl.allocate_shared_memory(dtype, [STAGES * PARTS, WGMMA_ROWS, BLOCK_K], w_shape)
    x_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], x_shape)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    num_m = gl.to_tensor(1) if SINGLE else (num_rows + BLOCK_M - 1) // BLOCK_M
    gl.warp_specialize(
        [
            (_consume, (bias_ptr, residual_ptr, out_ptr, x_smem, w_smem, full, empty, num_rows,
                        num_m, N, NUM_N, NUM_K, ROWS, HAS_BIAS, HAS_RESIDUAL, ACTIVATION, PDL)),
            (_produce, (x_desc, w_desc, x_smem, w_smem, full, empty, num_m, N, NUM_N, NUM_K, ROWS,
                        GATED, PDL)),
        ],
        [1],
        [40],
    )  # fmt: skip
