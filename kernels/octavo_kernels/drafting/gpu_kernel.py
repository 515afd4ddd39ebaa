"""Triton kernels that look drafts up in rows of tokens, and keep those that were drawn. Know rows
of a table, no request.

Pointers without "_ptr" may have any alignment: views of one upload start where they start.
"""

from __future__ import annotations

import triton.language as tl

from octavo_kernels.launch import jit

PLACES = tl.constexpr(1 << 24)  # more than a row has tokens


@jit
def propose_rows(
    batch_rows,  # [R] int32, negative: none
    seq_lens,  # [R] int32, changed: ~d becomes the row's tokens and d drafts
    sample_rows,  # [S] int32, negative: none
    sample_positions,  # [S] int32, changed: ~i becomes the row's tokens and i
    token_table,  # [N, L] int32, rows token_stride apart, changed behind a row's tokens
    num_tokens_of,  # [N] int32
    num_found,  # [R] int32, out
    num_requests,
    num_samples,
    num_rows,
    max_tokens,  # of a row
    token_stride,
    min_length,  # tokens that must have occurred before to count as found
    max_length,  # that are compared
    CHUNK: tl.constexpr,
    MOST: tl.constexpr,  # drafts
):
    # grid: (R + cdiv(S, CHUNK),); one program a request, then positions by the chunk
    place = tl.program_id(0)
    lanes = tl.arange(0, CHUNK)
    if place >= num_requests:
        at = (place - num_requests) * CHUNK + lanes
        word = tl.load(sample_positions + at, mask=at < num_samples, other=0)
        row = tl.load(sample_rows + at, mask=at < num_samples, other=-1)
        counted = (word < 0) & (row >= 0) & (row < num_rows)
        known = tl.load(num_tokens_of + row, mask=counted, other=0)
        tl.store(sample_positions + at, known - 1 - word, mask=counted)
        return
    row = tl.load(batch_rows + place).to(tl.int64)
    word = tl.load(seq_lens + place)
    tl.debug_barrier()  # every warp has read it before one of them writes it
    found = 0
    if (row >= 0) & (row < num_rows) & (word < 0):
        num_drafts = -1 - word
        known = tl.load(num_tokens_of + row)
        tl.store(seq_lens + place, known + num_drafts)
        if (num_drafts > 0) & (known > 0) & (known + num_drafts <= max_tokens):
            tokens = token_table + row * token_stride
            best = 0  # length of the match, then where it ends: the larger the better
            end = 1  # of earlier occurrences, where the continuation begins
            while end < known:
                ends = end + lanes
                length = tl.zeros([CHUNK], tl.int32)
                alive = ends < known
                for back in range(1, max_length + 1):
                    last = tl.load(tokens + known - back, mask=known >= back, other=-1)
                    alive = alive & (ends >= back)
                    alive = alive & (tl.load(tokens + ends - back, mask=alive, other=-2) == last)
                    length += alive.to(tl.int32)
                best = tl.maximum(best, tl.max(tl.where(length > 0, length * PLACES + ends, 0), 0))
                end += CHUNK
            # Without an occurrence the last token is repeated.
            begin = tl.where(best > 0, best % PLACES, known - 1)
            drafts = tl.arange(0, MOST)
            mask = drafts < num_drafts
            token = tl.load(tokens + begin + drafts % (known - begin), mask=mask)
            tl.store(tokens + known + drafts, token, mask=mask)
            found = tl.where(best // PLACES >= min_length, num_drafts, 0)
    tl.store(num_found + place, found)


@jit
def accept_runs(
    sample_rows,  # [S] int32, negative: none; a run of equal ones is one row's
    tokens_ptr,  # [S] int64, negative: nothing could be drawn
    token_table,  # [N, L] int32, rows token_stride apart, changed
    num_tokens_of,  # [N] int32, changed
    counts_ptr,  # [N, V] int32, changed
    num_drawn,  # [S] int32, out
    num_samples,
    num_rows,
    max_tokens,  # of a row
    token_stride,
    max_run,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # grid: (cdiv(S, BLOCK),); a lane is a sample, those that begin a run do its work
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = place < num_samples
    row = tl.load(sample_rows + place, mask=real, other=-1).to(tl.int64)
    before = tl.load(sample_rows + place - 1, mask=real & (place > 0), other=-1)
    heads = (row >= 0) & (row < num_rows) & (row != before)
    first = tl.load(num_tokens_of + row, mask=heads, other=0)
    length = first
    alive = heads & (first >= 0)
    for step in range(max_run):
        token = tl.load(tokens_ptr + place + step, mask=alive, other=-1)
        drawn = alive & (token >= 0) & (length < max_tokens)
        behind = place + step + 1
        after = tl.load(sample_rows + behind, mask=drawn & (behind < num_samples), other=-1)
        goes_on = drawn & (after == row)
        at = token_table + row * token_stride + length
        draft = tl.load(at, mask=goes_on, other=-1)
        tl.store(at, token.to(tl.int32), mask=drawn)
        to = counts_ptr + row * VOCAB + token
        tl.atomic_add(to, 2, mask=drawn & (token < VOCAB), sem="relaxed")
        length += drawn.to(tl.int32)
        alive = goes_on & (draft == token)
    tl.store(num_tokens_of + row, length, mask=heads)
    tl.store(num_drawn + place, length - first, mask=real)
