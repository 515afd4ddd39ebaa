"""QK-norm, rotary embedding and cache write of one token per program. Knows no requests.

A head is held in three parts: the two members of its R / 2 pairs, [M, R / 2] each, and the H - R
dimensions that do not turn, [M, H - R]; an empty part stands for another one and is never used.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo_kernels.launch import jit


@triton.jit
def to_e4m3(x):
    """The bits of float32 x as float8 e4m3, to nearest even, saturated to +-448; NaN stays NaN."""
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2**-6 values are 2**-9 apart, which is the last place of 2**14: the sum rounds to it.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def load_parts(x_ptr, at, is_head, H: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Heads starting at x_ptr + at [M, 1] as three parts in their own dtype."""
    PAIRS: tl.constexpr = triton.next_power_of_2(HALF if HALF > 0 else 1)
    REST: tl.constexpr = triton.next_power_of_2(H - 2 * HALF if H > 2 * HALF else 1)
    if H > 2 * HALF:
        cols = tl.arange(0, REST)[None, :]
        mask = is_head & (cols < H - 2 * HALF)
        rest = tl.load(x_ptr + at + (2 * HALF + cols), mask=mask, other=0.0)
    if HALF > 0:
        if INTERLEAVED:
            cols = tl.arange(0, 2 * PAIRS)[None, :]
            both = tl.load(x_ptr + at + cols, mask=is_head & (cols < 2 * HALF), other=0.0)
            a, b = tl.split(tl.reshape(both, [both.shape[0], PAIRS, 2]))
        else:
            cols = tl.arange(0, PAIRS)[None, :]
            mask = is_head & (cols < HALF)
            a = tl.load(x_ptr + at + cols, mask=mask, other=0.0)
            b = tl.load(x_ptr + at + (HALF + cols), mask=mask, other=0.0)
        if H == 2 * HALF:
            rest = a
    else:
        a = rest
        b = rest
    return a, b, rest


