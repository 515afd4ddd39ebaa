"""Gluon kernel of prefill attention for Hopper: TMA, asynchronous WGMMA, specialised warps.

One program computes work items one after the other: 128 rows (query tokens x heads of one kv head)
against the keys they see. A producer warp copies K and V tiles with TMA into two buffers each; two
consumer warpgroups of 64 rows each start the scores of tile j, then the values of tile j - 1, and
do the softmax of tile j while the tensor cores work. The arithmetic is `numerics`, bit for bit.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from octavo_kernels.paged_attention import numerics
from octavo_kernels.paged_attention.numerics import fold_sink, merge, normalise, softmax_tile

GROUP_ROWS = gl.constexpr(64)  # rows of a consumer warpgroup
GROUPS = gl.constexpr(2)
PASS_ROUNDS = gl.constexpr(4)  # rounds of a pass, at least
LOG2_E = gl.constexpr(numerics.LOG2_E)
RENAMED = gl.constexpr(hasattr(tma, "async_load"))  # after Triton 3.6
copy_rows = async_copy.async_load if RENAMED.value else async_copy.async_copy_global_to_shared
copy_box = tma.async_load if RENAMED.value else tma.async_copy_global_to_shared


@gluon.jit
def _heads_of_a_pass(num_tiles, K: gl.constexpr):
    """Items (tile, kv head) are taken pass by pass over some of the kv heads, so that what all
    programs read lies in the L2 cache, with rounds enough in a pass to even out."""
    heads = num_tiles * 0 + K
    for power in gl.static_range(3, -1, -1):
        if K % (1 << power) == 0:
            enough = num_tiles * (1 << power) >= PASS_ROUNDS * gl.num_programs(0)
            heads = gl.where(enough, 1 << power, heads)
    return heads


@gluon.jit
def _turn(round, first_head, heads, num_tiles):
    """What a program takes in a round of the pass that begins with first_head: there and back,
    longest first, so that long items even out. Only a pass's last round may have nothing for it:
    then, what it takes first in the next pass. Returns the place in the pass, the round, the pass.
    """
    p, programs = gl.program_id(0), gl.num_programs(0)
    place = round * programs + gl.where(round % 2 == 1, programs - 1 - p, p)
    over = place >= num_tiles * heads
    first_head = gl.where(over, first_head + heads, first_head)
    return gl.where(over, p, place), gl.where(over, 0, round), first_head


@gluon.jit
def _tile(place, first_head, heads, num_tiles, tiles_ptr, K: gl.constexpr):
    """An item (past the last: any item): request, first token, kv head."""
    tile = gl.minimum(place // heads, num_tiles - 1)
    head = gl.minimum(first_head + place % heads, K - 1)
    return gl.load(tiles_ptr + 2 * tile), gl.load(tiles_ptr + 2 * tile + 1), head


@gluon.jit
def _bounds(request, starts_ptr, lengths_ptr, num_tokens):
    """A request's first row of q and the next one's, held to [0, num_tokens]; its keys."""
    start = gl.maximum(gl.load(starts_ptr + request), 0)
    stop = gl.minimum(gl.load(starts_ptr + request + 1), num_tokens)
    return start, stop, gl.load(lengths_ptr + request)


@gluon.jit
def _item(first, start, stop, keys, max_keys, BLOCK_Q: gl.constexpr, TILE: gl.constexpr,
          CAUSAL: gl.constexpr, WINDOW: gl.constexpr):  # fmt: skip
    """An item's first row of q, its tokens, the first one's position, the request's keys, and the
    tiles of keys [begin, end) that there are to do (at least one)."""
    keys = gl.minimum(keys, max_keys)
    tokens = gl.minimum(stop - start - first, BLOCK_Q)
    position = keys - (stop - start) + first
    end = keys
    if CAUSAL:
        end = position + tokens
    begin = 0
    if WINDOW > 0:
        begin = gl.maximum(position - WINDOW + 1, 0) // TILE
    end = gl.maximum((end + TILE - 1) // TILE, begin + 1)
    return start + first, tokens, position, keys, begin, end


@gluon.jit
def _block_rows(table, tile, keys, head, K: gl.constexpr, TILE: gl.constexpr,
                BLOCK: gl.constexpr):  # fmt: skip
    """First cache row of each block of a tile; one past the keys gets a negative row: reads 0."""
    rows = ()
    for part in gl.static_range(TILE // BLOCK):
        block = tile * (TILE // BLOCK) + part
        number = gl.load(table + block, mask=block * BLOCK < keys, other=-1)
        rows = rows + (gl.where(number < 0, -BLOCK, (number * K + head) * BLOCK),)
    return rows


@gluon.jit
def _copy_tile(desc, smem, full, empty, rows, count, TILE: gl.constexpr, BLOCK: gl.constexpr):
    """Copies tile number `count` from these rows of the cache, one copy per block."""
    STAGES: gl.constexpr = smem.shape[0]
    slot = count % STAGES
    mbarrier.wait(empty.index(slot), ((count // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(slot), TILE * desc.block_type.shape[1] * 2)
    for part in gl.static_range(TILE // BLOCK):
        to = smem.index(slot).slice(part * BLOCK, BLOCK)
        copy_box(desc, [rows[part], 0], full.index(slot), to)


@gluon.jit
def _produce(k_desc, v_desc, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
             tiles_ptr, num_tiles_ptr, starts_ptr, lengths_ptr, table_ptr, table_stride, max_keys,
             num_tokens, K: gl.constexpr, BLOCK: gl.constexpr, BLOCK_Q: gl.constexpr,
             TILE: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr):  # fmt: skip
    """The producer warp: K and V tiles of this program's items, in order."""
    num_tiles = gl.load(num_tiles_ptr)
    count = 0
    heads = _heads_of_a_pass(num_tiles, K)
    if gl.program_id(0) >= num_tiles * heads:
        return
    # what an item is takes two loads: each is started one item before it is needed
    request, first, head = _tile(gl.program_id(0), 0, heads, num_tiles, tiles_ptr, K)
    start, stop, length = _bounds(request, starts_ptr, lengths_ptr, num_tokens)
    place, round, next_pass = _turn(1, 0, heads, num_tiles)
    next_request, next_first, next_head = _tile(place, next_pass, heads, num_tiles, tiles_ptr, K)
    this_pass = num_tiles * 0
    while this_pass < K:
        _, _, _, keys, begin, end = _item(
            first, start, stop, length, max_keys, BLOCK_Q, TILE, CAUSAL, WINDOW
        )
        table = table_ptr + request.to(gl.int64) * table_stride
        rows = _block_rows(table, begin, keys, head, K, TILE, BLOCK)
        start, stop, length = _bounds(next_request, starts_ptr, lengths_ptr, num_tokens)
        place, round, last_pass = _turn(round + 1, next_pass, heads, num_tiles)
        last_request, last_first, last_head = _tile(
            place, last_pass, heads, num_tiles, tiles_ptr, K
        )
        for tile in range(begin, end):
            ahead = _block_rows(table, tile + 1, keys, head, K, TILE, BLOCK)
            _copy_tile(k_desc, k_smem, k_full, k_empty, rows, count, TILE, BLOCK)
            _copy_tile(v_desc, v_smem, v_full, v_empty, rows, count, TILE, BLOCK)
            rows = ahead
            count += 1
        request, first, head, this_pass = next_request, next_first, next_head, next_pass
        next_request, next_first, next_head = last_request, last_first, last_head
        next_pass = last_pass


