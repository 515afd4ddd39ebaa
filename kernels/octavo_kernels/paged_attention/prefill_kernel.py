"""Attention of many query tokens: paged or packed keys, one tile of rows a program.

Row r of a tile is query token r // G, query head r % G of the program's kv head, so that all heads
that read a key share its load. The arithmetic of a row is that of `numerics`: tiles whose keys all
rows see run without masks, the others with, and the bits are the same.
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


@triton.jit
def block_ids(table_ptr, tile, max_blocks, num_blocks, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Ids of the blocks that hold a tile, [max(1, TILE // BLOCK)], never out of the cache."""
    blocks = tile * TILE // BLOCK + tl.arange(0, max(1, TILE // BLOCK))
    ids = tl.load(table_ptr + tl.minimum(blocks, max_blocks - 1))
    return tl.minimum(tl.maximum(ids, 0), num_blocks - 1)


@triton.jit
def key_offsets(
    ids, tile, K: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """Offsets [TILE] of a tile's keys in a cache [B, K, BLOCK, H], for kv head 0; int64."""
    PIECE: tl.constexpr = min(BLOCK, TILE)  # neighbours in one block
    slots = tile * TILE % BLOCK + tl.arange(0, PIECE)
    offsets = ids[:, None].to(tl.int64) * (K * BLOCK * H) + slots[None, :] * H
    return tl.multiple_of(tl.reshape(offsets, (TILE,)), 16)  # H is one: 16-byte loads


@triton.jit
def _sweep(
    first, last,  # tiles [first, last)
    q,  # [BLOCK_M, HP]
    m, l, acc,  # the open partition: [BLOCK_M], [BLOCK_M], [BLOCK_M, HP]
    m_done, l_done, acc_done,  # all partitions before it
    q_pos, heads,  # [BLOCK_M]
    seen_lo, seen_hi,  # keys that any row sees lie in [seen_lo, seen_hi)
    scale,
    k_ptr, v_ptr, table_ptr, slopes_ptr, rel_bias_ptr,
    span, max_blocks, num_blocks,
    K: tl.constexpr, H: tl.constexpr, KV_STRIDE: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, PARTITION: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, FOLDS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Runs rows over key tiles; returns the sums of the open partition and of those before it.

    Without FOLDS the tiles lie in one partition.
    """
    HP: tl.constexpr = q.shape[1]
    d = tl.arange(0, HP)
    factor = softmax_scale(scale, slopes_ptr, rel_bias_ptr, SOFT_CAP)
    ids = 0
    if table_ptr is not None:
        ids = block_ids(table_ptr, first, max_blocks, num_blocks, BLOCK, TILE)
    for tile in tl.range(first, last):
        if FOLDS:  # noqa: SIM102  (a constexpr: leaves no branch behind)
            if tile % (PARTITION // TILE) == 0:
                m_done, l_done, acc_done = merge(m_done, l_done, acc_done, m, l, acc)
                m = tl.full(m.shape, float("-inf"), tl.float32)
                l = tl.zeros(l.shape, tl.float32)
                acc = tl.zeros(acc.shape, tl.float32)
        k_pos = tile * TILE + tl.arange(0, TILE)
        if table_ptr is not None:
            offsets = key_offsets(ids, tile, K, H, BLOCK, TILE)
            ids = block_ids(table_ptr, tile + 1, max_blocks, num_blocks, BLOCK, TILE)
        else:
            offsets = k_pos.to(tl.int64) * KV_STRIDE
        offsets = offsets[:, None] + d[None, :]
        if MASKED or HP != H:
            # What no row sees may hold NaN, and 0 * NaN is NaN.
            within = (d < H)[None, :]
            if MASKED:
                within = within & ((k_pos >= seen_lo) & (k_pos < seen_hi))[:, None]
            k = tl.load(k_ptr + offsets, mask=within, other=0.0)
            v = tl.load(v_ptr + offsets, mask=within, other=0.0)
        else:
            k = tl.load(k_ptr + offsets)
            v = tl.load(v_ptr + offsets)
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        s = shape_logits(s, scale, q_pos, k_pos, heads, slopes_ptr, rel_bias_ptr, span, SOFT_CAP)
        if MASKED:
            distance = k_pos[None, :] - q_pos[:, None]
            seen = (k_pos < seen_hi)[None, :]
            if CAUSAL:
                seen = distance <= 0
            elif WINDOW > 0:
                seen = seen & (distance < WINDOW)
            if WINDOW > 0:
                seen = seen & (distance > -WINDOW)
            s = tl.where(seen, s, float("-inf"))
        p, m, l, alpha = softmax_tile(s, m, l, factor)
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc, input_precision="ieee")
    return m, l, acc, m_done, l_done, acc_done


@triton.jit
def key_range(p0, p1, seq_len, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Keys [lo, hi) that any of positions p0..p1 sees, and [all_lo, all_hi) that all of them do."""
    lo, all_lo, hi, all_hi = 0, 0, seq_len, seq_len
    if WINDOW > 0:
        lo, all_lo = tl.maximum(p0 - WINDOW + 1, 0), tl.maximum(p1 - WINDOW + 1, 0)
    if CAUSAL:
        hi, all_hi = p1 + 1, p0 + 1
    elif WINDOW > 0:
        hi, all_hi = tl.minimum(p1 + WINDOW, seq_len), tl.minimum(p0 + WINDOW, seq_len)
    return lo, tl.maximum(hi, 0), all_lo, tl.maximum(all_hi, 0)


@triton.jit
def attend_range(
    lo, hi,  # keys that any row sees
    all_lo, all_hi,  # keys that all rows see
    q, q_pos, heads, scale, k_ptr, v_ptr, table_ptr, slopes_ptr, rel_bias_ptr, span, max_blocks,
    num_blocks,
    K: tl.constexpr, H: tl.constexpr, KV_STRIDE: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, PARTITION: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, FOLDS: tl.constexpr,
):  # fmt: skip
    """m, l, acc of rows over keys [lo, hi), all partitions folded; arguments as in `_sweep`."""
    first, last = lo // TILE, tl.cdiv(hi, TILE)
    full = tl.minimum(tl.maximum(tl.cdiv(all_lo, TILE), first), last)
    edge = tl.minimum(tl.maximum(all_hi // TILE, full), last)
    m = tl.full([q.shape[0]], float("-inf"), tl.float32)
    l = tl.zeros([q.shape[0]], tl.float32)
    acc = tl.zeros(q.shape, tl.float32)
    m_done, l_done, acc_done = m, l, acc
    for phase in tl.static_range(3):  # masked tiles of the window's old edge, full, masked
        if phase != 0 or WINDOW > 0:
            begin = (first, full, edge)[phase]
            end = (full, edge, last)[phase]
            m, l, acc, m_done, l_done, acc_done = _sweep(
                begin, end, q, m, l, acc, m_done, l_done, acc_done, q_pos, heads, lo, hi, scale,
                k_ptr, v_ptr, table_ptr, slopes_ptr, rel_bias_ptr, span, max_blocks, num_blocks,
                K, H, KV_STRIDE, BLOCK, TILE, PARTITION, CAUSAL, WINDOW, SOFT_CAP, FOLDS,
                phase != 1,
            )  # fmt: skip
    if FOLDS:
        m, l, acc = merge(m_done, l_done, acc_done, m, l, acc)
    return m, l, acc


@jit
def attend(
    q_ptr,  # [T, N, H], rows Q_STRIDE elements apart
    k_ptr, v_ptr,  # paged [B, K, BLOCK, H]; packed [Tk, K, H], keys KV_STRIDE elements apart
    out_ptr,  # [T, N, H]
    table_ptr,  # paged: [R, max_blocks] int32; packed: None
    starts_ptr,  # [R + 1] int32, first query row of each request
    lengths_ptr,  # paged: [R] int32, keys of each request; packed: [R + 1], first key row of each
    tiles_ptr,  # paged: [capacity, 2] int32 (request, first token); packed: None
    num_tiles_ptr,  # paged: [1] int32; packed: None
    sinks_ptr, slopes_ptr, rel_bias_ptr,  # [N], [N], [N, 2 * span - 1] float32, or None
    k_scale_ptr, v_scale_ptr,  # [K] float32, or None
    scale, span,
    num_tokens,  # T
    num_blocks,  # paged: B; packed: Tk
    table_stride, max_blocks,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, Q_STRIDE: tl.constexpr,
    KV_STRIDE: tl.constexpr, BLOCK: tl.constexpr,
    TILE_Q: tl.constexpr,  # query tokens of an entry of tiles, or of a packed tile
    BLOCK_M: tl.constexpr, TILE: tl.constexpr, PARTITION: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
):  # fmt: skip
    """Grid: paged (capacity * pieces of an entry * K,); packed (tiles of the longest, K, R).

    One kv head follows the other: the keys in use then fit the L2 cache. An entry of TILE_Q tokens
    falls into pieces of BLOCK_M // G. A packed request's last tile comes
    first. Query i of a request stands at key position keys - queries + i.
    """
    G: tl.constexpr = N // K
    BLOCK_Q: tl.constexpr = BLOCK_M // G
    PIECES: tl.constexpr = (TILE_Q + BLOCK_Q - 1) // BLOCK_Q
    if table_ptr is not None:
        items = tl.num_programs(0) // K
        item, kv_head = tl.program_id(0) % items, tl.program_id(0) // items
        entry = item // PIECES
        if entry >= tl.load(num_tiles_ptr):
            return
        request, first_token = tl.load(tiles_ptr + 2 * entry), tl.load(tiles_ptr + 2 * entry + 1)
        token = first_token + item % PIECES * BLOCK_Q
        seq_len = tl.minimum(tl.load(lengths_ptr + request), max_blocks * BLOCK)
        table_ptr += request.to(tl.int64) * table_stride
        key_base = kv_head.to(tl.int64) * (BLOCK * H)
    else:
        kv_head, request = tl.program_id(1), tl.program_id(2)
        token = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
        first_token = token
        first_key = tl.minimum(tl.maximum(tl.load(lengths_ptr + request), 0), num_blocks)
        seq_len = tl.minimum(tl.load(lengths_ptr + request + 1), num_blocks) - first_key
        key_base = first_key.to(tl.int64) * KV_STRIDE + kv_head * H
    start = tl.maximum(tl.load(starts_ptr + request), 0)
    query_len = tl.minimum(tl.load(starts_ptr + request + 1), num_tokens) - start
    last_token = tl.minimum(tl.minimum(token + BLOCK_Q, first_token + TILE_Q), query_len) - 1
    if token > last_token:
        return
    row = tl.arange(0, BLOCK_M)
    heads = kv_head * G + row % G
    tokens = token + row // G
    real = (row < BLOCK_Q * G) & (tokens <= last_token)
    shift = seq_len - query_len
    q_pos = shift + tl.minimum(tokens, last_token)
    d = tl.arange(0, HP)
    live = real[:, None] & (d < H)[None, :]
    rows = (start + tokens).to(tl.int64)[:, None]
    q = tl.load(q_ptr + rows * Q_STRIDE + heads[:, None] * H + d[None, :], mask=live, other=0.0)

    lo, hi, all_lo, all_hi = key_range(shift + token, shift + last_token, seq_len, CAUSAL, WINDOW)
    scale = logit_scale(scale, k_scale_ptr, kv_head)
    m, l, acc = attend_range(
        lo, hi, all_lo, all_hi, q, q_pos, heads, scale, k_ptr + key_base, v_ptr + key_base,
        table_ptr, slopes_ptr, rel_bias_ptr, span, max_blocks, num_blocks, K, H, KV_STRIDE, BLOCK,
        TILE, PARTITION, CAUSAL, WINDOW, SOFT_CAP, True,
    )  # fmt: skip
    acc = finish(m, l, acc, heads, kv_head, sinks_ptr, v_scale_ptr)
    where = rows * (N * H) + heads[:, None] * H + d[None, :]
    tl.store(out_ptr + where, acc.to(out_ptr.dtype.element_ty), mask=live)
