"""The embedding gather's host side: checks and one launch. Knows shapes, not models."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo_kernels.embedding.gpu_kernel import embedding_kernel
from octavo_kernels.launch import launch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BLOCK = 1024


def embedding(
    ids: Tensor,
    weight: Tensor,
    *,
    scale: float | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows ids [T] (int32 or int64) of weight [V, D] -> [T, D], exactly, in weight's dtype.

    With scale the product is float32, rounded once to the output's dtype (`out` or `out_dtype`).
    Ids are not checked, which would need the GPU's answer: one out of range takes the first or
    the last row. Raises ValueError for other shapes, dtypes or strides.
    """
    if ids.dim() != 1 or ids.dtype not in (torch.int32, torch.int64) or not ids.is_contiguous():
        raise _refusal("ids", ids, "contiguous [T] of int32 or int64")
    if weight.dim() != 2 or weight.dtype not in DTYPES or not weight.is_contiguous():
        raise _refusal("weight", weight, f"contiguous [V, D] of {DTYPES}")
    num_tokens = ids.shape[0]
    vocabulary, dim = weight.shape
    if not vocabulary or not dim:
        raise _refusal("weight", weight, "at least one row and one column")
    if out is None:
        out = torch.empty((num_tokens, dim), dtype=out_dtype or weight.dtype, device=ids.device)
    if out.shape != (num_tokens, dim) or out.dtype not in DTYPES or not out.is_contiguous():
        raise _refusal("out", out, f"contiguous [{num_tokens}, {dim}] of {DTYPES}")
    if out_dtype not in (None, out.dtype):
        raise ValueError(f"embedding was given out of {out.dtype} and out_dtype {out_dtype}")
    launch(
        embedding_kernel,
        (num_tokens, -(-dim // _BLOCK)),
        ids,
        weight,
        out,
        1.0 if scale is None else float(scale),
        V=vocabulary,
        D=dim,
        BLOCK=_BLOCK,
        HAS_SCALE=scale is not None,
        num_warps=4,
    )
    return out


def _refusal(name: str, tensor: Tensor, need: str) -> ValueError:
    return ValueError(
        f"embedding needs {name} {need}, got {tensor.dtype} {list(tensor.shape)} with strides"
        f" {tensor.stride()}"
    )
