"""Gated activations over rows at addresses. Know nothing of layers."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from octavo_kernels.parallel import device, kernel
from octavo_kernels.simd import (
    LANES,
    add,
    div,
    exp,
    first_lanes,
    fma,
    load_f32,
    load_f32_masked,
    mul,
    splat,
    store_f32,
    store_f32_masked,
)


@device
def _gate(value, exponent, up):
    """value / (1 + exp(exponent)) * up."""
    return mul(div(value, add(splat(np.float32(1.0)), exp(exponent))), up)


@device
def gate_silu(gate, up):
    return _gate(gate, mul(gate, splat(np.float32(-1.0))), up)


@device
def gate_gelu(gate, up):
    # 0.5 * (1 + tanh(u)) = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) * (gate + 0.044715 * gate**3)
    square = mul(gate, gate)
    cubic = fma(
        square, splat(np.float32(-0.07135481627159736)), splat(np.float32(-1.5957691216057308))
    )
    return _gate(gate, mul(gate, cubic), up)


@device
def _rows(part, num_parts, x, out, num_rows, width, is_gelu):
    for row in range(part * num_rows // num_parts, (part + 1) * num_rows // num_parts):
        gate_at, out_at = x + 8 * row * width, out + 4 * row * width
        up_at = gate_at + 4 * width
        i = 0
        while i < 4 * width:
            mask = first_lanes(width - i // 4)
            is_whole = i // 4 + LANES <= width
            if is_whole:
                gate, up = load_f32(gate_at + i), load_f32(up_at + i)
            else:
                gate, up = load_f32_masked(gate_at + i, mask), load_f32_masked(up_at + i, mask)
            value = gate_gelu(gate, up) if is_gelu else gate_silu(gate, up)
            if is_whole:
                store_f32(out_at + i, value)
            else:
                store_f32_masked(out_at + i, value, mask)
            i += 4 * LANES


@kernel
def silu_rows(part, num_parts, x, out, num_rows, width):
    """x [num_rows, 2 * width] -> out [num_rows, width]."""
    _rows(part, num_parts, x, out, num_rows, width, False)


@kernel
def gelu_rows(part, num_parts, x, out, num_rows, width):
    """x [num_rows, 2 * width] -> out [num_rows, width]."""
    _rows(part, num_parts, x, out, num_rows, width, True)
