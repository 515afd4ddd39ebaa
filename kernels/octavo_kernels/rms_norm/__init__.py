"""RMS normalisation of rows, with an optional residual. Knows shapes, not models."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo_kernels import memory, parallel
from octavo_kernels.op import require_device
from octavo_kernels.rms_norm import cpu
from octavo_kernels.rms_norm.reference import rms_norm_reference

__all__ = ["kernels", "rms_norm", "rms_norm_reference", "warm"]

_SERIAL_ELEMENTS = 1 << 14  # below this, one thread is done before a second has started


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """x / sqrt(mean(x**2) + eps) * weight over the last dimension; [T, D] float32 -> [T, D].

    With residual [T, D]: first residual += x in place, then the sum is what gets normalised, the
    order of a pre-norm block (h = residual + x; y = norm(h)). x itself is not changed; out may
    be x.
    On a GPU also bfloat16 and float16, and weight_offset 1 (`octavo_kernels.rms_norm.gpu`).
    A row's bits depend on that row alone. Raises ValueError for other shapes, dtypes or strides.
    """
    if x.is_cuda:
        from octavo_kernels.rms_norm import gpu  # here: an installation for the CPU has no Triton

        return gpu.rms_norm(
            x, weight, eps=eps, residual=residual, weight_offset=weight_offset, out=out
        )
    require_device("rms_norm", x, have=("cpu", "cuda"))
    if weight_offset:
        raise ValueError(f"weight_offset on CPU must be 0, got {weight_offset}")
    if x.dim() != 2 or weight.shape != x.shape[1:]:
        raise ValueError(
            f"rms_norm takes x [T, D] and weight [D], got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    num_rows, dim = x.shape
    if out is None:
        out = memory.empty((num_rows, dim))
    for name, tensor in (("x", x), ("residual", residual), ("out", out)):
        if tensor is not None and not (
            tensor.dtype == torch.float32 and tensor.shape == x.shape and tensor.is_contiguous()
        ):
            raise ValueError(
                f"{name} must be contiguous float32 {tuple(x.shape)}, got {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )
    if weight.dtype != torch.float32 or not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous float32, got {weight.dtype}")
    if num_rows == 0:
        return out
    parts = 1 if num_rows * dim < _SERIAL_ELEMENTS else min(num_rows, parallel.num_threads())
    cpu.normalise(
        parts,
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        num_rows,
        dim,
        eps,
    )
    return out


def kernels() -> tuple[parallel.Kernel, ...]:
    """What a server calls."""
    return (cpu.normalise,)


def warm() -> None:
    """Compile the kernel or load it from disk."""
    for kernel in kernels():
        assert kernel.address
