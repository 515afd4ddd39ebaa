"""Attention over paged keys and values on the CPU. Knows addresses; knows nothing of models.

One work item is (request, chunk of its query tokens, kv head); the query heads of the group and
the chunk's tokens are its rows. A row runs over its keys in partitions of 512 and tiles of 64 keys
that lie at absolute positions: inside a partition an online softmax, then the partitions are merged
in ascending order. So a row's arithmetic follows from its position alone, whatever the chunk, the
batch or the thread.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from octavo_kernels.paged_attention.microkernels import (
    MAX_ROWS,
    SUBS,
    TILE,
    claim,
    exp2,
    scores,
    softmax_step,
    weigh_16,
    weigh_64,
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

PARTITION = 512  # keys; a multiple of TILE
CHUNK_ROWS = 96  # rows of the widest work item: their state stays in the second-level cache

# Scratch of one part, in bytes: score rows, rescale factors, ones, then tables of 4 addresses: the
# keys of even and of odd tiles, so that a tile's loops can ask for the next one's, and the values.
_FACTORS = 4 * MAX_ROWS * TILE
_ONES = _FACTORS + 4 * LANES
_KEYS = _ONES + 4 * LANES
_VALUES = _KEYS + 2 * 8 * SUBS
WORK_FLOATS = (_VALUES + 8 * SUBS + 63) // 64 * 16

# A call is a row of int64: first what `make_plan` decides, then what the host gives.
PLAN_FIELDS = 8
CHUNK_TOKENS, NUM_ITEMS, SPLIT, COST, STATUS, NEXT_ITEM, NUM_SLOTS, CULPRIT = range(PLAN_FIELDS)
(STARTS, SEQ_LENS, NUM_REQUESTS, NUM_TOKENS, TABLES, TABLE_STRIDE, MAX_KEYS, NUM_KV_HEADS, GROUP,
 DIM, BLOCK_SIZE, NUM_BLOCKS, WINDOW, NUM_THREADS, Q, Q_STRIDE, K_CACHE, V_CACHE, OUT, SCRATCH,
 SCRATCH_STRIDE, PARTIALS) = range(PLAN_FIELDS, PLAN_FIELDS + 22)  # fmt: skip
BAD_START, BAD_LENGTH, BAD_BLOCK = 1, 2, 3


class _Layout(NamedTuple):
    """Sizes of one call; strides and sizes in bytes where named so."""

    call: int
    block_size: int
    num_blocks: int
    dim: int
    group: int
    window: int
    key_bytes: int  # between two h of a key
    row_bytes: int  # between two values
    block_bytes: int


class _Head(NamedTuple):
    """Where one request's keys and values of one kv head lie."""

    k: int
    v: int
    table: int


class _State(NamedTuple):
    """Online softmax of an item's rows: top [rows], sums [rows, 16], acc [rows, dim]."""

    top: int
    sums: int
    acc: int


@device
def _field(call, field):
    return get_i64(call + 8 * field)


@device
def _first_key(position, window):
    """The oldest key position that the token at `position` sees."""
    return max(0, position - window + 1) if window > 0 else 0


@device
def _weigh(tag, rows, p, factors, values, ahead, acc, lo, hi, dim, key_bytes):
    """Add the weighted values of keys [lo, hi) of a tile to `rows` accumulators."""
    column = 0
    while column + 4 * LANES <= dim:
        weigh_64(tag, rows, p, factors, values, ahead, column, acc, dim, lo, hi, key_bytes)
        column += 4 * LANES
    while column < dim:
        weigh_16(tag, rows, p, factors, values, ahead, column, acc, dim, lo, hi, key_bytes)
        column += LANES


