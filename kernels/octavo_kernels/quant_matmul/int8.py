"""Int8 weights times activations quantised per token, on the CPU; knows no layer or model.

Sums are integers and exact, and what follows is elementwise: a row's bits depend on that row
alone, whatever T, the threads or the path of the CPU. A row with NaN or infinity gives NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo_kernels.op import no_kernel
from octavo_kernels.parallel import Kernel, num_threads
from octavo_kernels.quant_matmul.cpu_dot import CpuPath, host_path
from octavo_kernels.quant_matmul.cpu_int8 import (
    gather_kernel,
    matmul_kernel,
    quantise_kernel,
    row_bytes,
)
from octavo_kernels.quant_matmul.cpu_int8_tile import PANEL_WIDTH, TILE_ROWS
from octavo_kernels.quant_matmul.cpu_int8_write import write_codes, write_floats
from octavo_kernels.quant_matmul.int8_packed import Int8Weight, unpack, write_rows

__all__ = [
    "Int8Weight",
    "gated_int8",
    "gather_rows_int8",
    "kernels",
    "matmul_int8",
    "unpack",
    "warm",
    "write_rows",
]

_HAVE = ("cpu", "and for cuda octavo_kernels.quant_matmul.gpu.quant_matmul")
# Multiply-adds below which waking another thread costs more than it gains.
_ALONE = 120_000
# Elements of x that every part quantises for itself rather than waiting for a launch that does.
_QUANTISE_EACH = 8192
_PARTS_PER_THREAD = 2


def matmul_int8(
    x: Tensor,
    weight: Int8Weight,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x [T, K] float32 @ W[N, K]^T (+ bias [N]) (+ residual [T, N]) -> [T, N] float32.

    x is quantised symmetrically per token to 8 bits. `out` may be neither x nor residual.
    Raises ValueError for a gated weight, another device, dtype or shape, or for tensors that are
    not contiguous.
    """
    if weight.is_gated:
        raise ValueError("matmul_int8 takes a plain weight, got a gated one (see gated_int8)")
    out = _checked(x, weight, weight.n, out)
    bias_at = residual_at = 0
    if bias is not None:
        if not _is_plain(bias) or bias.shape != (weight.n,):
            raise _refusal("bias", bias, [weight.n])
        bias_at = bias.data_ptr()
    if residual is not None:
        if not _is_plain(residual) or residual.shape != out.shape:
            raise _refusal("residual", residual, out.shape)
        residual_at = residual.data_ptr()
        if residual_at == out.data_ptr() and out.numel():
            raise ValueError("matmul_int8 cannot add a residual that is also its out")
    _run(x, weight, out, bias_at, residual_at, is_gelu=False)
    return out


