"""Triton kernels that draw tokens from logits. Know rows, subtiles and one row's numbers.

`survey` reads all logits once: each subtile's peak and, for rows that race over everything, a
bound of what its tokens can score. `cut` finds a row's least kept key among few candidates: those
above the k-th best subtile's peak, or those that `weigh` or `narrow` listed where a top_p alone
cuts. Sums that decide are of integers, hence exact in any order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo_kernels.launch import jit
from octavo_kernels.sampling.gpu_narrow_kernel import (
    BINS,
    RANGES,
    TURNS,
    find_bracket,
    judge_guess,
    light_weight,
    needed_mass,
    sum_parts,
)
from octavo_kernels.sampling.gpu_numbers_kernel import (
    MAX_KEY,
    MIN_KEY,
    NO_KEY,
    SUB,
    fixed_point,
    key_value,
    lists_candidates,
    load_peaks,
    order_key,
    peaks_bound,
    philox,
    row_noise,
    weight,
)

NEVER = tl.constexpr(float("-inf"))
STEEP = tl.constexpr(1e30)  # a scale above which scores are not bounded, as they might overflow


@triton.jit
def _load_sub(logits_ptr, row, blocks, word: tl.constexpr, VOCAB: tl.constexpr):
    """Subtile `word` of each block of 1024 tokens: [blocks, 256] float32, -inf past the end."""
    token = blocks[:, None] * 1024 + word * SUB + tl.arange(0, SUB)[None, :]
    at = logits_ptr + row * VOCAB + token
    x = tl.load(at, mask=token < VOCAB, other=NEVER).to(tl.float32)
    return tl.where(x != x, float("inf"), x)  # either fails the row


@triton.jit
def _bound(x, peaks, bits, scale):
    """log2 of a subtile's best score, or up to 0.09 above it if that is a likely winner's.

    A draw is at least 1 - u, and the bits of a float, read as an integer, never lie above its
    logarithm on a scale of 2^23.
    """
    # The upper bits of 1 - u as a float: no conversion of integers, which is slow.
    rest = ((bits >> 9) ^ 0x3FFFFFFF).to(tl.int32, bitcast=True)
    rest = rest.to(tl.float32, bitcast=True) - 1.0
    low = (rest.to(tl.int32, bitcast=True) >> 8) | 0x4B000000  # the integer above 2^23
    low = low.to(tl.float32, bitcast=True)
    high = tl.max(tl.fma(low, -3.0517578125e-05, tl.fma(x, scale, 383.0)), 1)
    steep = tl.where(peaks > NEVER, float("inf"), high)
    return tl.where(scale > STEEP, steep, high)


@jit
def survey(
    logits_ptr,  # [S, V]
    temperature_ptr,  # [S] float32
    top_k_ptr,  # [S] int32
    seeds_ptr,  # [S] int64
    positions_ptr,  # [S] int64
    peaks_ptr,  # [S, NUM_SUBS] int32, out: order keys
    bounds_ptr,  # [S, NUM_SUBS] float32, out, for rows that race over all tokens
    VOCAB: tl.constexpr,
    NUM_SUBS: tl.constexpr,
    GROUP: tl.constexpr,  # blocks of 1024 tokens of a program
    NUM_TILES: tl.constexpr,
    DRAWS: tl.constexpr,
):
    # grid: (S * NUM_TILES,)
    row = (tl.program_id(0) // NUM_TILES).to(tl.int64)
    blocks = (tl.program_id(0) % NUM_TILES) * GROUP + tl.arange(0, GROUP)
    x0 = _load_sub(logits_ptr, row, blocks, 0, VOCAB)
    x1 = _load_sub(logits_ptr, row, blocks, 1, VOCAB)
    x2 = _load_sub(logits_ptr, row, blocks, 2, VOCAB)
    x3 = _load_sub(logits_ptr, row, blocks, 3, VOCAB)
    p0, p1, p2, p3 = tl.max(x0, 1), tl.max(x1, 1), tl.max(x2, 1), tl.max(x3, 1)
    subs = blocks * 4
    at = peaks_ptr + row * NUM_SUBS + subs
    tl.store(at, order_key(p0), mask=subs < NUM_SUBS)
    tl.store(at + 1, order_key(p1), mask=subs + 1 < NUM_SUBS)
    tl.store(at + 2, order_key(p2), mask=subs + 2 < NUM_SUBS)
    tl.store(at + 3, order_key(p3), mask=subs + 3 < NUM_SUBS)
    if DRAWS:
        temperature = tl.load(temperature_ptr + row)
        listed = lists_candidates(tl.load(top_k_ptr + row), NUM_SUBS, VOCAB)
        if (temperature > 0.0) & (listed == 0):
            scale = 1.4426950408889634 / temperature
            c2, c3, k0, k1 = row_noise(seeds_ptr, positions_ptr, row)
            counter = (blocks[:, None] * SUB + tl.arange(0, SUB)[None, :]).to(tl.uint32)
            w0, w1, w2, w3 = philox(counter, c2, c3, k0, k1)
            to = bounds_ptr + row * NUM_SUBS + subs
            tl.store(to, _bound(x0, p0, w0, scale), mask=subs < NUM_SUBS)
            tl.store(to + 1, _bound(x1, p1, w1, scale), mask=subs + 1 < NUM_SUBS)
            tl.store(to + 2, _bound(x2, p2, w2, scale), mask=subs + 2 < NUM_SUBS)
            tl.store(to + 3, _bound(x3, p3, w3, scale), mask=subs + 3 < NUM_SUBS)


@triton.jit
def _gather(
    row_ptr,
    subs_ptr,
    values_ptr,
    ids_ptr,
    peaks,
    cut_key,
    end_key,
    cut_weight,
    peak,
    temperature,
    VOCAB: tl.constexpr,
    SUBS_PAD: tl.constexpr,
    CAPACITY: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Lists, by ascending id, the tokens at or above both cuts and below end_key.

    Returns their number, -1 if they do not fit, and the mass of the tokens from end_key on.
    """
    # Weights may fall by an ulp where keys rise, hence the slack.
    tops = key_value(tl.maximum(peaks, MIN_KEY))
    reach = weight(tops, peak, temperature) >= cut_weight * 0.999
    kept = ((peaks >= cut_key) & (peaks != NO_KEY) & reach).to(tl.int32)
    tl.store(subs_ptr + tl.cumsum(kept, 0) - 1, tl.arange(0, SUBS_PAD), mask=kept != 0)
    num_subs = tl.sum(kept, 0)
    tl.debug_barrier()
    lanes = tl.arange(0, GROUP * SUB)
    count = num_subs * 0
    start = num_subs * 0
    above = count.to(tl.int64)
    while (start < num_subs) & (count <= CAPACITY):
        place = start + lanes // SUB
        sub = tl.load(subs_ptr + place, mask=place < num_subs, other=0)
        token = sub * SUB + lanes % SUB
        real = (place < num_subs) & (token < VOCAB)
        raw = tl.load(row_ptr + token, mask=real, other=NEVER)
        x = raw.to(tl.float32)
        key = order_key(x)
        w = weight(x, peak, temperature)
        stays = real & (key >= cut_key) & (w >= cut_weight)
        above += tl.sum(tl.where(stays & (key >= end_key), fixed_point(w), 0), 0)
        stays = stays & (key < end_key)
        ones = stays.to(tl.int32)
        to = count + tl.cumsum(ones, 0) - 1
        has_room = stays & (to < CAPACITY)
        tl.store(values_ptr + to, raw, mask=has_room)
        tl.store(ids_ptr + to, token, mask=has_room)
        count += tl.sum(ones, 0)
        start += GROUP
    tl.debug_barrier()
    fits = count <= CAPACITY
    return tl.where(fits, count, -1), tl.where(fits, above, 0)


