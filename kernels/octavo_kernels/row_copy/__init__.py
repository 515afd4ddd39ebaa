"""Copies rows between tensors whose rows may lie apart. Knows strides, not what rows hold."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo_kernels import parallel
from octavo_kernels.op import require_device
from octavo_kernels.row_copy import cpu
from octavo_kernels.row_copy.reference import row_copy_reference

__all__ = ["kernels", "row_copy", "row_copy_reference", "warm"]

_SERIAL_ELEMENTS = 1 << 15  # below this, one thread is done before a second has started


def row_copy(x: Tensor, *, out: Tensor) -> Tensor:
    """out[t] = x[t]; both [T, D] float32 on the CPU, each with rows any distance apart.

    Unlike `Tensor.copy_` it is a kernel, which a recording replays. The two may not overlap.
    Returns out. Raises ValueError for other shapes, dtypes or strides.
    """
    require_device("row_copy", x)
    if x.dim() != 2 or out.shape != x.shape:
        raise ValueError(
            f"row_copy takes x and out [T, D], got {tuple(x.shape)} and {tuple(out.shape)}"
        )
    num_rows, width = x.shape
    for name, tensor in (("x", x), ("out", out)):
        if tensor.dtype != torch.float32 or (width > 1 and tensor.stride(1) != 1):
            raise ValueError(
                f"{name} must be float32 with neighbouring columns, got {tensor.dtype} with "
                f"strides {tensor.stride()}"
            )
    if num_rows == 0:
        return out
    parts = 1 if num_rows * width < _SERIAL_ELEMENTS else min(num_rows, parallel.num_threads())
    cpu.copy_rows(
        parts, x.data_ptr(), 4 * x.stride(0), out.data_ptr(), 4 * out.stride(0), num_rows, 4 * width
    )
    return out


def kernels() -> tuple[parallel.Kernel, ...]:
    """What a server calls."""
    return (cpu.copy_rows,)


def warm() -> None:
    """Compile the kernel or load it from disk."""
    for kernel in kernels():
        assert kernel.address
