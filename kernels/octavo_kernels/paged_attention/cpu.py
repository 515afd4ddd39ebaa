"""Attention over paged keys and values on the CPU. Knows addresses; knows nothing of models.

One work item is (request, chunk of its query tokens, kv head); the query heads of the group and
the chunk's tokens are its rows. Where there are many short items, one takes all kv heads of a
request, as a block's heads lie side by side. A row runs over its keys in partitions of 512 and
tiles of 64 keys that lie at absolute positions: inside a partition an online softmax, then the
partitions are merged in ascending order. So a row's arithmetic follows from its position alone,
whatever the chunk, the item, the batch or the thread.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from octavo_kernels.paged_attention.cpu_merge import (
    State,
    emit_row,
    lane_sum,
    merge_row,
    slot_state,
)
from octavo_kernels.paged_attention.cpu_plan import (
    BAD_BLOCK,
    BLOCK_SIZE,
    CHUNK_TOKENS,
    DIM,
    GROUP,
    ITEM_HEADS,
    NEXT_ITEM,
    NUM_BLOCKS,
    NUM_FINISHED,
    NUM_ITEMS,
    NUM_KV_HEADS,
    NUM_SLOTS,
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
)
from octavo_kernels.paged_attention.int8_tiles import (
    SCALE_BYTES,
    clear_weights,
    fine_codes,
    value_scales,
)
from octavo_kernels.paged_attention.microkernels import (
    claim,
    is_coded,
    scores,
    softmax_step,
    weigh_16,
    weigh_64,
)
from octavo_kernels.paged_attention.tile_ir import MAX_ROWS, SUBS, TILE
from octavo_kernels.parallel import device, kernel
from octavo_kernels.simd import (
    LANES,
    get_f32,
    get_i32,
    get_i64,
    load_f32,
    mul,
    put_f32,
    put_i64,
    splat,
    store_f32,
)

# Scratch of one part, in bytes: score rows, rescale factors, ones, then two tables of addresses of
# a tile's keys and values, so that a tile's loops can ask for the next one's, and V's scales.
_FACTORS = 4 * MAX_ROWS * TILE
_ONES = _FACTORS + 4 * LANES
_TABLES = _ONES + 4 * LANES
_TABLE_BYTES = 2 * 8 * SUBS
_SCALES = _TABLES + 2 * _TABLE_BYTES
WORK_FLOATS = (_SCALES + 4 * (TILE + LANES)) // 64 * 16


class _Layout(NamedTuple):
    """Sizes of a layer's cache; strides and sizes in bytes where named so."""

    plan: int
    block_bits: int  # a block has 2 ** block_bits tokens
    num_blocks: int
    dim: int
    group: int
    window: int
    key_stride: int  # between two h of a key
    key_bytes: int  # between two keys, 16 of them at least
    value_bytes: int  # between two values, likewise
    head_bytes: int  # of one kv head's block
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
    """Where one request's keys and values of an item's first kv head lie."""

    k: int
    v: int
    table: int


@device
def _weigh(tag, rows, p, factors, values, ahead, acc, lo, hi, dim, key_stride):
    """Add the weighted values of keys [lo, hi) of a tile to `rows` accumulators."""
    column = 0
    while column + 4 * LANES <= dim:
        weigh_64(tag, rows, p, factors, values, ahead, column, acc, dim, lo, hi, key_stride)
        column += 4 * LANES
    while column < dim:
        weigh_16(tag, rows, p, factors, values, ahead, column, acc, dim, lo, hi, key_stride)
        column += LANES


@device
def _weigh_row_tile(tag, layout, work, values, ahead, first, n, token_a, token_b, pos_a, base, acc):
    """`_weigh` of a row tile: the keys at `base` that all its tokens see, then each one's rest."""
    dim, group, window = layout.dim, layout.group, layout.window
    factors = work + _FACTORS
    pos_b = pos_a + token_b - token_a
    oldest_a = max(0, oldest_key(pos_a, window) - base)
    shared_lo, shared_hi = max(0, oldest_key(pos_b, window) - base), min(TILE, pos_a + 1 - base)
    is_shared = oldest_a == shared_lo and shared_lo < shared_hi
    last_piece = 1 + token_b - token_a
    if is_coded(tag):  # whose weights are 0 where a row does not see
        shared_lo, shared_hi = oldest_a, min(TILE, pos_b + 1 - base)
        is_shared, last_piece = True, 0
    # One call site: the loops are inlined, and each copy costs seconds of compilation.
    for piece in range(0 if is_shared else 1, last_piece + 1):
        row, rows, lo, hi = 0, n, shared_lo, shared_hi
        if piece > 0:
            token = token_a + piece - 1
            row = max(first, token * group) - first
            rows = min(first + n, (token + 1) * group) - first - row
            pos = pos_a + piece - 1
            hi = min(TILE, pos + 1 - base)
            lo = shared_hi if is_shared else max(0, oldest_key(pos, window) - base)
        if lo < hi:
            _weigh(tag, rows, work + 4 * TILE * row, factors + 4 * row, values, ahead,
                   acc + 4 * dim * row, lo, hi, dim, layout.key_stride)  # fmt: skip
        if is_shared:
            factors = work + _ONES


