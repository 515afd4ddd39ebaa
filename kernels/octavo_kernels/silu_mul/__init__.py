"""Gated activations: act(gate) * up of a packed [gate | up] row. Know shapes, not models."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo_kernels import memory, parallel
from octavo_kernels.op import require_device
from octavo_kernels.silu_mul import cpu
from octavo_kernels.silu_mul.reference import (
    gelu_mul_reference,
    gelu_tanh_mul_reference,
    silu_mul_reference,
)

__all__ = [
    "gelu_mul",
    "gelu_mul_reference",
    "gelu_tanh_mul",
    "gelu_tanh_mul_reference",
    "kernels",
    "silu_mul",
    "silu_mul_reference",
    "warm",
]

_SERIAL_ELEMENTS = 1 << 13  # below this, one thread is done before a second has started


def silu_mul(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(x[:, :F]) * x[:, F:] with silu(g) = g / (1 + exp(-g)); [T, 2F] float32 -> [T, F].

    On a GPU also bfloat16 and float16 (`octavo_kernels.silu_mul.gpu`).
    Raises ValueError for other shapes, dtypes or strides.
    """
    if x.is_cuda:
        from octavo_kernels.silu_mul import gpu  # here: an installation for the CPU has no Triton

        return gpu.silu_mul(x, out=out)
    return _run("silu_mul", cpu.silu_rows, x, out)


def gelu_tanh_mul(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """gelu(x[:, :F]) * x[:, F:] with the tanh form of gelu; [T, 2F] float32 -> [T, F].

    On a GPU also bfloat16 and float16 (`octavo_kernels.silu_mul.gpu`).
    Raises ValueError for other shapes, dtypes or strides.
    """
    if x.is_cuda:
        from octavo_kernels.silu_mul import gpu  # here: an installation for the CPU has no Triton

        return gpu.gelu_tanh_mul(x, out=out)
    return _run("gelu_tanh_mul", cpu.gelu_rows, x, out)


def gelu_mul(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """gelu(x[:, :F]) * x[:, F:] with the exact, erf form of gelu; [T, 2F] -> [T, F]. GPU only.

    Raises ValueError for other shapes, dtypes or strides, and on any other device.
    """
    require_device("gelu_mul", x, have=("cuda",))
    from octavo_kernels.silu_mul import gpu  # here: an installation for the CPU has no Triton

    return gpu.gelu_mul(x, out=out)


def _run(name: str, rows: parallel.Kernel, x: Tensor, out: Tensor | None) -> Tensor:
    require_device(name, x, have=("cpu", "cuda"))
    if x.dim() != 2 or x.shape[1] % 2 or x.dtype != torch.float32 or not x.is_contiguous():
        raise ValueError(f"{name} takes contiguous float32 [T, 2F], got {x.dtype} {tuple(x.shape)}")
    num_rows, width = x.shape[0], x.shape[1] // 2
    if out is None:
        out = memory.empty((num_rows, width))
    elif out.shape != (num_rows, width) or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous float32 {(num_rows, width)}, got {out.dtype} "
            f"{tuple(out.shape)}"
        )
    if num_rows == 0:
        return out
    parts = 1 if num_rows * width < _SERIAL_ELEMENTS else min(num_rows, parallel.num_threads())
    rows(parts, x.data_ptr(), out.data_ptr(), num_rows, width)
    return out


def kernels() -> tuple[parallel.Kernel, ...]:
    """What a server calls."""
    return (cpu.silu_rows, cpu.gelu_rows)


def warm() -> None:
    """Compile the kernels or load them from disk."""
    for kernel in kernels():
        assert kernel.address
