"""Log-probabilities, ranks and best tokens of logits on the CPU. Knows one row; knows no request.

The normaliser is a sum of fixed-point integers, exact in any order; nothing of size [S, V] is made.
"""

# mypy: ignore-errors
# The bodies are numba's dialect: fixed-width arithmetic that type stubs cannot follow.

from __future__ import annotations

import math

import numpy as np
from numba import carray, float32, int32, int64

from octavo_kernels.parallel import device, kernel
from octavo_kernels.sampling.cpu import NON_FINITE, OK, TILE, tile_peaks
from octavo_kernels.sampling.scalars import (
    MAX_KEY,
    MIN_KEY,
    address_of,
    exp_negative,
    fixed_point,
    key_value,
    order_key,
)


@device
def _mass(x, peak):
    total = int64(0)
    for i in range(x.shape[0]):
        total += fixed_point(exp_negative(x[i] - peak))
    return total


@device
def _count_above(x, value):
    above = 0
    for i in range(x.shape[0]):
        above += x[i] > value
    return above


@device
def _next_in_tile(x, start, stop, last_key, last_id):
    """Best (key, id) in [start, stop) after (last_key, last_id): lower, or equal and later."""
    best, found = int64(-0x80000000), -1
    for i in range(start, stop):
        key = int64(order_key(x[i]))
        if key > best and (key < last_key or (key == last_key and i > last_id)):
            best, found = key, i
    return best, found


@device
def _list_best(x, peaks, heads, n, normaliser, ids, logprobs):
    """The n best tokens, ties by lower id. `peaks` is used up: each tile's best not yet listed."""
    size = x.shape[0]
    for tile in range(peaks.shape[0]):
        _, at = _next_in_tile(x, tile * TILE, min((tile + 1) * TILE, size), int64(2**62), -1)
        heads[tile] = np.int32(at)
    for place in range(min(n, size)):
        tile = 0
        for other in range(1, peaks.shape[0]):
            if heads[other] >= 0 and (heads[tile] < 0 or peaks[other] > peaks[tile]):
                tile = other
        key, at = int64(peaks[tile]), int64(heads[tile])
        ids[place] = np.int32(at)
        logprobs[place] = np.float32(float(x[at]) - normaliser)
        start, stop = tile * TILE, min((tile + 1) * TILE, size)
        best, after = _next_in_tile(x, start, stop, key, at)
        peaks[tile], heads[tile] = np.int32(best), np.int32(after)


@kernel
def logprob_rows(
    part,  # rows part, part + num_parts, ... ; workspace `part`
    num_parts,
    logits_at,  # [S, V] float32
    num_rows,
    vocab_size,
    chosen_at,  # [S] int64
    num_best,
    chosen_logprobs_at,  # [S] float32, out
    ranks_at,  # [S] int32, out
    best_ids_at,  # [S, num_best] int32, out
    best_logprobs_at,  # [S, num_best] float32, out
    status_at,  # [S] int32, out
    workspace_at,  # [num_parts, 2, tiles] int32
):
    tiles = -(-vocab_size // TILE)
    logits = carray(address_of(float32, logits_at), (num_rows, vocab_size))
    chosen = carray(address_of(int64, chosen_at), (num_rows,))
    chosen_logprobs = carray(address_of(float32, chosen_logprobs_at), (num_rows,))
    ranks = carray(address_of(int32, ranks_at), (num_rows,))
    best_ids = carray(address_of(int32, best_ids_at), (num_rows, num_best))
    best_logprobs = carray(address_of(float32, best_logprobs_at), (num_rows, num_best))
    status = carray(address_of(int32, status_at), (num_rows,))
    work = carray(address_of(int32, workspace_at), (num_parts, 2, tiles))[part]
    for row in range(part, num_rows, num_parts):
        x = logits[row]
        least, most = tile_peaks(x, work[0])
        if most >= MAX_KEY or least < MIN_KEY or most == MIN_KEY:
            status[row] = NON_FINITE
            continue
        status[row] = OK
        peak = key_value(most)
        normaliser = float(peak) + math.log(float(_mass(x, peak)) / 1099511627776.0)
        value = x[chosen[row]]
        chosen_logprobs[row] = np.float32(float(value) - normaliser)
        ranks[row] = np.int32(1 + _count_above(x, value))
        if num_best > 0:
            _list_best(x, work[0], work[1], num_best, normaliser, best_ids[row], best_logprobs[row])