@triton.jit
def store_part(x_ptr, at, mask, part):
    """One part to addresses x_ptr + at, rounded to what is stored there (bytes: e4m3)."""
    if x_ptr.dtype.element_ty == tl.uint8:
        tl.store(x_ptr + at, to_e4m3(part), mask=mask)
    else:
        tl.store(x_ptr + at, part.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_parts(
    x_ptr, at, is_head, a, b, rest, H: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """The inverse of `load_parts`."""
    PAIRS: tl.constexpr = triton.next_power_of_2(HALF if HALF > 0 else 1)
    REST: tl.constexpr = triton.next_power_of_2(H - 2 * HALF if H > 2 * HALF else 1)
    if H > 2 * HALF:
        cols = tl.arange(0, REST)[None, :]
        store_part(x_ptr, at + (2 * HALF + cols), is_head & (cols < H - 2 * HALF), rest)
    if HALF > 0:
        if INTERLEAVED:
            cols = tl.arange(0, 2 * PAIRS)[None, :]
            both = tl.reshape(tl.join(a, b), [a.shape[0], 2 * PAIRS])
            store_part(x_ptr, at + cols, is_head & (cols < 2 * HALF), both)
        else:
            cols = tl.arange(0, PAIRS)[None, :]
            mask = is_head & (cols < HALF)
            store_part(x_ptr, at + cols, mask, a)
            store_part(x_ptr, at + (HALF + cols), mask, b)


@triton.jit
def prepare(
    a,
    b,
    rest,
    cos,
    sin,
    weight_ptr,  # [H] or None
    eps,
    OFFSET: tl.constexpr,
    H: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Heads as float32 parts, normalised if there are weights, then rotated."""
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    rest = rest.to(tl.float32)
    if weight_ptr is not None:
        at = tl.zeros([1, 1], tl.int32)
        w_a, w_b, w_rest = load_parts(weight_ptr, at, at == 0, H, HALF, INTERLEAVED)
        if H == 2 * HALF:
            total = tl.sum(tl.fma(a, a, b * b), axis=1)
        elif HALF == 0:
            total = tl.sum(rest * rest, axis=1)
        else:
            total = tl.sum(tl.fma(a, a, b * b), axis=1) + tl.sum(rest * rest, axis=1)
        factor = tl.div_rn(1.0, tl.sqrt_rn(total * (1.0 / H) + eps))[:, None]
        a = a * factor * (w_a.to(tl.float32) + OFFSET)
        b = b * factor * (w_b.to(tl.float32) + OFFSET)
        rest = rest * factor * (w_rest.to(tl.float32) + OFFSET)
    if HALF > 0:
        turned = tl.fma(a, cos, -(b * sin))
        b = tl.fma(b, cos, a * sin)
        a = turned
    return a, b, rest


@jit
def rotate_and_write(
    qkv_ptr,  # [T, (N + 2 K) H], rows [q heads | k heads | v heads]
    q_out_ptr,  # [T, N, H], or None: q is overwritten
    positions,  # [T] integers; not "_ptr": their alignment decides nothing
    cos_ptr,  # [P, HALF] float32, or None if HALF is 0
    sin_ptr,  # [P, HALF] float32, or None if HALF is 0
    slots,  # [T] integers, or None without a cache
    k_cache_ptr,  # [B, K, BLOCK, H], e4m3 as bytes; or None
    v_cache_ptr,  # [B, K, BLOCK, H], e4m3 as bytes; or None
    q_norm_ptr,  # [H] or None
    k_norm_ptr,  # [H] or None
    k_scale_ptr,  # [K] float32 for an e4m3 cache, or None
    v_scale_ptr,  # [K] float32 for an e4m3 cache, or None
    row_steps,  # qkv's row length / STEP; not the length, so that STEP = 1 tells nothing of rows
    num_positions,  # P
    num_slots,  # B * BLOCK
    eps,
    SIZES: tl.constexpr,  # N, K, H, HALF = R / 2, BLOCK
    KV_HEADS: tl.constexpr,
    STEP: tl.constexpr,
    OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    K_IN_PLACE: tl.constexpr,
    PDL: tl.constexpr,
):
    # grid: (T * cdiv(K, KV_HEADS),); one program takes KV_HEADS kv heads of one token, and their q
    N: tl.constexpr = SIZES[0]
    K: tl.constexpr = SIZES[1]
    H: tl.constexpr = SIZES[2]
    HALF: tl.constexpr = SIZES[3]
    BLOCK: tl.constexpr = SIZES[4]
    Q_HEADS: tl.constexpr = N // K * KV_HEADS
    PARTS: tl.constexpr = (K + KV_HEADS - 1) // KV_HEADS
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    program = tl.program_id(0)
    token = (program // PARTS).to(tl.int64)
    part = program % PARTS
    index = tl.arange(0, triton.next_power_of_2(Q_HEADS))[:, None]
    q_head = part * Q_HEADS + index
    is_q = (index < Q_HEADS) & (q_head < N)
    index = tl.arange(0, triton.next_power_of_2(KV_HEADS))[:, None]
    kv_head = part * KV_HEADS + index
    is_kv = (index < KV_HEADS) & (kv_head < K)
    cols = tl.arange(0, triton.next_power_of_2(H))[None, :]

    # All loads before the first store: no store can hold up a load.
    row = token * row_steps * STEP
    q_at = row + q_head * H
    k_at = row + (N + kv_head) * H
    v_at = row + (N + K + kv_head) * H
    q_a, q_b, q_rest = load_parts(qkv_ptr, q_at, is_q, H, HALF, INTERLEAVED)
    k_a, k_b, k_rest = load_parts(qkv_ptr, k_at, is_kv, H, HALF, INTERLEAVED)
    if k_cache_ptr is not None:
        v = tl.load(qkv_ptr + v_at + cols, mask=is_kv & (cols < H), other=0.0)
        slot = tl.load(slots + token).to(tl.int64)
    cos = 1.0
    sin = 0.0
    if HALF > 0:
        position = tl.load(positions + token).to(tl.int64)
        position = tl.minimum(tl.maximum(position, 0), num_positions - 1)
        pair = tl.arange(0, triton.next_power_of_2(HALF))[None, :]
        cos = tl.load(cos_ptr + position * HALF + pair, mask=pair < HALF, other=0.0)
        sin = tl.load(sin_ptr + position * HALF + pair, mask=pair < HALF, other=0.0)

    q_a, q_b, q_rest = prepare(
        q_a, q_b, q_rest, cos, sin, q_norm_ptr, eps, OFFSET, H, HALF, INTERLEAVED
    )
    k_a, k_b, k_rest = prepare(
        k_a, k_b, k_rest, cos, sin, k_norm_ptr, eps, OFFSET, H, HALF, INTERLEAVED
    )
    if q_out_ptr is None:
        store_parts(qkv_ptr, q_at, is_q, q_a, q_b, q_rest, H, HALF, INTERLEAVED)
    else:
        q_at = (token * N + q_head) * H
        store_parts(q_out_ptr, q_at, is_q, q_a, q_b, q_rest, H, HALF, INTERLEAVED)
    if K_IN_PLACE:
        store_parts(qkv_ptr, k_at, is_kv, k_a, k_b, k_rest, H, HALF, INTERLEAVED)
    if k_cache_ptr is not None:
        if k_scale_ptr is not None:
            k_scale = tl.load(k_scale_ptr + kv_head, mask=is_kv, other=1.0)
            v_scale = tl.load(v_scale_ptr + kv_head, mask=is_kv, other=1.0)
            k_a = tl.div_rn(k_a, k_scale)
            k_b = tl.div_rn(k_b, k_scale)
            k_rest = tl.div_rn(k_rest, k_scale)
            v = tl.div_rn(v.to(tl.float32), v_scale)
        elif v_cache_ptr.dtype.element_ty == tl.uint8:
            v = v.to(tl.float32)
        if (slot >= 0) & (slot < num_slots):
            at = ((slot // BLOCK * K + kv_head) * BLOCK + slot % BLOCK) * H
            store_parts(k_cache_ptr, at, is_kv, k_a, k_b, k_rest, H, HALF, INTERLEAVED)
            store_part(v_cache_ptr, at + cols, is_kv & (cols < H), v)
