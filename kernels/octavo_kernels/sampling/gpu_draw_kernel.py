"""The Triton kernel that ends a draw: one token per row. Knows a row's summary and its cuts."""

from __future__ import annotations

import triton
import triton.language as tl

from octavo_kernels.launch import jit
from octavo_kernels.sampling.gpu_numbers_kernel import (
    MAX_KEY,
    MIN_KEY,
    SUB,
    key_value,
    lists_candidates,
    load_peaks,
    order_key,
    row_noise,
    token_draw,
    weight,
)
from octavo_kernels.sampling.gpu_sample_kernel import NEVER, STEEP


@triton.jit
def _scores(x, token, kept, peak, temperature, c2, c3, k0, k1):
    """Bits of weight over draw, which order as the scores; -1 for tokens that are not kept."""
    w = weight(x, peak, temperature)
    score = tl.div_rn(w, token_draw(token, c2, c3, k0, k1))
    return tl.where(kept, score.to(tl.int32, bitcast=True), -1)


@triton.jit
def _first_peak(row_ptr, peaks, most, VOCAB: tl.constexpr, SUBS_PAD: tl.constexpr):
    """The lowest token with the row's greatest logit."""
    sub = tl.min(tl.where(peaks == most, tl.arange(0, SUBS_PAD), SUBS_PAD), 0)
    token = sub * SUB + tl.arange(0, SUB)
    x = tl.load(row_ptr + token, mask=token < VOCAB, other=NEVER).to(tl.float32)
    return tl.min(tl.where((token < VOCAB) & (order_key(x) == most), token, VOCAB), 0)


@triton.jit
def _race_source(
    source_ptr,
    ids_ptr,
    is_listed,
    count,
    cut_key,
    least,
    peak,
    temperature,
    c2,
    c3,
    k0,
    k1,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The winner among candidates, all of which are raced."""
    best = tl.full([BLOCK], -1, tl.int32)
    winner = tl.full([BLOCK], VOCAB, tl.int32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(source_ptr + at, mask=at < count, other=NEVER).to(tl.float32)
        token = tl.load(ids_ptr + at, mask=at < tl.where(is_listed, count, 0), other=0)
        token = tl.where(is_listed, token, at)
        w = weight(x, peak, temperature)
        kept = (at < count) & (order_key(x) >= cut_key) & (w >= least)
        score = _scores(x, token, kept, peak, temperature, c2, c3, k0, k1)
        winner = tl.where(score > best, token, winner)
        best = tl.maximum(best, score)
    return tl.min(tl.where(best == tl.max(best, 0), winner, VOCAB), 0)


@triton.jit
def _race_bounded(
    row_ptr,
    bounds_ptr,
    cut_key,
    least,
    peaks,
    peak,
    temperature,
    c2,
    c3,
    k0,
    k1,
    VOCAB: tl.constexpr,
    NUM_SUBS: tl.constexpr,
    SUBS_PAD: tl.constexpr,
):
    """The winner among all kept tokens, subtiles in order of what they can score at most."""
    subs = tl.arange(0, SUBS_PAD)
    open_sub = (subs < NUM_SUBS) & (peaks >= cut_key)
    bounds = tl.load(bounds_ptr + subs, mask=open_sub, other=NEVER)
    scale = 1.4426950408889634 / temperature
    # What rounding, and an approximate logarithm, may take from a bound or add to `limit`.
    slack = 1e-3 + 1e-6 * tl.abs(peak) * scale
    highest = tl.max(bounds, 0)
    limit = tl.minimum(highest, NEVER)
    best = cut_key * 0 - 1
    winner = cut_key * 0
    while (highest > NEVER) & (highest >= limit):
        sub = tl.min(tl.where(bounds == highest, subs, SUBS_PAD), 0)
        token = sub * SUB + tl.arange(0, SUB)
        x = tl.load(row_ptr + token, mask=token < VOCAB, other=NEVER).to(tl.float32)
        kept = (token < VOCAB) & (order_key(x) >= cut_key)
        kept = kept & (weight(x, peak, temperature) >= least)
        bits = _scores(x, token, kept, peak, temperature, c2, c3, k0, k1)
        top = tl.max(bits, 0)
        first = tl.min(tl.where(bits == top, token, VOCAB), 0)
        better = (top > best) | ((top == best) & (first < winner))
        winner = tl.where(better, first, winner)
        best = tl.maximum(best, top)
        score = tl.maximum(best, 1).to(tl.float32, bitcast=True)
        reached = tl.log2(score) + peak * scale - slack
        limit = tl.where((best > 0) & (scale <= STEEP), reached, NEVER)
        bounds = tl.where(subs == sub, NEVER, bounds)
        highest = tl.max(bounds, 0)
    return winner


@jit
def draw(
    logits_ptr,  # [S, V]
    temperature_ptr,  # [S] float32
    top_k_ptr,  # [S] int32
    top_p_ptr,  # [S] float32
    min_p_ptr,  # [S] float32
    seeds_ptr,  # [S] int64
    positions_ptr,  # [S] int64
    peaks_ptr,  # [S, NUM_SUBS] int32
    bounds_ptr,  # [S, NUM_SUBS] float32
    values_ptr,  # [S, CAPACITY]
    ids_ptr,  # [S, CAPACITY] int32
    cuts_ptr,  # [S, 2] int32
    tokens_ptr,  # [S] int64, out
    status_ptr,  # [S] int32, out: 0, 1 (not finite) or 2 (all forbidden)
    VOCAB: tl.constexpr,
    NUM_SUBS: tl.constexpr,
    SUBS_PAD: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # grid: (S,)
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    peaks = load_peaks(peaks_ptr, row, NUM_SUBS, SUBS_PAD)
    most = tl.max(peaks, 0)
    row_ptr = logits_ptr + row * VOCAB
    token = top_k * 0 - 1
    if (most < MAX_KEY) & (most > MIN_KEY):
        if temperature > 0.0:
            peak = key_value(most)
            least = tl.load(min_p_ptr + row)
            cut_key = tl.load(cuts_ptr + row * 2)
            c2, c3, k0, k1 = row_noise(seeds_ptr, positions_ptr, row)
            if lists_candidates(top_k, NUM_SUBS, VOCAB):
                listed = tl.load(cuts_ptr + row * 2 + 1)
                source_ptr = row_ptr
                if listed >= 0:
                    source_ptr = values_ptr + row * CAPACITY
                token = _race_source(
                    source_ptr, ids_ptr + row * CAPACITY, listed >= 0,
                    tl.where(listed >= 0, listed, VOCAB), cut_key, least, peak, temperature,
                    c2, c3, k0, k1, VOCAB, BLOCK,
                )  # fmt: skip
            else:
                token = _race_bounded(
                    row_ptr, bounds_ptr + row * NUM_SUBS, cut_key, least, peaks, peak,
                    temperature, c2, c3, k0, k1, VOCAB, NUM_SUBS, SUBS_PAD,
                )  # fmt: skip
        else:
            token = _first_peak(row_ptr, peaks, most, VOCAB, SUBS_PAD)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    status = (most >= MAX_KEY).to(tl.int32) + 2 * (most == MIN_KEY).to(tl.int32)
    tl.store(status_ptr + row, status)