def gated_int8(
    x: Tensor, weight: Int8Weight, *, is_gelu: bool = False, out: Tensor | None = None
) -> Tensor:
    """x [T, K] float32 times a gated weight [2 F, K] -> silu(gate) * up, [T, F] float32.

    With is_gelu the tanh form of gelu in silu's place. The same bits as `matmul_int8` followed by
    `silu_mul` or `gelu_tanh_mul`. Raises ValueError as `matmul_int8` does, for a plain weight too.
    """
    if not weight.is_gated:
        raise ValueError("gated_int8 takes a gated weight, got a plain one (see matmul_int8)")
    out = _checked(x, weight, weight.n // 2, out)
    _run(x, weight, out, 0, 0, is_gelu=is_gelu)
    return out


def _checked(x: Tensor, weight: Int8Weight, n: int, out: Tensor | None) -> Tensor:
    if not _is_plain(x) or x.dim() != 2 or x.shape[1] != weight.k:
        raise _refusal("x", x, ["T", weight.k])
    shape = (x.shape[0], n)
    if out is None:
        return torch.empty(shape, dtype=torch.float32)
    if not _is_plain(out) or out.shape != shape:
        raise _refusal("out", out, shape)
    return out


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype == torch.float32 and tensor.is_contiguous()


def _refusal(name: str, tensor: Tensor, shape: Sequence[int | str]) -> ValueError:
    if not tensor.is_cpu:
        return no_kernel("matmul_int8", tensor, have=_HAVE)
    return ValueError(
        f"matmul_int8 needs {name} contiguous float32 {list(shape)}, got"
        f" {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
    )


def _run(
    x: Tensor, weight: Int8Weight, out: Tensor, bias: int, residual: int, *, is_gelu: bool
) -> None:
    num_rows, k = x.shape
    if not num_rows:
        return
    halves = 2 if weight.is_gated else 1
    path, data = weight.path, weight.data
    parts, is_each = 1, True
    if num_rows * weight.n * k >= _ALONE:
        # Parts that quantise for themselves are one for each thread, else two, so that a core
        # that lags behind leaves its second to the others.
        is_each = num_rows * k <= _QUANTISE_EACH
        wanted = num_threads() * (1 if is_each else _PARTS_PER_THREAD)
        parts = min(data.shape[0] // halves, wanted)
    rows_size = num_rows * row_bytes(k)
    codes_size = rows_size * parts if is_each else rows_size
    up_size = 4 * TILE_ROWS[path] * PANEL_WIDTH[path] * parts if weight.is_gated else 0
    scratch = torch.empty(codes_size + up_size, dtype=torch.uint8)
    codes = scratch.data_ptr()
    if not is_each:
        count = min(num_rows, _PARTS_PER_THREAD * num_threads())
        quantise_kernel(count, x.data_ptr(), codes, num_rows, k)
    matmul_kernel(path)(
        parts,
        x.data_ptr() if is_each else 0,
        codes,
        codes + codes_size,
        data.data_ptr(),
        weight.base.data_ptr(),
        weight.scale.data_ptr(),
        out.data_ptr(),
        bias,
        residual,
        num_rows,
        weight.n // halves,
        k,
        halves,
        int(is_gelu),
    )


def gather_rows_int8(weight: Int8Weight, ids: Tensor) -> Tensor:
    """Rows ids [T] (int32 or int64) of a plain weight, code times scale: [T, K] float32.

    Lets a tied embedding live only in the head's panels. Raises ValueError for a gated weight,
    another device or dtype; ids out of range are the caller's error and are checked (a negative id
    does not wrap).
    """
    if not ids.is_cpu:
        raise no_kernel("gather_rows_int8", ids)
    if weight.is_gated or ids.dim() != 1 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "gather_rows_int8 needs a plain weight and ids [T] int32 or int64, got"
            f" {'gated' if weight.is_gated else 'plain'}, {ids.dtype} {list(ids.shape)}"
        )
    num_rows = ids.shape[0]
    out = torch.empty((num_rows, weight.k), dtype=torch.float32)
    if num_rows:
        low, high = ids.aminmax()
        if int(low) < 0 or int(high) >= weight.n:
            raise ValueError(
                f"gather_rows_int8 needs ids in [0, {weight.n}), got {int(low)}..{int(high)}"
            )
        wide = ids.long().contiguous()
        gather_kernel(
            1 if num_rows < 16 else min(num_rows // 8, _PARTS_PER_THREAD * num_threads()),
            weight.data.data_ptr(),
            weight.scale.data_ptr(),
            wide.data_ptr(),
            out.data_ptr(),
            num_rows,
            weight.k,
            weight.data.shape[2],
        )
    return out


def kernels(path: CpuPath | None = None) -> tuple[Kernel, ...]:
    """What a server with int8 weights calls, on this machine's path by default."""
    running = (matmul_kernel(path or host_path()), quantise_kernel, gather_kernel)
    return (*running, write_floats, write_codes)


def warm() -> None:
    """Compiles, or loads from the cache, the kernels of this machine."""
    for kernel in kernels():
        assert kernel.address
