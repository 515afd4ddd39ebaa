"""Triton kernels that weigh rows which a top_p alone cuts. Know rows, samples and masses.

`guess` draws a bracket for the cut from a sample of a row: its heaviest subtiles, every subtile's
peak and some of the rest. `weigh` then reads the row once for its exact mass, the exact masses from
both ends of the bracket on, and a list of the tokens inside. A guess decides nothing but time: the
masses tell whether the cut is in the bracket, and `narrow` looks elsewhere if it is not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo_kernels.launch import jit
from octavo_kernels.sampling.gpu_narrow_kernel import (
    FAINT,
    LANES,
    MASSES,
    NEVER,
    RANGES,
    bottom,
    load_tile,
)
from octavo_kernels.sampling.gpu_numbers_kernel import (
    MAX_KEY,
    MIN_KEY,
    NO_KEY,
    SUB,
    fixed_point,
    key_value,
    load_peaks,
    order_key,
    peaks_bound,
    weight_over,
)

HEAVY = tl.constexpr(8)  # subtiles of a sample that are the heaviest of the row
SAMPLE = tl.constexpr(32)
DEVIATIONS = tl.constexpr(2.8)  # that a bracket reaches to each side of the sample's cut


@triton.jit
def _rough_weight(x, peak, temperature, least):
    w = tl.exp((x - peak) / temperature)
    return tl.where((x > NEVER) & (w >= least), w, 0.0)


@triton.jit
def _sample(row_ptr, subs_ptr, peaks_ptr, peaks, most, VOCAB: tl.constexpr, NUM_SUBS: tl.constexpr):
    """Sampled logits [SAMPLE * SUB], how many tokens each stands for, and which peaks are extra.

    Tokens of the heaviest subtiles stand for themselves, as do the other subtiles' peaks; -inf
    stands for nothing.
    """
    real = peaks != NO_KEY
    heaviest = peaks_bound(peaks, min(HEAVY, NUM_SUBS), most)
    heavy = real & (peaks >= heaviest)
    rank = tl.cumsum(heavy.to(tl.int32), 0)
    heavy = heavy & (rank <= HEAVY)
    light = real & (heavy == 0)
    order = tl.cumsum(light.to(tl.int32), 0) - 1
    num_light = tl.sum(light.to(tl.int32), 0)
    stride = tl.maximum((num_light + SAMPLE - HEAVY - 1) // (SAMPLE - HEAVY), 1)
    picked = light & (order % stride == stride // 2)
    num_picked = tl.sum(picked.to(tl.int32), 0)
    to = tl.where(heavy, rank - 1, HEAVY + order // stride)
    tl.store(subs_ptr + to, tl.arange(0, peaks.shape[0]), mask=heavy | picked)
    tl.debug_barrier()
    lanes = tl.arange(0, SAMPLE * SUB)
    place = lanes // SUB
    is_light = place >= HEAVY
    known = place < tl.where(is_light, HEAVY + num_picked, tl.sum(heavy.to(tl.int32), 0))
    sub = tl.load(subs_ptr + place, mask=known, other=0)
    top = key_value(tl.load(peaks_ptr + sub, mask=known, other=MIN_KEY))
    token = sub * SUB + lanes % SUB
    x = tl.load(row_ptr + token, mask=known & (token < VOCAB), other=NEVER).to(tl.float32)
    x = tl.where(is_light & (x == top), NEVER, x)
    share = num_light.to(tl.float32) / tl.maximum(num_picked, 1).to(tl.float32)
    return x, is_light, share, light, key_value(heaviest)


@triton.jit
def _tail(x, mass, values, value_mass, cut):
    """Estimated mass below a logit."""
    sampled = tl.sum(tl.where(x < cut, mass, 0.0), 0)
    return sampled + tl.sum(tl.where(values < cut, value_mass, 0.0), 0)


@jit
def guess(
    logits_ptr,  # [S, V]
    temperature_ptr,  # [S] float32
    top_k_ptr,  # [S] int32
    top_p_ptr,  # [S] float32
    min_p_ptr,  # [S] float32
    peaks_ptr,  # [S, NUM_SUBS] int32
    ranges_ptr,  # [S, RANGES, 2] float32, out: range 0; low and end of the bracket
    cursors_ptr,  # [S, 3] int32, out: zeros
    subs_ptr,  # [S, NUM_SUBS] int32, scratch
    VOCAB: tl.constexpr,
    NUM_SUBS: tl.constexpr,
    SUBS_PAD: tl.constexpr,
):
    # grid: (S,)
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    has_k = (top_k > 0) & (top_k < VOCAB)
    if (temperature > 0.0) & (top_p < 1.0) & (has_k == 0):
        peaks = load_peaks(peaks_ptr, row, NUM_SUBS, SUBS_PAD)
        most = tl.max(peaks, 0)
        if (most < MAX_KEY) & (most > MIN_KEY):
            peak = key_value(most)
            least = tl.load(min_p_ptr + row)
            x, is_light, share, light, heaviest = _sample(
                logits_ptr + row * VOCAB, subs_ptr + row * NUM_SUBS, peaks_ptr + row * NUM_SUBS,
                peaks, most, VOCAB, NUM_SUBS,
            )  # fmt: skip
            values = tl.where(light, key_value(peaks), NEVER)
            value_mass = _rough_weight(values, peak, temperature, least)
            mass = _rough_weight(x, peak, temperature, least) * tl.where(is_light, share, 1.0)
            total = tl.sum(mass, 0) + tl.sum(value_mass, 0)
            dropped = (1.0 - top_p) * total
            # What a sample of the light subtiles tells of all of them varies with these
            # (a token in the tail counts top_p there, net of its share of the total).
            spread = (1.0 - top_p) * (1.0 - top_p)
            spread *= tl.sum(tl.where(is_light, mass * mass, 0.0), 0)
            tail_spread = top_p * top_p * share * dropped
            loose = tl.where(share > 1.0, 1.0, 0.0)
            lightest = tl.min(tl.where(x > NEVER, x, peak), 0)
            floor = bottom(peak, temperature, top_p, VOCAB)
            low = tl.maximum(lightest, floor)
            end = peak
            low_end, end_low = peak, low
            for _ in range(12):
                middle = 0.5 * low + 0.5 * low_end
                w = _rough_weight(tl.minimum(middle, heaviest), peak, temperature, 0.0)
                slack = DEVIATIONS * tl.sqrt(loose * (w * tail_spread + spread))
                surely = _tail(x, mass, values, value_mass, middle) + slack + 1e-5 * total
                low = tl.where(surely <= dropped, middle, low)
                low_end = tl.where(surely <= dropped, low_end, middle)
                middle = 0.5 * end_low + 0.5 * end
                w = _rough_weight(tl.minimum(middle, heaviest), peak, temperature, 0.0)
                slack = DEVIATIONS * tl.sqrt(loose * (w * tail_spread + spread))
                surely = _tail(x, mass, values, value_mass, middle) - slack - 1e-5 * total
                end = tl.where(surely >= dropped, middle, end)
                end_low = tl.where(surely >= dropped, end_low, middle)
            low = tl.where(low <= lightest, floor, low)
            end = tl.where(end >= peak, float("inf"), end)
            tl.store(ranges_ptr + row * RANGES * 2, tl.minimum(low, end))
            tl.store(ranges_ptr + row * RANGES * 2 + 1, end)
            for place in tl.static_range(3):
                tl.store(cursors_ptr + row * 3 + place, 0)


@jit
def weigh(
    logits_ptr,  # [S, V]
    temperature_ptr,  # [S] float32
    top_k_ptr,  # [S] int32
    top_p_ptr,  # [S] float32
    min_p_ptr,  # [S] float32
    peaks_ptr,  # [S, NUM_SUBS] int32
    masses_ptr,  # [S, MASSES, NUM_PARTS] int64, out: 0 of all tokens, 1 from low on, 2 from end on
    ranges_ptr,  # [S, RANGES, 2] float32
    cursors_ptr,  # [S, 3] int32: 0 counts the tokens in the bracket, beyond CAPACITY about
    values_ptr,  # [S, CAPACITY], out: tokens in the bracket, in any order
    VOCAB: tl.constexpr,
    NUM_SUBS: tl.constexpr,
    SUBS_PAD: tl.constexpr,
    NUM_TILES: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    # grid: (S * NUM_PARTS, 1)
    row = (tl.program_id(0) // NUM_PARTS).to(tl.int64)
    part = tl.program_id(0) % NUM_PARTS
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    has_k = (top_k > 0) & (top_k < VOCAB)
    if (temperature > 0.0) & (top_p < 1.0) & (has_k == 0):
        most = tl.max(load_peaks(peaks_ptr, row, NUM_SUBS, SUBS_PAD), 0)
        if (most < MAX_KEY) & (most > MIN_KEY):
            peak = key_value(most)
            least = tl.maximum(tl.load(min_p_ptr + row), FAINT)
            low = tl.load(ranges_ptr + row * RANGES * 2)
            end = tl.load(ranges_ptr + row * RANGES * 2 + 1)
            low_key = order_key(low)
            total = tl.zeros([LANES], tl.int64)
            from_low, from_end = total, total
            first = tl.zeros([LANES], tl.int32)  # where each lane listed last
            inverse = tl.div_rn(1.0, temperature)
            for tile in range(part, NUM_TILES, NUM_PARTS):
                _, x = load_tile(logits_ptr + row * VOCAB, tile, VOCAB)
                w = weight_over(x, peak, temperature, inverse)
                stays = w >= least  # tokens past the end weigh nothing
                gain = fixed_point(tl.where(stays, w, 0.0))
                total += tl.sum(gain, 1)
                sub = tile * 8 + tl.arange(0, 8)
                tops = tl.load(peaks_ptr + row * NUM_SUBS + sub, mask=sub < NUM_SUBS, other=NO_KEY)
                if tl.max(tops, 0) >= low_key:
                    from_low += tl.sum(tl.where(x >= low, gain, 0), 1)
                    from_end += tl.sum(tl.where(x >= end, gain, 0), 1)
                    inside = (stays & (x >= low) & (x < end)).to(tl.int32)
                    # One addition a lane; a list that is full needs no exact length.
                    count = tl.where(first <= CAPACITY, tl.sum(inside, 1), 0)
                    cursor = cursors_ptr + row * 3 + count * 0
                    found = tl.atomic_add(cursor, count, mask=count > 0, sem="relaxed")
                    first = tl.where(count > 0, found, first)
                    to = first[:, None] + tl.cumsum(inside, 1) - 1
                    listed = (inside > 0) & (to < CAPACITY)
                    value = x.to(values_ptr.dtype.element_ty)
                    tl.store(values_ptr + row * CAPACITY + to, value, mask=listed)
            at = masses_ptr + row * MASSES * NUM_PARTS + part
            tl.store(at, tl.sum(total, 0))
            tl.store(at + NUM_PARTS, tl.sum(from_low, 0))
            tl.store(at + 2 * NUM_PARTS, tl.sum(from_end, 0))
