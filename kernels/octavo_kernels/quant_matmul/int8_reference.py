"""The CPU's int8 matmul in plain torch, from its definition; knows nothing of panels."""

from __future__ import annotations

import torch
from torch import Tensor


def quantise_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [T, K] and scales [T, 1] of x [T, K], float64: the largest magnitude is 127."""
    wide = x.to(torch.float32)
    if not wide.numel():
        return wide.double(), wide.new_ones(wide.shape[0], 1).double()
    scale = wide.abs().amax(1, keepdim=True) / torch.full((wide.shape[0], 1), 127.0)
    scale = scale.clamp(min=1e-36)
    codes = (wide * (torch.ones_like(scale) / scale)).round()
    return codes.double(), scale.double()


def matmul_int8_reference(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x [T, K] times the weight codes [N, K] * scale [N], float64; x quantised per token."""
    mine, row_scale = quantise_tokens(x)
    out = mine @ codes.double().t() * row_scale * scale.double()
    if bias is not None:
        out = out + bias
    return out if residual is None else out + residual


def gated_int8_reference(
    x: Tensor, codes: Tensor, scale: Tensor, *, is_gelu: bool = False
) -> Tensor:
    """silu (or the tanh form of gelu) of the first half of the outputs times the second half."""
    gate, up = matmul_int8_reference(x, codes, scale).chunk(2, dim=1)
    functional = torch.nn.functional
    return (functional.gelu(gate, approximate="tanh") if is_gelu else functional.silu(gate)) * up
