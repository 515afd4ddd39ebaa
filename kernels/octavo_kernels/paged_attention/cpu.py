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

from octavo_kernels.paged_attention.cpu_plan import (
    BAD_BLOCK,
    BLOCK_SIZE,
    CHUNK_TOKENS,
    DIM,
    GROUP,
    NEXT_ITEM,
    NUM_BLOCKS,
    NUM_FINISHED,
    NUM_ITEMS,
    NUM_KV_HEADS,
    NUM_REQUESTS,
    NUM_SLOTS,
    PARTIALS,
    PARTITION,
    SCRATCH,
    SCRATCH_STRIDE,
    SEQ_LENS,
    SPLIT,
    TABLE_STRIDE,
    TABLES,
    WINDOW,
    field,
    oldest_key,
    query_length,
    query_start,
    refuse,
    slot_floats,
)
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
    load_f32,
    put_f32,
    put_i64,
    reduce_add,
)

# Scratch of one part, in bytes: score rows, rescale factors, ones, then tables of 4 addresses: the
# keys of even and of odd tiles, so that a tile's loops can ask for the next one's, and the values.
_FACTORS = 4 * MAX_ROWS * TILE
_ONES = _FACTORS + 4 * LANES
_KEYS = _ONES + 4 * LANES
_VALUES = _KEYS + 2 * 8 * SUBS
WORK_FLOATS = (_VALUES + 8 * SUBS + 63) // 64 * 16


class _Layout(NamedTuple):
    """Sizes of a layer's cache; strides and sizes in bytes where named so."""

    plan: int
    block_size: int
    num_blocks: int
    dim: int
    group: int
    window: int
    key_bytes: int  # between two h of a key
    row_bytes: int  # between two values
    block_bytes: int


class _Layer(NamedTuple):
    """What one layer brings: addresses, and bytes between two tokens of q."""

    q: int
    q_bytes: int
    k: int
    v: int
    out: int
    scale: np.float32


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
    oldest_a = max(0, oldest_key(position + token_a, window) - base)
    shared_lo = max(0, oldest_key(position + token_b, window) - base)
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
            lo = shared_hi if is_shared else max(0, oldest_key(position + token, window) - base)
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
            refuse(layout.plan, BAD_BLOCK, block)
            block = 0
        put_i64(keys + 8 * s, head.k + block * layout.block_bytes + offset * itemsize)
        put_i64(values + 8 * s, head.v + block * layout.block_bytes + offset * layout.row_bytes)


@device
def _soften(layout, state, work, first, n, position, base):
    """The online softmax step of each row of a row tile, over the keys at `base` that it sees."""
    for r in range(n):
        row = first + r
        pos = position + row // layout.group
        lo = max(0, oldest_key(pos, layout.window) - base)
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
    first_key = max(partition * PARTITION, oldest_key(position, window))
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
            if pos_b < base or oldest_key(pos_a, window) >= base + TILE:
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
def _emit_row(plan, out, token, head, member, total, acc):
    """Write one row's quotient to out [T, K, G, H]."""
    group, dim = field(plan, GROUP), field(plan, DIM)
    target = out + 4 * ((token * field(plan, NUM_KV_HEADS) + head) * group + member) * dim
    for h in range(dim):
        put_f32(target + 4 * h, get_f32(acc + 4 * h) / total)


@device
def _pack_query(layer, packed, token, num_tokens, first_column, width):
    """Copy the item's rows [num_tokens, group * dim] of q, scaled."""
    for t in range(num_tokens):
        source = layer.q + (token + t) * layer.q_bytes + 4 * first_column
        target = packed + 4 * t * width
        for i in range(width):
            put_f32(target + 4 * i, get_f32(source + 4 * i) * layer.scale)


@device
def _slot(plan, item):
    """The partial state of a split item."""
    chunk, group, dim = field(plan, CHUNK_TOKENS), field(plan, GROUP), field(plan, DIM)
    sums = field(plan, PARTIALS) + 4 * item * slot_floats(chunk, group, dim)
    top = sums + 4 * chunk * group * LANES
    return _State(top, sums, top + 4 * chunk * group)


@device
def _attend_item(tag, layout, layer, request, head, slot, item, token, num_tokens, position, part):
    """All partitions of one work item, or of a split one the partition number `slot`."""
    plan, dim, group, window = layout.plan, layout.dim, layout.group, layout.window
    max_rows, num_rows = field(plan, CHUNK_TOKENS) * group, num_tokens * group
    work = field(plan, SCRATCH) + part * field(plan, SCRATCH_STRIDE)
    packed = work + 4 * WORK_FLOATS
    acc = packed + 4 * max_rows * dim
    whole_acc = acc + 4 * max_rows * dim
    sums = whole_acc + 4 * max_rows * dim
    top = sums + 4 * max_rows * LANES
    whole_top = top + 4 * max_rows
    whole_sum = whole_top + 4 * max_rows
    state = _State(top, sums, acc)
    first = oldest_key(position, window) // PARTITION
    last = (position + num_tokens - 1) // PARTITION
    is_split = field(plan, SPLIT) != 0
    if is_split:
        first += slot
        if first > last:
            return
        last, state = first, _slot(plan, item)
    shift = head * layout.block_size * layout.row_bytes
    table = field(plan, TABLES) + 4 * request * field(plan, TABLE_STRIDE)
    where = _Head(layer.k + shift, layer.v + shift, table)
    _pack_query(layer, packed, token, num_tokens, head * group * dim, group * dim)
    for partition in range(first, last + 1):
        _partition(tag, layout, where, state, partition, packed, work, num_rows, position)
        for row in range(0 if first == last else num_rows):
            pos = position + row // group
            start = oldest_key(pos, window) // PARTITION
            if start <= partition <= pos // PARTITION:
                _merge_row(partition == start, whole_top + 4 * row, whole_sum + 4 * row,
                           whole_acc + 4 * row * dim, top + 4 * row,
                           _lane_sum(sums + 4 * LANES * row), acc + 4 * row * dim, dim)  # fmt: skip
    for row in range(0 if is_split else num_rows):
        at, member = token + row // group, row % group
        if first == last:
            total = _lane_sum(sums + 4 * LANES * row)
            _emit_row(plan, layer.out, at, head, member, total, acc + 4 * row * dim)
        else:
            total = get_f32(whole_sum + 4 * row)
            _emit_row(plan, layer.out, at, head, member, total, whole_acc + 4 * row * dim)


