"""Packs a step's tokens out of the request table, in one launch. Knows addresses, no request.

In numpy the same takes some thirty calls, and after a step's weights have passed through the caches
each of them finds its code and its objects gone: 0.2 ms of a step of 2.4.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from octavo_kernels.parallel import device, kernel
from octavo_kernels.simd import copy_bytes, get_i32, get_i64, put_i32, put_i64

OK, BAD_COUNT, NO_BLOCK = range(3)


@device
def _fill_tokens(tokens, blocks, block_size, first, last, token_ids, positions, slots):
    """Ids, positions and slots of the tokens [first, last) of one request; the outputs' places."""
    for position in range(first, last):
        at = 4 * (position - first)
        block = get_i32(blocks + 4 * (position // block_size))
        put_i32(token_ids + at, get_i32(tokens + 4 * position))
        put_i32(positions + at, position)
        put_i32(slots + at, block * block_size + position % block_size)


@kernel
def fill_step(
    part,
    num_parts,
    rows,
    num_known,
    counts,
    num_requests,
    table_tokens,
    tokens_stride,
    table_blocks,
    blocks_stride,
    num_tokens,
    num_computed,
    num_blocks,
    block_size,
    token_ids,
    positions,
    slots,
    block_tables,
    tables_stride,
    starts,
    seq_lens,
    num_requests_at,
    samples,
    depths,
    sample_tokens,
    found,
):
    """The batch of table rows `rows` [R] int64, one part; strides in bytes.

    num_known, counts: [R] int32 tokens of the step, without drafts and with them. Of the table:
    ids, blocks, and of each row the known and the computed tokens and the blocks, int32. Written:
    ids, positions, slots [T], block tables and starts and lengths, int32; the number of requests,
    int64; of each token to draw after its request's index (int64), the drafts up to it and its
    place (int32); found [3] int64: how many those are, OK or what is wrong, and whose.
    """
    total, drawn = 0, 0
    put_i64(found, 0)
    put_i64(found + 8, OK)
    put_i64(num_requests_at, num_requests)
    put_i32(starts, 0)
    for request in range(num_requests):
        row = get_i64(rows + 8 * request)
        known, count = get_i32(num_known + 4 * request), get_i32(counts + 4 * request)
        first = get_i32(num_computed + 4 * row)
        end, last_known = first + count, get_i32(num_tokens + 4 * row)
        needed = (end + block_size - 1) // block_size
        is_wrong = known <= 0 or count < known or first + known > last_known
        if is_wrong or needed > get_i32(num_blocks + 4 * row):
            put_i64(found + 8, BAD_COUNT if is_wrong else NO_BLOCK)
            put_i64(found + 16, request)
            return
        tokens, blocks = table_tokens + row * tokens_stride, table_blocks + row * blocks_stride
        _fill_tokens(tokens, blocks, block_size, first, end, token_ids + 4 * total,
                     positions + 4 * total, slots + 4 * total)  # fmt: skip
        copy_bytes(block_tables + request * tables_stride, blocks, 4 * needed)
        put_i32(seq_lens + 4 * request, end)
        if first + known == last_known:
            for depth in range(count - known + 1):
                put_i64(samples + 8 * drawn, request)
                put_i32(depths + 4 * drawn, depth)
                put_i32(sample_tokens + 4 * drawn, total + known - 1 + depth)
                drawn += 1
        total += count
        put_i32(starts + 4 * (request + 1), total)
    put_i64(found, drawn)
