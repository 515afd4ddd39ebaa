"""How a batch's attention is divided on the CPU: the plan's record and the kernel that fills it.

Knows requests' lengths, no keys and no values. The layers of a step share a plan. All of a record
is written by `make_plan`, so launches that were recorded once can run again on other batches.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from octavo_kernels.paged_attention.tile_ir import MAX_ROWS
from octavo_kernels.parallel import device, kernel
from octavo_kernels.simd import LANES, get_i32, get_i64, put_i64

PARTITION = 512  # keys; a multiple of a tile
CHUNK_ROWS = 96  # rows of the widest work item: their state stays in the second-level cache
# Multiply-adds of one kind (scores or values) below which waking a thread costs more than it saves.
SERIAL_COST = 1 << 15
# Items of whole requests for each thread from which on the last one's wait costs less than reading
# a block's heads one after the other saves.
_JOINED_ITEMS = 6

# A plan is a row of int64. Words that threads write share no cache line with those they read.
(CHUNK_TOKENS, NUM_ITEMS, SPLIT, NUM_SLOTS, ATTEND_PARTS, MERGE_PARTS, STARTS, SEQ_LENS,
 NUM_REQUESTS, NUM_TOKENS, TABLES, TABLE_STRIDE, MAX_KEYS, NUM_KV_HEADS, GROUP, DIM, BLOCK_SIZE,
 NUM_BLOCKS, WINDOW, SCRATCH, SCRATCH_STRIDE, PARTIALS, ITEM_HEADS) = range(23)  # fmt: skip
STATUS, CULPRIT, OTHER_STATUS = 32, 33, 34
NEXT_ITEM, NUM_FINISHED = 48, 49
PLAN_WORDS = 64
BAD_START, BAD_LENGTH, BAD_BLOCK = 1, 2, 3


@device
def field(plan, index):
    return get_i64(plan + 8 * index)


@device
def oldest_key(position, window):
    """The oldest key position that the token at `position` sees."""
    return max(0, position - window + 1) if window > 0 else 0


@device
def query_start(plan, request):
    return get_i32(field(plan, STARTS) + 4 * request)


@device
def query_length(plan, request):
    return query_start(plan, request + 1) - query_start(plan, request)


@device
def refuse(plan, status, culprit):
    put_i64(plan + 8 * STATUS, status)
    put_i64(plan + 8 * CULPRIT, culprit)


@device
def slot_floats(chunk, group, dim):
    """Floats of the partial state of a split item: lane sums, maxima, accumulators."""
    return chunk * group * (dim + LANES + 1)


@device
def _count_items(plan, chunk):
    items = 0
    for request in range(field(plan, NUM_REQUESTS)):
        items += (query_length(plan, request) + chunk - 1) // chunk * field(plan, NUM_KV_HEADS)
    return items


@device
def _measure(plan):
    """Check the batch: (cost per head and dimension, partitions of the longest, longest query)."""
    window, num_requests = field(plan, WINDOW), field(plan, NUM_REQUESTS)
    cost, longest, longest_query = 0, 0, 1
    is_whole = query_start(plan, num_requests) == field(plan, NUM_TOKENS)
    if query_start(plan, 0) != 0 or not is_whole:
        refuse(plan, BAD_START, 0)
        return 0, 0, 1
    for request in range(num_requests):
        query_len = query_length(plan, request)
        keys = get_i32(field(plan, SEQ_LENS) + 4 * request)
        if query_len < 0:
            refuse(plan, BAD_START, request)
            return 0, 0, 1
        if query_len > 0 and (keys < query_len or keys > field(plan, MAX_KEYS)):
            refuse(plan, BAD_LENGTH, request)
            return 0, 0, 1
        if query_len > 0:
            first = oldest_key(keys - query_len, window) // PARTITION
            longest = max(longest, (keys - 1) // PARTITION - first + 1)
            longest_query = max(longest_query, query_len)
            cost += query_len * (min(keys, window + query_len) if window > 0 else keys)
    return cost, longest, longest_query


@device
def _divide(plan, num_threads, max_partials):
    """Choose the chunk, the split and the parts; none of them changes a result's bits."""
    group, dim = field(plan, GROUP), field(plan, DIM)
    cost, longest, longest_query = _measure(plan)
    if field(plan, STATUS) != 0:
        return
    chunk = min(longest_query, max(1, CHUNK_ROWS // group))
    items = _count_items(plan, chunk)
    while items < 4 * num_threads and chunk > 1 and chunk * group > 2 * MAX_ROWS:
        chunk = (chunk + 1) // 2
        items = _count_items(plan, chunk)
    is_split = num_threads > 1 and items < 2 * num_threads and longest > 1
    if items * longest * slot_floats(chunk, group, dim) > max_partials:
        is_split = False
    items *= longest if is_split else 1
    heads, joined = 1, items // field(plan, NUM_KV_HEADS)
    is_joined = not is_split and joined >= _JOINED_ITEMS * num_threads
    if is_joined and chunk * group * field(plan, NUM_KV_HEADS) <= CHUNK_ROWS:
        items, heads = joined, field(plan, NUM_KV_HEADS)
    put_i64(plan + 8 * ITEM_HEADS, heads)
    is_small = cost * field(plan, NUM_KV_HEADS) * group * dim < SERIAL_COST
    put_i64(plan + 8 * CHUNK_TOKENS, chunk)
    put_i64(plan + 8 * NUM_ITEMS, items)
    put_i64(plan + 8 * SPLIT, 1 if is_split else 0)
    put_i64(plan + 8 * NUM_SLOTS, longest if is_split else 1)
    put_i64(plan + 8 * ATTEND_PARTS, min(1 if is_small else num_threads, items))
    put_i64(plan + 8 * MERGE_PARTS, 1 if is_split else 0)


@kernel
def make_plan(
    part,
    num_parts,
    plan,
    starts,
    seq_lens,
    num_requests_at,
    num_requests,
    num_tokens,
    tables,
    table_stride,
    max_keys,
    num_kv_heads,
    group,
    dim,
    block_size,
    num_blocks,
    window,
    num_threads,
    scratch,
    scratch_stride,
    partials,
    max_partials,
):
    """Check a batch and fill its plan; a batch that is refused gets 0 parts and a status.

    num_requests_at: address of the int64 number of requests, at most num_requests, or 0: it is
    num_requests. partials: room for max_partials floats, which bound the split.
    """
    for index in range(PLAN_WORDS):
        put_i64(plan + 8 * index, 0)
    live = num_requests if num_requests_at == 0 else get_i64(num_requests_at)
    put_i64(plan + 8 * STARTS, starts)
    put_i64(plan + 8 * SEQ_LENS, seq_lens)
    put_i64(plan + 8 * NUM_REQUESTS, min(max(live, 0), num_requests))
    put_i64(plan + 8 * NUM_TOKENS, num_tokens)
    put_i64(plan + 8 * TABLES, tables)
    put_i64(plan + 8 * TABLE_STRIDE, table_stride)
    put_i64(plan + 8 * MAX_KEYS, max_keys)
    put_i64(plan + 8 * NUM_KV_HEADS, num_kv_heads)
    put_i64(plan + 8 * GROUP, group)
    put_i64(plan + 8 * DIM, dim)
    put_i64(plan + 8 * BLOCK_SIZE, block_size)
    put_i64(plan + 8 * NUM_BLOCKS, num_blocks)
    put_i64(plan + 8 * WINDOW, window)
    put_i64(plan + 8 * SCRATCH, scratch)
    put_i64(plan + 8 * SCRATCH_STRIDE, scratch_stride)
    put_i64(plan + 8 * PARTIALS, partials)
    _divide(plan, num_threads, max_partials)