@gluon.jit
def _load_q(q_ptr, q_smem, row, tokens, head, group: gl.constexpr, Q_STRIDE: gl.constexpr,
            G: gl.constexpr):  # fmt: skip
    """Starts the copy of this warpgroup's rows of q; rows that do not exist become 0."""
    H: gl.constexpr = q_smem.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // H, H // 8], [4, 1], [1, 0])
    r = group * GROUP_ROWS + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, layout))
    h = gl.arange(0, H, gl.SliceLayout(0, layout))
    at = (row + r // G).to(gl.int64) * Q_STRIDE + (head * G + r % G) * H
    copy_rows(q_smem, q_ptr + at[:, None] + h[None, :], mask=(r // G < tokens)[:, None])
    async_copy.commit_group()


@gluon.jit
def _wait(full, count):
    """Until tile number `count` has come."""
    STAGES: gl.constexpr = full.shape[0]
    mbarrier.wait(full.index(count % STAGES), (count // STAGES) & 1)


@gluon.jit
def _release(empty, count):
    """This warpgroup no longer needs tile number `count`."""
    mbarrier.arrive(empty.index(count % empty.shape[0]))


@gluon.jit
def _start_scores(q_smem, k_smem, k_full, count, TILE: gl.constexpr, S: gl.constexpr):
    """Waits for tile number `count` of K and starts its scores; returns them unfinished."""
    _wait(k_full, count)
    s = gl.zeros([GROUP_ROWS, TILE], gl.float32, S)
    k = k_smem.index(count % k_smem.shape[0]).permute((1, 0))
    return warpgroup_mma(q_smem, k, s, use_acc=False, is_async=True)


@gluon.jit
def _mask(s, tile, last, TILE: gl.constexpr, WINDOW: gl.constexpr, S: gl.constexpr):
    """-inf where a row does not see a key; last [M] is the newest key a row sees, or -1."""
    key = (tile * TILE + gl.arange(0, TILE, gl.SliceLayout(0, S)))[None, :]
    seen = key <= last[:, None]
    if WINDOW > 0:
        seen = seen & (key > last[:, None] - WINDOW)
    return gl.where(seen, s, float("-inf"))


@gluon.jit
def _clear_unseen(v, lo, hi, LAYOUT: gl.constexpr):
    """Zeroes the rows of a V tile outside [lo, hi), which may hold NaN: 0 * NaN is not 0.

    Both warpgroups do it, with the same values, and so need not wait for each other.
    """
    STEP: gl.constexpr = 32
    ROWS: gl.constexpr = v.shape[0]
    for at in gl.static_range(0, ROWS, STEP):
        if (hi < at + STEP) | (lo > at):
            part = v.slice(at, STEP)
            row = at + gl.arange(0, STEP, gl.SliceLayout(1, LAYOUT))
            seen = (row >= lo) & (row < hi)
            part.store(gl.where(seen[:, None], part.load(LAYOUT), 0.0))
    fence_async_shared()


@gluon.jit
def _merge(m_a, l_a, acc_a, m_b, l_b, acc_b, S_ROW: gl.constexpr, A_ROW: gl.constexpr):
    """`numerics.merge` with m and l in the layout of the scores' rows."""
    m_a = gl.convert_layout(m_a, A_ROW, assert_trivial=True)
    l_a = gl.convert_layout(l_a, A_ROW, assert_trivial=True)
    m_b = gl.convert_layout(m_b, A_ROW, assert_trivial=True)
    l_b = gl.convert_layout(l_b, A_ROW, assert_trivial=True)
    m, l, acc = merge(m_a, l_a, acc_a, m_b, l_b, acc_b)
    m = gl.convert_layout(m, S_ROW, assert_trivial=True)
    l = gl.convert_layout(l, S_ROW, assert_trivial=True)
    return m, l, acc


@gluon.jit
def _store(out_ptr, rows, smem, row, tokens, head, group: gl.constexpr, N: gl.constexpr,
           G: gl.constexpr, FLAT: gl.constexpr):  # fmt: skip
    """Writes this warpgroup's rows, through shared memory to write 16 bytes at a time."""
    H: gl.constexpr = rows.shape[1]
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    if RENAMED:
        smem = smem.reinterpret(rows.dtype, [GROUP_ROWS, H], swizzled)
    else:
        smem = smem._reinterpret(rows.dtype, [GROUP_ROWS, H], swizzled)
    smem.store(rows)
    rows = smem.load(FLAT)
    r = group * GROUP_ROWS + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, FLAT))
    h = gl.arange(0, H, gl.SliceLayout(0, FLAT))
    at = ((row + r // G).to(gl.int64) * N + head * G + r % G) * H
    gl.store(out_ptr + at[:, None] + h[None, :], rows, mask=(r // G < tokens)[:, None])


@gluon.jit
def _attend(q_smem, k_smem, v_smem, fold_smem, k_full, k_empty, v_full, v_empty, count, begin,
            end, full_from, full_to, low, keys, last, scale, q_ptr, next_first, next_start,
            next_stop, next_length, next_head, max_keys, group: gl.constexpr,
            Q_STRIDE: gl.constexpr, G: gl.constexpr, BLOCK_Q: gl.constexpr, CAUSAL: gl.constexpr,
            A: gl.constexpr, S: gl.constexpr, FLAT: gl.constexpr,
            PARTITION: gl.constexpr, WINDOW: gl.constexpr):  # fmt: skip
    """The rows in q_smem against tiles [begin, end) of keys, the ring's from number `count` on.

    last [M]: newest key a row sees. All rows see all keys of tiles [full_from, full_to), none sees
    a key before `low`. Meanwhile the next item's rows of q are copied. Returns m, l and the sums
    [M, H] of all partitions.
    """
    H: gl.constexpr = q_smem.shape[1]
    TILE: gl.constexpr = k_smem.shape[1]
    PER: gl.constexpr = PARTITION // TILE
    dtype: gl.constexpr = q_smem.dtype
    P: gl.constexpr = gl.DotOperandLayout(0, A, 2)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S)
    A_ROW: gl.constexpr = gl.SliceLayout(1, A)
    s = _start_scores(q_smem, k_smem, k_full, count, TILE, S)
    s = warpgroup_mma_wait(0, deps=(s,))
    _release(k_empty, count)
    if (begin < full_from) | (begin >= full_to):
        s = _mask(s, begin, last, TILE, WINDOW, S)
    m = gl.full([GROUP_ROWS], float("-inf"), gl.float32, S_ROW)
    l = gl.full([GROUP_ROWS], 0.0, gl.float32, S_ROW)
    m_all = m
    l_all = l
    acc = gl.zeros([GROUP_ROWS, H], gl.float32, A)
    x, m, l, alpha = softmax_tile(s, m, l, scale)
    p = gl.convert_layout(x.to(dtype), P)
    _wait(v_full, count)
    if low > begin * TILE:
        _clear_unseen(v_smem.index(count % v_smem.shape[0]), low - begin * TILE, TILE, FLAT)
    for tile in range(begin + 1, end):
        before = count
        count += 1
        s = _start_scores(q_smem, k_smem, k_full, count, TILE, S)
        acc = warpgroup_mma(p, v_smem.index(before % v_smem.shape[0]), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        _release(k_empty, count)
        if (tile < full_from) | (tile >= full_to):
            s = _mask(s, tile, last, TILE, WINDOW, S)
        fresh = tile % PER == 0
        m_part = m
        l_part = l
        m = gl.where(fresh, float("-inf"), m)
        l = gl.where(fresh, 0.0, l)
        x, m, l, alpha = softmax_tile(s, m, l, scale)
        # This tile's V is needed only in the next round, but the branch in its wait keeps the
        # assembler from moving the softmax behind the end of the product that runs now.
        _wait(v_full, count)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        _release(v_empty, before)
        if fresh:
            if tile - PER > begin:  # not the first
                m_all, l_all, acc = _merge(
                    m_all, l_all, fold_smem.load(A), m_part, l_part, acc, S_ROW, A_ROW
                )
            else:
                m_all = m_part
                l_all = l_part
                acc = acc + 0.0  # as `merge` with nothing: no -0.0
            fold_smem.store(acc)
            acc = gl.zeros([GROUP_ROWS, H], gl.float32, A)
        acc = acc * gl.convert_layout(alpha, A_ROW, assert_trivial=True)[:, None]
        p = gl.convert_layout(x.to(dtype), P)
    next_row, next_tokens, next_place, next_keys, next_begin, next_end = _item(
        next_first, next_start, next_stop, next_length, max_keys, BLOCK_Q, TILE, CAUSAL, WINDOW
    )
    _load_q(q_ptr, q_smem, next_row, next_tokens, next_head, group, Q_STRIDE, G)
    if end * TILE > keys:
        _clear_unseen(v_smem.index(count % v_smem.shape[0]), 0, keys - (end - 1) * TILE, FLAT)
    acc = warpgroup_mma(p, v_smem.index(count % v_smem.shape[0]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    _release(v_empty, count)
    if (end - 1) // PER * PER > begin:
        m, l, acc = _merge(m_all, l_all, fold_smem.load(A), m, l, acc, S_ROW, A_ROW)
    else:
        acc = acc + 0.0
    m = gl.convert_layout(m, A_ROW, assert_trivial=True)
    l = gl.convert_layout(l, A_ROW, assert_trivial=True)
    return m, l, acc, next_row, next_tokens, next_place, next_keys, next_begin, next_end


@gluon.jit
def _consume(q_ptr, out_ptr, sinks_ptr, q_smem, k_smem, v_smem, fold_smem,
             k_full, k_empty, v_full, v_empty, tiles_ptr, num_tiles_ptr, starts_ptr, lengths_ptr,
             max_keys, num_tokens, scale, group: gl.constexpr, Q_STRIDE: gl.constexpr,
             N: gl.constexpr, K: gl.constexpr, BLOCK_Q: gl.constexpr, PARTITION: gl.constexpr,
             CAUSAL: gl.constexpr, WINDOW: gl.constexpr):  # fmt: skip
    """A consumer warpgroup: rows [64 * group, 64 * group + 64) of this program's items."""
    H: gl.constexpr = q_smem.shape[1]
    TILE: gl.constexpr = k_smem.shape[1]
    G: gl.constexpr = N // K
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, H, 16])
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // H, H // 8], [4, 1], [1, 0])
    scale = scale * LOG2_E
    r = group * GROUP_ROWS + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, S))
    num_tiles = gl.load(num_tiles_ptr)
    heads = _heads_of_a_pass(num_tiles, K)
    if gl.program_id(0) >= num_tiles * heads:
        return
    count = 0
    # what an item is takes two loads: each is started one item before it is needed
    request, first, head = _tile(gl.program_id(0), 0, heads, num_tiles, tiles_ptr, K)
    start, stop, length = _bounds(request, starts_ptr, lengths_ptr, num_tokens)
    row, tokens, position, keys, begin, end = _item(
        first, start, stop, length, max_keys, BLOCK_Q, TILE, CAUSAL, WINDOW
    )
    _load_q(q_ptr, q_smem, row, tokens, head, group, Q_STRIDE, G)
    place, round, next_pass = _turn(1, 0, heads, num_tiles)
    request, first, next_head = _tile(place, next_pass, heads, num_tiles, tiles_ptr, K)
    this_pass = num_tiles * 0
    while this_pass < K:
        start, stop, length = _bounds(request, starts_ptr, lengths_ptr, num_tokens)
        place, round, last_pass = _turn(round + 1, next_pass, heads, num_tiles)
        request, last_first, last_head = _tile(place, last_pass, heads, num_tiles, tiles_ptr, K)
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
        async_copy.wait_group(0)
        fence_async_shared()
        m, l, acc, next_row, next_tokens, position, keys, next_begin, next_end = _attend(
            q_smem, k_smem, v_smem, fold_smem, k_full, k_empty, v_full, v_empty, count,
            begin, end, full_from, full_to, low, keys, last, scale, q_ptr, first, start, stop,
            length, next_head, max_keys, group, Q_STRIDE, G, BLOCK_Q, CAUSAL, A, S, FLAT,
            PARTITION, WINDOW,
        )  # fmt: skip
        count += end - begin
        if sinks_ptr is not None:
            h = head * G + gl.convert_layout(r % G, gl.SliceLayout(1, A))
            m, l, acc = fold_sink(m, l, acc, gl.load(sinks_ptr + h) * LOG2_E)
        rows = normalise(l, acc).to(q_smem.dtype)
        _store(out_ptr, rows, fold_smem, row, tokens, head, group, N, G, FLAT)
        head, row, tokens, begin, end = next_head, next_row, next_tokens, next_begin, next_end
        first, next_head, this_pass, next_pass = last_first, last_head, next_pass, last_pass
    async_copy.wait_group(0)


@gluon.jit(do_not_specialize=["table_stride", "max_keys", "num_tokens", "scale"])
def attend_hopper(
    q_ptr,  # [T, N, H], rows Q_STRIDE elements apart
    k_desc, v_desc,  # cache [B, K, BLOCK, H] as [B * K * BLOCK, H], copied by blocks [BLOCK, H]
    out_ptr,  # [T, N, H]
    table_ptr,  # [R, max_blocks] int32
    starts_ptr,  # [R + 1] int32, first query row of each request
    lengths_ptr,  # [R] int32, keys of each request
    tiles_ptr,  # [capacity, 2] int32: request, first token
    num_tiles_ptr,  # [1] int32
    sinks_ptr,  # [N] float32, or None
    scale, table_stride, max_keys, num_tokens,
    N: gl.constexpr, K: gl.constexpr, H: gl.constexpr, Q_STRIDE: gl.constexpr, BLOCK: gl.constexpr,
    BLOCK_Q: gl.constexpr, TILE: gl.constexpr, PARTITION: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,  # 0, or keys that a token sees, itself included; needs CAUSAL
):  # fmt: skip
    # Grid: (programs,), any number; each takes tiles x kv heads in turn, longest first.
    STAGES: gl.constexpr = 256 // H  # buffers of K, and of V
    dtype: gl.constexpr = k_desc.dtype
    kv: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, H], dtype)
    fold: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_smem = gl.allocate_shared_memory(dtype, [GROUPS, GROUP_ROWS, H], kv)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, TILE, H], kv)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, TILE, H], kv)
    fold_smem = gl.allocate_shared_memory(gl.float32, [GROUPS, GROUP_ROWS, H], fold)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    gl.warp_specialize(
        [
            (_consume, (q_ptr, out_ptr, sinks_ptr, q_smem.index(0), k_smem, v_smem,
                        fold_smem.index(0), k_full, k_empty, v_full, v_empty, tiles_ptr,
                        num_tiles_ptr, starts_ptr, lengths_ptr, max_keys, num_tokens, scale, 0,
                        Q_STRIDE, N, K, BLOCK_Q, PARTITION, CAUSAL, WINDOW)),
            (_consume, (q_ptr, out_ptr, sinks_ptr, q_smem.index(1), k_smem, v_smem,
                        fold_smem.index(1), k_full, k_empty, v_full, v_empty, tiles_ptr,
                        num_tiles_ptr, starts_ptr, lengths_ptr, max_keys, num_tokens, scale, 1,
                        Q_STRIDE, N, K, BLOCK_Q, PARTITION, CAUSAL, WINDOW)),
            (_produce, (k_desc, v_desc, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                        tiles_ptr, num_tiles_ptr, starts_ptr, lengths_ptr, table_ptr, table_stride,
                        max_keys, num_tokens, K, BLOCK, BLOCK_Q, TILE, CAUSAL, WINDOW)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
