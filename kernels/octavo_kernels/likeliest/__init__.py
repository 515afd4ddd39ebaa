"""The likeliest column of each row of logits, and how likely it is. Knows no token, no request."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo_kernels import parallel
from octavo_kernels.likeliest import cpu
from octavo_kernels.likeliest.reference import likeliest_reference
from octavo_kernels.op import require_device

__all__ = ["kernels", "likeliest", "likeliest_reference", "warm"]

_SERIAL_ELEMENTS = 1 << 17  # below this, one thread is done before a second has started


def likeliest(logits: Tensor, *, places: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """places[s] = argmax of logits[s], the first of equals, and probs[s] its softmax.

    logits [S, V] float32 on the CPU, contiguous; places [S] int32; probs [S] float32, NaN where
    a logit is NaN or infinite: then the place means nothing. Returns both. Raises ValueError for
    other shapes and dtypes.
    """
    require_device("likeliest", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"likeliest takes logits [S, V], V > 0, got {tuple(logits.shape)}")
    num_rows, width = logits.shape
    for name, tensor, dtype, shape in (
        ("logits", logits, torch.float32, logits.shape),
        ("places", places, torch.int32, (num_rows,)),
        ("probs", probs, torch.float32, (num_rows,)),
    ):
        if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {dtype} of shape {tuple(shape)}, got {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )
    if num_rows:
        is_serial = num_rows * width < _SERIAL_ELEMENTS
        parts = 1 if is_serial else min(num_rows, parallel.num_threads())
        cpu.likeliest_rows(
            parts, logits.data_ptr(), num_rows, width, places.data_ptr(), probs.data_ptr()
        )
    return places, probs


def kernels() -> tuple[parallel.Kernel, ...]:
    """What a server that drafts by a model calls."""
    return (cpu.likeliest_rows,)


def warm() -> None:
    """Compile the kernel or load it from disk."""
    for kernel in kernels():
        assert kernel.address
