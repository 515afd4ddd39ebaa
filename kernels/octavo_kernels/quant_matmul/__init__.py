"""Matmul over weights of 8 and 4 bits; knows no layer, no model and no checkpoint.

Four formats: e4m3 with a scale per output channel or per block of 128 x 128, int8 per channel, and
4-bit groups with or without zero points. These have GPU kernels only; the CPU's weights, in panels,
and their ops are in `quant_matmul.blocks`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo_kernels.op import require_device
from octavo_kernels.quant_matmul.weight import (
    Kind,
    QuantActivations,
    QuantWeight,
    pack_codes,
    pack_fp8,
    pack_fp8_blocks,
    pack_int4,
    pack_int8,
)

__all__ = [
    "QuantActivations",
    "QuantWeight",
    "pack_codes",
    "pack_fp8",
    "pack_fp8_blocks",
    "pack_int4",
    "pack_int8",
    "quant_matmul",
    "quantise",
]


def quant_matmul(
    x: Tensor | QuantActivations,
    weight: QuantWeight,
    *,
    quantise_activations: bool = False,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [T, K] @ W[N, K]^T (+ bias) (+ residual) -> [T, N]; see `gpu.quant_matmul`."""
    require_device("quant_matmul", weight.data, have=("cuda",))
    from octavo_kernels.quant_matmul import gpu  # a CPU-only install has no triton

    return gpu.quant_matmul(
        x,
        weight,
        quantise_activations=quantise_activations,
        bias=bias,
        residual=residual,
        out=out,
        out_dtype=out_dtype,
    )


def quantise(x: Tensor, kind: Kind, *, grouped: bool = False) -> QuantActivations:
    """Activations [T, K] to 8-bit codes for several `quant_matmul`; see `gpu.quantise`."""
    require_device("quantise", x, have=("cuda",))
    from octavo_kernels.quant_matmul import gpu  # a CPU-only install has no triton

    return gpu.quantise(x, kind, grouped=grouped)
