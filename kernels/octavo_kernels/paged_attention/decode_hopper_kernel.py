"""Gluon kernel of decode attention for Hopper: TMA, asynchronous WGMMA, specialised warps.

Programs walk the units of an `AttentionPlan` as `decode_kernel` does. A producer warp copies K and
V tiles with TMA into rings, ahead of everything else and across the borders of units; a consumer
warpgroup starts the scores of tile j, then the values of tile j - 1, and does the softmax of tile j
while the tensor cores work. A cache of e4m3 passes through a warpgroup that widens it tile by tile.
The arithmetic is `numerics`, bit for bit.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from octavo_kernels.paged_attention.decode_hopper_ring_kernel import (
    RENAMED,
    arrive,
    first_unit,
    next_unit,
    produce,
    ring_barriers,
    wait,
    widen,
)
from octavo_kernels.paged_attention.decode_kernel import _unit_tiles
from octavo_kernels.paged_attention.logits_kernel import finish, logit_scale, softmax_scale
from octavo_kernels.paged_attention.numerics import merge, softmax_tile

ROWS = gl.constexpr(64)  # of a unit: query tokens x heads of one kv head, the rest zeros
copy_rows = async_copy.async_load if RENAMED.value else async_copy.async_copy_global_to_shared
all_threads = gl.barrier if RENAMED.value else gl.thread_barrier


@gluon.jit
def _load_q(q_ptr, q_smem, start, tokens, head, Q_STRIDE: gl.constexpr, G: gl.constexpr):
    """Starts the copy of a unit's rows of q; rows that do not exist become 0."""
    H: gl.constexpr = q_smem.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // H, H // 8], [4, 1], [1, 0])
    r = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    h = gl.arange(0, H, gl.SliceLayout(0, layout))
    at = (start + r // G).to(gl.int64) * Q_STRIDE + (head * G + r % G) * H
    copy_rows(q_smem, q_ptr + at[:, None] + h[None, :], mask=(r // G < tokens)[:, None])
    async_copy.commit_group()


@gluon.jit
def _start_scores(q_smem, k_smem, k_full, count, S: gl.constexpr):
    """Waits for tile number `count` of K and starts its scores; returns them unfinished."""
    TILE: gl.constexpr = k_smem.shape[1]
    wait(k_full, count)
    s = gl.zeros([ROWS, TILE], gl.float32, S)
    k = k_smem.index(count % k_smem.shape[0]).permute((1, 0))
    return warpgroup_mma(q_smem, k, s, use_acc=False, is_async=True)


@gluon.jit
def _upper(x, HALF: gl.constexpr):
    """Rows 0 to 7 of every 16 of x [ROWS, ..], which are all that hold a query where HALF."""
    if HALF:
        y, _ = gl.split(x.reshape([ROWS // 16, 2, 8, x.shape[1]]).permute([0, 2, 3, 1]))
        return y.reshape([ROWS // 2, x.shape[1]])
    else:
        return x


@gluon.jit
def _whole(x, HALF: gl.constexpr):
    """The reverse of `_upper`, with zeros in the other rows."""
    if HALF:
        y = gl.join(x, gl.zeros_like(x)).reshape([ROWS // 16, 8, x.shape[1], 2])
        return y.permute([0, 3, 1, 2]).reshape([ROWS, x.shape[1]])
    else:
        return x


@gluon.jit
def _whole_rows(x, like: gl.constexpr, HALF: gl.constexpr):
    """`_whole` for a value a row, in the layout `like`."""
    if HALF:
        y = gl.join(x, gl.zeros_like(x)).reshape([ROWS // 16, 8, 2]).permute([0, 2, 1])
        x = y.reshape([ROWS])
    return gl.convert_layout(x, like, assert_trivial=True)


@gluon.jit
def _mask(s, tile, last, WINDOW: gl.constexpr, S: gl.constexpr):
    """-inf where a row does not see a key; last [ROWS] is the newest key a row sees, or -1."""
    TILE: gl.constexpr = s.shape[1]
    key = (tile * TILE + gl.arange(0, TILE, gl.SliceLayout(0, S)))[None, :]
    seen = key <= last[:, None]
    if WINDOW > 0:
        seen = seen & (key > last[:, None] - WINDOW)
    return gl.where(seen, s, float("-inf"))


@gluon.jit
def _clear_unseen(v, lo, hi, LAYOUT: gl.constexpr):
    """Zeroes the rows of a V tile outside [lo, hi), which may hold NaN: 0 * NaN is not 0."""
    STEP: gl.constexpr = 32
    TILE: gl.constexpr = v.shape[0]
    for at in gl.static_range(0, TILE, STEP):
        if (hi < at + STEP) | (lo > at):
            part = v.slice(at, STEP)
            row = at + gl.arange(0, STEP, gl.SliceLayout(1, LAYOUT))
            seen = (row >= lo) & (row < hi)
            part.store(gl.where(seen[:, None], part.load(LAYOUT), 0.0))
    fence_async_shared()


@gluon.jit
def _attend(q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, count, begin, end,
            full_from, full_to, low, keys, last, scale, q_ptr, next_start, next_tokens, next_head,
            Q_STRIDE: gl.constexpr, G: gl.constexpr, A: gl.constexpr, S: gl.constexpr,
            WINDOW: gl.constexpr, CLEAR: gl.constexpr, HALF: gl.constexpr):  # fmt: skip
    """The rows in q_smem against tiles [begin, end) of keys, the rings' from number `count` on.

    last [ROWS]: newest key a row sees. All rows see all keys of tiles [full_from, full_to), none
    sees a key before `low`. Meanwhile the next unit's rows of q are copied. Returns m, l and the
    sums [ROWS, H] of these tiles. HALF: no query lies in rows 8 to 15 of every 16, which are those
    that the same threads would have to compute.
    """
    H: gl.constexpr = q_smem.shape[1]
    TILE: gl.constexpr = k_smem.shape[1]
    V_STAGES: gl.constexpr = v_smem.shape[0]
    P: gl.constexpr = gl.DotOperandLayout(0, A, 2)
    A_ROW: gl.constexpr = gl.SliceLayout(1, A)
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // H, H // 8], [4, 1], [1, 0])
    s = _start_scores(q_smem, k_smem, k_full, count, S)
    s = warpgroup_mma_wait(0, deps=(s,))
    arrive(k_empty, count)
    if (begin < full_from) | (begin >= full_to):
        s = _mask(s, begin, last, WINDOW, S)
    x = _upper(s, HALF)
    S_ROW: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    m = gl.full([x.shape[0]], float("-inf"), gl.float32, S_ROW)
    l = gl.full([x.shape[0]], 0.0, gl.float32, S_ROW)
    acc = gl.zeros([ROWS, H], gl.float32, A)
    x, m, l, alpha = softmax_tile(x, m, l, scale)
    p = gl.convert_layout(_whole(x.to(q_smem.dtype), HALF), P)
    wait(v_full, count)
    if CLEAR and WINDOW > 0:  # noqa: SIM102  (constexprs: no branch is left behind)
        if low > begin * TILE:
            _clear_unseen(v_smem.index(count % V_STAGES), low - begin * TILE, TILE, FLAT)
    for tile in range(begin + 1, end):
        s = _start_scores(q_smem, k_smem, k_full, count + 1, S)
        acc = warpgroup_mma(p, v_smem.index(count % V_STAGES), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        arrive(k_empty, count + 1)
        if (tile < full_from) | (tile >= full_to):
            s = _mask(s, tile, last, WINDOW, S)
        x, m, l, alpha = softmax_tile(_upper(s, HALF), m, l, scale)
        # This tile's V is needed only in the next round, but the branch in its wait keeps the
        # assembler from moving the softmax behind the end of the product that runs now.
        wait(v_full, count + 1)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        arrive(v_empty, count)
        acc = acc * _whole_rows(alpha, A_ROW, HALF)[:, None]
        p = gl.convert_layout(_whole(x.to(q_smem.dtype), HALF), P)
        count += 1
    _load_q(q_ptr, q_smem, next_start, next_tokens, next_head, Q_STRIDE, G)
    if CLEAR:  # noqa: SIM102
        if end * TILE > keys:
            _clear_unseen(v_smem.index(count % V_STAGES), 0, keys - (end - 1) * TILE, FLAT)
    acc = warpgroup_mma(p, v_smem.index(count % V_STAGES), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    arrive(v_empty, count)
    return _whole_rows(m, A_ROW, HALF), _whole_rows(l, A_ROW, HALF), acc


@gluon.jit
def _fold(base, rows, parts, start, head, out_ptr, m_ptr, l_ptr, acc_ptr, sinks_ptr, v_scale_ptr,
          N: gl.constexpr, G: gl.constexpr, H: gl.constexpr):  # fmt: skip
    """Writes the output of one (request, kv head) from its partials, partitions ascending."""
    STEP: gl.constexpr = 512 // H
    AHEAD: gl.constexpr = 8  # partitions whose partials are read at once
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // H, H // 4], [4, 1], [1, 0])
    d = gl.arange(0, H, gl.SliceLayout(0, layout))
    for at in range(0, rows, STEP):
        row = at + gl.arange(0, STEP, gl.SliceLayout(1, layout))
        live = row < rows
        m = gl.full([STEP], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
        l = gl.full([STEP], 0.0, gl.float32, gl.SliceLayout(1, layout))
        acc = gl.zeros([STEP, H], gl.float32, layout)
        for part in range(0, parts, AHEAD):
            read = ()
            for i in gl.static_range(AHEAD):
                # Written by other programs a moment ago: read past the first-level cache. (Read
                # again rather than masked: the compiler would wait for each masked load.)
                here = gl.minimum(part + i, parts - 1) * rows + gl.minimum(row, rows - 1)
                at_row = (base + here).to(gl.int64)
                m_b = gl.load(m_ptr + at_row, cache_modifier=".cg")
                l_b = gl.load(l_ptr + at_row, cache_modifier=".cg")
                acc_b = gl.load(acc_ptr + at_row[:, None] * H + d[None, :], cache_modifier=".cg")
                read = read + ((m_b, l_b, acc_b),)
            for i in gl.static_range(AHEAD):
                m_a, l_a, acc_a = merge(m, l, acc, read[i][0], read[i][1], read[i][2])
                there = part + i < parts
                m = gl.where(there, m_a, m)
                l = gl.where(there, l_a, l)
                acc = gl.where(there, acc_a, acc)
        heads = head * G + row % G
        values = finish(m, l, acc, gl.minimum(heads, N - 1), head, sinks_ptr, v_scale_ptr)
        where = ((start + row // G).to(gl.int64) * N + heads) * H
        gl.store(
            out_ptr + where[:, None] + d[None, :], values.to(out_ptr.dtype.element_ty),
            mask=live[:, None],
        )  # fmt: skip


@gluon.jit
def _end_unit(m, l, acc, row, head, part, unit, out_ptr, arrivals_ptr, m_ptr, l_ptr, acc_ptr,
              sinks_ptr, v_scale_ptr, N: gl.constexpr, K: gl.constexpr,
              FUSED: gl.constexpr, A: gl.constexpr):  # fmt: skip
    """Writes a unit's output, or its partials and, if it is the last of its kind, their sum."""
    H: gl.constexpr = acc.shape[1]
    G: gl.constexpr = N // K
    _, start, query_len, _, first, own, stop, partial = unit
    r = gl.arange(0, ROWS, gl.SliceLayout(1, A))
    d = gl.arange(0, H, gl.SliceLayout(0, A))
    rows = query_len * G
    parts = stop - first
    if parts == 1:
        heads = head * G + r % G
        values = finish(m, l, acc, heads, head, sinks_ptr, v_scale_ptr)
        at = ((start + r // G).to(gl.int64) * N + heads) * H
        gl.store(
            out_ptr + at[:, None] + d[None, :], values.to(out_ptr.dtype.element_ty),
            mask=(r < rows)[:, None],
        )  # fmt: skip
    else:
        base = partial + head * parts * rows
        at = (base + (part - first) * rows + r).to(gl.int64)
        gl.store(m_ptr + at, m, mask=r < rows)
        gl.store(l_ptr + at, l, mask=r < rows)
        gl.store(acc_ptr + at[:, None] * H + d[None, :], acc, mask=(r < rows)[:, None])
        if FUSED:
            all_threads()  # all stores before the arrival
            arrival = arrivals_ptr + row * K + head
            if gl.atomic_add(arrival, 1, sem="acq_rel") == stop - own - 1:
                _fold(
                    base, rows, parts, start, head, out_ptr, m_ptr, l_ptr, acc_ptr, sinks_ptr,
                    v_scale_ptr, N, G, H,
                )  # fmt: skip
                gl.store(arrival, 0)


@gluon.jit
def _consume(q_ptr, out_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
             requests_ptr, programs_ptr, arrivals_ptr, m_ptr, l_ptr, acc_ptr, sinks_ptr,
             k_scale_ptr, v_scale_ptr, scale, step, last_program, Q_STRIDE: gl.constexpr,
             N: gl.constexpr, K: gl.constexpr, PARTITION: gl.constexpr, CAUSAL: gl.constexpr,
             WINDOW: gl.constexpr, FUSED: gl.constexpr, HALF: gl.constexpr,
             CLEAR: gl.constexpr):  # fmt: skip
    """The consumer warpgroup: this program's units."""
    H: gl.constexpr = q_smem.shape[1]
    TILE: gl.constexpr = k_smem.shape[1]
    G: gl.constexpr = N // K
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, H, 16])
    r = gl.arange(0, ROWS, gl.SliceLayout(1, S))
    row, head, part, todo, unit = first_unit(programs_ptr, requests_ptr, step, last_program)
    _load_q(q_ptr, q_smem, unit[1], gl.where(todo > 0, unit[2], 0), head, Q_STRIDE, G)
    count = 0
    while count < todo:
        begin, end = _unit_tiles(part, unit[2], unit[3], TILE, PARTITION, WINDOW)
        more = count + end - begin < todo
        next_row, next_head, next_part, ahead = next_unit(
            requests_ptr, row, head, part, more, unit, K
        )
        tokens, keys = unit[2], unit[3]
        position = keys - tokens
        low, full_from = 0, 0
        if CAUSAL:
            last = gl.where(r // G < tokens, position + r // G, -1)
            full_to = (position + 1) // TILE
            if WINDOW > 0:
                low = position - WINDOW + 1
                full_from = (gl.maximum(position + tokens - WINDOW, 0) + TILE - 1) // TILE
        else:
            last = gl.where(r // G < tokens, keys - 1, -1)
            full_to = keys // TILE
        natural = logit_scale(scale, k_scale_ptr, head)
        async_copy.wait_group(0)
        fence_async_shared()
        m, l, acc = _attend(
            q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, count, begin, end,
            full_from, full_to, low, keys, last, softmax_scale(natural, None, None, 0.0), q_ptr,
            ahead[1], gl.where(more, ahead[2], 0), next_head, Q_STRIDE, G, A, S, WINDOW, CLEAR,
            HALF,
        )  # fmt: skip
        _end_unit(
            m, l, acc, row, head, part, unit, out_ptr, arrivals_ptr, m_ptr, l_ptr, acc_ptr,
            sinks_ptr, v_scale_ptr, N, K, FUSED, A,
        )  # fmt: skip
        count += end - begin
        row, head, part, unit = next_row, next_head, next_part, ahead
    async_copy.wait_group(0)


@gluon.jit(do_not_specialize=["scale", "table_stride", "step", "last_program"])
def decode_hopper(
    q_ptr,  # [T, N, H], rows Q_STRIDE elements apart
    k_desc, v_desc,  # cache [B, K, BLOCK, H] as [B * K * BLOCK, H], copied by blocks [BLOCK, H]
    out_ptr,  # [T, N, H]
    table_ptr,  # [R, max_blocks] int32, rows table_stride apart
    requests_ptr, programs_ptr, arrivals_ptr, m_ptr, l_ptr, acc_ptr,  # see AttentionPlan
    sinks_ptr, k_scale_ptr, v_scale_ptr,  # [N], [K], [K] float32, or None
    scale, table_stride,
    step, last_program,  # programs of the plan that one of this grid does, and the plan's number
    N: gl.constexpr, K: gl.constexpr, H: gl.constexpr, Q_STRIDE: gl.constexpr, BLOCK: gl.constexpr,
    TILE: gl.constexpr, PARTITION: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,  # 0, or keys that a token sees, itself included; needs CAUSAL
    FUSED: gl.constexpr,  # whether partials are folded here, or by `decode_kernel.combine`
    HALF: gl.constexpr,  # whether no unit has more than 8 rows
    STAGES: gl.constexpr,  # tiles of K, and of V, on their way or in use
    WIDE: gl.constexpr,  # (K, V) tiles of a cache of 8 bits that are kept widened, or (0, 0)
):  # fmt: skip
    # Grid: (programs of the plan / step, rounded up,).
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    kv: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, H], dtype)
    codes: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, H], k_desc.dtype)
    rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, H], dtype)
    q_smem = gl.allocate_shared_memory(dtype, [ROWS, H], rows)
    k_copied = gl.allocate_shared_memory(k_desc.dtype, [STAGES, TILE, H], codes)
    v_copied = gl.allocate_shared_memory(k_desc.dtype, [STAGES, TILE, H], codes)
    k_here, k_taken = ring_barriers(STAGES)
    v_here, v_taken = ring_barriers(STAGES)
    if WIDE[0] > 0:
        k_smem = gl.allocate_shared_memory(dtype, [WIDE[0], TILE, H], kv)
        v_smem = gl.allocate_shared_memory(dtype, [WIDE[1], TILE, H], kv)
        k_full, k_empty = ring_barriers(WIDE[0])
        v_full, v_empty = ring_barriers(WIDE[1])
        gl.warp_specialize(
            [
                (_consume, (q_ptr, out_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full,
                            v_empty, requests_ptr, programs_ptr, arrivals_ptr, m_ptr, l_ptr,
                            acc_ptr, sinks_ptr, k_scale_ptr, v_scale_ptr, scale, step,
                            last_program, Q_STRIDE, N, K, PARTITION, CAUSAL, WINDOW, FUSED,
                            HALF, False)),
                (widen, (k_copied, v_copied, k_here, k_taken, v_here, v_taken, k_smem, v_smem,
                          k_full, k_empty, v_full, v_empty, requests_ptr, programs_ptr, step,
                          last_program)),
                (produce, (k_desc, v_desc, k_copied, v_copied, k_here, k_taken, v_here, v_taken,
                            table_ptr, requests_ptr, programs_ptr, table_stride, step,
                            last_program, K, BLOCK, PARTITION, WINDOW)),
            ],
            [4, 1],
            [160, 56],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (q_ptr, out_ptr, q_smem, k_copied, v_copied, k_here, k_taken, v_here,
                            v_taken, requests_ptr, programs_ptr, arrivals_ptr, m_ptr, l_ptr,
                            acc_ptr, sinks_ptr, k_scale_ptr, v_scale_ptr, scale, step,
                            last_program, Q_STRIDE, N, K, PARTITION, CAUSAL, WINDOW, FUSED,
                            HALF, True)),
                (produce, (k_desc, v_desc, k_copied, v_copied, k_here, k_taken, v_here, v_taken,
                            table_ptr, requests_ptr, programs_ptr, table_stride, step,
                            last_program, K, BLOCK, PARTITION, WINDOW)),
            ],
            [1],
            [72],
        )  # fmt: skip
