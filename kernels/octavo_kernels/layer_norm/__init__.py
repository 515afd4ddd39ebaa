"""Layer normalisation of rows, with an optional residual; GPU only. Knows shapes, not models."""

from __future__ import annotations

from torch import Tensor

from octavo_kernels.layer_norm.reference import layer_norm_reference
from octavo_kernels.op import require_device

__all__ = ["layer_norm", "layer_norm_reference"]


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `octavo_kernels.layer_norm.gpu.layer_norm`. Raises ValueError on any other device."""
    require_device("layer_norm", x, have=("cuda",))
    from octavo_kernels.layer_norm import gpu  # here: an installation for the CPU has no Triton

    return gpu.layer_norm(x, weight, bias, eps=eps, residual=residual, out=out)
