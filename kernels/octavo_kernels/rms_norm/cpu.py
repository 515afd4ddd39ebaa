"""RMS normalisation of rows at addresses. Knows nothing of what a row means."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from octavo_kernels.parallel import device, kernel
from octavo_kernels.simd import (
    LANES,
    add,
    div,
    first_lanes,
    fma,
    lane,
    load_f32,
    load_f32_masked,
    mul,
    reduce_add,
    splat,
    sqrt,
    store_f32,
    store_f32_masked,
)


@device
def inverse_rms(total, count, eps):
    """1 / sqrt(total / count + eps) as a float32; total is a vector of lane sums."""
    mean = np.float32(reduce_add(total) / np.float32(count))
    return lane(div(splat(np.float32(1.0)), sqrt(splat(np.float32(mean + np.float32(eps))))), 0)


@device
def sum_squares(x, residual, dim):
    """Lane sums of one row's squares, always the same 4 chains; with residual, residual += x."""
    s0 = splat(np.float32(0.0))
    s1, s2, s3 = s0, s0, s0
    i = 0
    while i + 4 * LANES <= dim:
        at = 4 * i
        a, b = load_f32(x + at), load_f32(x + at + 64)
        c, d = load_f32(x + at + 128), load_f32(x + at + 192)
        if residual != 0:
            a, b = add(load_f32(residual + at), a), add(load_f32(residual + at + 64), b)
            c, d = add(load_f32(residual + at + 128), c), add(load_f32(residual + at + 192), d)
            store_f32(residual + at, a)
            store_f32(residual + at + 64, b)
            store_f32(residual + at + 128, c)
            store_f32(residual + at + 192, d)
        s0, s1, s2, s3 = fma(a, a, s0), fma(b, b, s1), fma(c, c, s2), fma(d, d, s3)
        i += 4 * LANES
    while i < dim:
        mask = first_lanes(dim - i)
        a = load_f32_masked(x + 4 * i, mask)
        if residual != 0:
            a = add(load_f32_masked(residual + 4 * i, mask), a)
            store_f32_masked(residual + 4 * i, a, mask)
        s0 = fma(a, a, s0)
        i += LANES
    return add(add(s0, s1), add(s2, s3))


@kernel
def normalise(part, num_parts, x, residual, weight, out, num_rows, dim, eps: float):
    """Rows [num_rows, dim]; residual is 0 or an address that takes residual + x before the norm."""
    for row in range(part * num_rows // num_parts, (part + 1) * num_rows // num_parts):
        shift = 4 * row * dim
        source = x + shift
        other = residual + shift if residual != 0 else 0
        total = sum_squares(source, other, dim)
        factor = splat(inverse_rms(total, dim, eps))
        if residual != 0:
            source = other
        i = 0
        while i + LANES <= dim:
            scaled = mul(load_f32(source + 4 * i), factor)
            store_f32(out + shift + 4 * i, mul(scaled, load_f32(weight + 4 * i)))
            i += LANES
        if i < dim:
            mask = first_lanes(dim - i)
            scaled = mul(load_f32_masked(source + 4 * i, mask), factor)
            value = mul(scaled, load_f32_masked(weight + 4 * i, mask))
            store_f32_masked(out + shift + 4 * i, value, mask)
