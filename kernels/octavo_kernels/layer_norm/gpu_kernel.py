"""Layer normalisation of rows on a GPU. Knows nothing of what a row means."""

from __future__ import annotations

import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo_kernels.launch import jit


@jit
def layer_norm_rows(
    x_ptr,  # [T, D]
    weight_ptr,  # [D]
    bias_ptr,  # [D] or None
    residual_ptr,  # [T, D], becomes residual + x; or None
    out_ptr,  # [T, D], may be x
    num_rows,
    row_steps,  # D / STEP; not D, so that STEP = 1 tells nothing of where rows start
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    PDL: tl.constexpr,
):
    # grid: (cdiv(T, ROWS),); one program normalises ROWS rows
    cols = tl.arange(0, BLOCK_D)
    is_col = cols < D
    weight = tl.load(weight_ptr + cols, mask=is_col, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=is_col, other=0.0)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = (rows.to(tl.int64) * row_steps * STEP)[:, None] + cols[None, :]
    mask = (rows < num_rows)[:, None] & is_col[None, :]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    if residual_ptr is not None:
        total = x.to(tl.float32) + tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = total.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + at, x, mask=mask)
    x = x.to(tl.float32)
    mean = tl.sum(x, axis=1) * (1.0 / D)
    # From the differences, not from the squares' sum: no cancellation where the mean is large.
    x = tl.where(is_col[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(x * x, axis=1) * (1.0 / D)
    factor = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    y = x * factor[:, None] * weight.to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += bias.to(tl.float32)[None, :]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)
