"""Gated activations of packed rows on a GPU. Know nothing of layers."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo_kernels.launch import jit


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):
    """The activation of float32 gates by its name."""
    if ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) * (gate + 0.044715 * gate**3)
        exponent = gate * tl.fma(gate * gate, -0.07135481627159736, -1.5957691216057308)
    else:
        exponent = -gate
    # bounded so that the exponential stays finite: the result is 0 to float32 there
    return gate / (1.0 + tl.exp(tl.minimum(exponent, 88.0)))


@jit
def gate_mul_rows(
    x_ptr,  # [T, 2 F], rows [gate | up]
    out_ptr,  # [T, F]
    ACTIVATION: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    # grid: (T * cdiv(F, BLOCK),); one program computes BLOCK elements of one row
    PARTS: tl.constexpr = (F + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = (program // PARTS).to(tl.int64)
    cols = program % PARTS * BLOCK + tl.arange(0, BLOCK)
    mask = cols < F
    at = x_ptr + row * (2 * F) + cols
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)
    y = activate(gate, ACTIVATION) * up
    tl.store(out_ptr + row * F + cols, y.to(out_ptr.dtype.element_ty), mask=mask)