@device
def _point(layout, head, keys, tile, first_key, last_key):
    """Fill a tile's address tables, of keys and then of values.

    16-key groups outside [first_key, last_key] repeat others.
    """
    low, high = first_key & -LANES, last_key & -LANES
    for s in range(SUBS):
        key = min(max(tile * TILE + s * LANES, low), high)
        block = get_i32(head.table + 4 * (key >> layout.block_bits))
        offset = key & ((1 << layout.block_bits) - 1)
        if block < 0 or block >= layout.num_blocks:
            refuse(layout.plan, BAD_BLOCK, block)
            block = 0
        start = block * layout.block_bytes
        put_i64(keys + 8 * s, head.k + start + offset * layout.key_bytes)
        put_i64(keys + 8 * (SUBS + s), head.v + start + offset * layout.value_bytes)


@device
def _point_on(keys, ahead, nbytes):
    """Fill the address table `ahead` with the places `nbytes` after those of the table `keys`."""
    for at in range(0, _TABLE_BYTES, 8):
        put_i64(ahead + at, get_i64(keys + at) + nbytes)


@device
def _soften(tag, layout, state, work, values, first, n, token, pos, base):
    """The online softmax step of each row of a row tile, over the keys at `base` that it sees."""
    scales, scaled_lo, scaled_hi = work + _SCALES, 0, 0
    next_token = (token + 1) * layout.group
    for row in range(first, first + n):
        if row == next_token:
            pos += 1
            next_token += layout.group
        lo = max(0, oldest_key(pos, layout.window) - base)
        hi = min(TILE, pos + 1 - base)
        factor, scores_at = np.float32(1.0), work + 4 * TILE * (row - first)
        if lo < hi:
            if lo != scaled_lo or hi != scaled_hi:
                value_scales(tag, values, layout.dim, lo, hi, scales)
                scaled_lo, scaled_hi = lo, hi
            sums = state.sums + 4 * LANES * row
            factor = softmax_step(tag, scores_at, state.top + 4 * row, sums, scales, lo, hi)
        else:
            clear_weights(tag, scores_at)
        put_f32(work + _FACTORS + 4 * (row - first), factor)


@device
def _reset(state, num_rows, dim):
    zero = splat(np.float32(0.0))
    for row in range(num_rows):
        put_f32(state.top + 4 * row, np.float32(-np.inf))
        store_f32(state.sums + 4 * LANES * row, zero)
    for i in range(0, 4 * num_rows * dim, 4 * LANES):
        store_f32(state.acc + i, zero)


@device
def _tile(tag, layout, state, tile, keys, ahead, q, work, num_rows, position):
    """One tile of one kv head's keys, whose addresses are in the table `keys`, for all its rows."""
    dim, group, window, base = layout.dim, layout.group, layout.window, tile * TILE
    values = keys + 8 * SUBS
    num_row_tiles = (num_rows + MAX_ROWS - 1) // MAX_ROWS
    step = (num_rows + num_row_tiles - 1) // num_row_tiles
    for first in range(0, num_rows, step):
        n = min(step, num_rows - first)
        token_a, token_b = first // group, (first + n - 1) // group
        pos_a, pos_b = position + token_a, position + token_b
        if pos_b < base or oldest_key(pos_a, window) >= base + TILE:
            continue
        scores(tag, n, q + 4 * dim * first, keys, values, work, dim, layout.key_stride)
        _soften(tag, layout, state, work, values, first, n, token_a, pos_a, base)
        acc = state.acc + 4 * dim * first
        _weigh_row_tile(tag, layout, work, values, ahead, first, n, token_a, token_b, pos_a,
                        base, acc)  # fmt: skip


