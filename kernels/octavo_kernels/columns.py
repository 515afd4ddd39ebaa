"""Refuses tensors that a kernel would misread, in words. Knows shapes and dtypes, no op."""

from __future__ import annotations

import torch
from torch import Tensor


def check_column(
    name: str, tensor: Tensor, size: int, dtype: torch.dtype, *, beside: Tensor
) -> None:
    """Raises ValueError unless tensor is a contiguous [size] of dtype on the other's device."""
    fits = tensor.shape == (size,) and tensor.is_contiguous() and tensor.device == beside.device
    if tensor.dtype != dtype or not fits:
        raise refusal(name, tensor, f"contiguous {dtype} [{size}] on {beside.device}")


def refusal(name: str, tensor: Tensor, need: str) -> ValueError:
    """What a tensor must be, and what it is."""
    return ValueError(
        f"{name} must be {need}, got {tensor.dtype} {list(tensor.shape)} with strides "
        f"{tensor.stride()} on {tensor.device}"
    )
