"""RMS normalisation in plain torch, in the dtype it is given. Knows nothing of vectors."""

from __future__ import annotations

from torch import Tensor


def rms_norm_reference(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor:
    """See `rms_norm`; adds x into residual in place where one is given."""
    if residual is not None:
        x = residual.add_(x)
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * (weight + weight_offset)
