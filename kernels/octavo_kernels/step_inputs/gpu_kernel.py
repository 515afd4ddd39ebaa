"""Triton kernels that move words and look rows up in tables. Know no request and no model.

Pointers without "_ptr" may have any alignment: views of one upload start where they start.
"""

from __future__ import annotations

import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo_kernels.launch import jit


@jit
def scatter_ranges(
    words,  # [W] int32
    ranges,  # [U, 3] int32: first source word, first target word, how many
    arena,  # [A] int32, changed
    num_words,
    arena_words,
    num_parts,
    CHUNK: tl.constexpr,
):
    # grid: (U * num_parts,); the programs of a range take its chunks in turn
    entry = ranges + tl.program_id(0) // num_parts * 3
    source = tl.load(entry).to(tl.int64)
    target = tl.load(entry + 1).to(tl.int64)
    count = tl.load(entry + 2).to(tl.int64)
    if (source >= 0) & (target >= 0):
        count = tl.minimum(count, tl.minimum(num_words - source, arena_words - target))
        at = (tl.program_id(0) % num_parts).to(tl.int64) * CHUNK
        while at < count:
            lanes = at + tl.arange(0, CHUNK)
            mask = lanes < count
            tl.store(arena + target + lanes, tl.load(words + source + lanes, mask=mask), mask=mask)
            at += num_parts * CHUNK


@jit
def build_rows(
    batch_rows,  # [R] int32, negative: none
    query_start_loc,  # [R + 1] int32
    seq_lens,  # [R] int32
    token_table,  # [N, L] int32, rows token_stride apart
    block_table,  # [N, MB] int32, rows block_stride apart
    token_ids,  # [T] int32, out
    positions,  # [T] int32, out
    slots,  # [T] int32, out
    block_tables,  # [R, OUT] int32, rows out_stride apart, out
    num_requests,
    num_tokens,
    num_rows,
    max_position,  # tokens that either table has room for
    token_stride,
    block_stride,
    max_blocks,  # of a row, here and there
    out_stride,
    num_parts,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Tokens past the last request are written as padding by the programs of place R."""
    # grid: ((R + 1) * num_parts,); the programs of a request take its chunks in turn
    request = tl.program_id(0) // num_parts
    first = tl.program_id(0) % num_parts * CHUNK
    step = num_parts * CHUNK
    real = request < num_requests
    row = tl.load(batch_rows + request, mask=real, other=-1)
    row = tl.where(row < num_rows, row, -1).to(tl.int64)
    seq_len = tl.load(seq_lens + request, mask=real, other=0)
    start = tl.load(query_start_loc + request)
    end = tl.load(query_start_loc + request + 1, mask=real, other=num_tokens)
    lanes = tl.arange(0, CHUNK)

    at = tl.maximum(start, 0) + first
    while at < tl.minimum(end, num_tokens):
        token = at + lanes
        mask = token < tl.minimum(end, num_tokens)
        position = seq_len - (end - token)
        known = mask & (row >= 0) & (position >= 0) & (position < max_position)
        ids = tl.load(token_table + row * token_stride + position, mask=known, other=0)
        entry = block_table + row * block_stride + position // BLOCK_SIZE
        block = tl.load(entry, mask=known, other=-1)
        slot = tl.where(block >= 0, block * BLOCK_SIZE + position % BLOCK_SIZE, -1)
        tl.store(token_ids + token, ids, mask=mask)
        tl.store(positions + token, tl.where(known, position, 0), mask=mask)
        tl.store(slots + token, slot, mask=mask)
        at += step

    if row >= 0:
        held = tl.minimum((tl.maximum(seq_len, 0) + BLOCK_SIZE - 1) // BLOCK_SIZE, max_blocks)
        at = first
        while at < held:
            mask = at + lanes < held
            block = tl.load(block_table + row * block_stride + at + lanes, mask=mask)
            to = block_tables + request.to(tl.int64) * out_stride + at + lanes
            tl.store(to, block, mask=mask)
            at += step


@jit
def gather_columns(
    rows,  # [S] int32, negative: none
    temperature_from,  # [N] float32
    top_k_from,  # [N] int32
    top_p_from,  # [N] float32
    min_p_from,  # [N] float32
    seeds_from,  # [N] int64
    positions_from,  # [S] int32
    temperature,  # [S] float32, out
    top_k,  # [S] int32, out
    top_p,  # [S] float32, out
    min_p,  # [S] float32, out
    seeds,  # [S] int64, out
    positions,  # [S] int64, out
    num_samples,
    num_rows,
    BLOCK: tl.constexpr,
):
    # grid: (cdiv(S, BLOCK),)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_samples
    row = tl.load(rows + at, mask=mask, other=-1)
    live = (row >= 0) & (row < num_rows)
    tl.store(temperature + at, tl.load(temperature_from + row, mask=live, other=0.0), mask=mask)
    tl.store(top_k + at, tl.load(top_k_from + row, mask=live, other=0), mask=mask)
    tl.store(top_p + at, tl.load(top_p_from + row, mask=live, other=1.0), mask=mask)
    tl.store(min_p + at, tl.load(min_p_from + row, mask=live, other=0.0), mask=mask)
    tl.store(seeds + at, tl.load(seeds_from + row, mask=live, other=0), mask=mask)
    position = tl.load(positions_from + at, mask=live, other=0)
    tl.store(positions + at, position.to(tl.int64), mask=mask)


@jit
def gather_matrix_rows(
    hidden_ptr,  # [T, D]
    index,  # [S] int32
    out_ptr,  # [S, D]
    num_rows,  # T
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    # grid: (S, cdiv(D, BLOCK)); one program copies BLOCK columns of one row
    place = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.load(index + place)
    row = tl.minimum(tl.maximum(row, 0), num_rows - 1).to(tl.int64)
    values = tl.load(hidden_ptr + row * D + columns, mask=columns < D)
    tl.store(out_ptr + place * D + columns, values, mask=columns < D)
