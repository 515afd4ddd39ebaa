"""Gated activations of packed rows on a GPU. Know shapes and launches, not models."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo_kernels.launch import launch
from octavo_kernels.silu_mul.gpu_kernel import gate_mul_rows
from octavo_kernels.tuning import Choice, choose

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def silu_mul(x: Tensor, *, out: Tensor | None = None, use_pdl: bool = False) -> Tensor:
    """silu(x[:, :F]) * x[:, F:] with silu(g) = g / (1 + exp(-g)); [T, 2F] -> [T, F].

    float32, bfloat16 or float16, computed in float32 and rounded once. use_pdl (GPU only): starts
    while the kernel before it in the stream still runs.
    Raises ValueError for other shapes, dtypes or strides.
    """
    return _run("silu_mul", "silu", x, out, use_pdl)


def gelu_tanh_mul(x: Tensor, *, out: Tensor | None = None, use_pdl: bool = False) -> Tensor:
    """gelu(x[:, :F]) * x[:, F:] with the tanh form of gelu; the rest as `silu_mul`."""
    return _run("gelu_tanh_mul", "gelu_tanh", x, out, use_pdl)


def gelu_mul(x: Tensor, *, out: Tensor | None = None, use_pdl: bool = False) -> Tensor:
    """gelu(x[:, :F]) * x[:, F:] with the exact, erf form of gelu; the rest as `silu_mul`."""
    return _run("gelu_mul", "gelu", x, out, use_pdl)


def default_choice(width: int) -> Choice:
    """What launches take where nothing was measured: two 16-byte loads each of gate and up."""
    block = min(max(1 << (width - 1).bit_length(), 128), 2048)
    while block > 512 and width % block:
        block //= 2
    return {"block": block, "num_warps": max(block // 512, 1)}


def _run(name: str, activation: str, x: Tensor, out: Tensor | None, use_pdl: bool) -> Tensor:
    if x.dim() != 2 or x.shape[1] % 2 or x.dtype not in _DTYPES or not x.is_contiguous():
        raise ValueError(
            f"{name} takes contiguous [T, 2F] of {', '.join(map(str, _DTYPES))}, got {x.dtype} "
            f"{tuple(x.shape)} with strides {x.stride()}"
        )
    num_rows, width = x.shape[0], x.shape[1] // 2
    if out is None:
        out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    elif (
        out.shape != (num_rows, width)
        or (out.dtype, out.device) != (x.dtype, x.device)
        or not out.is_contiguous()
    ):
        raise ValueError(
            f"out must be contiguous {x.dtype} {(num_rows, width)} on {x.device}, got {out.dtype} "
            f"{tuple(out.shape)} on {out.device}"
        )
    if width == 0:
        return out
    choice = choose("silu_mul", f"F{width}", default_choice(width))
    launch(
        gate_mul_rows,
        (num_rows * -(-width // choice["block"]),),
        x,
        out,
        ACTIVATION=activation,
        F=width,
        BLOCK=choice["block"],
        PDL=use_pdl,
        num_warps=choice["num_warps"],
        launch_pdl=use_pdl,
    )
    return out
