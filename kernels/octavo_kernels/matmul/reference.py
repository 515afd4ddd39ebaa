"""What matmul and gather_rows mean, in plain torch; knows nothing of panels."""

from __future__ import annotations

from torch import Tensor


def matmul_reference(
    x: Tensor, weight: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """x [T, K] times weight [N, K] transposed, plus bias [N], plus residual [T, N]: [T, N]."""
    result = x @ weight.to(x.dtype).T
    if bias is not None:
        result = result + bias
    return result if residual is None else result + residual


def gather_rows_reference(weight: Tensor, ids: Tensor) -> Tensor:
    """Rows ids [T] of weight [N, K]: [T, K]."""
    return weight[ids.long()]
