"""Where ops on the CPU get tensors whose addresses they give to kernels; knows no op.

While launches are being recorded (`octavo_kernels.recording`) such tensors must outlive the call:
a replay runs the same kernels on the same addresses. Two kinds, by who fills them:

- `empty`: a kernel writes it in every run before a kernel reads it. Recordings share this memory,
  and within one a tensor's place is used again once the tensor is gone.
- `hold`: Python wrote it (sizes, addresses, zeros); the recording keeps it, for itself alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Keeper(Protocol):
    """Who provides memory while launches are recorded."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor: ...

    def hold(self, tensor: Tensor) -> None: ...


_keeper: Keeper | None = None


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised, contiguous tensor on the CPU."""
    if _keeper is None:
        return torch.empty(shape, dtype=dtype)
    return _keeper.empty(shape, dtype)


def hold(tensor: Tensor) -> Tensor:
    """The same tensor, kept at its address with whatever is in it, for replays of a recording."""
    if _keeper is not None:
        _keeper.hold(tensor)
    return tensor


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros, of at least one element, that a recording keeps: for words of status."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return hold(torch.frombuffer(bytearray(num_bytes), dtype=dtype).view(*shape))


def set_keeper(keeper: Keeper | None) -> None:
    """Begins (or, with None, ends) a recording's say over memory. Not for several threads."""
    global _keeper
    _keeper = keeper
