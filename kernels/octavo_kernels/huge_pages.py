"""Memory on huge pages for what is read end to end in every step. Knows no layout.

A weight on pages of 4 KB is bound by page walks, on a virtual machine above all. The system gives
huge pages to mappings that are large, so weights that are not share one.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE = 2 * 1024 * 1024
_SLAB_BYTES = 16 * HUGE_PAGE  # that small tensors share; pages of it exist once they are written
_SMALLEST = 32 * 1024  # less would gain nothing
_ALIGN = 64

_lock = threading.Lock()
_free: Tensor | None = None  # of the newest slab, which lives as long as a tensor of it does


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU that begin on a line of memory, on huge pages where the system has them."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _SMALLEST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    return _take(num_bytes).view(dtype).view(*shape)


def _take(num_bytes: int) -> Tensor:
    global _free
    if num_bytes > _SLAB_BYTES // 2:
        return _mapping(num_bytes)[:num_bytes]
    with _lock:
        if _free is None or _free.numel() < num_bytes:
            _free = _mapping(_SLAB_BYTES)
        taken = _free[:num_bytes]
        _free = _free[-(-num_bytes // _ALIGN) * _ALIGN :]
        return taken


def _mapping(num_bytes: int) -> Tensor:
    """Zeros of at least so many bytes, from the start of a huge page on."""
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    store = torch.frombuffer(memory, dtype=torch.uint8)
    return store[-store.data_ptr() % HUGE_PAGE :]
