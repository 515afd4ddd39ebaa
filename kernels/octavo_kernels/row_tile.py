"""Lays rows that are reduced over a program's threads. Knows a row's length, no op.

What is here decides the order of a row's sum and so its bits: it depends on the row's length and
item size alone, never on how many rows there are.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_DIM = 16384
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes of the widest load
_TILE_ELEMENTS = 1024  # a program takes several rows shorter than this
_THREAD_ELEMENTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTile:
    """How one program holds its rows."""

    rows: int
    block_d: int  # the row's length, up to a power of two
    num_warps: int
    # Elements that every row start is a multiple of. 1 where rows cannot all start at 16 bytes:
    # then none is told to, since the width of loads shapes the sum.
    step: int


@functools.lru_cache(maxsize=256)
def row_tile(dim: int, itemsize: int) -> RowTile:
    """The one layout of rows of dim elements. Raises ValueError where none fits."""
    if not 1 <= dim <= MAX_DIM:
        raise ValueError(f"row length must be 1 to {MAX_DIM}, got {dim}")
    block_d = 1 << (dim - 1).bit_length()
    elements = max(block_d, _TILE_ELEMENTS)
    return RowTile(
        rows=elements // block_d,
        block_d=block_d,
        num_warps=min(elements // (32 * _THREAD_ELEMENTS), 16),
        step=_ALIGNMENT // itemsize if dim * itemsize % _ALIGNMENT == 0 else 1,
    )


def is_aligned(tensor: Tensor) -> bool:
    """Whether a tensor starts where 16-byte loads may."""
    return tensor.data_ptr() % _ALIGNMENT == 0 or tensor.is_meta


def check_rows(op: str, x: Tensor, *others: tuple[str, Tensor | None], step: int) -> None:
    """Raises ValueError unless all are contiguous [T, D] alike and start where step asks."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{op} takes {', '.join(map(str, DTYPES))}, got {x.dtype}")
    for name, tensor in (("x", x), *others):
        if tensor is None:
            continue
        if (tensor.dtype, tensor.shape, tensor.device) != (x.dtype, x.shape, x.device):
            raise ValueError(
                f"{name} must be {x.dtype} {tuple(x.shape)} on {x.device}, got {tensor.dtype} "
                f"{tuple(tensor.shape)} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
        if step > 1 and not is_aligned(tensor):
            raise ValueError(f"{name} must start at a multiple of 16 bytes")


def check_vector(op: str, name: str, vector: Tensor, x: Tensor) -> None:
    """Raises ValueError unless vector is a contiguous [D] beside x [T, D], aligned to 16 bytes."""
    if vector.shape != x.shape[1:] or vector.dtype not in DTYPES or vector.device != x.device:
        raise ValueError(
            f"{op}'s {name} must be [{x.shape[1]}] on {x.device}, got {vector.dtype} "
            f"{tuple(vector.shape)} on {vector.device}"
        )
    if not vector.is_contiguous() or not is_aligned(vector):
        raise ValueError(f"{name} must be contiguous and start at a multiple of 16 bytes")
