"""What lies between two passes of a head that drafts, in one launch: each request's likeliest next
token becomes its next place. Knows rows of logits and a step's inputs, no model, no request.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from octavo_kernels.likeliest.cpu import likeliest_row
from octavo_kernels.parallel import kernel
from octavo_kernels.simd import copy_bytes, get_i32, get_i64, put_f32, put_i32


@kernel
def follow(
    part,  # one part alone
    num_parts,
    logits,  # [T, V'] float32
    width,  # V'
    drafted,  # [V'] int32, the token that a column stands for
    hidden,  # [T, D] float32
    features,  # [R, D] float32, out
    row_bytes,  # of hidden and features
    num_requests,  # [1] int64
    query_start_loc,  # [R + 1] int32
    token_ids,  # [>= T] int32, as all that follows
    positions,
    slots,
    block_tables,  # [R, ...] int32
    table_stride,  # in bytes
    block_size,
    seq_lens,  # [R] int32
    probs,  # [R] float32, out
):
    """Of requests that were computed up to ``seq_lens``, T tokens in all: puts the next token of
    each, its place and slot where they are read, as a batch of one token for each, with its
    hidden row; and how likely that token is, NaN where a logit is not finite."""
    for request in range(get_i64(num_requests)):
        # Never before what is written: a request has at least one row.
        last = get_i32(query_start_loc + 4 * request + 4) - 1
        column, prob = likeliest_row(logits + 4 * width * last, width)
        place = get_i32(seq_lens + 4 * request)
        table = block_tables + request * table_stride
        # A place behind the table's end is never run.
        block = get_i32(table + min(4 * (place // block_size), table_stride - 4))
        put_i32(token_ids + 4 * request, get_i32(drafted + 4 * column))
        put_i32(positions + 4 * request, place)
        put_i32(slots + 4 * request, block * block_size + place % block_size)
        put_i32(seq_lens + 4 * request, place + 1)
        put_f32(probs + 4 * request, prob)
        copy_bytes(features + request * row_bytes, hidden + last * row_bytes, row_bytes)
    for request in range(get_i64(num_requests)):
        put_i32(query_start_loc + 4 * request + 4, request + 1)
