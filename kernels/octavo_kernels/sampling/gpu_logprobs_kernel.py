"""Triton kernels that score tokens: chosen, ranks and the best, nothing of size [S, V] made."""

from __future__ import annotations

import triton
import triton.language as tl

from octavo_kernels.launch import jit
from octavo_kernels.sampling.gpu_numbers_kernel import (
    MAX_KEY,
    MIN_KEY,
    NO_KEY,
    SUB,
    exp_negative,
    fixed_point,
    key_value,
    load_peaks,
    order_key,
)
from octavo_kernels.sampling.gpu_sample_kernel import NEVER


@jit
def score_tiles(
    logits_ptr,  # [S, V]
    chosen_ptr,  # [S] int64
    peaks_ptr,  # [S, NUM_SUBS] int32
    masses_ptr,  # [S, NUM_TILES] int64, out
    above_ptr,  # [S, NUM_TILES] int32, out: tokens with a greater logit than the chosen one's
    VOCAB: tl.constexpr,
    NUM_SUBS: tl.constexpr,
    SUBS_PAD: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    # grid: (S * NUM_TILES,)
    row = (tl.program_id(0) // NUM_TILES).to(tl.int64)
    tile = tl.program_id(0) % NUM_TILES
    token = tile * TILE + tl.arange(0, TILE)
    row_ptr = logits_ptr + row * VOCAB
    x = tl.load(row_ptr + token, mask=token < VOCAB, other=NEVER).to(tl.float32)
    chosen = tl.load(chosen_ptr + row)
    known = (chosen >= 0) & (chosen < VOCAB)
    value = tl.load(row_ptr + chosen, mask=known, other=NEVER).to(tl.float32)
    tl.store(above_ptr + row * NUM_TILES + tile, tl.sum((x > value).to(tl.int32), 0))
    most = tl.max(load_peaks(peaks_ptr, row, NUM_SUBS, SUBS_PAD), 0)
    mass = tl.cast(0, tl.int64)
    if (most < MAX_KEY) & (most > MIN_KEY):
        mass = tl.sum(fixed_point(exp_negative(x - key_value(most))), 0)
    tl.store(masses_ptr + row * NUM_TILES + tile, mass)


@triton.jit
def _list_best(
    row_ptr,
    ids_ptr,
    logprobs_ptr,
    peaks,
    normaliser,
    num_best,
    VOCAB: tl.constexpr,
    SUBS_PAD: tl.constexpr,
):
    """The best tokens, ties by lower id: always the next one of the subtile that leads."""
    subs = tl.arange(0, SUBS_PAD)
    listed = tl.full([SUBS_PAD], -1, tl.int32)  # last token listed whose key is the subtile's peak
    for place in range(num_best):
        most = tl.max(peaks, 0)
        sub = tl.min(tl.where(peaks == most, subs, SUBS_PAD), 0)
        last = tl.max(tl.where(subs == sub, listed, -1), 0)
        token = sub * SUB + tl.arange(0, SUB)
        x = tl.load(row_ptr + token, mask=token < VOCAB, other=NEVER).to(tl.float32)
        key = tl.where(token < VOCAB, order_key(x), NO_KEY)
        at = tl.min(tl.where((key == most) & (token > last), token, VOCAB), 0)
        tl.store(ids_ptr + place, at)
        tl.store(logprobs_ptr + place, (key_value(most).to(tl.float64) - normaliser).to(tl.float32))
        rest = (key < most) | ((key == most) & (token > at))
        following = tl.max(tl.where(rest, key, NO_KEY), 0)
        peaks = tl.where(subs == sub, following, peaks)
        listed = tl.where(subs == sub, tl.where(following == most, at, -1), listed)


@jit
def score_rows(
    logits_ptr,  # [S, V]
    chosen_ptr,  # [S] int64
    peaks_ptr,  # [S, NUM_SUBS] int32
    masses_ptr,  # [S, NUM_TILES] int64
    above_ptr,  # [S, NUM_TILES] int32
    chosen_logprobs_ptr,  # [S] float32, out
    ranks_ptr,  # [S] int32, out
    ids_ptr,  # [S, num_best] int32, out
    logprobs_ptr,  # [S, num_best] float32, out
    status_ptr,  # [S] int32, out
    num_best,
    VOCAB: tl.constexpr,
    NUM_SUBS: tl.constexpr,
    SUBS_PAD: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILES_PAD: tl.constexpr,
):
    # grid: (S,)
    row = tl.program_id(0).to(tl.int64)
    peaks = load_peaks(peaks_ptr, row, NUM_SUBS, SUBS_PAD)
    most = tl.max(peaks, 0)
    fails = (most >= MAX_KEY) | (most == MIN_KEY)
    tl.store(status_ptr + row, fails.to(tl.int32))
    row_ptr = logits_ptr + row * VOCAB
    if fails == 0:
        tiles = tl.arange(0, TILES_PAD)
        real = tiles < NUM_TILES
        mass = tl.sum(tl.load(masses_ptr + row * NUM_TILES + tiles, mask=real, other=0), 0)
        above = tl.sum(tl.load(above_ptr + row * NUM_TILES + tiles, mask=real, other=0), 0)
        share = mass.to(tl.float64) / 1099511627776.0
        normaliser = key_value(most).to(tl.float64) + tl.log(share)
        chosen = tl.load(chosen_ptr + row)
        known = (chosen >= 0) & (chosen < VOCAB)
        value = tl.load(row_ptr + chosen, mask=known, other=NEVER).to(tl.float64)
        tl.store(chosen_logprobs_ptr + row, (value - normaliser).to(tl.float32))
        tl.store(ranks_ptr + row, 1 + above)
        _list_best(
            row_ptr, ids_ptr + row * num_best, logprobs_ptr + row * num_best, peaks, normaliser,
            num_best, VOCAB, SUBS_PAD,
        )  # fmt: skip
    else:
        tl.store(chosen_logprobs_ptr + row, float("nan"))
        tl.store(ranks_ptr + row, 0)
        for place in range(num_best):
            tl.store(ids_ptr + row * num_best + place, -1)
            tl.store(logprobs_ptr + row * num_best + place, float("nan"))
