"""Triton kernels that bracket where a top_p alone cuts, for rows whose guess told too little.

Know rows, bins of logits and masses. The first turn of `narrow` counts the tokens of a range that
surely holds the cut by bins of logits; the second makes a bracket of the counts and lists the
bracket's tokens if they are few, else counts them by bins of the bracket. Logits are binned by one
monotone function, and a bin's mass lies between what its count weighs at its two edges, each moved
outwards by more than rounding can do: hence every bracket is exact, lists may be in any order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo_kernels.launch import jit
from octavo_kernels.sampling.gpu_numbers_kernel import (
    MAX_KEY,
    MIN_KEY,
    fixed_point,
    key_value,
    load_peaks,
    weight,
)

NEVER = tl.constexpr(float("-inf"))
BINS = tl.constexpr(64)
LANES = tl.constexpr(256)  # a tile is [LANES, 8] tokens: 4-bit counts hold a lane's 8
ONE = tl.constexpr(1099511627776.0)  # a mass of 1
TURNS = tl.constexpr(2)  # that count or list, after `weigh`
MASSES = tl.constexpr(4)  # sums of a row: all, two of `weigh`, one from the last turn's end on
RANGES = tl.constexpr(2)  # of a row: the guess, the last turn's
FAINT = tl.constexpr(1.2e-38)  # below every weight but 0


@triton.jit
def needed_mass(top_p, total):
    """The fixed-point mass that kept tokens must reach."""
    target = top_p.to(tl.float64) * total.to(tl.float64)
    needed = target.to(tl.int64)
    return tl.maximum(needed + (needed.to(tl.float64) < target).to(tl.int64), 1)


@triton.jit
def light_weight(top_p, total, VOCAB: tl.constexpr):
    """A weight below which all tokens together have no more mass than top_p drops."""
    share = 0.99 * (1.0 - top_p.to(tl.float64)) * total.to(tl.float64)
    return (share / (ONE * VOCAB)).to(tl.float32)


@triton.jit
def _slack(top, low):
    """More than rounding moves a bin's edge."""
    return 1e-6 * (tl.abs(top) + tl.abs(low)) + 1e-30


@triton.jit
def bottom(peak, temperature, top_p, VOCAB: tl.constexpr):
    """A logit at or above which there is surely enough mass, whatever the row holds."""
    depth = 1.001 * tl.log(VOCAB / (0.99 * (1.0 - top_p))) + 0.001
    low = peak - tl.minimum(depth * temperature, 1e38)
    return tl.maximum(low - _slack(peak, low), -3e38)


@triton.jit
def _step(top, low):
    return tl.maximum((top - low) * (1.0 / BINS), 1e-30)


@triton.jit
def sum_parts(masses_ptr, row, which, NUM_PARTS: tl.constexpr, PARTS_PAD: tl.constexpr):
    """One of a row's masses."""
    part = tl.arange(0, PARTS_PAD)
    at = masses_ptr + (row * MASSES + which) * NUM_PARTS + part
    return tl.sum(tl.load(at, mask=part < NUM_PARTS, other=0), 0)


