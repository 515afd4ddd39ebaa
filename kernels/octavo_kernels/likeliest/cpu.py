"""Greatest value, its place and the softmax's sum of rows, in vectors. Knows one row's numbers."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from octavo_kernels.parallel import device, kernel
from octavo_kernels.simd import (
    LANES,
    add,
    exp_flushed,
    first_lanes,
    fma,
    get_f32,
    load_f32,
    load_f32_masked,
    maximum,
    put_f32,
    put_i32,
    reduce_add,
    reduce_max,
    select,
    splat,
    sub,
)

_BYTES = 4 * LANES


@device
def _load(row, column, width):
    """Lanes of a row from a column on; behind its end they are -inf."""
    left = width - column
    if left >= LANES:
        return load_f32(row + 4 * column)
    mask = first_lanes(left)
    return select(mask, load_f32_masked(row + 4 * column, mask), splat(np.float32(-np.inf)))


@device
def _is_finite(row, width):
    zero = splat(np.float32(0.0))
    total = zero
    for column in range(0, width - LANES + 1, LANES):
        total = fma(load_f32(row + 4 * column), zero, total)
    start = width // LANES * LANES
    total = fma(load_f32_masked(row + 4 * start, first_lanes(width - start)), zero, total)
    return reduce_add(total) == np.float32(0.0)


@device
def likeliest_row(at, width):
    """(column, its softmax) of a row; (0, NaN) where a value is not finite."""
    if not _is_finite(at, width):
        return 0, np.float32(np.nan)
    best = splat(np.float32(-np.inf))
    for column in range(0, width, LANES):
        best = maximum(_load(at, column, width), best)
    peak = reduce_max(best)
    total = splat(np.float32(0.0))
    for column in range(0, width, LANES):
        total = add(total, exp_flushed(sub(_load(at, column, width), splat(peak))))
    column = 0
    while reduce_max(_load(at, column, width)) != peak:
        column += LANES
    while get_f32(at + 4 * column) != peak:
        column += 1
    return column, np.float32(1.0) / reduce_add(total)


@kernel
def likeliest_rows(part, num_parts, logits, num_rows, width, places, probs):
    """Parts share the rows."""
    for row in range(part * num_rows // num_parts, (part + 1) * num_rows // num_parts):
        column, prob = likeliest_row(logits + 4 * row * width, width)
        put_i32(places + 4 * row, column)
        put_f32(probs + 4 * row, prob)
