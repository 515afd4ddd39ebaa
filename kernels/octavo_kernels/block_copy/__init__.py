"""Copies whole cache blocks in place. Knows block numbers, not requests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo_kernels import parallel
from octavo_kernels.block_copy import cpu
from octavo_kernels.block_copy.reference import block_copy_reference
from octavo_kernels.op import require_device

__all__ = ["block_copy", "block_copy_reference", "kernels", "warm"]

_SERIAL_BYTES = 1 << 16


def block_copy(caches: Sequence[Tensor], *, src: Tensor, dst: Tensor) -> None:
    """caches[c][dst[i]] = caches[c][src[i]] for every cache c and i ascending.

    caches: tensors [B, ...] of any dtype, contiguous; src, dst: [n] integer block numbers. Copies
    happen in order: a block written earlier may be a later source. Raises ValueError for a number
    outside its cache or unequal lengths, before anything is written.
    On a GPU without order and without that check: see `octavo_kernels.block_copy.gpu`.
    """
    if caches and caches[0].is_cuda:
        from octavo_kernels.block_copy import gpu  # here: a CPU installation has no Triton

        gpu.block_copy(caches, src=src, dst=dst)
        return
    source, target = src.tolist(), dst.tolist()
    if len(source) != len(target):
        raise ValueError(f"src and dst must be of one length, got {len(source)} and {len(target)}")
    if not source:
        return
    for cache in caches:
        require_device("block_copy", cache, have=("cpu", "cuda"))
        if not cache.is_contiguous():
            raise ValueError("caches must be contiguous")
        low, high = min(*source, *target), max(*source, *target)
        if low < 0 or high >= cache.shape[0]:
            raise ValueError(
                f"block numbers must be 0 to {cache.shape[0] - 1}, got {low} to {high}"
            )
    src, dst = src.to(torch.int64).contiguous(), dst.to(torch.int64).contiguous()
    for cache in caches:
        block_bytes = cache[0].numel() * cache.element_size()
        is_small = len(source) * block_bytes < _SERIAL_BYTES
        cpu.copy_blocks(
            1 if is_small else parallel.num_threads(),
            cache.data_ptr(),
            block_bytes,
            src.data_ptr(),
            dst.data_ptr(),
            len(source),
        )


def kernels() -> tuple[parallel.Kernel, ...]:
    """What a server calls."""
    return (cpu.copy_blocks,)


def warm() -> None:
    """Compile the kernel or load it from disk."""
    for kernel in kernels():
        assert kernel.address
