"""Partials of decoded requests over a prefix that several of them hold, keys read once for all.

A tile has rows of different requests. What it writes are the partials that the decode kernel would
have written, bit for bit: partitions begin at the same positions whoever computes them.
"""

from __future__ import annotations

import triton.language as tl

from octavo_kernels.launch import jit
from octavo_kernels.paged_attention.logits_kernel import logit_scale
from octavo_kernels.paged_attention.prefill_kernel import attend_range, key_range


@jit
def list_tiles(
    group_starts_ptr,  # [NG + 1] int32, where each group's members begin
    members_ptr,  # [NM] int32, requests
    group_partitions_ptr,  # [NG] int32, whole partitions in the common prefix
    requests_ptr, num_decoded_ptr,  # see AttentionPlan
    member_rows_ptr,  # out [NM] int32: row of `requests`, -1 = not decoded
    tiles_ptr,  # out [capacity, 2] int32: group or -1, first slot
    num_groups, num_members, num_requests, capacity,
    member_slots,  # rows kept for a member
    steps,  # halvings that leave one row of `requests`
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid: (ceil(max(NM, capacity) / CHUNK),)."""
    i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    is_member = i < num_members
    request = tl.load(members_ptr + i, mask=is_member, other=0)
    count = tl.minimum(tl.load(num_decoded_ptr), num_requests)
    lo = tl.zeros([CHUNK], tl.int32)
    hi = lo + count
    for _ in tl.range(0, steps):
        middle = (lo + hi) // 2
        there = tl.load(requests_ptr + 8 * middle, mask=middle < hi, other=0)
        before = (middle < hi) & (there < request)
        hi = tl.where(before, hi, middle)
        lo = tl.where(before, middle + 1, lo)
    there = tl.load(requests_ptr + 8 * lo, mask=is_member & (lo < count), other=-1)
    tl.store(member_rows_ptr + i, tl.where(there == request, lo, -1), mask=is_member)

    group = tl.zeros([CHUNK], tl.int32)
    tiles_before = tl.zeros([CHUNK], tl.int32)
    total = 0
    for at in tl.range(0, num_groups, CHUNK):
        g = at + tl.arange(0, CHUNK)
        live = g < num_groups
        size = tl.load(group_starts_ptr + g + 1, mask=live, other=0)
        size -= tl.load(group_starts_ptr + g, mask=live, other=0)
        partitions = tl.load(group_partitions_ptr + g, mask=live, other=0)
        tiles = tl.where(partitions > 0, tl.cdiv(tl.maximum(size, 0) * member_slots, BLOCK_M), 0)
        past = ((total + tl.cumsum(tiles, 0))[None, :] <= i[:, None]) & live[None, :]
        total += tl.sum(tiles, 0)
        group += tl.sum(past.to(tl.int32), 1)
        tiles_before += tl.sum(tl.where(past, tiles[None, :], 0), 1)
    group = tl.where(i < total, group, -1)
    tl.store(tiles_ptr + 2 * i, group, mask=i < capacity)
    tl.store(tiles_ptr + 2 * i + 1, (i - tiles_before) * BLOCK_M, mask=i < capacity)


@jit
def attend_shared(
    q_ptr,  # [T, N, H], rows Q_STRIDE elements apart
    k_ptr, v_ptr,  # [B, K, BLOCK, H]
    table_ptr,  # [R, max_blocks] int32, rows table_stride apart
    group_starts_ptr, members_ptr, group_partitions_ptr, member_rows_ptr, tiles_ptr,  # `list_tiles`
    requests_ptr, m_ptr, l_ptr, acc_ptr,  # see AttentionPlan
    slopes_ptr, rel_bias_ptr, k_scale_ptr,  # [N], [N, 2 * span - 1], [K] float32, or None
    scale, span, table_stride, max_blocks, num_blocks, num_requests, num_members,
    member_slots,  # rows kept for a member, a multiple of G
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, Q_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr, PARTITION: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles, K, partitions), so tiles that read the same keys run side by side."""
    G: tl.constexpr = N // K
    tile, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group = tl.load(tiles_ptr + 2 * tile)
    if group < 0:
        return
    if part >= tl.load(group_partitions_ptr + group):
        return
    first_member = tl.maximum(tl.load(group_starts_ptr + group), 0)
    end_member = tl.minimum(tl.load(group_starts_ptr + group + 1), num_members)
    slot = tl.load(tiles_ptr + 2 * tile + 1) + tl.arange(0, BLOCK_M)
    member, token = first_member + slot // member_slots, slot % member_slots // G
    heads = kv_head * G + slot % G
    row = tl.load(member_rows_ptr + member, mask=member < end_member, other=-1)
    live = row >= 0
    record = requests_ptr + 8 * row
    start = tl.load(record + 1, mask=live, other=0)
    query_len = tl.load(record + 2, mask=live, other=0)
    q_pos = tl.load(record + 3, mask=live, other=0) - query_len + token
    first = tl.load(record + 4, mask=live, other=0)
    own = tl.load(record + 5, mask=live, other=0)
    live = live & (token < query_len) & (first <= part) & (part < own)
    lowest = tl.min(tl.where(live, q_pos, 1 << 30), 0)
    highest = tl.max(tl.where(live, q_pos, -1), 0)
    if highest < 0:
        return
    q_pos = tl.where(live, q_pos, highest)
    d = tl.arange(0, HP)
    at = (start + token).to(tl.int64)[:, None] * Q_STRIDE + heads[:, None] * H + d[None, :]
    q = tl.load(q_ptr + at, mask=live[:, None] & (d < H)[None, :], other=0.0)

    # Where the rows' partials belong, and -1: one value a row is kept over the loop.
    parts = tl.load(record + 6, mask=live, other=0) - first
    partial = tl.load(record + 7, mask=live, other=0)
    partial += (kv_head * parts + part - first) * (query_len * G) + token * G + slot % G
    partial = tl.where(live, partial, -1)

    # The partition ends where all its requests have keys, so no length cuts it.
    begin, end = part * PARTITION, (part + 1) * PARTITION
    lo, hi, all_lo, all_hi = key_range(lowest, highest, end, CAUSAL, WINDOW)
    lo, all_lo = tl.maximum(lo, begin), tl.maximum(all_lo, begin)
    hi, all_hi = tl.minimum(hi, end), tl.minimum(all_hi, end)
    leader = tl.load(members_ptr + first_member)
    leader = tl.minimum(tl.maximum(leader, 0), num_requests - 1).to(tl.int64)
    base = kv_head.to(tl.int64) * (BLOCK * H)
    m, l, acc = attend_range(
        lo, hi, all_lo, all_hi, q, q_pos, heads, logit_scale(scale, k_scale_ptr, kv_head),
        k_ptr + base, v_ptr + base, table_ptr + leader * table_stride, slopes_ptr, rel_bias_ptr,
        span, max_blocks, num_blocks, K, H, H, BLOCK, TILE, PARTITION, CAUSAL, WINDOW, SOFT_CAP,
        False,
    )  # fmt: skip
    live = partial >= 0
    tl.store(m_ptr + partial, m, mask=live)
    tl.store(l_ptr + partial, l, mask=live)
    at = partial.to(tl.int64)[:, None] * HP + d[None, :]
    tl.store(acc_ptr + at, acc, mask=live[:, None])
