"""Activations quantised in blocks for the matmul over blocks on the CPU; knows no layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo_kernels import memory
from octavo_kernels.op import no_kernel
from octavo_kernels.parallel import num_threads
from octavo_kernels.quant_matmul.cpu_blocks_tile import FORMATS, Kind
from octavo_kernels.quant_matmul.cpu_records import (
    normalise_kernel,
    num_parts,
    quantise_kernel,
    record_bytes,
)

# Elements below which one thread is done before a second has started.
_ALONE = 1 << 13


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockRows:
    """Activations [num_rows, k] as int8 codes with a scale per row and block of elements.

    data: [num_rows * ceil(k / block) * (block + 8)] uint8, laid out as `cpu_records` tells;
    block and zero: of the weights that they are for.
    """

    data: Tensor
    num_rows: int
    k: int
    block: int
    zero: int

    @staticmethod
    def empty(num_rows: int, k: int, *, kind: Kind) -> BlockRows:
        """Room for rows that are to meet weights of a kind."""
        block, zero = FORMATS[kind].block, FORMATS[kind].zero
        size = num_rows * -(-k // block) * record_bytes(block)
        data = memory.empty((size,), torch.uint8)
        return BlockRows(data=data, num_rows=num_rows, k=k, block=block, zero=zero)


def quantise_rows(x: Tensor, *, kind: Kind) -> BlockRows:
    """Rows x [T, K] float32 for weights of a kind.

    Raises ValueError for another device, dtype or shape, or for x that is not contiguous.
    """
    require_plain("quantise_rows", "x", x, dims=2)
    num_rows, k = x.shape
    rows = BlockRows.empty(num_rows, k, kind=kind)
    if num_rows:
        quantise_kernel(rows.block)(
            _parts(num_rows, k), x.data_ptr(), rows.data.data_ptr(), num_rows, k, rows.zero
        )
    return rows


def rms_norm_rows(x: Tensor, weight: Tensor, *, eps: float, kind: Kind) -> BlockRows:
    """`quantise_rows` of `rms_norm(x, weight, eps=eps)`, to the bit, in one launch.

    Raises ValueError as they do.
    """
    require_plain("rms_norm_rows", "x", x, dims=2)
    require_plain("rms_norm_rows", "weight", weight, dims=1)
    num_rows, k = x.shape
    if weight.shape[0] != k:
        raise ValueError(f"rms_norm_rows needs weight [{k}], got {list(weight.shape)}")
    rows = BlockRows.empty(num_rows, k, kind=kind)
    if num_rows:
        normalise_kernel(rows.block)(
            _parts(num_rows, k),
            x.data_ptr(),
            weight.data_ptr(),
            rows.data.data_ptr(),
            num_rows,
            k,
            rows.zero,
            eps,
        )
    return rows


def _parts(num_rows: int, k: int) -> int:
    return 1 if num_rows * k < _ALONE else num_parts(num_rows, num_threads())


def require_plain(op: str, name: str, tensor: Tensor, *, dims: int) -> None:
    """Raises ValueError for what is not contiguous float32 of so many dimensions on the CPU."""
    if not tensor.is_cpu:
        raise no_kernel(op, tensor, have=("cpu",))
    if tensor.dtype != torch.float32 or tensor.dim() != dims or not tensor.is_contiguous():
        raise ValueError(
            f"{op} needs {name} contiguous float32 of {dims} dimensions, got {tensor.dtype}"
            f" {list(tensor.shape)} with strides {tensor.stride()}"
        )
