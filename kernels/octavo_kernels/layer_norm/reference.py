"""Layer normalisation in plain torch, in the dtype it is given. Knows nothing of tiles."""

from __future__ import annotations

from torch import Tensor


def layer_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    residual: Tensor | None = None,
) -> Tensor:
    """See `layer_norm`; adds x into residual in place where one is given."""
    if residual is not None:
        x = residual.add_(x)
    centred = x - x.mean(dim=-1, keepdim=True)
    y = centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight
    return y if bias is None else y + bias