@device
def _partition(tag, layout, head, heads, state, partition, q, work, num_rows, position):
    """One partition of keys for all rows of an item, whose first token stands at `position`.

    Rows of its `heads` kv heads, `num_rows` each, lie one head after the other.
    """
    dim, window = layout.dim, layout.window
    _reset(state, heads * num_rows, dim)
    last_key = min((partition + 1) * PARTITION - 1, position + (num_rows - 1) // layout.group)
    first_key = max(partition * PARTITION, oldest_key(position, window))
    tile, keys, ahead = first_key // TILE, work + _TABLES, work + _TABLES + _TABLE_BYTES
    _point(layout, head, keys, tile, first_key, last_key)
    for tile in range(first_key // TILE, last_key // TILE + 1):
        for index in range(heads):
            if index + 1 < heads:
                _point_on(keys, ahead, layout.head_bytes)
            else:  # past the last tile this repeats its last keys, which costs nothing
                _point(layout, head, ahead, tile + 1, first_key, last_key)
            row = index * num_rows
            mine = State(state.top + 4 * row, state.sums + 4 * LANES * row,
                         state.acc + 4 * dim * row)  # fmt: skip
            _tile(tag, layout, mine, tile, keys, ahead, q + 4 * dim * row, work, num_rows, position)
            keys, ahead = ahead, keys


@device
def _pack_query(tag, layer, packed, token, num_tokens, first_column, group, dim):
    """Copy the item's rows [num_tokens * group, dim] of q, scaled: floats, or codes and a float."""
    for t in range(num_tokens):
        source = layer.q + (token + t) * layer.q_bytes + 4 * first_column
        target = packed + 4 * t * group * dim
        if is_coded(tag):
            for row in range(0, 4 * group * dim, 4 * dim):
                unit = fine_codes(source + row, dim, target + row)
                put_f32(target + row + 2 * dim, unit * layer.scale)
        else:
            for i in range(0, 4 * group * dim, 4 * LANES):
                store_f32(target + i, mul(load_f32(source + i), splat(layer.scale)))


@device
def _attend_item(tag, layout, layer, request, head, slot, item, token, num_tokens, position, part):
    """All partitions of one work item, or of a split one the partition number `slot`."""
    plan, dim, group, window = layout.plan, layout.dim, layout.group, layout.window
    heads, head_rows = field(plan, ITEM_HEADS), num_tokens * group
    max_rows, num_rows = field(plan, CHUNK_TOKENS) * group * heads, head_rows * heads
    work = field(plan, SCRATCH) + part * field(plan, SCRATCH_STRIDE)
    packed = work + 4 * WORK_FLOATS
    acc = packed + 4 * max_rows * dim
    whole_acc = acc + 4 * max_rows * dim
    sums = whole_acc + 4 * max_rows * dim
    top = sums + 4 * max_rows * LANES
    whole_top = top + 4 * max_rows
    whole_sum = whole_top + 4 * max_rows
    state = State(top, sums, acc)
    first = oldest_key(position, window) // PARTITION
    last = (position + num_tokens - 1) // PARTITION
    is_split = field(plan, SPLIT) != 0
    if is_split:
        first += slot
        if first > last:
            return
        last, state = first, slot_state(plan, item)
    shift = head * layout.head_bytes
    table = field(plan, TABLES) + 4 * request * field(plan, TABLE_STRIDE)
    where = _Head(layer.k + shift, layer.v + shift, table)
    for index in range(heads):
        _pack_query(tag, layer, packed + 4 * dim * head_rows * index, token, num_tokens,
                    (head + index) * group * dim, group, dim)  # fmt: skip
    for partition in range(first, last + 1):
        _partition(tag, layout, where, heads, state, partition, packed, work, head_rows, position)
        for row in range(0 if first == last else num_rows):
            pos = position + row % head_rows // group
            start = oldest_key(pos, window) // PARTITION
            if start <= partition <= pos // PARTITION:
                merge_row(partition == start, whole_top + 4 * row, whole_sum + 4 * row,
                           whole_acc + 4 * row * dim, top + 4 * row,
                           lane_sum(sums + 4 * LANES * row), acc + 4 * row * dim, dim)  # fmt: skip
    for row in range(0 if is_split else num_rows):
        at, member = token + row % head_rows // group, row % group
        of_head = head + row // head_rows
        if first == last:
            total = lane_sum(sums + 4 * LANES * row)
            emit_row(plan, layer.out, at, of_head, member, total, acc + 4 * row * dim)
        else:
            total = get_f32(whole_sum + 4 * row)
            emit_row(plan, layer.out, at, of_head, member, total, whole_acc + 4 * row * dim)


@device
def _attend(tag, itemsize, part, num_parts, plan, layer):
    block_size, dim, chunk = field(plan, BLOCK_SIZE), field(plan, DIM), field(plan, CHUNK_TOKENS)
    num_kv_heads, splits = field(plan, NUM_KV_HEADS), field(plan, NUM_SLOTS)
    item_heads = field(plan, ITEM_HEADS)
    items_per_chunk = num_kv_heads // item_heads * splits
    key_stride, key_bytes, value_bytes = block_size * itemsize, itemsize, dim * itemsize
    if is_coded(tag):
        key_stride, key_bytes, value_bytes = 0, dim + SCALE_BYTES, dim + SCALE_BYTES
    block_bits = 4
    while 1 << block_bits < block_size:
        block_bits += 1
    layout = _Layout(
        plan, block_bits, field(plan, NUM_BLOCKS), dim, field(plan, GROUP), field(plan, WINDOW),
        key_stride, key_bytes, value_bytes, block_size * value_bytes,
        num_kv_heads * block_size * value_bytes,
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
            if item < passed + chunks * items_per_chunk:
                break
            passed += chunks * items_per_chunk
            request += 1
        local = item - passed
        begin = chunk * (chunks - 1 - local // items_per_chunk)  # the longest work first
        head, slot = local % items_per_chunk // splits * item_heads, local % splits
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
def attend_int8(part, num_parts, plan, q, q_bytes, k, v, out, scale: float):
    """`attend_float32` for a cache of `int8_tiles`."""
    layer = _Layer(q, q_bytes, k, v, out, np.float32(scale))
    _attend(np.int8(0), 1, part, num_parts, plan, layer)
