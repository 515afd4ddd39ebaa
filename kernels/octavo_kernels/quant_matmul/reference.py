"""Quantised matmul in plain torch, from the definition of the codes; knows nothing of words."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo_kernels.quant_matmul.weight import QuantWeight

# Value of every e4m3 code: sign, 4 bits of exponent (bias 7), 3 of mantissa, no infinity.
_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


def dequantise(weight: QuantWeight) -> Tensor:
    """The weight the codes stand for, [N, K] float64."""
    groups, n, width = weight.data.shape
    words = weight.data.view(groups, n, width // 2, 2).long()
    words = words[..., 0] + 256 * words[..., 1]
    bits = 4 if weight.kind == "int4" else 8
    planes = [words >> shift & (1 << bits) - 1 for shift in range(0, 16, bits)]
    codes = torch.cat(planes, 2).transpose(0, 1).reshape(n, -1)[:, : weight.k]
    if weight.kind == "fp8":
        values = _E4M3.to(codes.device)[codes]
    elif weight.kind == "int8":
        values = ((codes + 128) % 256 - 128).double()
    else:
        values = codes.double() - 8
    scale = weight.scale
    if weight.paired is not None:
        halves = weight.scale.view(torch.int16).view(*weight.scale.shape, 2)
        values += 8 - _spread(weight, halves[..., 0], 1)
        scale = halves[..., 1].contiguous().view(weight.paired)
    return values * _spread(weight, scale, weight.rows)


def _spread(weight: QuantWeight, table: Tensor, rows: int) -> Tensor:
    wide = table.double().t().repeat_interleave(weight.group, 1)[:, : weight.k]
    return wide.repeat_interleave(rows, 0)[: weight.n]


def quantise_reference(x: Tensor, kind: str, *, grouped: bool = False) -> tuple[Tensor, Tensor]:
    """Codes of x [T, K] as values [T, K] and scales [T, K], float64; one scale a row or 128 k."""
    wide = x.float()
    num_rows, k = wide.shape
    size = 128 if grouped else max(k, 1)
    parts = torch.nn.functional.pad(wide, (0, -k % size)).view(num_rows, -(-k // size), size)
    top = 448.0 if kind == "fp8" else 127.0
    biggest = parts.abs().amax(2, keepdim=True)
    # Not "/ top": on a GPU torch then multiplies by the rounded reciprocal.
    scale = biggest / torch.full_like(biggest, top)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    exact = parts / scale
    if kind == "fp8":
        codes = exact.clamp(-448, 448).to(torch.float8_e4m3fn).double()
    else:
        codes = exact.round().double()
    spread = scale.double().expand(parts.shape)
    return codes.flatten(1)[:, :k], spread.flatten(1)[:, :k]


def quant_matmul_reference(
    x: Tensor,
    weight: QuantWeight,
    *,
    quantise_activations: bool = False,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """See `quant_matmul`; float64 throughout (activations are quantised in float32)."""
    wide = x.double()
    if quantise_activations:
        codes, scale = quantise_reference(x, weight.kind, grouped=weight.is_grouped)
        wide = codes * scale
    out = wide @ dequantise(weight).t()
    if bias is not None:
        out = out + bias
    return out if residual is None else out + residual
