"""Draws tokens from logits, row by row, on the CPU. Knows one row's numbers; knows no request.

A row is handled by one thread from its own values alone. Sums are of fixed-point integers and
therefore exact in any order, so nothing here depends on vector widths either.

Random bits: token t of vocabulary block b = t >> 10 takes word (t >> 8) & 3 of Philox at counter
(256 * b + (t & 255), 0, position low, position high) under the key (seed low, seed high). A
token's draw thus depends on (seed, position, token id) only, and a loop over 256 neighbouring
counters writes contiguous tokens.
"""

# mypy: ignore-errors
# The bodies are numba's dialect: fixed-width arithmetic that type stubs cannot follow.

from __future__ import annotations

import numpy as np
from numba import carray, float32, int32, int64

from octavo_kernels.parallel import device, kernel
from octavo_kernels.sampling.scalars import (
    MAX_KEY,
    MIN_KEY,
    address_of,
    exp_negative,
    exponential,
    fixed_point,
    float_bits,
    key_value,
    order_key,
    philox,
)
from octavo_kernels.simd import get_i32

OK, NON_FINITE, ALL_FORBIDDEN = 0, 1, 2
TILE = 256  # tokens of a tile: its peak lets a search skip it
NOISE_BLOCK = 1024  # tokens whose random bits are made together
_LANES = 256
_SCALAR_NOISE = 16  # at most V / 16 candidates: one draw each is cheaper than drawing for all


