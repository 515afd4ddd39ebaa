"""Second phase of attention on the CPU: partitions of keys become rows. Knows no keys or values."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

from octavo_kernels.paged_attention.cpu_plan import (
    CHUNK_TOKENS,
    DIM,
    GROUP,
    NUM_KV_HEADS,
    NUM_REQUESTS,
    NUM_SLOTS,
    PARTIALS,
    PARTITION,
    SEQ_LENS,
    WINDOW,
    field,
    oldest_key,
    query_length,
    query_start,
    slot_floats,
)
from octavo_kernels.paged_attention.microkernels import exp2
from octavo_kernels.parallel import device, kernel
from octavo_kernels.simd import (
    LANES,
    add,
    copy_bytes,
    div,
    get_f32,
    get_i32,
    load_f32,
    mul,
    put_f32,
    reduce_add,
    splat,
    store_f32,
)


class State(NamedTuple):
    """Online softmax of an item's rows: top [rows], sums [rows, 16], acc [rows, dim]."""

    top: int
    sums: int
    acc: int


@device
def lane_sum(address):
    return reduce_add(load_f32(address))


@device
def merge_row(is_first, top, total, acc, part_top, part_total, part_acc, dim):
    """Fold one partition's (max, sum, accumulator) of a row into the row's own, by address."""
    new_top = get_f32(part_top)
    if is_first:
        put_f32(top, new_top)
        put_f32(total, part_total)
        copy_bytes(acc, part_acc, 4 * dim)
        return
    old_top = get_f32(top)
    best = old_top if old_top > new_top else new_top
    a, b = exp2(old_top - best), exp2(new_top - best)
    put_f32(top, best)
    put_f32(total, get_f32(total) * a + part_total * b)
    a_all, b_all = splat(a), splat(b)
    for h in range(0, 4 * dim, 4 * LANES):
        mine, other = mul(load_f32(acc + h), a_all), mul(load_f32(part_acc + h), b_all)
        store_f32(acc + h, add(mine, other))


@device
def emit_row(plan, out, token, head, member, total, acc):
    """Write one row's quotient to out [T, K, G, H]."""
    group, dim = field(plan, GROUP), field(plan, DIM)
    target = out + 4 * ((token * field(plan, NUM_KV_HEADS) + head) * group + member) * dim
    total_all = splat(total)
    for h in range(0, 4 * dim, 4 * LANES):
        store_f32(target + h, div(load_f32(acc + h), total_all))


@device
def slot_state(plan, item):
    """The partial state of a split item."""
    chunk, group, dim = field(plan, CHUNK_TOKENS), field(plan, GROUP), field(plan, DIM)
    sums = field(plan, PARTIALS) + 4 * item * slot_floats(chunk, group, dim)
    top = sums + 4 * chunk * group * LANES
    return State(top, sums, top + 4 * chunk * group)


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
                mine = slot_state(plan, base + start)
                top, total = mine.top + 4 * row, mine.sums + 4 * LANES * row
                acc = mine.acc + 4 * dim * row
                put_f32(total, lane_sum(total))
                for partition in range(start + 1, pos // PARTITION + 1):
                    other = slot_state(plan, base + partition)
                    merge_row(False, top, total, acc, other.top + 4 * row,
                               lane_sum(other.sums + 4 * LANES * row), other.acc + 4 * dim * row,
                               dim)  # fmt: skip
                token = query_start(plan, request) + begin + row // group
                emit_row(plan, out, token, head, row % group, get_f32(total), acc)
            item += field(plan, NUM_SLOTS)
