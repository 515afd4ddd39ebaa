"""Attention of few query tokens a request: one partition of keys for all rows of a kv head a time.

Programs walk one loop over all their tiles, whatever unit these belong to, so that the loads of the
next unit are on their way while one ends. The arithmetic of a row is that of `numerics`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo_kernels.launch import jit
from octavo_kernels.paged_attention.logits_kernel import (
    finish,
    logit_scale,
    shape_logits,
    softmax_scale,
)
from octavo_kernels.paged_attention.numerics import merge, softmax_tile
from octavo_kernels.paged_attention.prefill_kernel import key_offsets

# Four e4m3 codes of $2 to bfloat16, exactly: exponent and mantissa move into place, then a power of
# two makes up for the difference of biases. NaN, which no cache holds, becomes 480.
_WIDEN = tl.constexpr("""{ .reg .b32 t, s, p, z;
    mov.b32 p, 0x7B807B80; mov.b32 z, 0x80008000;
    prmt.b32 t, $2, 0, 0x1404; shr.b32 s, t, 4; and.b32 s, s, 0x07F007F0;
    lop3.b32 s, t, 0x80008000, s, 0xEA; fma.rn.bf16x2 $0, s, p, z;
    prmt.b32 t, $2, 0, 0x3424; shr.b32 s, t, 4; and.b32 s, s, 0x07F007F0;
    lop3.b32 s, t, 0x80008000, s, 0xEA; fma.rn.bf16x2 $1, s, p, z; }""")


@triton.jit
def _widen(x, DTYPE: tl.constexpr, WIDENS: tl.constexpr):
    """Keys or values in q's dtype; WIDENS: four e4m3 codes at a time to bfloat16."""
    if WIDENS:
        codes = x.to(tl.int8, bitcast=True)
        return tl.inline_asm_elementwise(
            _WIDEN.value, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    return x.to(DTYPE)


@triton.jit
def _request(requests_ptr, row):
    """A row of `AttentionPlan.requests`, and the first and last tile are left to `_tiles`."""
    at = requests_ptr + 8 * row
    return (
        tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3),
        tl.load(at + 4), tl.load(at + 5), tl.load(at + 6), tl.load(at + 7),
    )  # fmt: skip