@triton.jit
def _mass_above(source_ptr, count, cut_key, cut_weight, peak, temperature, BLOCK: tl.constexpr):
    """Fixed-point mass of the tokens at or above both cuts."""
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(source_ptr + at, mask=at < count, other=NEVER).to(tl.float32)
        w = weight(x, peak, temperature)
        stays = (at < count) & (order_key(x) >= cut_key) & (w >= cut_weight)
        total += tl.where(stays, fixed_point(w), 0)
    return tl.sum(total, 0)


@triton.jit
def _search(
    source_ptr,
    count,
    needed,
    low,
    high,
    cut_weight,
    peak,
    temperature,
    MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The greatest key in [low, high] at or above which is the mass (else number) `needed`."""
    lo, hi = low.to(tl.int64), high.to(tl.int64)
    while lo < hi:
        span = hi - lo
        first, second = lo + (span + 3) // 4, lo + (span + 1) // 2
        third = lo + (3 * span + 3) // 4
        sum1 = tl.zeros([BLOCK], tl.int64 if MASS else tl.int32)
        sum2 = sum1
        sum3 = sum1
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(source_ptr + at, mask=at < count, other=NEVER).to(tl.float32)
            key = tl.where(at < count, order_key(x), NO_KEY)
            w = weight(x, peak, temperature)
            gain = fixed_point(w) if MASS else (at < count).to(tl.int32)
            gain = tl.where(w >= cut_weight, gain, 0)
            sum1 += tl.where(key >= first.to(tl.int32), gain, 0)
            sum2 += tl.where(key >= second.to(tl.int32), gain, 0)
            sum3 += tl.where(key >= third.to(tl.int32), gain, 0)
        up1, up2 = tl.sum(sum1, 0) >= needed, tl.sum(sum2, 0) >= needed
        up3 = tl.sum(sum3, 0) >= needed
        hi = tl.where(up3, hi, tl.where(up2, third, tl.where(up1, second, first)) - 1)
        lo = tl.where(up3, third, tl.where(up2, second, tl.where(up1, first, lo)))
    return lo.to(tl.int32)


@triton.jit
def _search_list(
    source_ptr, count, needed, low, high, cut_weight, peak, temperature, HELD: tl.constexpr
):
    """The greatest key in [low, high] at or above which a list, held in registers, has the mass."""
    at = tl.arange(0, HELD)
    x = tl.load(source_ptr + at, mask=at < count, other=NEVER).to(tl.float32)
    w = weight(x, peak, temperature)
    stays = (at < count) & (w >= cut_weight)
    w = tl.where(stays, w, 0.0)
    key = order_key(x)
    lo = tl.maximum(low, tl.min(tl.where(stays, key, MAX_KEY), 0)).to(tl.int64)
    hi = tl.minimum(high, tl.max(tl.where(stays, key, NO_KEY), 0)).to(tl.int64)
    while lo < hi:
        middle = lo + (hi - lo + 1) // 2
        mass = tl.sum(tl.where(key >= middle.to(tl.int32), fixed_point(w), 0), 0)
        lo = tl.where(mass >= needed, middle, lo)
        hi = tl.where(mass >= needed, hi, middle - 1)
    return lo.to(tl.int32)


@triton.jit
def _last_bracket(
    masses_ptr,
    counts_ptr,
    ranges_ptr,
    cursors_ptr,
    row,
    total,
    top_p,
    peak,
    temperature,
    VOCAB: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Low and end key of a row's bracket, its tokens, if they are listed, and the mass from end."""
    needed = needed_mass(top_p, total)
    low, end, above, is_listed = judge_guess(
        masses_ptr, ranges_ptr, cursors_ptr, row, needed, peak, temperature, top_p, VOCAB,
        NUM_PARTS, PARTS_PAD, CAPACITY,
    )  # fmt: skip
    count = tl.load(cursors_ptr + row * 3)
    if is_listed == 0:
        at = ranges_ptr + row * RANGES * 2 + 2
        low, end = tl.load(at), tl.load(at + 1)
        above = sum_parts(masses_ptr, row, 3, NUM_PARTS, PARTS_PAD)
        count = tl.load(cursors_ptr + row * 3 + 1)
        is_listed = tl.load(cursors_ptr + row * 3 + 2) != 0
        if is_listed == 0:
            low, end, count = find_bracket(
                counts_ptr + (row * TURNS + 1) * NUM_PARTS * BINS, low, end, above, needed, peak,
                temperature, VOCAB, NUM_PARTS, PARTS_PAD,
            )  # fmt: skip
    return order_key(low), order_key(end), count, is_listed & (count <= CAPACITY), above


@jit
def cut(
    logits_ptr,  # [S, V]
    temperature_ptr,  # [S] float32
    top_k_ptr,  # [S] int32
    top_p_ptr,  # [S] float32
    min_p_ptr,  # [S] float32
    peaks_ptr,  # [S, NUM_SUBS] int32
    masses_ptr,  # [S, MASSES, NUM_PARTS] int64
    counts_ptr,  # [S, TURNS, NUM_PARTS, BINS] int32
    ranges_ptr,  # [S, RANGES, 2] float32
    cursors_ptr,  # [S, 3] int32
    subs_ptr,  # [S, NUM_SUBS] int32, scratch
    values_ptr,  # [S, CAPACITY], out: gathered candidates
    ids_ptr,  # [S, CAPACITY] int32, out: their tokens, if top_k bounds them
    cuts_ptr,  # [S, 2] int32, out: least kept key; number of candidates or -1
    VOCAB: tl.constexpr,
    NUM_SUBS: tl.constexpr,
    SUBS_PAD: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    CAPACITY: tl.constexpr,
    HELD: tl.constexpr,  # tokens of a list that fit into registers
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # grid: (S,)
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    least = tl.load(min_p_ptr + row)
    has_k = (top_k > 0) & (top_k < VOCAB)
    cut_key = top_k * 0 + MIN_KEY
    listed = top_k * 0 - 1
    if (temperature > 0.0) & (has_k | (top_p < 1.0)):
        peaks = load_peaks(peaks_ptr, row, NUM_SUBS, SUBS_PAD)
        most = tl.max(peaks, 0)
        if (most < MAX_KEY) & (most > MIN_KEY):
            peak = key_value(most)
            row_ptr = logits_ptr + row * VOCAB
            needed = tl.cast(1, tl.int64)
            above = tl.cast(0, tl.int64)
            end_key = top_k * 0 + MAX_KEY
            cut_weight = least
            gathers = has_k & (top_k <= NUM_SUBS)
            if gathers:
                cut_key = peaks_bound(peaks, top_k, most)
            if has_k == 0:
                total = sum_parts(masses_ptr, row, 0, NUM_PARTS, PARTS_PAD)
                needed = needed_mass(top_p, total)
                cut_weight = tl.maximum(least, light_weight(top_p, total, VOCAB))
                cut_key, end_key, count, is_listed, above = _last_bracket(
                    masses_ptr, counts_ptr, ranges_ptr, cursors_ptr, row, total, top_p, peak,
                    temperature, VOCAB, NUM_PARTS, PARTS_PAD, CAPACITY,
                )  # fmt: skip
                gathers = (is_listed == 0) & (count <= CAPACITY)
                listed = tl.where(is_listed, count, -1)
            if gathers:
                listed, above = _gather(
                    row_ptr, subs_ptr + row * NUM_SUBS, values_ptr + row * CAPACITY,
                    ids_ptr + row * CAPACITY, peaks, cut_key, end_key, cut_weight, peak,
                    temperature, VOCAB, SUBS_PAD, CAPACITY, GROUP,
                )  # fmt: skip
            above = tl.where(listed >= 0, above, 0)
            count = tl.where(listed >= 0, listed, VOCAB)
            source_ptr = row_ptr
            if listed >= 0:
                source_ptr = values_ptr + row * CAPACITY
            if has_k & (count > top_k):
                cut_key = _search(
                    source_ptr, count, top_k, cut_key, most, cut_weight, peak, temperature,
                    False, BLOCK,
                )  # fmt: skip
            if top_p < 1.0:
                if has_k:
                    total = _mass_above(
                        source_ptr, count, cut_key, cut_weight, peak, temperature, BLOCK
                    )
                    needed = needed_mass(top_p, total)
                high = tl.minimum(most, end_key - 1)
                if (listed >= 0) & (count <= HELD):
                    cut_key = _search_list(
                        source_ptr, count, needed - above, cut_key, high, cut_weight, peak,
                        temperature, HELD,
                    )  # fmt: skip
                else:
                    cut_key = _search(
                        source_ptr, count, needed - above, cut_key, high, cut_weight, peak,
                        temperature, True, BLOCK,
                    )  # fmt: skip
    tl.store(cuts_ptr + row * 2, cut_key)
    tl.store(cuts_ptr + row * 2 + 1, listed)