def workspace_bytes(vocab_size: int) -> int:
    """Scratch of one part of `sample_rows`: weights, keys, ids, masses, tile peaks, a block."""
    tiles = -(-vocab_size // TILE)
    return -(-(20 * vocab_size + 4 * tiles + 4 * NOISE_BLOCK + 64) // 64) * 64


@device
def tile_peaks(x, peaks):
    """Order keys of each tile's greatest value into `peaks`; returns the least and greatest key."""
    size = x.shape[0]
    least, most = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for tile in range(peaks.shape[0]):
        start = tile * TILE
        part = x[start : min(start + TILE, size)]
        low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
        for i in range(part.shape[0]):
            key = order_key(part[i])
            low = min(low, key)
            high = max(high, key)
        peaks[tile] = high
        least = min(least, low)
        most = max(most, high)
    return least, most


@device
def find_key(x, peaks, key):
    """Lowest index whose value has the order key `key`, which is the row's greatest."""
    size = x.shape[0]
    for tile in range(peaks.shape[0]):
        if peaks[tile] == key:
            for i in range(tile * TILE, min((tile + 1) * TILE, size)):
                if order_key(x[i]) == key:
                    return i
    return -1


@device
def kth_largest(keys, count, k, low, high):
    """The k-th largest of keys[:count], all within [low, high]."""
    keys = keys[:count]
    lo, hi = int64(low), int64(high)
    while lo < hi:
        middle = lo + (hi - lo + 1) // 2
        bound = np.int32(middle)
        above = 0
        for i in range(keys.shape[0]):
            above += keys[i] >= bound
        if above >= k:
            lo = middle
        else:
            hi = middle - 1
    return np.int32(lo)


@device
def _mass_threshold(keys, masses, count, needed, low, high):
    """The greatest key t at which the mass of keys >= t reaches `needed`."""
    keys, masses = keys[:count], masses[:count]
    lo, hi = int64(low), int64(high)
    while lo < hi:
        middle = lo + (hi - lo + 1) // 2
        bound = np.int32(middle)
        total = int64(0)
        for i in range(keys.shape[0]):
            total += masses[i] if keys[i] >= bound else int64(0)
        if total >= needed:
            lo = middle
        else:
            hi = middle - 1
    return np.int32(lo)


@device
def _weigh(x, peak, temperature, weights):
    for i in range(x.shape[0]):
        weights[i] = exp_negative((x[i] - peak) / temperature)


@device
def _mass_from(weights, least):
    """Fixed-point mass of the weights that are at least `least`."""
    total = int64(0)
    for i in range(weights.shape[0]):
        total += fixed_point(weights[i]) if weights[i] >= least else int64(0)
    return total


@device
def _gather(x, weights, peaks, cut_key, cut_weight, keys, masses, ids):
    """Lists, by ascending id, the tokens at or above both cuts; returns how many."""
    size = x.shape[0]
    count = 0
    for tile in range(peaks.shape[0]):
        if peaks[tile] < cut_key:
            continue
        for i in range(tile * TILE, min((tile + 1) * TILE, size)):
            key = order_key(x[i])
            if weights[i] >= cut_weight and key >= cut_key:
                keys[count] = key
                masses[count] = fixed_point(weights[i])
                ids[count] = np.int32(i)
                count += 1
    return count


@device
def _thresholds(x, weights, peaks, least, most, top_k, top_p, min_p, keys, masses, ids):
    """min_p, then top_k, then top_p: (key cut, weight cut, listed candidates).

    A token stays when its key and its weight reach the cuts; equal logits stay or go together.
    """
    size = x.shape[0]
    cut_key, cut_weight = least, min_p
    has_k = 0 < top_k < size
    total = int64(0)
    if has_k:
        # At least k tiles have a token this high, so at least k tokens are.
        tiles = peaks.shape[0]
        if top_k <= tiles:
            cut_key = kth_largest(peaks, tiles, top_k, least, most)
    elif top_p < 1.0:
        total = _mass_from(weights, min_p)
        # All that lie below can hold no more than the mass which top_p drops.
        share = 0.99 * (1.0 - float(top_p)) * float(total) / (1099511627776.0 * size)
        cut_weight = max(min_p, np.float32(share))
    count = _gather(x, weights, peaks, cut_key, cut_weight, keys, masses, ids)
    if has_k and count > top_k:
        cut_key = kth_largest(keys, count, top_k, cut_key, most)
    if top_p < 1.0:
        if has_k:
            for i in range(count):
                total += masses[i] if keys[i] >= cut_key else int64(0)
        needed = max(int64(1), int64(np.ceil(float(top_p) * float(total))))
        cut_key = _mass_threshold(keys, masses, count, needed, cut_key, most)
    return cut_key, cut_weight, count


@device
def _draw_one(token, seed_low, seed_high, place_low, place_high):
    block = token // NOISE_BLOCK
    counter = np.uint32(block * _LANES + token % _LANES)
    word = (token // _LANES) % 4
    bits = philox(counter, np.uint32(0), place_low, place_high, seed_low, seed_high)
    if word == 0:
        return exponential(bits[0])
    if word == 1:
        return exponential(bits[1])
    if word == 2:
        return exponential(bits[2])
    return exponential(bits[3])


@device
def _draw_block(block, seed_low, seed_high, place_low, place_high, draws):
    for i in range(_LANES):
        counter = np.uint32(block * _LANES + i)
        bits = philox(counter, np.uint32(0), place_low, place_high, seed_low, seed_high)
        draws[i] = exponential(bits[0])
        draws[_LANES + i] = exponential(bits[1])
        draws[2 * _LANES + i] = exponential(bits[2])
        draws[3 * _LANES + i] = exponential(bits[3])


@device
def _race_all(weights, seed_low, seed_high, place_low, place_high, draws):
    """Lowest id with the greatest weight / draw: token i wins with probability ~ its weight."""
    size = weights.shape[0]
    best, winner = np.int32(-1), -1
    for block in range(-(-size // NOISE_BLOCK)):
        start = block * NOISE_BLOCK
        part = weights[start : min(start + NOISE_BLOCK, size)]
        _draw_block(block, seed_low, seed_high, place_low, place_high, draws)
        highest = np.int32(-1)
        for i in range(part.shape[0]):
            draws[i] = part[i] / draws[i]
            highest = max(highest, float_bits(draws[i]))
        if highest > best:
            best = highest
            for i in range(part.shape[0]):
                if float_bits(draws[i]) == highest:
                    winner = start + i
                    break
    return winner


@device
def _race_listed(weights, keys, ids, count, cut_key, seed_low, seed_high, place_low, place_high):
    best, winner = np.int32(-1), -1
    for i in range(count):
        if keys[i] >= cut_key:
            token = int64(ids[i])
            draw = _draw_one(token, seed_low, seed_high, place_low, place_high)
            score = float_bits(weights[token] / draw)
            if score > best:
                best, winner = score, token
    return winner


@device
def _zero_dropped(x, weights, cut_key, cut_weight):
    for i in range(x.shape[0]):
        stays = weights[i] >= cut_weight and order_key(x[i]) >= cut_key
        weights[i] = weights[i] if stays else np.float32(0.0)


@device
def _sample_row(x, temperature, top_k, top_p, min_p, seed, position, work):
    """(token, status) of one row."""
    size = x.shape[0]
    tiles = -(-size // TILE)
    masses = carray(address_of(int64, work), (size,))
    weights = carray(address_of(float32, work + 8 * size), (size,))
    keys = carray(address_of(int32, work + 12 * size), (size,))
    ids = carray(address_of(int32, work + 16 * size), (size,))
    peaks = carray(address_of(int32, work + 20 * size), (tiles,))
    draws = carray(address_of(float32, work + 20 * size + 4 * tiles), (NOISE_BLOCK,))
    least, most = tile_peaks(x, peaks)
    if most >= MAX_KEY or least < MIN_KEY:
        return -1, NON_FINITE
    if most == MIN_KEY:
        return -1, ALL_FORBIDDEN
    if temperature == 0.0:
        return find_key(x, peaks, most), OK
    seed_low, seed_high = np.uint32(seed & 0xFFFFFFFF), np.uint32((seed >> 32) & 0xFFFFFFFF)
    low, high = np.uint32(position & 0xFFFFFFFF), np.uint32((position >> 32) & 0xFFFFFFFF)
    _weigh(x, key_value(most), temperature, weights)
    if (top_k <= 0 or top_k >= size) and top_p >= 1.0 and min_p <= 0.0:
        return _race_all(weights, seed_low, seed_high, low, high, draws), OK
    cut_key, cut_weight, count = _thresholds(
        x, weights, peaks, least, most, top_k, top_p, min_p, keys, masses, ids
    )
    if count * _SCALAR_NOISE <= size:
        winner = _race_listed(weights, keys, ids, count, cut_key, seed_low, seed_high, low, high)
        return winner, OK
    _zero_dropped(x, weights, cut_key, cut_weight)
    return _race_all(weights, seed_low, seed_high, low, high, draws), OK


@kernel
def sample_rows(
    part,  # rows part, part + num_parts, ... ; workspace `part`
    num_parts,
    logits_at,  # [S, V] float32
    num_rows,
    vocab_size,
    slots_at,  # [S] int32: a row's place in the next five, or 0: they are [S], each row its own
    num_slots,
    temperature_at,  # [N] float32
    top_k_at,  # [N] int32
    top_p_at,  # [N] float32
    min_p_at,  # [N] float32
    seeds_at,  # [N] int64: 64 bits
    positions_at,  # [S] int64
    tokens_at,  # [S] int64, out
    status_at,  # [S] int32, out
    workspace_at,
    workspace_stride,
):
    logits = carray(address_of(float32, logits_at), (num_rows, vocab_size))
    temperature = carray(address_of(float32, temperature_at), (num_slots,))
    top_k = carray(address_of(int32, top_k_at), (num_slots,))
    top_p = carray(address_of(float32, top_p_at), (num_slots,))
    min_p = carray(address_of(float32, min_p_at), (num_slots,))
    seeds = carray(address_of(int64, seeds_at), (num_slots,))
    positions = carray(address_of(int64, positions_at), (num_rows,))
    tokens = carray(address_of(int64, tokens_at), (num_rows,))
    status = carray(address_of(int32, status_at), (num_rows,))
    work = workspace_at + part * workspace_stride
    for row in range(part, num_rows, num_parts):
        slot = row if slots_at == 0 else get_i32(slots_at + 4 * row)
        tokens[row], status[row] = _sample_row(
            logits[row],
            temperature[slot],
            top_k[slot],
            top_p[slot],
            min_p[slot],
            seeds[slot],
            positions[row],
            work,
        )


@kernel
def philox_words(part, num_parts, counters_at, count, words_at):
    """Philox4x32-10 of [count, 6] uint32 (counter, key) rows into [count, 4]: for known answers."""
    counters = carray(address_of(int32, counters_at), (count, 6))
    words = carray(address_of(int32, words_at), (count, 4))
    for i in range(count):
        c = counters[i]
        found = philox(
            np.uint32(c[0]),
            np.uint32(c[1]),
            np.uint32(c[2]),
            np.uint32(c[3]),
            np.uint32(c[4]),
            np.uint32(c[5]),
        )
        for j in range(4):
            words[i, j] = np.int32(found[j])
