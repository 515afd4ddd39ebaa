"""matmul over packed weights, and reading rows back as embeddings; knows no layer or model.

`matmul(x, w)[t, n]` is one chain of fused multiply-adds over k ascending, whatever T, the row's
place, the number of threads or the vector width: a row's bits depend on that row alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo_kernels import memory
from octavo_kernels.matmul.cpu import gather_kernel, matmul_kernel
from octavo_kernels.matmul.packed import (
    PACKED_DTYPES,
    PackedWeight,
    pack_rows_,
    panel_width,
    unpack,
)
from octavo_kernels.op import no_kernel
from octavo_kernels.parallel import Kernel, num_threads
from octavo_kernels.simd import LANES

__all__ = ["PackedWeight", "gather_rows", "kernels", "matmul", "pack_rows_", "unpack", "warm"]

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Packed weights are the CPU's; a GPU's are plain tensors.
_HAVE = ("cpu", "and for cuda octavo_kernels.matmul.gpu.linear")
_HAVE_ROWS = ("cpu", "and for cuda octavo_kernels.embedding.gpu.embedding")
# Multiply-adds below which waking another thread costs more than it gains.
_ALONE = 60_000
# Few and long parts: a tile asks for its next panel ahead, in vain if another core takes it
# (measured at 16 rows: 12 to 32 parts are 25 % slower). Two for each thread, so that a core that
# lags behind leaves its second to the others.
_PARTS_PER_THREAD = 2


def matmul(
    x: Tensor,
    weight: PackedWeight,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x [T, K] float32 @ W[N, K]^T (+ bias [N]) (+ residual [T, N]) -> [T, N] float32.

    Weights of 16 bits are widened exactly; sums are float32. `out` may be neither x nor residual.
    Raises ValueError for another device, dtype or shape, or for tensors that are not contiguous.
    """
    n, k = weight.n, weight.k
    if not _is_plain(x) or x.dim() != 2 or x.shape[1] != k:
        raise _refusal("x", x, ["T", k])
    num_rows = x.shape[0]
    shape = (num_rows, n)
    if out is None:
        out = memory.empty(shape)
    elif not _is_plain(out) or out.shape != shape:
        raise _refusal("out", out, shape)
    bias_at = residual_at = 0
    if bias is not None:
        if not _is_plain(bias) or bias.shape != (n,):
            raise _refusal("bias", bias, [n])
        bias_at = bias.data_ptr()
    out_at = out.data_ptr()
    if residual is not None:
        if not _is_plain(residual) or residual.shape != shape:
            raise _refusal("residual", residual, shape)
        residual_at = residual.data_ptr()
        if residual_at == out_at and num_rows:
            raise ValueError("matmul cannot add a residual that is also its out")
    if num_rows:
        data = weight.data
        panels, _, width = data.shape
        parts = 1 if num_rows * n * k < _ALONE else min(panels, _PARTS_PER_THREAD * num_threads())
        run = matmul_kernel(_NAMES[data.dtype], width // LANES)
        run(parts, x.data_ptr(), data.data_ptr(), out_at, bias_at, residual_at, num_rows, n, k)
    return out


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype == torch.float32 and tensor.is_contiguous()


def _refusal(name: str, tensor: Tensor, shape: Sequence[int | str]) -> ValueError:
    if not tensor.is_cpu:
        return no_kernel("matmul", tensor, have=_HAVE)
    return ValueError(
        f"matmul needs {name} contiguous float32 {list(shape)}, got"
        f" {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
    )


def gather_rows(weight: PackedWeight, ids: Tensor) -> Tensor:
    """Rows ids [T] (int32 or int64) of a packed weight, exactly: [T, K] float32.

    Lets a tied embedding live only in the head's panels. Raises ValueError for another device or
    dtype, and for ids out of range (a negative id does not wrap); in a replay of a recording the
    row of such an id is NaN.
    """
    if not ids.is_cpu:
        raise no_kernel("gather_rows", ids, have=_HAVE_ROWS)
    if ids.dim() != 1 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"gather_rows needs ids [T] int32 or int64, got {ids.dtype} {list(ids.shape)}"
        )
    num_rows = ids.shape[0]
    out = memory.empty((num_rows, weight.k))
    if num_rows:
        data, status = weight.data, memory.zeros((1,), torch.int64)
        gather_kernel(_NAMES[data.dtype])(
            1 if num_rows < 16 else min(num_rows // 8, _PARTS_PER_THREAD * num_threads()),
            data.data_ptr(),
            ids.data_ptr(),
            ids.stride(0) * ids.itemsize,
            ids.itemsize,
            out.data_ptr(),
            num_rows,
            weight.n,
            weight.k,
            data.shape[2],
            status.data_ptr(),
        )
        if status.tolist()[0]:
            raise ValueError(
                f"gather_rows needs ids in [0, {weight.n}), got {int(ids.min())}..{int(ids.max())}"
            )
    return out


def kernels(dtype: torch.dtype) -> tuple[Kernel, ...]:
    """What a server with weights of dtype calls."""
    name = _NAMES[dtype]
    return matmul_kernel(name, panel_width() // LANES), gather_kernel(name)


def warm(dtype: torch.dtype) -> None:
    """Compiles, or loads from the cache, the kernels for weights of dtype."""
    for kernel in kernels(dtype):
        assert kernel.address


assert tuple(_NAMES) == PACKED_DTYPES