@triton.jit
def _unit_tiles(
    part, query_len, seq_len,
    TILE: tl.constexpr, PARTITION: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Tiles [begin, end) of a partition that any row sees; at least one."""
    begin = part * (PARTITION // TILE)
    end = begin + PARTITION // TILE
    if WINDOW > 0:
        lowest = tl.minimum(seq_len - query_len - (WINDOW - 1), seq_len - 1)
        begin = tl.maximum(begin, tl.maximum(lowest, 0) // TILE)
    end = tl.minimum(end, (seq_len + TILE - 1) // TILE)
    return begin, tl.maximum(end, begin + 1)


@triton.jit
def _table_entries(table_ptr, tile, max_blocks, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Ids of the blocks that hold a tile as they stand in the table, [max(1, TILE // BLOCK)]."""
    blocks = tile * TILE // BLOCK + tl.arange(0, max(1, TILE // BLOCK))
    return tl.load(table_ptr + tl.minimum(blocks, max_blocks - 1))


@triton.jit
def fold_partials(
    base,  # first row of partials of one (request, kv head)
    rows,  # query_len * G
    parts,
    start,  # the request's first query token
    kv_head,
    out_ptr, m_ptr, l_ptr, acc_ptr, sinks_ptr, v_scale_ptr,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Writes the output of one (request, kv head) from its partials, partitions ascending."""
    G: tl.constexpr = N // K
    d = tl.arange(0, HP)
    for at in tl.range(0, rows, ROWS):
        row = at + tl.arange(0, ROWS)
        live = row < rows
        m = tl.full([ROWS], float("-inf"), tl.float32)
        l = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, HP], tl.float32)
        for part in tl.range(0, parts, loop_unroll_factor=4):
            # Written by other programs a moment ago: read past the first-level cache. Rows past
            # the last read it again: masked loads would be waited for one by one.
            at_row = (base + part * rows + tl.minimum(row, rows - 1)).to(tl.int64)
            m_b = tl.load(m_ptr + at_row, cache_modifier=".cg")
            l_b = tl.load(l_ptr + at_row, cache_modifier=".cg")
            acc_b = tl.load(acc_ptr + at_row[:, None] * HP + d[None, :], cache_modifier=".cg")
            m, l, acc = merge(m, l, acc, m_b, l_b, acc_b)
        heads = kv_head * G + row % G
        values = finish(m, l, acc, tl.minimum(heads, N - 1), kv_head, sinks_ptr, v_scale_ptr)
        where = (start + row // G).to(tl.int64)[:, None] * (N * H) + heads[:, None] * H + d[None, :]
        mask = live[:, None] & (d < H)[None, :]
        tl.store(out_ptr + where, values.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def combine(
    out_ptr,  # [T, N, H]
    requests_ptr, num_decoded_ptr, m_ptr, l_ptr, acc_ptr,  # see AttentionPlan
    sinks_ptr, v_scale_ptr,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: (R, K). Folds what `decode` left behind where it does not fold itself."""
    row, kv_head = tl.program_id(0), tl.program_id(1)
    if row >= tl.load(num_decoded_ptr):
        return
    _r, start, query_len, _s, first, _o, end, partial_start = _request(requests_ptr, row)
    parts = end - first
    if parts > 1:
        rows = query_len * (N // K)
        fold_partials(
            partial_start + kv_head * parts * rows, rows, parts, start, kv_head, out_ptr, m_ptr,
            l_ptr, acc_ptr, sinks_ptr, v_scale_ptr, N, K, H, HP, ROWS,
        )  # fmt: skip


@jit
def decode(
    q_ptr,  # [T, N, H], rows Q_STRIDE elements apart
    k_ptr, v_ptr,  # [B, K, BLOCK, H]
    out_ptr,  # [T, N, H]
    table_ptr,  # [R, max_blocks] int32, rows table_stride apart
    requests_ptr, programs_ptr, arrivals_ptr, m_ptr, l_ptr, acc_ptr,  # see AttentionPlan
    sinks_ptr, slopes_ptr, rel_bias_ptr,  # [N], [N], [N, 2 * span - 1] float32, or None
    k_scale_ptr, v_scale_ptr,  # [K] float32, or None
    scale, span, table_stride, max_blocks, num_blocks,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, Q_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr, PARTITION: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, FOLD_ROWS: tl.constexpr,
    STAGES: tl.constexpr, WIDENS: tl.constexpr, KEEP_Q: tl.constexpr,
):  # fmt: skip
    """Grid: (programs of the plan,). FOLD_ROWS: rows folded at a time, 0 = `combine` does it."""
    G: tl.constexpr = N // K
    program = programs_ptr + 4 * tl.program_id(0)
    todo = tl.load(program + 7) - tl.load(program + 3)
    if todo <= 0:
        return
    row, kv_head, part = tl.load(program), tl.load(program + 1), tl.load(program + 2)
    request, _s, query_len, seq_len, _f, own, stop, _p = _request(requests_ptr, row)
    part = tl.where(part < 0, own, part)
    tile, last = _unit_tiles(part, query_len, seq_len, TILE, PARTITION, WINDOW)
    tile -= 1  # the loop steps on before it looks
    always = todo > 0  # which the compiler does not see

    lane = tl.arange(0, BLOCK_M)
    d = tl.arange(0, HP)
    ahead = tl.zeros([max(1, TILE // BLOCK)], tl.int32)
    q = tl.zeros([BLOCK_M, HP], q_ptr.dtype.element_ty)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HP], tl.float32)
    for step in tl.range(0, todo, num_stages=STAGES):
        # The tile after the last one: of the same unit, partition, kv head or of another request.
        # (Loads stand inside an `if` here and below: others would be taken for ones to pipeline.)
        tile += 1
        is_first = (step == 0) | (tile >= last)
        if tile >= last:
            part += 1
            if part >= stop:
                kv_head += 1
                if kv_head >= K:
                    kv_head = 0
                    row += 1
                    request, _s, query_len, seq_len, _f, own, stop, _p = _request(requests_ptr, row)
                part = own
            tile, last = _unit_tiles(part, query_len, seq_len, TILE, PARTITION, WINDOW)
        table = table_ptr + request.to(tl.int64) * table_stride
        ids = ahead
        if always:
            if is_first:
                ids = _table_entries(table, tile, max_blocks, BLOCK, TILE)
            ahead = _table_entries(table, tile + 1, max_blocks, BLOCK, TILE)

        # Keys and values of this tile.
        k_pos = tile * TILE + tl.arange(0, TILE)
        offsets = kv_head.to(tl.int64) * (BLOCK * H) + key_offsets(
            tl.minimum(tl.maximum(ids, 0), num_blocks - 1), tile, K, H, BLOCK, TILE
        )
        offsets = offsets[:, None] + d[None, :]
        # What no row sees may hold NaN, and 0 * NaN is NaN.
        within = k_pos < seq_len
        if WINDOW > 0:
            within = within & (k_pos > seq_len - query_len - WINDOW)
        within = within[:, None] & (d < H)[None, :]
        k = tl.load(k_ptr + offsets, mask=within, other=0.0)
        v = tl.load(v_ptr + offsets, mask=within, other=0.0)

        # Rows of this unit.
        tokens = lane // G
        heads = kv_head * G + lane % G
        live = (lane < query_len * G)[:, None] & (d < H)[None, :]
        if not KEEP_Q:  # read for every tile: it costs time, but no registers in between
            q = tl.zeros([BLOCK_M, HP], q_ptr.dtype.element_ty)
        if is_first if KEEP_Q else always:
            start = tl.load(requests_ptr + 8 * row + 1)
            at = (start + tokens).to(tl.int64)[:, None] * Q_STRIDE + heads[:, None] * H + d[None, :]
            q = tl.load(q_ptr + at, mask=live, other=0.0)
        natural = logit_scale(scale, k_scale_ptr, kv_head)
        q_pos = seq_len - query_len + tl.minimum(tokens, query_len - 1)
        s = tl.dot(q, tl.trans(_widen(k, q.dtype, WIDENS)), input_precision="ieee")
        s = shape_logits(s, natural, q_pos, k_pos, heads, slopes_ptr, rel_bias_ptr, span, SOFT_CAP)
        # Columns [low, high) of this tile are seen.
        high = tl.zeros_like(q_pos) + seq_len
        if CAUSAL:
            high = q_pos + 1
        elif WINDOW > 0:
            high = tl.minimum(q_pos + WINDOW, seq_len)
        column = tl.arange(0, TILE)
        seen = column[None, :] < (high - tile * TILE)[:, None]
        if WINDOW > 0:
            seen = seen & (column[None, :] > (q_pos - WINDOW - tile * TILE)[:, None])
        s = tl.where(seen, s, float("-inf"))
        m = tl.where(is_first, float("-inf"), m)
        l = tl.where(is_first, 0.0, l)
        p, m, l, alpha = softmax_tile(
            s, m, l, softmax_scale(natural, slopes_ptr, rel_bias_ptr, SOFT_CAP)
        )
        acc = tl.where(is_first, 0.0, acc * alpha[:, None])
        acc = tl.dot(p.to(q.dtype), _widen(v, q.dtype, WIDENS), acc, input_precision="ieee")
        # Uses inside an `if` alone would not make the compiler wait for the product.
        acc = tl.where(always, acc, 0.0)

        if tile + 1 >= last:
            # Read again: kept from the loop's first stage to this one, it would cost registers.
            _r, start, _q, _n, first, own_, stop_, partial = _request(requests_ptr, row)
            parts = stop_ - first
            if parts == 1:
                values = finish(m, l, acc, heads, kv_head, sinks_ptr, v_scale_ptr)
                at = (start + tokens).to(tl.int64)[:, None] * (N * H) + heads[:, None] * H
                at += d[None, :]
                tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=live)
            else:
                rows = query_len * G
                base = partial + kv_head * parts * rows
                at_row = (base + (part - first) * rows + lane).to(tl.int64)
                tl.store(m_ptr + at_row, m, mask=lane < rows)
                tl.store(l_ptr + at_row, l, mask=lane < rows)
                at = at_row[:, None] * HP + d[None, :]
                tl.store(acc_ptr + at, acc, mask=(lane < rows)[:, None])
                if FOLD_ROWS > 0:
                    # A sum over all threads: its barrier puts their stores before the arrival.
                    # (`debug_barrier` would keep the compiler from pipelining the loop.)
                    one = tl.max((tl.arange(0, 128) < rows).to(tl.int32), 0)
                    arrival = arrivals_ptr + row * K + kv_head
                    if tl.atomic_add(arrival, one, sem="acq_rel") == stop_ - own_ - 1:
                        fold_partials(
                            base, rows, parts, start, kv_head, out_ptr, m_ptr, l_ptr, acc_ptr,
                            sinks_ptr, v_scale_ptr, N, K, H, HP, FOLD_ROWS,
                        )  # fmt: skip
                        tl.store(arrival, 0)