@device
def _weigh_row_tile(tag, layout, work, ahead, first, n, position, base, acc):
    """`_weigh` of a row tile: the keys at `base` that all its tokens see, then each one's rest."""
    dim, group, window = layout.dim, layout.group, layout.window
    factors = work + _FACTORS
    token_a, token_b = first // group, (first + n - 1) // group
    oldest_a = max(0, _first_key(position + token_a, window) - base)
    shared_lo = max(0, _first_key(position + token_b, window) - base)
    shared_hi = min(TILE, position + token_a + 1 - base)
    is_shared = oldest_a == shared_lo and shared_lo < shared_hi
    # One call site: the loops are inlined, and each copy costs seconds of compilation.
    for piece in range(0 if is_shared else 1, 2 + token_b - token_a):
        row, rows, lo, hi = 0, n, shared_lo, shared_hi
        if piece > 0:
            token = token_a + piece - 1
            row = max(first, token * group) - first
            rows = min(first + n, (token + 1) * group) - first - row
            hi = min(TILE, position + token + 1 - base)
            lo = shared_hi if is_shared else max(0, _first_key(position + token, window) - base)
        if lo < hi:
            _weigh(tag, rows, work + 4 * TILE * row, factors + 4 * row, work + _VALUES, ahead,
                   acc + 4 * dim * row, lo, hi, dim, layout.key_bytes)  # fmt: skip
        if is_shared:
            factors = work + _ONES


