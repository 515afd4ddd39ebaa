"""QK-norm, rotary embedding and cache write, token by token. Knows addresses, not requests."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from octavo_kernels.paged_attention.int8_tiles import SCALE_BYTES, cache_codes
from octavo_kernels.parallel import device, kernel
from octavo_kernels.rms_norm.cpu import inverse_rms
from octavo_kernels.simd import (
    LANES,
    copy_bytes,
    first_lanes,
    fma,
    get_f32,
    get_i32,
    get_i64,
    load_f32,
    load_f32_masked,
    mul,
    put_bf16,
    put_f16,
    put_f32,
    put_i64,
    splat,
    store_bf16,
    store_f16,
    store_f32,
    store_f32_masked,
)

OK, BAD_POSITION, BAD_SLOT = range(3)
_FLOAT32, _BFLOAT16, _FLOAT16, _INT8 = range(4)


@device
def _norm_head(x, weight, dim, eps):
    """RMS norm of one head in place; dim is a multiple of 16."""
    total = splat(np.float32(0.0))
    for i in range(0, dim, LANES):
        value = load_f32(x + 4 * i)
        total = fma(value, value, total)
    factor = splat(inverse_rms(total, dim, eps))
    for i in range(0, dim, LANES):
        scaled = mul(load_f32(x + 4 * i), factor)
        store_f32(x + 4 * i, mul(scaled, load_f32(weight + 4 * i)))


@device
def _rotate_head(x, cos, sin, half):
    """Rotate the pairs (x[i], x[half + i]) of one head in place."""
    i = 0
    while i < half:
        mask = first_lanes(half - i)
        at, other = x + 4 * i, x + 4 * (half + i)
        c, s = load_f32_masked(cos + 4 * i, mask), load_f32_masked(sin + 4 * i, mask)
        a, b = load_f32_masked(at, mask), load_f32_masked(other, mask)
        minus_s = mul(s, splat(np.float32(-1.0)))
        store_f32_masked(at, fma(a, c, mul(b, minus_s)), mask)
        store_f32_masked(other, fma(b, c, mul(a, s)), mask)
        i += LANES


@device
def _get_index(address, i, itemsize):
    return get_i64(address + 8 * i) if itemsize == 8 else get_i32(address + 4 * i)


@device
def _write_head(kind, k, v, k_target, v_target, dim, block_size):
    """Store one head's key down a column of its block and its value as a row."""
    itemsize = 4 if kind == _FLOAT32 else 2
    stride = block_size * itemsize
    for h in range(dim):
        value = get_f32(k + 4 * h)
        if kind == _FLOAT32:
            put_f32(k_target + h * stride, value)
        elif kind == _BFLOAT16:
            put_bf16(k_target + h * stride, value)
        else:
            put_f16(k_target + h * stride, value)
    for h in range(0, dim, LANES):
        lanes = load_f32(v + 4 * h)
        if kind == _FLOAT32:
            store_f32(v_target + h * itemsize, lanes)
        elif kind == _BFLOAT16:
            store_bf16(v_target + h * itemsize, lanes)
        else:
            store_f16(v_target + h * itemsize, lanes)


@device
def _write_codes(k, v, k_target, v_target, dim, offset):
    """Store one head's key and value as codes, which overwrite k and v, and their scales.

    The targets are those of 16 neighbouring tokens of which this one is number `offset`.
    """
    put_f32(k_target + LANES * dim + 4 * offset, cache_codes(k, dim, k))
    put_f32(v_target + LANES * dim + 4 * offset, cache_codes(v, dim, v))
    for i in range(0, dim, 2):
        copy_bytes(k_target + LANES * i + 2 * offset, k + i, 2)
    v_target += offset // 2 * 2 * dim + offset % 2
    for i in range(dim):
        copy_bytes(v_target + 2 * i, v + i, 1)


@kernel
def rotate_and_write(
    part,
    num_parts,
    kind,
    qkv,
    num_tokens,
    num_heads,
    num_kv_heads,
    dim,
    positions,
    position_bytes,
    cos,
    sin,
    half,
    num_positions,
    slots,
    slot_bytes,
    k_cache,
    v_cache,
    block_size,
    num_blocks,
    q_norm,
    k_norm,
    status,
    eps: float,
):
    """kind: cache storage; q_norm, k_norm: address of [dim] weights or 0; status: one int64."""
    itemsize = 4 if kind == _FLOAT32 else 2
    value_bytes = dim + SCALE_BYTES if kind == _INT8 else dim * itemsize
    row_bytes = 4 * dim * (num_heads + 2 * num_kv_heads)
    for token in range(part * num_tokens // num_parts, (part + 1) * num_tokens // num_parts):
        position = _get_index(positions, token, position_bytes)
        slot = _get_index(slots, token, slot_bytes)
        if position < 0 or position >= num_positions:
            put_i64(status, BAD_POSITION)
            continue
        if slot >= num_blocks * block_size:
            put_i64(status, BAD_SLOT)
            continue
        row = qkv + token * row_bytes
        table = 4 * half * position
        for head in range(num_heads + num_kv_heads):
            x = row + 4 * dim * head
            weight = q_norm if head < num_heads else k_norm
            if weight != 0:
                _norm_head(x, weight, dim, eps)
            _rotate_head(x, cos + table, sin + table, half)
        if slot < 0:
            continue
        block, offset = slot // block_size, slot % block_size
        for head in range(num_kv_heads):
            k = row + 4 * dim * (num_heads + head)
            v = k + 4 * dim * num_kv_heads
            place = (block * num_kv_heads + head) * block_size * value_bytes
            if kind == _INT8:
                within = offset % LANES
                place += (offset - within) * value_bytes
                _write_codes(k, v, k_cache + place, v_cache + place, dim, within)
            else:
                at, other = place + offset * itemsize, place + offset * value_bytes
                _write_head(kind, k, v, k_cache + at, v_cache + other, dim, block_size)
