"""A small kernel for the tests of launching, compiling and tuning."""

import triton
import triton.language as tl

from octavo_kernels.launch import jit


@jit
def scale_rows(
    x_ptr,  # [T, D]
    out_ptr,  # [T, D]
    num_rows,
    factor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr = 0,
):
    # grid: (T,)
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    if row < num_rows:
        keep = columns < D
        x = tl.load(x_ptr + row * D + columns, mask=keep, other=0.0)
        tl.store(out_ptr + row * D + columns, _scaled(x, factor) + ADD, mask=keep)


@triton.jit
def _scaled(x, factor):
    return x * factor
