"""Starts the Hopper matmul of few rows by a given tile. Knows what it takes; checks no inputs.

Same bits as the tiles of `gpu.by_tile`, which takes everything else.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo_kernels.device import is_hopper, num_multiprocessors
from octavo_kernels.launch import launch
from octavo_kernels.matmul.gpu_hopper_kernel import WGMMA_ROWS, linear_hopper_kernel
from octavo_kernels.tuning import Choice

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
# A thread's: of 256 threads two programs fit on a multiprocessor, one of them the next launch's.
MAX_REGISTERS = 128


def make_hopper_tile(
    block_m: int, rows: int, block_k: int, *, stages: int, parts: int = 1, programs: int = 1
) -> Choice:
    """block_m rows of x against parts times `rows` weight rows, on `programs` a multiprocessor."""
    return {
        "HOPPER": programs,
        "BLOCK_M": block_m,
        "ROWS": rows,
        "PARTS": parts,
        "BLOCK_K": block_k,
        "STAGES": stages,
    }


def hopper_shared_bytes(tile: Choice) -> int:
    """Shared memory of a program."""
    rows = tile["PARTS"] * int(WGMMA_ROWS.value) + tile["BLOCK_M"]
    return tile["STAGES"] * (2 * rows * tile["BLOCK_K"] + 16) + 1024


def runs_on_hopper(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes x [T, K] and weight [N, K] where they are."""
    if x.dtype not in _DTYPES or x.shape[1] * x.element_size() % 16:
        return False
    if x.device.type == "meta":
        return is_hopper()
    aligned = x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    return x.is_cuda and aligned and is_hopper()


def by_hopper_tile(
    x: Tensor,
    weight: Tensor,
    tile: Choice,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "",
    out: Tensor,
    use_pdl: bool = False,
) -> Tensor:
    """`gpu.linear` into out; activation by the kernel's name."""
    num_rows, k = x.shape
    n = out.shape[1]
    rows, parts, block_k = tile["ROWS"], tile["PARTS"], tile["BLOCK_K"]
    assert parts == 2 or not activation, "a gate takes tiles of two parts"
    width = rows if activation else rows * parts
    tiles = -(-num_rows // tile["BLOCK_M"]) * -(-n // width)
    launch(
        linear_hopper_kernel,
        (min(tiles, tile["HOPPER"] * num_multiprocessors()),),
        _descriptor(x, tile["BLOCK_M"], block_k),
        _descriptor(weight, rows & -rows, block_k),
        bias,
        residual,
        out,
        num_rows,
        N=n,
        K=k,
        ROWS=rows,
        PARTS=parts,
        STAGES=tile["STAGES"],
        SINGLE=num_rows <= tile["BLOCK_M"],
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation,
        PDL=use_pdl,
        num_warps=4,
        maxnreg=MAX_REGISTERS,
        launch_pdl=use_pdl,
    )
    return out


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """matrix [R, K], copied by boxes [rows, columns] into what a wgmma reads."""
    box = [rows, columns]
    layout = _layout(rows, columns, matrix.dtype)
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.shape[1], 1], box, layout)


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], _DTYPES[dtype])
