"""What embedding means, in plain torch."""

from __future__ import annotations

from torch import Tensor


def embedding_reference(ids: Tensor, weight: Tensor, *, scale: float | None = None) -> Tensor:
    """Rows ids [T] of weight [V, D], ids clamped into range, times scale: [T, D]."""
    rows = weight[ids.long().clamp(0, weight.shape[0] - 1)]
    return rows if scale is None else rows * scale
