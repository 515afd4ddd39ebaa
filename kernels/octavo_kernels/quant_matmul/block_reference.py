"""The CPU's matmul over blocks in plain torch, from its definition; knows nothing of panels."""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST = 2.0**-119  # a block of smaller magnitudes is zero


def quantised_rows(x: Tensor, *, block: int) -> tuple[Tensor, Tensor]:
    """Codes [T, B, block] and scales [T, B, 1] of x [T, K], float64; the most is 127."""
    wide = torch.nn.functional.pad(x.to(torch.float32), (0, -x.shape[1] % block))
    parts = wide.view(x.shape[0], wide.shape[1] // block, block)
    amax = parts.abs().amax(2, keepdim=True)
    is_live = amax >= _SMALLEST
    codes = torch.where(is_live, (parts * (127.0 / amax)).round(), 0.0)
    scale = torch.where(is_live, amax / 127.0, 0.0)
    return codes.double(), scale.double()


def matmul_blocks_reference(
    x: Tensor,
    weight: Tensor,
    *,
    block: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x [T, K], quantised in blocks, times the dequantised weight [N, K]: float64."""
    codes, scale = quantised_rows(x, block=block)
    rounded = (codes * scale).flatten(1)[:, : x.shape[1]]
    out = rounded @ weight.double().t()
    if bias is not None:
        out = out + bias
    return out if residual is None else out + residual


def gated_blocks_reference(
    x: Tensor, weight: Tensor, *, block: int, is_gelu: bool = False
) -> Tensor:
    """silu (or the tanh form of gelu) of the first half of the outputs times the second half."""
    gate, up = matmul_blocks_reference(x, weight, block=block).chunk(2, dim=1)
    functional = torch.nn.functional
    return (functional.gelu(gate, approximate="tanh") if is_gelu else functional.silu(gate)) * up
