"""Triton kernels that change logits by requests' parameters. Know slots and one row's tokens.

A slot's counts [V] int32 are 2 * (times in the output) + (1 if in the prompt). Slots, rows and
token ids out of range are passed over.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo_kernels.launch import jit

NEVER = tl.constexpr(float("-inf"))


@triton.jit
def _part(starts_ptr, slot, capacity):
    """First and end index of a slot's part of a list that holds at most `capacity`."""
    first = tl.maximum(tl.load(starts_ptr + slot), 0)
    return first, tl.minimum(tl.load(starts_ptr + slot + 1), capacity)


@triton.jit
def _lengths(num_prompt_ptr, num_tokens_ptr, slot, max_tokens, num_drafts=0):
    """Tokens of a slot's prompt, and of prompt and output, its drafts included."""
    num_tokens = tl.maximum(tl.load(num_tokens_ptr + slot), 0) + num_drafts
    num_tokens = tl.minimum(num_tokens, max_tokens)
    return tl.minimum(tl.maximum(tl.load(num_prompt_ptr + slot), 0), num_tokens), num_tokens


@jit
def clear_slots(
    slots_ptr,  # [L] int32
    counts_ptr,  # [N, V] int32, out
    allowed_ptr,  # [N, WORDS] int32, out
    num_slots,
    VOCAB: tl.constexpr,
    WORDS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    # grid: (L * NUM_TILES,)
    slot = tl.load(slots_ptr + tl.program_id(0) // NUM_TILES).to(tl.int64)
    tile = tl.program_id(0) % NUM_TILES
    if (slot >= 0) & (slot < num_slots):
        token = tile * TILE + tl.arange(0, TILE)
        tl.store(counts_ptr + slot * VOCAB + token, 0, mask=token < VOCAB)
        word = tile * (TILE // 32) + tl.arange(0, TILE // 32)
        tl.store(allowed_ptr + slot * WORDS + word, 0, mask=word < WORDS)


@jit
def fill_slots(
    slots_ptr,  # [L] int32
    token_ids_ptr,  # [N, max_tokens] int32
    num_prompt_ptr,  # [N] int32
    num_tokens_ptr,  # [N] int32
    allowed_starts_ptr,  # [N + 1] int32
    allowed_ids_ptr,  # [capacity] int32
    counts_ptr,  # [N, V] int32, zero before
    allowed_ptr,  # [N, WORDS] int32, zero before
    num_slots,
    max_tokens,
    capacity,
    VOCAB: tl.constexpr,
    WORDS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    TILE: tl.constexpr,
):
    # grid: (L * NUM_PARTS,)
    slot = tl.load(slots_ptr + tl.program_id(0) // NUM_PARTS).to(tl.int64)
    begin = (tl.program_id(0) % NUM_PARTS) * TILE
    lanes = tl.arange(0, TILE)
    if (slot >= 0) & (slot < num_slots):
        num_prompt, num_tokens = _lengths(num_prompt_ptr, num_tokens_ptr, slot, max_tokens)
        start = begin
        while start < num_tokens:
            at = start + lanes
            token = tl.load(token_ids_ptr + slot * max_tokens + at, mask=at < num_tokens, other=-1)
            known = (token >= 0) & (token < VOCAB)
            to = counts_ptr + slot * VOCAB + token
            tl.atomic_or(to, 1, mask=known & (at < num_prompt), sem="relaxed")
            tl.atomic_add(to, 2, mask=known & (at >= num_prompt), sem="relaxed")
            start += NUM_PARTS * TILE
        first, end = _part(allowed_starts_ptr, slot, capacity)
        start = first + begin
        while start < end:
            at = start + lanes
            token = tl.load(allowed_ids_ptr + at, mask=at < end, other=-1)
            known = (token >= 0) & (token < VOCAB)
            bit = tl.full([TILE], 1, tl.int32) << (token & 31)
            to = allowed_ptr + slot * WORDS + (token >> 5)
            tl.atomic_or(to, bit, mask=known, sem="relaxed")
            start += NUM_PARTS * TILE


@jit
def extend_slots(
    slots_ptr,  # [L] int32, no slot twice
    tokens_ptr,  # [L, STEPS] int64; negative: none
    token_ids_ptr,  # [N, max_tokens] int32, changed
    num_tokens_ptr,  # [N] int32, changed
    counts_ptr,  # [N, V] int32, changed
    num_listed,
    num_slots,
    max_tokens,
    VOCAB: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # grid: (cdiv(L, BLOCK),)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots_ptr + entry, mask=entry < num_listed, other=-1).to(tl.int64)
    real = (slot >= 0) & (slot < num_slots)
    length = tl.load(num_tokens_ptr + slot, mask=real, other=0)
    for step in range(STEPS):
        token = tl.load(tokens_ptr + entry.to(tl.int64) * STEPS + step, mask=real, other=-1)
        drawn = real & (token >= 0) & (length >= 0) & (length < max_tokens)
        to = token_ids_ptr + slot * max_tokens + length
        tl.store(to, token.to(tl.int32), mask=drawn)
        tl.atomic_add(
            counts_ptr + slot * VOCAB + token, 2, mask=drawn & (token < VOCAB), sem="relaxed"
        )
        length += drawn.to(tl.int32)
    tl.store(num_tokens_ptr + slot, length, mask=real)


@triton.jit
def _forbid(row_ptr, token, stays, VOCAB: tl.constexpr):
    """Writes -inf at the tokens of the list that exist."""
    tl.store(row_ptr + token, NEVER, mask=stays & (token >= 0) & (token < VOCAB))


@triton.jit
def _forbid_bad_words(
    row_ptr,
    output_ptr,
    num_output,
    first,
    end,
    word_starts_ptr,
    bad_ids_ptr,
    capacity,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Forbids the last token of each word whose beginning ends the output."""
    while first < end:
        word = first + tl.arange(0, BLOCK)
        start = tl.load(word_starts_ptr + word, mask=word < end, other=0)
        last = tl.load(word_starts_ptr + word + 1, mask=word < end, other=0) - 1
        length = last - start
        matches = (start >= 0) & (last < capacity) & (length >= 0) & (length <= num_output)
        longest = tl.max(tl.where(matches, length, 0), 0)
        for place in range(longest):
            inside = matches & (place < length)
            has = tl.load(output_ptr + num_output - length + place, mask=inside, other=-1)
            wants = tl.load(bad_ids_ptr + start + place, mask=inside, other=-1)
            matches = matches & (has == wants)
        token = tl.load(bad_ids_ptr + last, mask=matches, other=-1)
        _forbid(row_ptr, token, matches, VOCAB)
        first += BLOCK


@jit
def edit_rows(
    logits_ptr,  # [S, V], changed
    rows_ptr,  # [L] int32
    slots_ptr,  # [L] int32
    num_drafts_ptr,  # [L] int32, tokens behind a slot's that are output too; None: no entry has any
    token_ids_ptr,  # [N, max_tokens] int32
    num_prompt_ptr,  # [N] int32
    num_tokens_ptr,  # [N] int32
    min_tokens_ptr,  # [N] int32
    bias_starts_ptr,  # [N + 1] int32
    bias_ids_ptr,  # [bias_capacity] int32, no token twice in a slot
    bias_values_ptr,  # [bias_capacity] float32
    bad_starts_ptr,  # [N + 1] int32
    word_starts_ptr,  # [words + 1] int32
    bad_ids_ptr,  # [bad_capacity] int32
    stop_starts_ptr,  # [N + 1] int32
    stop_ids_ptr,  # [stop_capacity] int32
    num_rows,
    num_slots,
    max_tokens,
    bias_capacity,
    bad_capacity,
    stop_capacity,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # grid: (L,)
    row = tl.load(rows_ptr + tl.program_id(0)).to(tl.int64)
    slot = tl.load(slots_ptr + tl.program_id(0)).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    row_ptr = logits_ptr + row * VOCAB
    if (row >= 0) & (row < num_rows) & (slot >= 0) & (slot < num_slots):
        num_drafts = 0
        if num_drafts_ptr is not None:
            num_drafts = tl.maximum(tl.load(num_drafts_ptr + tl.program_id(0)), 0)
        num_prompt, num_tokens = _lengths(
            num_prompt_ptr, num_tokens_ptr, slot, max_tokens, num_drafts
        )
        first, end = _part(bad_starts_ptr, slot, bad_capacity)
        output_ptr = token_ids_ptr + slot * max_tokens + num_prompt
        _forbid_bad_words(
            row_ptr, output_ptr, num_tokens - num_prompt, first, end, word_starts_ptr,
            bad_ids_ptr, bad_capacity, VOCAB, BLOCK,
        )  # fmt: skip
        if num_tokens - num_prompt < tl.load(min_tokens_ptr + slot):
            start, end = _part(stop_starts_ptr, slot, stop_capacity)
            while start < end:
                at = start + lanes
                token = tl.load(stop_ids_ptr + at, mask=at < end, other=-1)
                _forbid(row_ptr, token, at < end, VOCAB)
                start += BLOCK
        tl.debug_barrier()
        start, end = _part(bias_starts_ptr, slot, bias_capacity)
        while start < end:
            at = start + lanes
            token = tl.load(bias_ids_ptr + at, mask=at < end, other=-1)
            known = (token >= 0) & (token < VOCAB)
            x = tl.load(row_ptr + token, mask=known, other=0.0).to(tl.float32)
            x += tl.load(bias_values_ptr + at, mask=at < end, other=0.0)
            tl.store(row_ptr + token, x.to(logits_ptr.dtype.element_ty), mask=known)
            start += BLOCK


@triton.jit
def _bits(masks_ptr, token, VOCAB: tl.constexpr):
    """Whether each token's bit is set in a row of a bit mask."""
    word = tl.load(masks_ptr + (token >> 5), mask=token < VOCAB, other=0)
    return ((word >> (token & 31)) & 1) != 0


@jit
def penalise_rows(
    logits_ptr,  # [S, V], changed
    rows_ptr,  # [L] int32
    slots_ptr,  # [L] int32
    num_drafts_ptr,  # [L] int32, tokens behind a slot's that are output too; None: no entry has any
    token_ids_ptr,  # [N, max_tokens] int32
    num_tokens_ptr,  # [N] int32
    repetition_ptr,  # [N] float32
    frequency_ptr,  # [N] float32
    presence_ptr,  # [N] float32
    counts_ptr,  # [N, V] int32
    allowed_starts_ptr,  # [N + 1] int32: a slot with allowed ids has a mask
    allowed_ptr,  # [N, WORDS] int32
    has_grammar_ptr,  # [N] int32
    grammar_ptr,  # [N, WORDS] int32
    num_rows,
    num_slots,
    max_tokens,
    VOCAB: tl.constexpr,
    WORDS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    # grid: (L * NUM_TILES,)
    entry = tl.program_id(0) // NUM_TILES
    row = tl.load(rows_ptr + entry).to(tl.int64)
    slot = tl.load(slots_ptr + entry).to(tl.int64)
    if (row >= 0) & (row < num_rows) & (slot >= 0) & (slot < num_slots):
        repetition = tl.load(repetition_ptr + slot)
        frequency = tl.load(frequency_ptr + slot)
        presence = tl.load(presence_ptr + slot)
        allowed = tl.load(allowed_starts_ptr + slot)
        has_allowed = tl.load(allowed_starts_ptr + slot + 1) > allowed
        has_grammar = tl.load(has_grammar_ptr + slot) != 0
        penalised = (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0)
        if penalised | has_allowed | has_grammar:
            token = (tl.program_id(0) % NUM_TILES) * TILE + tl.arange(0, TILE)
            at = logits_ptr + row * VOCAB + token
            x = tl.load(at, mask=token < VOCAB, other=0.0).to(tl.float32)
            if penalised:
                count = tl.load(counts_ptr + slot * VOCAB + token, mask=token < VOCAB, other=0)
                if num_drafts_ptr is not None:
                    first = tl.maximum(tl.load(num_tokens_ptr + slot), 0)
                    last = first + tl.load(num_drafts_ptr + entry)
                    while first < tl.minimum(last, max_tokens):
                        draft = tl.load(token_ids_ptr + slot * max_tokens + first)
                        count += tl.where(token == draft, 2, 0)
                        first += 1
                if repetition != 1.0:
                    repeated = tl.where(x > 0.0, tl.div_rn(x, repetition), x * repetition)
                    x = tl.where(count != 0, repeated, x)
                lower = (x - frequency * (count >> 1).to(tl.float32)) - presence
                x = tl.where(count >= 2, lower, x)
            if has_allowed:
                x = tl.where(_bits(allowed_ptr + slot * WORDS, token, VOCAB), x, NEVER)
            if has_grammar:
                x = tl.where(_bits(grammar_ptr + slot * WORDS, token, VOCAB), x, NEVER)
            tl.store(at, x.to(logits_ptr.dtype.element_ty), mask=token < VOCAB)
