"""Divides a step's requests among the programs of the attention kernels. Knows lengths alone."""

from __future__ import annotations

import triton
import triton.language as tl

from octavo_kernels.launch import jit


@triton.jit
def _read(
    r,  # request numbers, any shape
    starts_ptr, lens_ptr, shared_ptr,
    num_requests, num_tokens, max_query_len, max_seq_len, K,
    G: tl.constexpr, DECODE_ROWS: tl.constexpr, TILE: tl.constexpr, PARTITION: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """What decides a request's work, values held to the host's bounds.

    start, query_len, seq_len; first, own, end partition; first and last tile; whether its rows
    fit the decode kernel; rows of partials it would need (int64).
    """
    live = r < num_requests
    start = tl.load(starts_ptr + r, mask=live, other=0)
    query_len = tl.load(starts_ptr + r + 1, mask=live, other=0) - start
    start = tl.minimum(tl.maximum(start, 0), num_tokens)
    query_len = tl.minimum(query_len, tl.minimum(max_query_len, num_tokens - start))
    query_len = tl.maximum(query_len, 0)
    seq_len = tl.load(lens_ptr + r, mask=live, other=0)
    seq_len = tl.minimum(tl.maximum(seq_len, 0), max_seq_len)
    lowest = tl.zeros_like(seq_len)
    if WINDOW > 0:
        lowest = tl.minimum(seq_len - query_len - (WINDOW - 1), seq_len - 1)
        lowest = tl.maximum(lowest, 0)
    first = lowest // PARTITION
    end = tl.maximum((seq_len + PARTITION - 1) // PARTITION, first + 1)
    own = first
    if shared_ptr is not None:
        shared = tl.load(shared_ptr + r, mask=live, other=0)
        own = tl.minimum(tl.maximum(shared, first), end - 1)
    first_tile = tl.maximum(lowest // TILE, own * (PARTITION // TILE))
    last_tile = tl.maximum((seq_len + TILE - 1) // TILE, first_tile + 1)
    few = (query_len > 0) & (query_len * G <= DECODE_ROWS)
    need = (end - first).to(tl.int64) * (query_len * G) * K
    need = tl.where(few & (end - first > 1), need, 0)
    return start, query_len, seq_len, first, own, end, first_tile, last_tile, few, need


@triton.jit
def _is_decoded(few, need, needed_before, partial_rows):
    """Whether each request of a chunk is decoded, and where its partials begin."""
    begin = needed_before + tl.cumsum(need, 0) - need
    return few & ((need == 0) | (begin + need <= partial_rows)), begin


@triton.jit
def _list_requests(
    starts_ptr, lens_ptr, shared_ptr, requests_ptr, num_decoded_ptr, arrivals_ptr, num_tiles_ptr,
    num_requests, num_tokens, max_query_len, max_seq_len, partial_rows, capacity, K, block_q,
    G: tl.constexpr, DECODE_ROWS: tl.constexpr, TILE: tl.constexpr, PARTITION: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Writes the decoded requests' rows and both counts; sets the arrivals to zero."""
    count = 0
    tiles = 0
    needed = tl.zeros([], tl.int64)
    for at in range(0, num_requests, BLOCK_R):
        r = at + tl.arange(0, BLOCK_R)
        start, query_len, seq_len, first, own, end, _a, _b, few, need = _read(
            r, starts_ptr, lens_ptr, shared_ptr, num_requests, num_tokens, max_query_len,
            max_seq_len, K, G, DECODE_ROWS, TILE, PARTITION, WINDOW,
        )  # fmt: skip
        decoded, begin = _is_decoded(few, need, needed, partial_rows)
        needed += tl.sum(need, 0)
        one = decoded.to(tl.int32)
        row = requests_ptr + 8 * (count + tl.cumsum(one, 0) - one)
        count += tl.sum(one, 0)
        tl.store(row, r, mask=decoded)
        tl.store(row + 1, start, mask=decoded)
        tl.store(row + 2, query_len, mask=decoded)
        tl.store(row + 3, seq_len, mask=decoded)
        tl.store(row + 4, first, mask=decoded)
        tl.store(row + 5, own, mask=decoded)
        tl.store(row + 6, end, mask=decoded)
        tl.store(row + 7, begin.to(tl.int32), mask=decoded)
        tiles += tl.sum(tl.where(decoded, 0, (query_len + block_q - 1) // block_q), 0)
    tl.store(num_decoded_ptr, count)
    tl.store(num_tiles_ptr, tl.minimum(tiles, capacity))
    for at in range(0, num_requests * K, BLOCK_R):
        i = at + tl.arange(0, BLOCK_R)
        tl.store(arrivals_ptr + i, tl.zeros([BLOCK_R], tl.int32), mask=i < num_requests * K)


@triton.jit
def _place_programs(
    programs,  # [CHUNK] programs of the decode kernel, num_programs included: its end
    starts_ptr, lens_ptr, shared_ptr, programs_ptr,
    num_requests, num_tokens, max_query_len, max_seq_len, num_programs, partial_rows, K,
    G: tl.constexpr, DECODE_ROWS: tl.constexpr, TILE: tl.constexpr, PARTITION: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Writes where programs begin: parts of equal cost, a unit costs its tiles and one more."""
    PER: tl.constexpr = PARTITION // TILE
    total = tl.zeros([], tl.int64)
    needed = tl.zeros([], tl.int64)
    for at in range(0, num_requests, BLOCK_R):
        r = at + tl.arange(0, BLOCK_R)
        _s, _q, _n, _f, own, end, first_tile, last_tile, few, need = _read(
            r, starts_ptr, lens_ptr, shared_ptr, num_requests, num_tokens, max_query_len,
            max_seq_len, K, G, DECODE_ROWS, TILE, PARTITION, WINDOW,
        )  # fmt: skip
        decoded, _b = _is_decoded(few, need, needed, partial_rows)
        needed += tl.sum(need, 0)
        cost = (last_tile - first_tile + end - own).to(tl.int64) * K
        total += tl.sum(tl.where(decoded, cost, 0), 0)
    target = programs.to(tl.int64) * total // tl.maximum(num_programs, 1)
    # Of the requests that end at or before each target: how many, how many decoded, cost, tiles.
    request = tl.zeros_like(programs)
    row = tl.zeros_like(programs)
    cost_before = tl.zeros_like(target)
    tiles_before = tl.zeros_like(target)
    total = tl.zeros([], tl.int64)
    needed = tl.zeros([], tl.int64)
    for at in range(0, num_requests, BLOCK_R):
        r = at + tl.arange(0, BLOCK_R)
        _s, _q, _n, _f, own, end, first_tile, last_tile, few, need = _read(
            r, starts_ptr, lens_ptr, shared_ptr, num_requests, num_tokens, max_query_len,
            max_seq_len, K, G, DECODE_ROWS, TILE, PARTITION, WINDOW,
        )  # fmt: skip
        decoded, _b = _is_decoded(few, need, needed, partial_rows)
        needed += tl.sum(need, 0)
        tiles = tl.where(decoded, (last_tile - first_tile).to(tl.int64) * K, 0)
        cost = tl.where(decoded, tiles + (end - own).to(tl.int64) * K, 0)
        past = (total + tl.cumsum(cost, 0))[None, :] <= target[:, None]
        past = past & (r < num_requests)[None, :]
        total += tl.sum(cost, 0)
        request += tl.sum(past.to(tl.int32), 1)
        row += tl.sum((past & decoded[None, :]).to(tl.int32), 1)
        cost_before += tl.sum(tl.where(past, cost[None, :], 0), 1)
        tiles_before += tl.sum(tl.where(past, tiles[None, :], 0), 1)
    # The first unit of that request that begins at or after the target.
    _s, _q, _n, _f, own, end, first_tile, last_tile, _w, _d = _read(
        request, starts_ptr, lens_ptr, shared_ptr, num_requests, num_tokens, max_query_len,
        max_seq_len, K, G, DECODE_ROWS, TILE, PARTITION, WINDOW,
    )  # fmt: skip
    tiles = last_tile - first_tile
    left = tl.where(request < num_requests, target - cost_before, 0).to(tl.int32)
    head = left // (tiles + end - own)
    left = left % (tiles + end - own)
    first_cost = tl.minimum(tiles, (own + 1) * PER - first_tile) + 1
    skipped = 1 + (tl.maximum(left - first_cost, 0) + PER) // (PER + 1)
    partition = own + tl.where(left == 0, 0, skipped)
    head += (partition >= end).to(tl.int32)
    partition = tl.where(partition >= end, own, partition)
    tiles_before += head * tiles + tl.maximum(partition * PER - first_tile, 0)
    wraps = head >= K
    row += wraps.to(tl.int32)
    head = tl.where(wraps, 0, head)
    partition = tl.where(wraps, -1, partition)
    live = programs <= num_programs
    tl.store(programs_ptr + 4 * programs, row, mask=live)
    tl.store(programs_ptr + 4 * programs + 1, head, mask=live)
    tl.store(programs_ptr + 4 * programs + 2, partition, mask=live)
    tl.store(programs_ptr + 4 * programs + 3, tiles_before.to(tl.int32), mask=live)


@triton.jit
def _place_tiles(
    tiles,  # [CHUNK] prefill tiles in the order of requests
    starts_ptr, lens_ptr, shared_ptr, tiles_ptr,
    num_requests, num_tokens, max_query_len, max_seq_len, partial_rows, capacity, K, block_q,
    G: tl.constexpr, DECODE_ROWS: tl.constexpr, TILE: tl.constexpr, PARTITION: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Writes tiles where their rank by last position puts them, highest first."""
    request = tl.zeros_like(tiles)
    before = tl.zeros_like(tiles)
    total = 0
    needed = tl.zeros([], tl.int64)
    for at in range(0, num_requests, BLOCK_R):
        r = at + tl.arange(0, BLOCK_R)
        _s, query_len, _n, _f, _o, _e, _a, _b, few, need = _read(
            r, starts_ptr, lens_ptr, shared_ptr, num_requests, num_tokens, max_query_len,
            max_seq_len, K, G, DECODE_ROWS, TILE, PARTITION, WINDOW,
        )  # fmt: skip
        decoded, _p = _is_decoded(few, need, needed, partial_rows)
        needed += tl.sum(need, 0)
        count = tl.where(decoded, 0, (query_len + block_q - 1) // block_q)
        past = (total + tl.cumsum(count, 0))[None, :] <= tiles[:, None]
        past = past & (r < num_requests)[None, :]
        total += tl.sum(count, 0)
        request += tl.sum(past.to(tl.int32), 1)
        before += tl.sum(tl.where(past, count[None, :], 0), 1)
    mine = _read(
        request, starts_ptr, lens_ptr, shared_ptr, num_requests, num_tokens, max_query_len,
        max_seq_len, K, G, DECODE_ROWS, TILE, PARTITION, WINDOW,
    )  # fmt: skip
    first_token = (tiles - before) * block_q
    last = mine[2] - mine[1] + tl.minimum(first_token + block_q, mine[1])
    rank = tl.zeros_like(tiles)
    needed = tl.zeros([], tl.int64)
    for at in range(0, num_requests, BLOCK_R):
        r = at + tl.arange(0, BLOCK_R)
        _s, query_len, seq_len, _f, _o, _e, _a, _b, few, need = _read(
            r, starts_ptr, lens_ptr, shared_ptr, num_requests, num_tokens, max_query_len,
            max_seq_len, K, G, DECODE_ROWS, TILE, PARTITION, WINDOW,
        )  # fmt: skip
        decoded, _p = _is_decoded(few, need, needed, partial_rows)
        needed += tl.sum(need, 0)
        count = tl.where(decoded, 0, (query_len + block_q - 1) // block_q)
        # Tile t of a request ends at seq_len - query_len + min((t + 1) * block_q, query_len):
        # tiles that end at or after `bound` go first.
        bound = last[:, None] + (r[None, :] >= request[:, None]).to(tl.int32)
        full = tl.maximum(bound - (seq_len - query_len)[None, :] + block_q - 1, 0) // block_q
        earlier = 1 + tl.maximum(count[None, :] - tl.maximum(full, 1), 0)
        reaches = (seq_len[None, :] >= bound) & (count > 0)[None, :]
        rank += tl.sum(tl.where(reaches, earlier, 0), 1)
    live = (tiles < total) & (rank < capacity)
    tl.store(tiles_ptr + 2 * rank, request, mask=live)
    tl.store(tiles_ptr + 2 * rank + 1, first_token, mask=live)


@jit
def divide(
    starts_ptr,  # [R + 1] int32
    lens_ptr,  # [R] int32
    shared_ptr,  # [R] int32 or None
    requests_ptr, num_decoded_ptr, programs_ptr, arrivals_ptr, tiles_ptr, num_tiles_ptr,
    num_requests, num_tokens, max_query_len, max_seq_len, num_programs, partial_rows, capacity,
    K, block_q,
    G: tl.constexpr, DECODE_ROWS: tl.constexpr, TILE: tl.constexpr, PARTITION: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid: (1 + ceil((num_programs + 1) / CHUNK) + ceil(capacity / CHUNK),); see AttentionPlan."""
    chunk = tl.program_id(0) - 1
    if chunk < 0:
        _list_requests(
            starts_ptr, lens_ptr, shared_ptr, requests_ptr, num_decoded_ptr, arrivals_ptr,
            num_tiles_ptr, num_requests, num_tokens, max_query_len, max_seq_len, partial_rows,
            capacity, K, block_q, G, DECODE_ROWS, TILE, PARTITION, WINDOW, BLOCK_R,
        )  # fmt: skip
        return
    lanes = tl.arange(0, CHUNK)
    program_chunks = (num_programs + CHUNK) // CHUNK
    if chunk < program_chunks:
        _place_programs(
            chunk * CHUNK + lanes, starts_ptr, lens_ptr, shared_ptr, programs_ptr, num_requests,
            num_tokens, max_query_len, max_seq_len, num_programs, partial_rows, K, G, DECODE_ROWS,
            TILE, PARTITION, WINDOW, BLOCK_R,
        )  # fmt: skip
    else:
        _place_tiles(
            (chunk - program_chunks) * CHUNK + lanes, starts_ptr, lens_ptr, shared_ptr, tiles_ptr,
            num_requests, num_tokens, max_query_len, max_seq_len, partial_rows, capacity, K,
            block_q, G, DECODE_ROWS, TILE, PARTITION, WINDOW, BLOCK_R,
        )  # fmt: skip
