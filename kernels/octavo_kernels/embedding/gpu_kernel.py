"""Copies rows of a matrix by id in Triton; knows no token."""

import triton.language as tl

from octavo_kernels.launch import jit


@jit
def embedding_kernel(
    ids_ptr,  # [T] int32 or int64
    weight_ptr,  # [V, D]
    out_ptr,  # [T, D]
    scale,
    V: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """out[t] = round(weight[ids[t]] * scale); an id out of range takes the nearest row."""
    # Grid (T, column blocks): BLOCK columns of one row per program.
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < D
    row = tl.load(ids_ptr + token).to(tl.int64)
    row = tl.minimum(tl.maximum(row, 0), V - 1)
    value = tl.load(weight_ptr + row * D + columns, mask=mask)
    if HAS_SCALE:
        value = value.to(tl.float32) * scale
    tl.store(out_ptr + token * D + columns, value.to(out_ptr.dtype.element_ty), mask=mask)
