"""Attention over paged keys and values on the CPU. Knows addresses; knows nothing of models or requests' text.

One work item is (request, chunk of its query tokens, kv head); the query heads of the group and the
chunk's tokens are its rows. A row runs over its keys in partitions of 512 and tiles of 64 keys that lie at
absolute positions: inside a partition an online softmax, then the partitions are merged in ascending order.
So a row's arithmetic follows from its position alone, whatever the chunk, the batch or the thread.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from octavo_kernels.paged_attention.microkernels import (
    MAX_ROWS,
    SUBS,
    TILE,
    claim,
    exp2,
    scores,
    softmax_step,
    weigh,
)
from octavo_kernels.parallel import device, kernel
from octavo_kernels.simd import (
    LANES,
    get_f32,
    get_i32,
    get_i64,
    load_f32,
    put_f32,
    put_i64,
    reduce_add,
)

LOG2_E = 1.4426950408889634  # scores are base-2 logits
PARTITION = 512  # keys; a multiple of TILE
CHUNK_ROWS = 96  # rows of the widest work item: their state stays in the second-level cache

# Per-item scratch, in floats: score rows, rescale factors, ones, then tables of 4 addresses: the keys of
# even and of odd tiles, so that a tile's loops can ask for the next one's, and the values.
_SCORES = 0
_FACTORS = MAX_ROWS * TILE
_ONES = _FACTORS + LANES
_KEYS = _ONES + LANES
_VALUES = _KEYS + 2 * 2 * SUBS
WORK_FLOATS = (_VALUES + 2 * SUBS + LANES - 1) // LANES * LANES

# int64 places of the plan
CHUNK_TOKENS, NUM_ITEMS, SPLIT, COST, STATUS, NEXT_ITEM, MAX_PARTITIONS, CULPRIT = range(8)
BAD_START, BAD_LENGTH, BAD_BLOCK = 1, 2, 3


@device
def _scores(tag, rows, q, keys, stride, out, dim, ahead):
    if rows == 6:
        scores(tag, 6, q, keys, stride, out, dim, ahead)
    elif rows == 5:
        scores(tag, 5, q, keys, stride, out, dim, ahead)
    elif rows == 4:
        scores(tag, 4, q, keys, stride, out, dim, ahead)
    elif rows == 3:
        scores(tag, 3, q, keys, stride, out, dim, ahead)
    elif rows == 2:
        scores(tag, 2, q, keys, stride, out, dim, ahead)
    else:
        scores(tag, 1, q, keys, stride, out, dim, ahead)


@device
def _weigh_64(
    tag,
    rows,
    p,
    values,
    shift,
    stride,
    acc,
    acc_stride,
    factors,
    lo,
    hi,
    ahead,
    column,
    ahead_stride,
):
    """`weigh` of 64 columns."""
    if rows == 6:
        weigh(
            tag,
            6,
            4,
            p,
            values,
            shift,
            stride,
            acc,
            acc_stride,
            factors,
            lo,
            hi,
            ahead,
            column,
            ahead_stride,
        )
    elif rows == 5:
        weigh(
            tag,
            5,
            4,
            p,
            values,
            shift,
            stride,
            acc,
            acc_stride,
            factors,
            lo,
            hi,
            ahead,
            column,
            ahead_stride,
        )
    elif rows == 4:
        weigh(
            tag,
            4,
            4,
            p,
            values,
            shift,
            stride,
            acc,
            acc_stride,
            factors,
            lo,
            hi,
            ahead,
            column,
            ahead_stride,
        )
    elif rows == 3:
        weigh(
            tag,
            3,
            4,
            p,
            values,
            shift,
            stride,
            acc,
            acc_stride,
            factors,
            lo,
            hi,
            ahead,
            column,
            ahead_stride,
        )
    elif rows == 2:
        weigh(
            tag,
            2,
            4,
            p,
            values,
            shift,
            stride,
            acc,
            acc_stride,
            factors,
            lo,
            hi,
            ahead,
            column,
            ahead_stride,
        )
    else:
        weigh(
            tag,
            1,
            4,
            p,
            values,
            shift,
            stride,
            acc,
            acc_stride,
            factors,
            lo,
            hi,
            ahead,
            column,
            ahead_stride,
        )


@device
def _weigh_16(
    tag,
    rows,
    p,
    values,
    shift,
    stride,
    acc,
    acc_stride,
    factors,
    lo,
    hi,
    ahead,
    column,
    ahead_stride,
):
    """`weigh` of 16 columns."""
    if rows == 6:
        weigh(
            tag,
            6,
            1,
            p,
            values,
            shift,
            stride,
            acc,
            acc_stride,
            factors,
            lo,
            hi,
            ahead,
            column,
            ahead_stride,
        )
    elif rows == 5:
        weigh(
            tag,
            5,
            1,
            p,
            values,
            shift,
            stride,
            acc,
            acc_stride,
            factors,
            lo,
            hi,
            ahead,
            column,
            ahead_stride,
        )
    elif rows == 4:
        weigh(
            tag,
            4,
            1,
            p,
            values,
            shift,
            stride,
            acc,
            acc_stride,
            factors,
            lo,
            hi,
            ahead,
            column,
            ahead_stride,
        )
    elif rows == 3:
        weigh(
            tag,
            3,
            1,
            p,
            values,
            shift,
            stride,
            acc,
            acc_stride,
            factors,
            lo,
            hi,
            ahead,
            column,
            ahead_stride,
        )
    elif rows == 2:
        weigh(
            tag,
            2,
            1,
            p,
            values,
            shift,
            stride,
            acc,
            acc_stride,
            factors,
            lo,
            hi,
            ahead,
            column,
            ahead_stride,
        )
    else:
        weigh(
            tag,
            1,
            1,
            p,
            values,
            shift,
            stride,
            acc,
            acc_stride,
            factors,
            lo,
            hi,
            ahead,
            column,
            ahead_stride,
        )


@device
def _weigh(tag, rows, p, values, stride, acc, dim, factors, lo, hi, ahead, ahead_stride):
    """`weigh` over all `dim` columns."""
    itemsize = stride // dim
    column = 0
    while column + 4 * LANES <= dim:
        _weigh_64(
            tag,
            rows,
            p,
            values,
            column * itemsize,
            stride,
            acc + 4 * column,
            4 * dim,
            factors,
            lo,
            hi,
            ahead,
            column,
            ahead_stride,
        )
        column += 4 * LANES
    while column < dim:
        _weigh_16(
            tag,
            rows,
            p,
            values,
            column * itemsize,
            stride,
            acc + 4 * column,
            4 * dim,
            factors,
            lo,
            hi,
            ahead,
            column,
            ahead_stride,
        )
        column += LANES


@device
def _first_key(position, window):
    """The oldest key position that the token at `position` sees."""
    return max(0, position - window + 1) if window > 0 else 0


@device
def _point(
    keys,
    values,
    tile,
    first_key,
    last_key,
    k_head,
    v_head,
    table,
    block_size,
    block_bytes,
    num_blocks,
    key_bytes,
    row_bytes,
    plan,
):
    """Fill the address tables for a tile; 16-key groups outside [first_key, last_key] repeat another's."""
    itemsize = key_bytes // block_size
    clamped_lo = first_key // LANES * LANES
    clamped_hi = last_key // LANES * LANES
    for s in range(SUBS):
        key = min(max(tile * TILE + s * LANES, clamped_lo), clamped_hi)
        block = get_i32(table + 4 * (key // block_size))
        offset = key % block_size
        if block < 0 or block >= num_blocks:
            put_i64(plan + 8 * STATUS, BAD_BLOCK)
            put_i64(plan + 8 * CULPRIT, block)
            block = 0
        put_i64(keys + 8 * s, k_head + block * block_bytes + offset * itemsize)
        put_i64(values + 8 * s, v_head + block * block_bytes + offset * row_bytes)


@device
def _weigh_edge(
    tag, work, first, n, group, position, base, window, acc, row_bytes, dim, ahead, key_bytes
):
    """`_weigh` of a row tile whose tokens see different parts of the tile of keys at `base`."""
    p, values, factors = work, work + 4 * _VALUES, work + 4 * _FACTORS
    token_a, token_b = first // group, (first + n - 1) // group
    shared_lo = min(TILE, max(0, _first_key(position + token_b, window) - base))
    shared_hi = min(TILE, max(0, position + token_a + 1 - base))
    is_shared = shared_lo < shared_hi and _first_key(position + token_b, window) <= max(
        base, _first_key(position + token_a, window)
    )
    if is_shared:
        _weigh(
            tag, n, p, values, row_bytes, acc, dim, factors, shared_lo, shared_hi, ahead, key_bytes
        )
        factors = work + 4 * _ONES
    for token in range(token_a, token_b + 1):
        row = max(first, token * group)
        rows = min(first + n, (token + 1) * group) - row
        row -= first
        hi = min(TILE, position + token + 1 - base)
        lo = max(0, _first_key(position + token, window) - base)
        if is_shared:
            lo = shared_hi
        if lo < hi:
            _weigh(
                tag,
                rows,
                p + 4 * TILE * row,
                values,
                row_bytes,
                acc + 4 * dim * row,
                dim,
                factors + 4 * row,
                lo,
                hi,
                ahead,
                key_bytes,
            )


@device
def _partition(
    tag,
    partition,
    q,
    top,
    sums,
    acc,
    work,
    num_rows,
    group,
    position,
    window,
    k_head,
    v_head,
    table,
    block_size,
    block_bytes,
    num_blocks,
    key_bytes,
    row_bytes,
    dim,
    plan,
):
    """One partition of keys for all rows of an item: sets top [rows], sums [rows, 16], acc [rows, dim]."""
    for row in range(num_rows):
        put_f32(top + 4 * row, np.float32(-np.inf))
    for i in range(num_rows * LANES):
        put_f32(sums + 4 * i, np.float32(0.0))
    for i in range(num_rows * dim):
        put_f32(acc + 4 * i, np.float32(0.0))
    last_key = min((partition + 1) * PARTITION - 1, position + (num_rows - 1) // group)
    first_key = max(partition * PARTITION, _first_key(position, window))
    num_tiles = (num_rows + MAX_ROWS - 1) // MAX_ROWS
    step = (num_rows + num_tiles - 1) // num_tiles
    for tile in range(first_key // TILE, last_key // TILE + 1):
        base = tile * TILE
        values = work + 4 * _VALUES
        keys = work + 4 * _KEYS + 8 * SUBS * (tile & 1)
        ahead = work + 4 * _KEYS + 8 * SUBS * (~tile & 1)
        # Past the last tile this repeats its last keys, which costs nothing.
        _point(
            ahead,
            values,
            tile + 1,
            first_key,
            last_key,
            k_head,
            v_head,
            table,
            block_size,
            block_bytes,
            num_blocks,
            key_bytes,
            row_bytes,
            plan,
        )
        _point(
            keys,
            values,
            tile,
            first_key,
            last_key,
            k_head,
            v_head,
            table,
            block_size,
            block_bytes,
            num_blocks,
            key_bytes,
            row_bytes,
            plan,
        )
        for first in range(0, num_rows, step):
            n = min(step, num_rows - first)
            pos_a = position + first // group
            pos_b = position + (first + n - 1) // group
            if pos_b < base or _first_key(pos_a, window) >= base + TILE:
                continue
            _scores(tag, n, q + 4 * dim * first, keys, key_bytes, work, dim, values)
            for r in range(n):
                pos = position + (first + r) // group
                lo = max(0, _first_key(pos, window) - base)
                hi = min(TILE, pos + 1 - base)
                factor = np.float32(1.0)
                if lo < hi:
                    row = first + r
                    factor = softmax_step(
                        work + 4 * TILE * r, top + 4 * row, sums + 4 * LANES * row, lo, hi
                    )
                put_f32(work + 4 * _FACTORS + 4 * r, factor)
            row_acc = acc + 4 * dim * first
            if pos_a + 1 >= base + TILE and _first_key(pos_b, window) <= base:
                _weigh(
                    tag,
                    n,
                    work,
                    values,
                    row_bytes,
                    row_acc,
                    dim,
                    work + 4 * _FACTORS,
                    0,
                    TILE,
                    ahead,
                    key_bytes,
                )
            else:
                _weigh_edge(
                    tag,
                    work,
                    first,
                    n,
                    group,
                    position,
                    base,
                    window,
                    row_acc,
                    row_bytes,
                    dim,
                    ahead,
                    key_bytes,
                )


@device
def _lane_sum(address):
    return reduce_add(load_f32(address))


@device
def _merge_row(is_first, top, total, acc, part_top, part_total, part_acc, dim):
    """Fold one partition's (max, sum, accumulator) of a row into the row's; places are addresses."""
    new_top, new_total = get_f32(part_top), part_total
    if is_first:
        put_f32(top, new_top)
        put_f32(total, new_total)
        for h in range(dim):
            put_f32(acc + 4 * h, get_f32(part_acc + 4 * h))
        return
    old_top = get_f32(top)
    best = old_top if old_top > new_top else new_top
    a, b = exp2(old_top - best), exp2(new_top - best)
    put_f32(top, best)
    put_f32(total, get_f32(total) * a + new_total * b)
    for h in range(dim):
        put_f32(acc + 4 * h, get_f32(acc + 4 * h) * a + get_f32(part_acc + 4 * h) * b)


@device
def _emit_row(out, total, acc, dim):
    for h in range(dim):
        put_f32(out + 4 * h, get_f32(acc + 4 * h) / total)


@device
def _sees(partition, position, window):
    """Whether the token at `position` sees any key of the partition."""
    return partition * PARTITION <= position and (
        (partition + 1) * PARTITION > _first_key(position, window)
    )


@device
def _pack_query(q, q_stride, packed, token, num_tokens, head, width, scale):
    """Copy the item's rows [num_tokens, group * dim] of q, scaled."""
    for t in range(num_tokens):
        source = q + 4 * ((token + t) * q_stride + head * width)
        target = packed + 4 * t * width
        for i in range(width):
            put_f32(target + 4 * i, get_f32(source + 4 * i) * scale)


@device
def _attend(
    tag,
    itemsize,
    part,
    q,
    q_stride,
    k_cache,
    v_cache,
    tables,
    table_stride,
    starts,
    seq_lens,
    num_requests,
    out,
    scratch,
    scratch_stride,
    partials,
    plan,
    num_kv_heads,
    group,
    dim,
    block_size,
    num_blocks,
    window,
    scale64,
):
    scale = np.float32(scale64)
    chunk, split = get_i64(plan + 8 * CHUNK_TOKENS), get_i64(plan + 8 * SPLIT)
    num_items, splits = get_i64(plan + 8 * NUM_ITEMS), get_i64(plan + 8 * MAX_PARTITIONS)
    key_bytes, row_bytes = block_size * itemsize, dim * itemsize
    head_bytes = block_size * row_bytes
    block_bytes = num_kv_heads * head_bytes
    width, max_rows = group * dim, chunk * group
    work = scratch + part * scratch_stride
    for r in range(MAX_ROWS):
        put_f32(work + 4 * _ONES + 4 * r, np.float32(1.0))
    packed = work + 4 * WORK_FLOATS
    acc = packed + 4 * max_rows * dim
    whole_acc = acc + 4 * max_rows * dim
    sums = whole_acc + 4 * max_rows * dim
    top = sums + 4 * max_rows * LANES
    whole_top = top + 4 * max_rows
    whole_sum = whole_top + 4 * max_rows
    request, passed, query_start = 0, 0, get_i32(starts)
    while True:
        item = claim(plan + 8 * NEXT_ITEM)
        if item >= num_items:
            return
        while True:  # items of a request are contiguous, and this thread's items only ascend
            query_len = get_i32(starts + 4 * (request + 1)) - query_start
            chunks = (query_len + chunk - 1) // chunk
            if item < passed + chunks * num_kv_heads * splits:
                break
            passed += chunks * num_kv_heads * splits
            query_start += query_len
            request += 1
        local = item - passed
        index = chunks - 1 - local // (num_kv_heads * splits)  # the longest work first
        head, slot = local // splits % num_kv_heads, local % splits
        token = query_start + index * chunk
        num_tokens = min(chunk, query_len - index * chunk)
        num_rows = num_tokens * group
        position = get_i32(seq_lens + 4 * request) - query_len + index * chunk
        last = position + num_tokens - 1
        first_partition = _first_key(position, window) // PARTITION
        final_partition = last // PARTITION
        if split:
            first_partition += slot
            if first_partition > final_partition:
                continue
            final_partition = first_partition
            sums = partials + 4 * item * max_rows * (dim + LANES + 1)
            top = sums + 4 * max_rows * LANES
            acc = top + 4 * max_rows
        _pack_query(q, q_stride, packed, token, num_tokens, head, width, scale)
        for partition in range(first_partition, final_partition + 1):
            _partition(
                tag,
                partition,
                packed,
                top,
                sums,
                acc,
                work,
                num_rows,
                group,
                position,
                window,
                k_cache + head * head_bytes,
                v_cache + head * head_bytes,
                tables + 4 * request * table_stride,
                block_size,
                block_bytes,
                num_blocks,
                key_bytes,
                row_bytes,
                dim,
                plan,
            )
            if split or first_partition == final_partition:
                continue
            for row in range(num_rows):
                pos = position + row // group
                if _sees(partition, pos, window):
                    is_first = partition == _first_key(pos, window) // PARTITION
                    _merge_row(
                        is_first,
                        whole_top + 4 * row,
                        whole_sum + 4 * row,
                        whole_acc + 4 * row * dim,
                        top + 4 * row,
                        _lane_sum(sums + 4 * LANES * row),
                        acc + 4 * row * dim,
                        dim,
                    )
        if split:
            continue
        for row in range(num_rows):
            target = out + 4 * (
                ((token + row // group) * num_kv_heads + head) * width + row % group * dim
            )
            if first_partition == final_partition:
                _emit_row(target, _lane_sum(sums + 4 * LANES * row), acc + 4 * row * dim, dim)
            else:
                _emit_row(target, get_f32(whole_sum + 4 * row), whole_acc + 4 * row * dim, dim)


@kernel
def attend_float32(
    part,
    num_parts,
    q,
    q_stride,
    k_cache,
    v_cache,
    tables,
    table_stride,
    starts,
    seq_lens,
    num_requests,
    out,
    scratch,
    scratch_stride,
    partials,
    plan,
    num_kv_heads,
    group,
    dim,
    block_size,
    num_blocks,
    window,
    scale: float,
):
    _attend(
        np.float32(0),
        4,
        part,
        q,
        q_stride,
        k_cache,
        v_cache,
        tables,
        table_stride,
        starts,
        seq_lens,
        num_requests,
        out,
        scratch,
        scratch_stride,
        partials,
        plan,
        num_kv_heads,
        group,
        dim,
        block_size,
        num_blocks,
        window,
        scale,
    )


@kernel
def attend_bfloat16(
    part,
    num_parts,
    q,
    q_stride,
    k_cache,
    v_cache,
    tables,
    table_stride,
    starts,
    seq_lens,
    num_requests,
    out,
    scratch,
    scratch_stride,
    partials,
    plan,
    num_kv_heads,
    group,
    dim,
    block_size,
    num_blocks,
    window,
    scale: float,
):
    _attend(
        np.uint16(0),
        2,
        part,
        q,
        q_stride,
        k_cache,
        v_cache,
        tables,
        table_stride,
        starts,
        seq_lens,
        num_requests,
        out,
        scratch,
        scratch_stride,
        partials,
        plan,
        num_kv_heads,
        group,
        dim,
        block_size,
        num_blocks,
        window,
        scale,
    )


@kernel
def attend_float16(
    part,
    num_parts,
    q,
    q_stride,
    k_cache,
    v_cache,
    tables,
    table_stride,
    starts,
    seq_lens,
    num_requests,
    out,
    scratch,
    scratch_stride,
    partials,
    plan,
    num_kv_heads,
    group,
    dim,
    block_size,
    num_blocks,
    window,
    scale: float,
):
    _attend(
        np.int16(0),
        2,
        part,
        q,
        q_stride,
        k_cache,
        v_cache,
        tables,
        table_stride,
        starts,
        seq_lens,
        num_requests,
        out,
        scratch,
        scratch_stride,
        partials,
        plan,
        num_kv_heads,
        group,
        dim,
        block_size,
        num_blocks,
        window,
        scale,
    )


@kernel
def merge(
    part,
    num_parts,
    starts,
    seq_lens,
    num_requests,
    out,
    partials,
    plan,
    num_kv_heads,
    group,
    dim,
    window,
):
    """Second phase of split items: fold every row's partitions in ascending order, then emit."""
    chunk, splits = get_i64(plan + 8 * CHUNK_TOKENS), get_i64(plan + 8 * MAX_PARTITIONS)
    max_rows = chunk * group
    slot_bytes = 4 * max_rows * (dim + LANES + 1)
    item = 0
    for request in range(num_requests):
        query_start = get_i32(starts + 4 * request)
        query_len = get_i32(starts + 4 * (request + 1)) - query_start
        chunks = (query_len + chunk - 1) // chunk
        for local in range(chunks * num_kv_heads):
            index, head = chunks - 1 - local // num_kv_heads, local % num_kv_heads
            position = get_i32(seq_lens + 4 * request) - query_len + index * chunk
            base = _first_key(position, window) // PARTITION
            for row in range(min(chunk, query_len - index * chunk) * group):
                pos = position + row // group
                start = _first_key(pos, window) // PARTITION
                target = partials + (item + start - base) * slot_bytes
                top = target + 4 * (max_rows * LANES + row)
                acc = target + 4 * (max_rows * (LANES + 1) + row * dim)
                total = target + 4 * LANES * row  # its own lanes are read before it is written
                put_f32(total, _lane_sum(total))
                for partition in range(start + 1, pos // PARTITION + 1):
                    source = partials + (item + partition - base) * slot_bytes
                    _merge_row(
                        False,
                        top,
                        total,
                        acc,
                        source + 4 * (max_rows * LANES + row),
                        _lane_sum(source + 4 * LANES * row),
                        source + 4 * (max_rows * (LANES + 1) + row * dim),
                        dim,
                    )
                token = query_start + index * chunk + row // group
                place = (token * num_kv_heads + head) * group * dim + row % group * dim
                _emit_row(out + 4 * place, get_f32(total), acc, dim)
            item += splits


@kernel
def make_plan(
    part,
    num_parts,
    starts,
    seq_lens,
    num_requests,
    num_tokens,
    max_keys,
    num_kv_heads,
    group,
    dim,
    window,
    num_threads,
    plan,
):
    """Check the batch and choose the chunk and the split; neither changes a result's bits."""
    cost, longest = 0, 0
    if get_i32(starts) != 0 or get_i32(starts + 4 * num_requests) != num_tokens:
        put_i64(plan + 8 * STATUS, BAD_START)
        return
    for request in range(num_requests):
        query_len = get_i32(starts + 4 * (request + 1)) - get_i32(starts + 4 * request)
        keys = get_i32(seq_lens + 4 * request)
        if query_len < 0:
            put_i64(plan + 8 * STATUS, BAD_START)
            return
        if query_len > 0 and (keys < query_len or keys > max_keys):
            put_i64(plan + 8 * STATUS, BAD_LENGTH)
            put_i64(plan + 8 * CULPRIT, request)
            return
        if query_len > 0:
            seen = min(keys, window + query_len) if window > 0 else keys
            first = _first_key(keys - query_len, window) // PARTITION
            longest = max(longest, (keys - 1) // PARTITION - first + 1)
            cost += query_len * seen
    chunk = max(1, CHUNK_ROWS // group)
    while True:
        items = 0
        for request in range(num_requests):
            query_len = get_i32(starts + 4 * (request + 1)) - get_i32(starts + 4 * request)
            items += (query_len + chunk - 1) // chunk * num_kv_heads
        if items >= 4 * num_threads or chunk * group <= 2 * MAX_ROWS or chunk == 1:
            break
        chunk = (chunk + 1) // 2
    split = num_threads > 1 and items < 2 * num_threads and longest > 1
    splits = longest if split else 1
    longest_query = 1
    for request in range(num_requests):
        query_len = get_i32(starts + 4 * (request + 1)) - get_i32(starts + 4 * request)
        longest_query = max(longest_query, query_len)
    put_i64(plan + 8 * CHUNK_TOKENS, min(chunk, longest_query))
    put_i64(plan + 8 * NUM_ITEMS, items * splits)
    put_i64(plan + 8 * SPLIT, split)
    put_i64(plan + 8 * COST, cost * num_kv_heads * group * dim)
    put_i64(plan + 8 * MAX_PARTITIONS, splits)