@device
def _attend(tag, itemsize, part, num_parts, plan, layer):
    block_size, dim, chunk = field(plan, BLOCK_SIZE), field(plan, DIM), field(plan, CHUNK_TOKENS)
    num_kv_heads, splits = field(plan, NUM_KV_HEADS), field(plan, NUM_SLOTS)
    layout = _Layout(
        plan, block_size, field(plan, NUM_BLOCKS), dim, field(plan, GROUP), field(plan, WINDOW),
        block_size * itemsize, dim * itemsize, num_kv_heads * block_size * dim * itemsize,
    )  # fmt: skip
    ones = field(plan, SCRATCH) + part * field(plan, SCRATCH_STRIDE) + _ONES
    for r in range(MAX_ROWS):
        put_f32(ones + 4 * r, np.float32(1.0))
    request, passed = 0, 0
    while True:
        item = claim(plan + 8 * NEXT_ITEM)
        if item >= field(plan, NUM_ITEMS):
            break
        while True:  # items of a request are contiguous, and this thread's items only ascend
            query_len = query_length(plan, request)
            chunks = (query_len + chunk - 1) // chunk
            if item < passed + chunks * num_kv_heads * splits:
                break
            passed += chunks * num_kv_heads * splits
            request += 1
        local = item - passed
        begin = chunk * (chunks - 1 - local // (num_kv_heads * splits))  # the longest work first
        head, slot = local // splits % num_kv_heads, local % splits
        position = get_i32(field(plan, SEQ_LENS) + 4 * request) - query_len + begin
        _attend_item(tag, layout, layer, request, head, slot, item,
                     query_start(plan, request) + begin, min(chunk, query_len - begin), position,
                     part)  # fmt: skip
    # The last part leaves the counters as it found them, for the next layer.
    if claim(plan + 8 * NUM_FINISHED) == num_parts - 1:
        put_i64(plan + 8 * NEXT_ITEM, 0)
        put_i64(plan + 8 * NUM_FINISHED, 0)


@kernel
def attend_float32(part, num_parts, plan, q, q_bytes, k, v, out, scale: float):
    """One layer over a float32 cache; every part claims items of the plan until none is left."""
    layer = _Layer(q, q_bytes, k, v, out, np.float32(scale))
    _attend(np.float32(0), 4, part, num_parts, plan, layer)


@kernel
def attend_bfloat16(part, num_parts, plan, q, q_bytes, k, v, out, scale: float):
    """`attend_float32` for a bfloat16 cache."""
    layer = _Layer(q, q_bytes, k, v, out, np.float32(scale))
    _attend(np.uint16(0), 2, part, num_parts, plan, layer)


@kernel
def attend_float16(part, num_parts, plan, q, q_bytes, k, v, out, scale: float):
    """`attend_float32` for a float16 cache."""
    layer = _Layer(q, q_bytes, k, v, out, np.float32(scale))
    _attend(np.int16(0), 2, part, num_parts, plan, layer)


@kernel
def merge(part, num_parts, plan, out):
    """Second phase of split items: fold every row's partitions in ascending order, then emit."""
    chunk, group, dim = field(plan, CHUNK_TOKENS), field(plan, GROUP), field(plan, DIM)
    num_kv_heads, window = field(plan, NUM_KV_HEADS), field(plan, WINDOW)
    item = 0
    for request in range(field(plan, NUM_REQUESTS)):
        query_len = query_length(plan, request)
        chunks = (query_len + chunk - 1) // chunk
        for local in range(chunks * num_kv_heads):
            begin, head = chunk * (chunks - 1 - local // num_kv_heads), local % num_kv_heads
            position = get_i32(field(plan, SEQ_LENS) + 4 * request) - query_len + begin
            base = item - oldest_key(position, window) // PARTITION
            for row in range(min(chunk, query_len - begin) * group):
                pos = position + row // group
                start = oldest_key(pos, window) // PARTITION
                mine = _slot(plan, base + start)
                top, total = mine.top + 4 * row, mine.sums + 4 * LANES * row
                acc = mine.acc + 4 * dim * row
                put_f32(total, _lane_sum(total))
                for partition in range(start + 1, pos // PARTITION + 1):
                    other = _slot(plan, base + partition)
                    _merge_row(False, top, total, acc, other.top + 4 * row,
                               _lane_sum(other.sums + 4 * LANES * row), other.acc + 4 * dim * row,
                               dim)  # fmt: skip
                token = query_start(plan, request) + begin + row // group
                _emit_row(plan, out, token, head, row % group, get_f32(total), acc)
            item += field(plan, NUM_SLOTS)