@device
def _point(layout, head, keys, values, tile, first_key, last_key):
    """Fill a tile's address tables; 16-key groups outside [first_key, last_key] repeat others."""
    itemsize = layout.key_bytes // layout.block_size
    low, high = first_key // LANES * LANES, last_key // LANES * LANES
    for s in range(SUBS):
        key = min(max(tile * TILE + s * LANES, low), high)
        block = get_i32(head.table + 4 * (key // layout.block_size))
        offset = key % layout.block_size
        if block < 0 or block >= layout.num_blocks:
            put_i64(layout.call + 8 * STATUS, BAD_BLOCK)
            put_i64(layout.call + 8 * CULPRIT, block)
            block = 0
        put_i64(keys + 8 * s, head.k + block * layout.block_bytes + offset * itemsize)
        put_i64(values + 8 * s, head.v + block * layout.block_bytes + offset * layout.row_bytes)


@device
def _soften(layout, state, work, first, n, position, base):
    """The online softmax step of each row of a row tile, over the keys at `base` that it sees."""
    for r in range(n):
        row = first + r
        pos = position + row // layout.group
        lo = max(0, _first_key(pos, layout.window) - base)
        hi = min(TILE, pos + 1 - base)
        factor = np.float32(1.0)
        if lo < hi:
            sums = state.sums + 4 * LANES * row
            factor = softmax_step(work + 4 * TILE * r, state.top + 4 * row, sums, lo, hi)
        put_f32(work + _FACTORS + 4 * r, factor)


@device
def _reset(state, num_rows, dim):
    for row in range(num_rows):
        put_f32(state.top + 4 * row, np.float32(-np.inf))
    for i in range(num_rows * LANES):
        put_f32(state.sums + 4 * i, np.float32(0.0))
    for i in range(num_rows * dim):
        put_f32(state.acc + 4 * i, np.float32(0.0))


@device
def _partition(tag, layout, head, state, partition, q, work, num_rows, position):
    """One partition of keys for all rows of an item, whose first token stands at `position`."""
    dim, group, window, key_bytes = layout.dim, layout.group, layout.window, layout.key_bytes
    _reset(state, num_rows, dim)
    last_key = min((partition + 1) * PARTITION - 1, position + (num_rows - 1) // group)
    first_key = max(partition * PARTITION, _first_key(position, window))
    num_row_tiles = (num_rows + MAX_ROWS - 1) // MAX_ROWS
    step = (num_rows + num_row_tiles - 1) // num_row_tiles
    values = work + _VALUES
    for tile in range(first_key // TILE, last_key // TILE + 1):
        base = tile * TILE
        keys, ahead = work + _KEYS + 8 * SUBS * (tile & 1), work + _KEYS + 8 * SUBS * (~tile & 1)
        # Past the last tile this repeats its last keys, which costs nothing.
        _point(layout, head, ahead, values, tile + 1, first_key, last_key)
        _point(layout, head, keys, values, tile, first_key, last_key)
        for first in range(0, num_rows, step):
            n = min(step, num_rows - first)
            pos_a = position + first // group
            pos_b = position + (first + n - 1) // group
            if pos_b < base or _first_key(pos_a, window) >= base + TILE:
                continue
            scores(tag, n, q + 4 * dim * first, keys, values, work, dim, key_bytes)
            _soften(layout, state, work, first, n, position, base)
            acc = state.acc + 4 * dim * first
            _weigh_row_tile(tag, layout, work, ahead, first, n, position, base, acc)


@device
def _lane_sum(address):
    return reduce_add(load_f32(address))


@device
def _merge_row(is_first, top, total, acc, part_top, part_total, part_acc, dim):
    """Fold one partition's (max, sum, accumulator) of a row into the row's own, by address."""
    new_top = get_f32(part_top)
    if is_first:
        put_f32(top, new_top)
        put_f32(total, part_total)
        for h in range(dim):
            put_f32(acc + 4 * h, get_f32(part_acc + 4 * h))
        return
    old_top = get_f32(top)
    best = old_top if old_top > new_top else new_top
    a, b = exp2(old_top - best), exp2(new_top - best)
    put_f32(top, best)
    put_f32(total, get_f32(total) * a + part_total * b)
    for h in range(dim):
        put_f32(acc + 4 * h, get_f32(acc + 4 * h) * a + get_f32(part_acc + 4 * h) * b)


@device
def _emit_row(call, token, head, member, total, acc):
    """Write one row's quotient to out [T, K, G, H]."""
    group, dim = _field(call, GROUP), _field(call, DIM)
    place = ((token * _field(call, NUM_KV_HEADS) + head) * group + member) * dim
    out = _field(call, OUT) + 4 * place
    for h in range(dim):
        put_f32(out + 4 * h, get_f32(acc + 4 * h) / total)


@device
def _pack_query(call, packed, token, num_tokens, head, scale):
    """Copy the item's rows [num_tokens, group * dim] of q, scaled."""
    width = _field(call, GROUP) * _field(call, DIM)
    for t in range(num_tokens):
        source = _field(call, Q) + 4 * ((token + t) * _field(call, Q_STRIDE) + head * width)
        target = packed + 4 * t * width
        for i in range(width):
            put_f32(target + 4 * i, get_f32(source + 4 * i) * scale)


@device
def _query_start(call, request):
    return get_i32(_field(call, STARTS) + 4 * request)


@device
def _slot(call, item):
    """The partial state of a split item."""
    rows, dim = _field(call, CHUNK_TOKENS) * _field(call, GROUP), _field(call, DIM)
    sums = _field(call, PARTIALS) + 4 * item * rows * (dim + LANES + 1)
    top = sums + 4 * rows * LANES
    return _State(top, sums, top + 4 * rows)


@device
def _attend_item(tag, layout, request, head, slot, item, token, num_tokens, position, part, scale):
    """All partitions of one work item, or of a split one the partition number `slot`."""
    call, dim, group, window = layout.call, layout.dim, layout.group, layout.window
    max_rows, num_rows = _field(call, CHUNK_TOKENS) * group, num_tokens * group
    work = _field(call, SCRATCH) + part * _field(call, SCRATCH_STRIDE)
    packed = work + 4 * WORK_FLOATS
    acc = packed + 4 * max_rows * dim
    whole_acc = acc + 4 * max_rows * dim
    sums = whole_acc + 4 * max_rows * dim
    top = sums + 4 * max_rows * LANES
    whole_top = top + 4 * max_rows
    whole_sum = whole_top + 4 * max_rows
    state = _State(top, sums, acc)
    first = _first_key(position, window) // PARTITION
    last = (position + num_tokens - 1) // PARTITION
    is_split = _field(call, SPLIT) != 0
    if is_split:
        first += slot
        if first > last:
            return
        last, state = first, _slot(call, item)
    shift = head * layout.block_size * layout.row_bytes
    table = _field(call, TABLES) + 4 * request * _field(call, TABLE_STRIDE)
    where = _Head(_field(call, K_CACHE) + shift, _field(call, V_CACHE) + shift, table)
    _pack_query(call, packed, token, num_tokens, head, scale)
    for partition in range(first, last + 1):
        _partition(tag, layout, where, state, partition, packed, work, num_rows, position)
        for row in range(0 if first == last else num_rows):
            pos = position + row // group
            start = _first_key(pos, window) // PARTITION
            if start <= partition <= pos // PARTITION:
                _merge_row(partition == start, whole_top + 4 * row, whole_sum + 4 * row,
                           whole_acc + 4 * row * dim, top + 4 * row,
                           _lane_sum(sums + 4 * LANES * row), acc + 4 * row * dim, dim)  # fmt: skip
    for row in range(0 if is_split else num_rows):
        at, member = token + row // group, row % group
        if first == last:
            total = _lane_sum(sums + 4 * LANES * row)
            _emit_row(call, at, head, member, total, acc + 4 * row * dim)
        else:
            total = get_f32(whole_sum + 4 * row)
            _emit_row(call, at, head, member, total, whole_acc + 4 * row * dim)


@device
def _attend(tag, itemsize, part, call, scale64):
    scale = np.float32(scale64)
    block_size, dim, chunk = _field(call, BLOCK_SIZE), _field(call, DIM), _field(call, CHUNK_TOKENS)
    num_kv_heads, splits = _field(call, NUM_KV_HEADS), _field(call, NUM_SLOTS)
    layout = _Layout(
        call, block_size, _field(call, NUM_BLOCKS), dim, _field(call, GROUP), _field(call, WINDOW),
        block_size * itemsize, dim * itemsize, num_kv_heads * block_size * dim * itemsize,
    )  # fmt: skip
    ones = _field(call, SCRATCH) + part * _field(call, SCRATCH_STRIDE) + _ONES
    for r in range(MAX_ROWS):
        put_f32(ones + 4 * r, np.float32(1.0))
    request, passed, query_start = 0, 0, 0
    while True:
        item = claim(call + 8 * NEXT_ITEM)
        if item >= _field(call, NUM_ITEMS):
            return
        while True:  # items of a request are contiguous, and this thread's items only ascend
            query_len = _query_start(call, request + 1) - query_start
            chunks = (query_len + chunk - 1) // chunk
            if item < passed + chunks * num_kv_heads * splits:
                break
            passed += chunks * num_kv_heads * splits
            query_start += query_len
            request += 1
        local = item - passed
        begin = chunk * (chunks - 1 - local // (num_kv_heads * splits))  # the longest work first
        head, slot = local // splits % num_kv_heads, local % splits
        position = get_i32(_field(call, SEQ_LENS) + 4 * request) - query_len + begin
        _attend_item(tag, layout, request, head, slot, item, query_start + begin,
                     min(chunk, query_len - begin), position, part, scale)  # fmt: skip


@kernel
def attend_float32(part, num_parts, call, scale: float):
    """A whole call over a float32 cache; every part claims items until none is left."""
    _attend(np.float32(0), 4, part, call, scale)


@kernel
def attend_bfloat16(part, num_parts, call, scale: float):
    """`attend_float32` for a bfloat16 cache."""
    _attend(np.uint16(0), 2, part, call, scale)


@kernel
def attend_float16(part, num_parts, call, scale: float):
    """`attend_float32` for a float16 cache."""
    _attend(np.int16(0), 2, part, call, scale)


@kernel
def merge(part, num_parts, call):
    """Second phase of split items: fold every row's partitions in ascending order, then emit."""
    chunk, group, dim = _field(call, CHUNK_TOKENS), _field(call, GROUP), _field(call, DIM)
    num_kv_heads, window = _field(call, NUM_KV_HEADS), _field(call, WINDOW)
    item = 0
    for request in range(_field(call, NUM_REQUESTS)):
        query_start = _query_start(call, request)
        query_len = _query_start(call, request + 1) - query_start
        chunks = (query_len + chunk - 1) // chunk
        for local in range(chunks * num_kv_heads):
            begin, head = chunk * (chunks - 1 - local // num_kv_heads), local % num_kv_heads
            position = get_i32(_field(call, SEQ_LENS) + 4 * request) - query_len + begin
            base = item - _first_key(position, window) // PARTITION
            for row in range(min(chunk, query_len - begin) * group):
                pos = position + row // group
                start = _first_key(pos, window) // PARTITION
                mine = _slot(call, base + start)
                top, total = mine.top + 4 * row, mine.sums + 4 * LANES * row
                acc = mine.acc + 4 * dim * row
                put_f32(total, _lane_sum(total))
                for partition in range(start + 1, pos // PARTITION + 1):
                    other = _slot(call, base + partition)
                    _merge_row(False, top, total, acc, other.top + 4 * row,
                               _lane_sum(other.sums + 4 * LANES * row), other.acc + 4 * dim * row,
                               dim)  # fmt: skip
                token = query_start + begin + row // group
                _emit_row(call, token, head, row % group, get_f32(total), acc)
            item += _field(call, NUM_SLOTS)


@device
def _count_items(call, chunk):
    items = 0
    for request in range(_field(call, NUM_REQUESTS)):
        query_len = _query_start(call, request + 1) - _query_start(call, request)
        items += (query_len + chunk - 1) // chunk * _field(call, NUM_KV_HEADS)
    return items


@kernel
def make_plan(part, num_parts, call):
    """Check the batch and choose the chunk and the split; neither changes a result's bits."""
    group, window = _field(call, GROUP), _field(call, WINDOW)
    num_requests, num_threads = _field(call, NUM_REQUESTS), _field(call, NUM_THREADS)
    cost, longest, longest_query = 0, 0, 1
    if _query_start(call, 0) != 0 or _query_start(call, num_requests) != _field(call, NUM_TOKENS):
        put_i64(call + 8 * STATUS, BAD_START)
        return
    for request in range(num_requests):
        query_len = _query_start(call, request + 1) - _query_start(call, request)
        keys = get_i32(_field(call, SEQ_LENS) + 4 * request)
        if query_len < 0:
            put_i64(call + 8 * STATUS, BAD_START)
            return
        if query_len > 0 and (keys < query_len or keys > _field(call, MAX_KEYS)):
            put_i64(call + 8 * STATUS, BAD_LENGTH)
            put_i64(call + 8 * CULPRIT, request)
            return
        if query_len > 0:
            first = _first_key(keys - query_len, window) // PARTITION
            longest = max(longest, (keys - 1) // PARTITION - first + 1)
            longest_query = max(longest_query, query_len)
            cost += query_len * (min(keys, window + query_len) if window > 0 else keys)
    chunk = min(longest_query, max(1, CHUNK_ROWS // group))
    items = _count_items(call, chunk)
    while items < 4 * num_threads and chunk > 1 and chunk * group > 2 * MAX_ROWS:
        chunk = (chunk + 1) // 2
        items = _count_items(call, chunk)
    is_split = num_threads > 1 and items < 2 * num_threads and longest > 1
    put_i64(call + 8 * CHUNK_TOKENS, chunk)
    put_i64(call + 8 * NUM_ITEMS, items * (longest if is_split else 1))
    put_i64(call + 8 * SPLIT, 1 if is_split else 0)
    put_i64(call + 8 * COST, cost * _field(call, NUM_KV_HEADS) * group * _field(call, DIM))
    put_i64(call + 8 * NUM_SLOTS, longest if is_split else 1)
