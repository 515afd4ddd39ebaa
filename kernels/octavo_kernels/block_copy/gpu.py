"""Copies whole cache blocks in place on a GPU. Knows block numbers, not requests."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from octavo_kernels.block_copy.gpu_kernel import copy_blocks
from octavo_kernels.launch import launch

_UNITS = ((4, tl.int32), (2, tl.int16), (1, tl.int8))
_VECTOR_BYTES = 16
_CHUNK_BYTES = 8192
_INDEX_DTYPES = (torch.int32, torch.int64)


def block_copy(caches: Sequence[Tensor], *, src: Tensor, dst: Tensor) -> None:
    """caches[c][dst[i]] = caches[c][src[i]] for every cache c and every i, in no order.

    caches: tensors [B, ...] of any dtype, contiguous; src, dst: [n] int32 or int64 block numbers on
    their device, which are not read by the host. A block must not be written twice, nor written
    and also a source of another; a pair with a number outside a cache is skipped there. One launch
    for all caches of one shape.
    The addresses of a set of caches are copied to the device when the set is first seen: give a set
    once before a CUDA graph captures it. Raises ValueError for what does not fit otherwise.
    """
    if src.shape != dst.shape or src.dim() != 1:
        raise ValueError(
            f"src and dst must be of one length, got {tuple(src.shape)} and {tuple(dst.shape)}"
        )
    groups: dict[tuple[int, int], list[Tensor]] = {}
    for cache in caches:
        if not cache.is_contiguous():
            raise ValueError("caches must be contiguous")
        for name, index in (("src", src), ("dst", dst)):
            if index.dtype not in _INDEX_DTYPES or index.device != cache.device:
                raise ValueError(
                    f"{name} must be int32 or int64 on {cache.device}, got {index.dtype} on "
                    f"{index.device}"
                )
        if cache.numel():
            block_bytes = cache.numel() // cache.shape[0] * cache.element_size()
            groups.setdefault((cache.shape[0], block_bytes), []).append(cache)
    src, dst = src.contiguous(), dst.contiguous()
    for (num_blocks, block_bytes), group in groups.items():
        _copy(group, src=src, dst=dst, num_blocks=num_blocks, block_bytes=block_bytes)


def _copy(
    caches: Sequence[Tensor], *, src: Tensor, dst: Tensor, num_blocks: int, block_bytes: int
) -> None:
    addresses = tuple(cache.data_ptr() if not cache.is_meta else 0 for cache in caches)
    num_pairs = src.shape[0]
    grain = functools.reduce(lambda a, b: a | b, addresses, block_bytes)
    size, unit = next((size, unit) for size, unit in _UNITS if grain % size == 0)
    is_wide = grain % _VECTOR_BYTES == 0
    block_units = block_bytes // size
    chunk = min(1 << (block_units - 1).bit_length(), _CHUNK_BYTES // size)
    launch(
        copy_blocks,
        (len(caches) * num_pairs * -(-block_units // chunk),),
        _table(addresses, str(caches[0].device)),
        src,
        dst,
        num_pairs,
        num_blocks,
        UNIT=unit,
        BLOCK_UNITS=block_units,
        CHUNK=chunk,
        ALIGNMENT=_VECTOR_BYTES if is_wide else size,
        num_warps=4,
    )


@functools.cache
def _table(addresses: tuple[int, ...], device: str) -> Tensor:
    """Addresses on the device; kept for good, because a CUDA graph may read them again.

    An engine's caches stay where they are: there are as many tables as kinds of cache.
    """
    return torch.tensor(addresses, dtype=torch.int64, device=device)
