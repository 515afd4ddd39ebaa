"""Rows of an embedding matrix by token id, on the GPU; the CPU's are in matmul.gather_rows."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo_kernels.op import no_kernel

__all__ = ["embedding"]


def embedding(
    ids: Tensor,
    weight: Tensor,
    *,
    scale: float | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows ids [T] of weight [V, D], times scale: [T, D]. See `gpu.embedding`."""
    if ids.is_cuda:
        from octavo_kernels.embedding import gpu  # a CPU-only install has no triton

        return gpu.embedding(ids, weight, scale=scale, out=out, out_dtype=out_dtype)
    raise no_kernel("embedding", ids, have=("cuda",))