@triton.jit
def lists_cut(
    masses_ptr,
    cursors_ptr,
    row,
    needed,
    NUM_PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Whether the cut is in the guessed bracket and that in a list; the masses from its ends on."""
    from_low = sum_parts(masses_ptr, row, 1, NUM_PARTS, PARTS_PAD)
    from_end = sum_parts(masses_ptr, row, 2, NUM_PARTS, PARTS_PAD)
    fits = tl.load(cursors_ptr + row * 3) <= CAPACITY
    return (from_end < needed) & (from_low >= needed) & fits, from_low, from_end


@triton.jit
def judge_guess(
    masses_ptr,
    ranges_ptr,
    cursors_ptr,
    row,
    needed,
    peak,
    temperature,
    top_p,
    VOCAB: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """A range that surely holds the cut: low, end, the mass from end on, and whether it is listed.

    The guessed bracket, or else what lies beside it.
    """
    is_listed, from_low, from_end = lists_cut(
        masses_ptr, cursors_ptr, row, needed, NUM_PARTS, PARTS_PAD, CAPACITY
    )
    low, end = tl.load(ranges_ptr + row * RANGES * 2), tl.load(ranges_ptr + row * RANGES * 2 + 1)
    is_over, is_under = from_end >= needed, from_low < needed
    floor = bottom(peak, temperature, top_p, VOCAB)
    first = tl.where(is_over, end, tl.where(is_under, tl.minimum(floor, low), low))
    last = tl.where(is_over, float("inf"), tl.where(is_under, low, end))
    above = tl.where(is_over, 0, tl.where(is_under, from_low, from_end))
    return first, last, above, is_listed


@triton.jit
def find_bracket(
    counts_ptr,  # of the row's turn: [NUM_PARTS, BINS] int32
    low,
    end,
    above,
    needed,
    peak,
    temperature,
    VOCAB: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
):
    """The bracket that a turn's counts leave: low, end and how many tokens they count in it.

    The mass from low on surely is `needed` or more, that from end on surely less. above: the
    turn's exact mass from end on.
    """
    part = tl.arange(0, PARTS_PAD)[:, None]
    place = tl.arange(0, BINS)
    at = counts_ptr + part * BINS + place[None, :]
    counts = tl.sum(tl.load(at, mask=part < NUM_PARTS, other=0), 0)
    top = tl.minimum(end, peak)
    slack = _slack(top, low)
    step = _step(top, low)
    upper = top - place.to(tl.float32) * step
    lower = top - (place + 1).to(tl.float32) * step
    most = weight(tl.minimum(upper + slack, peak), peak, temperature).to(tl.float64)
    least = weight(tl.minimum(lower - slack, peak), peak, temperature).to(tl.float64)
    heavy = counts.to(tl.float64) * tl.minimum(most * 1.000001, 1.0) * ONE
    light = counts.to(tl.float64) * least * 0.999999 * ONE
    known = above.to(tl.float64)
    at_least = known + tl.cumsum(light, 0)
    at_most = known + tl.cumsum(heavy, 0)
    wanted = needed.to(tl.float64)
    # Fixed-point weights are up to one unit below the weights.
    enough = at_least >= wanted * 1.00001 + 2.0 * VOCAB
    lacking = at_most <= wanted * 0.99999 - 2.0 * VOCAB
    last = tl.min(tl.where(enough, place, BINS - 1), 0)
    first = tl.max(tl.where(lacking, place, -1), 0) + 1
    # Nothing below the range is asked for, even where its last bin is not surely enough.
    low = tl.maximum(tl.max(tl.where(place == last, lower - slack, NEVER), 0), low)
    end = tl.minimum(tl.min(tl.where(lacking, upper - step + slack, float("inf")), 0), end)
    inside = (place >= first) & (place <= last)
    return low, end, tl.sum(tl.where(inside, counts, 0), 0)


@triton.jit
def load_tile(row_ptr, tile, VOCAB: tl.constexpr):
    """Tokens [LANES, 8] of a tile and their logits, -inf past the end."""
    place = tl.arange(0, 8)[None, :] * LANES + tl.arange(0, LANES)[:, None]
    # An exclusive or with 0 that the compiler does not know: wider loads would put a lane's
    # tokens into several threads, and each tile through shared memory.
    token = tile * (LANES * 8) + (place ^ tl.program_id(1))
    return token, tl.load(row_ptr + token, mask=token < VOCAB, other=NEVER).to(tl.float32)


@triton.jit
def _places(x, top, low):
    """The bin of each logit."""
    place = tl.minimum((top - x) * (1.0 / _step(top, low)), BINS - 1.0)
    return tl.maximum(place, 0.0).to(tl.int32)


@triton.jit
def _count_bins(place, counted, PACK: tl.constexpr):
    """Counts of bins 16 * PACK to 16 * PACK + 15: two int64 [LANES] of 8-bit counts."""
    one = tl.full(place.shape, 1, tl.int64) << ((place & 15) * 4).to(tl.int64)
    packed = tl.sum(tl.where(counted & ((place >> 4) == PACK), one, 0), 1)
    return packed & 0x0F0F0F0F0F0F0F0F, (packed >> 4) & 0x0F0F0F0F0F0F0F0F


@triton.jit
def _store_bins(to_ptr, even, odd):
    """Sums 8-bit counts of 16 bins over 256 lanes: below 2^16."""
    place = tl.arange(0, 4)
    for half in tl.static_range(2):
        fields0 = tl.sum((even >> (8 * half)) & 0x00FF00FF00FF00FF, 0)
        fields1 = tl.sum((odd >> (8 * half)) & 0x00FF00FF00FF00FF, 0)
        shift = place.to(tl.int64) * 16
        to = to_ptr + place * 4 + 2 * half
        tl.store(to, ((fields0 >> shift) & 0xFFFF).to(tl.int32))
        tl.store(to + 1, ((fields1 >> shift) & 0xFFFF).to(tl.int32))


@jit
def narrow(
    logits_ptr,  # [S, V]
    temperature_ptr,  # [S] float32
    top_k_ptr,  # [S] int32
    top_p_ptr,  # [S] float32
    min_p_ptr,  # [S] float32
    peaks_ptr,  # [S, NUM_SUBS] int32
    masses_ptr,  # [S, MASSES, NUM_PARTS] int64, out: 3, from the second turn's end on
    counts_ptr,  # [S, TURNS, NUM_PARTS, BINS] int32, out: this turn's
    ranges_ptr,  # [S, RANGES, 2] float32, out: range 1, the second turn's low and end
    cursors_ptr,  # [S, 3] int32, out: 1 tokens listed by the second turn, 2 whether it lists
    values_ptr,  # [S, CAPACITY], out: tokens in the bracket, in any order
    VOCAB: tl.constexpr,
    NUM_SUBS: tl.constexpr,
    SUBS_PAD: tl.constexpr,
    NUM_TILES: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    TURN: tl.constexpr,
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
        # Most rows end here; those that are not finite have masses of any kind.
        total = sum_parts(masses_ptr, row, 0, NUM_PARTS, PARTS_PAD)
        needed = needed_mass(top_p, total)
        is_listed, _from_low, _from_end = lists_cut(
            masses_ptr, cursors_ptr, row, needed, NUM_PARTS, PARTS_PAD, CAPACITY
        )
        if is_listed == 0:
            most = tl.max(load_peaks(peaks_ptr, row, NUM_SUBS, SUBS_PAD), 0)
            if (most < MAX_KEY) & (most > MIN_KEY):
                peak = key_value(most)
                low, end, above, _is_listed = judge_guess(
                    masses_ptr, ranges_ptr, cursors_ptr, row, needed, peak, temperature, top_p,
                    VOCAB, NUM_PARTS, PARTS_PAD, CAPACITY,
                )  # fmt: skip
                row_ptr = logits_ptr + row * VOCAB
                least = tl.maximum(tl.load(min_p_ptr + row), FAINT)
                light = tl.maximum(least, light_weight(top_p, total, VOCAB))
                fits = False
                at = row * TURNS * NUM_PARTS
                if TURN == 2:
                    low, end, count = find_bracket(
                        counts_ptr + at * BINS, low, end, above, needed, peak, temperature, VOCAB,
                        NUM_PARTS, PARTS_PAD,
                    )  # fmt: skip
                    fits = count <= CAPACITY - CAPACITY // 16
                    if part == 0:
                        tl.store(ranges_ptr + row * RANGES * 2 + 2, low)
                        tl.store(ranges_ptr + row * RANGES * 2 + 3, end)
                        tl.store(cursors_ptr + row * 3 + 2, fits.to(tl.int32))
                mass = tl.zeros([LANES], tl.int64)
                if fits:
                    for tile in range(part, NUM_TILES, NUM_PARTS):
                        token, x = load_tile(row_ptr, tile, VOCAB)
                        w = weight(x, peak, temperature)
                        stays = (token < VOCAB) & (w >= least) & (x >= end)
                        mass += tl.sum(tl.where(stays, fixed_point(w), 0), 1)
                        stays = (token < VOCAB) & (w >= light) & (x >= low) & (x < end)
                        cursor = cursors_ptr + row * 3 + 1 + token * 0
                        to = tl.atomic_add(cursor, 1, mask=stays, sem="relaxed")
                        value = x.to(values_ptr.dtype.element_ty)
                        stays = stays & (to < CAPACITY)
                        tl.store(values_ptr + row * CAPACITY + to, value, mask=stays)
                else:
                    top = tl.minimum(end, peak)
                    e0 = tl.zeros([LANES], tl.int64)
                    e1, e2, e3, o0, o1, o2, o3 = e0, e0, e0, e0, e0, e0, e0
                    for tile in range(part, NUM_TILES, NUM_PARTS):
                        token, x = load_tile(row_ptr, tile, VOCAB)
                        w = weight(x, peak, temperature)
                        stays = (token < VOCAB) & (w >= least)
                        if TURN == 2:
                            heavier = tl.where(stays & (x >= end), fixed_point(w), 0)
                            mass += tl.sum(heavier, 1)
                        counted = stays & (x >= low) & (x < end)
                        place = _places(x, top, low)
                        even, odd = _count_bins(place, counted, 0)
                        e0, o0 = e0 + even, o0 + odd
                        even, odd = _count_bins(place, counted, 1)
                        e1, o1 = e1 + even, o1 + odd
                        even, odd = _count_bins(place, counted, 2)
                        e2, o2 = e2 + even, o2 + odd
                        even, odd = _count_bins(place, counted, 3)
                        e3, o3 = e3 + even, o3 + odd
                    to = counts_ptr + (at + (TURN - 1) * NUM_PARTS + part) * BINS
                    _store_bins(to, e0, o0)
                    _store_bins(to + 16, e1, o1)
                    _store_bins(to + 32, e2, o2)
                    _store_bins(to + 48, e3, o3)
                if TURN == 2:
                    tl.store(masses_ptr + (row * MASSES + 3) * NUM_PARTS + part, tl.sum(mass, 0))
