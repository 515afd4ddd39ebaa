"""Matmul over weights of 4- and 8-bit blocks on the CPU; knows no layer, no file and no model.

`write_blocks` takes a GGUF file's blocks, `write_rows` quantises floats. Activations
get int8 codes and a scale per row and block, sums of codes are exact integers, and each
block is added to a float32 chain over K ascending. A row's bits depend on that row alone, and are
the same on every kind of CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from octavo_kernels import memory
from octavo_kernels.op import no_kernel
from octavo_kernels.parallel import Kernel, num_threads
from octavo_kernels.quant_matmul.block_packed import (
    BlockWeight,
    dequantise,
    write_blocks,
    write_rows,
)
from octavo_kernels.quant_matmul.block_rows import BlockRows, quantise_rows, rms_norm_rows
from octavo_kernels.quant_matmul.cpu_blocks import GELU, SILU, gather_kernel, matmul_kernel
from octavo_kernels.quant_matmul.cpu_blocks_tile import FORMATS, Kind
from octavo_kernels.quant_matmul.cpu_dot import CpuPath, host_path, supported_paths
from octavo_kernels.quant_matmul.cpu_records import (
    normalise_kernel,
    quantise_kernel,
    record_bytes,
)
from octavo_kernels.quant_matmul.cpu_requantise import Source, requantise_kernel
from octavo_kernels.silu_mul import gelu_tanh_mul, silu_mul
from octavo_kernels.simd import LANES

__all__ = [
    "BlockRows",
    "BlockWeight",
    "Kind",
    "dequantise",
    "gated_blocks",
    "gated_rows",
    "gather_rows",
    "kernels",
    "matmul_blocks",
    "quantise_rows",
    "rms_norm_rows",
    "warm",
    "write_blocks",
    "write_rows",
]

_HAVE = ("cpu", "and for cuda octavo_kernels.quant_matmul.gpu.quant_matmul")
_HAVE_ROWS = ("cpu", "and for cuda octavo_kernels.embedding.gpu.embedding")
# Multiply-adds below which waking another thread costs more than it gains.
_ALONE = 200_000
# Elements of x that every part quantises for itself rather than waiting for a launch that does.
_QUANTISE_EACH = 8192
# Two for each thread, so that a core that lags behind leaves its second to the others. But one
# for each where every part quantises.
_PARTS_PER_THREAD = 2


def matmul_blocks(
    x: Tensor | BlockRows,
    weight: BlockWeight,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    path: CpuPath | None = None,
) -> Tensor:
    """x [T, K] float32 @ W[N, K]^T (+ bias [N]) (+ residual [T, N]) -> [T, N] float32.

    x may come quantised: the bits are the same. A row of x with a NaN or an infinity gives NaN.
    `out` may be neither x nor residual; `path` is the fastest this machine has. Raises ValueError
    for another device, dtype or shape, or for tensors that are not contiguous.
    """
    num_rows, n = _num_rows(x, weight), weight.n
    if out is None:
        out = memory.empty((num_rows, n))
    elif not _is_plain(out, 2) or out.shape != (num_rows, n):
        raise _refusal("out", out, (num_rows, n))
    bias_at = residual_at = 0
    if bias is not None:
        if not _is_plain(bias, 1) or bias.shape[0] != n:
            raise _refusal("bias", bias, (n,))
        bias_at = bias.data_ptr()
    out_at = out.data_ptr()
    if residual is not None:
        if not _is_plain(residual, 2) or residual.shape != (num_rows, n):
            raise _refusal("residual", residual, (num_rows, n))
        residual_at = residual.data_ptr()
        if residual_at == out_at and num_rows:
            raise ValueError("matmul_blocks cannot add a residual that is also its out")
    if num_rows:
        _launch(x, weight, n, path, 1, out_at, bias_at, residual_at, 0, None)
    return out


def gated_blocks(
    x: Tensor | BlockRows,
    weight: BlockWeight,
    *,
    is_gelu: bool = False,
    out: Tensor | None = None,
    path: CpuPath | None = None,
) -> Tensor:
    """silu(y[:, :F]) * y[:, F:] with y = x [T, K] @ W[2F, K]^T, to the bit -> [T, F] float32.

    With is_gelu the tanh form of gelu in silu's place.
    Raises ValueError as `matmul_blocks` does, and for a weight of an odd number of rows.
    """
    width = _gate_width(weight)
    num_rows = _num_rows(x, weight)
    if out is None:
        out = memory.empty((num_rows, width))
    elif not _is_plain(out, 2) or out.shape != (num_rows, width):
        raise _refusal("out", out, (num_rows, width))
    if width % LANES:  # a panel holds both gate and up rows
        gate = gelu_tanh_mul if is_gelu else silu_mul
        return gate(matmul_blocks(x, weight, path=path), out=out)
    if num_rows:
        gate_id = GELU if is_gelu else SILU
        _launch(x, weight, width, path, 1, out.data_ptr(), 0, 0, gate_id, None)
    return out


def gated_rows(
    x: Tensor | BlockRows,
    weight: BlockWeight,
    *,
    kind: Kind,
    is_gelu: bool = False,
    path: CpuPath | None = None,
) -> BlockRows:
    """`quantise_rows` of `gated_blocks`, to the bit; in one launch where F is whole blocks.

    Raises ValueError as `gated_blocks` does.
    """
    width = _gate_width(weight)
    if width % FORMATS[kind].block:
        return quantise_rows(gated_blocks(x, weight, is_gelu=is_gelu, path=path), kind=kind)
    rows = BlockRows.empty(_num_rows(x, weight), width, kind=kind)
    if rows.num_rows:
        gate_id = GELU if is_gelu else SILU
        at, panels = rows.data.data_ptr(), rows.block // LANES
        _launch(x, weight, width, path, panels, at, 0, 0, gate_id, rows)
    return rows


def _gate_width(weight: BlockWeight) -> int:
    if weight.n % 2:
        raise ValueError(
            f"gated_blocks needs gate and up rows, as many of each, got {weight.n} rows"
        )
    return weight.n // 2


def _num_rows(x: Tensor | BlockRows, weight: BlockWeight) -> int:
    """Of x, which is made sure to fit the weight."""
    if isinstance(x, BlockRows):
        form = FORMATS[weight.kind]
        if (x.k, x.block, x.zero) != (weight.k, form.block, form.zero):
            raise ValueError(
                f"matmul_blocks needs rows of {weight.k} quantised for {weight.kind}, got rows of"
                f" {x.k} for weights in blocks of {x.block} with the zero {x.zero}"
            )
        return x.num_rows
    if not _is_plain(x, 2) or x.shape[1] != weight.k:
        raise _refusal("x", x, ("T", weight.k))
    return x.shape[0]


def _launch(
    x: Tensor | BlockRows,
    weight: BlockWeight,
    n: int,
    path: CpuPath | None,
    panels_at_once: int,
    out_at: int,
    bias_at: int,
    residual_at: int,
    gate: int,
    next_rows: BlockRows | None,
) -> None:
    """Launches the matmul for n outputs, and the quantisation before it where x asks for one.

    next_rows: what out_at are, if they are records.
    """
    path = _supported(path)
    most = -(-n // (LANES * (panels_at_once if gate else 2)))
    parts, x_at = _even_parts(most), 0
    if isinstance(x, Tensor):
        num_rows, k = x.shape
        is_alone = num_rows * weight.n * k < _ALONE
        if is_alone or num_rows * k <= _QUANTISE_EACH:
            parts, x_at = 1 if is_alone else min(most, num_threads()), x.data_ptr()
            size = num_rows * weight.data.shape[1] * record_bytes(FORMATS[weight.kind].block)
            records = memory.empty((parts * size,), torch.uint8)
        else:
            rows = quantise_rows(x, kind=weight.kind)
            records = rows.data
    else:
        num_rows, records = x.num_rows, x.data
        if num_rows * weight.n * x.k < _ALONE:
            parts = 1
    matmul_kernel(weight.kind, path)(
        parts,
        x_at,
        records.data_ptr(),
        weight.data.data_ptr(),
        out_at,
        bias_at,
        residual_at,
        num_rows,
        n,
        weight.k,
        gate,
        0 if next_rows is None else next_rows.block,
        0 if next_rows is None else next_rows.zero,
    )


def _even_parts(units: int) -> int:
    """Of so many units of work: some for each thread, and alike where that can be."""
    threads = num_threads()
    for parts in range(_PARTS_PER_THREAD * threads, threads - 1, -threads):
        if units % parts == 0:
            return parts
    return min(units, _PARTS_PER_THREAD * threads)


def gather_rows(weight: BlockWeight, ids: Tensor) -> Tensor:
    """Rows ids [T] (int32 or int64) as `dequantise` has them: [T, K] float32.

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
        status = memory.zeros((1,), torch.int64)
        gather_kernel(weight.kind)(
            1 if num_rows < 16 else min(num_rows // 8, _PARTS_PER_THREAD * num_threads()),
            weight.data.data_ptr(),
            ids.data_ptr(),
            ids.stride(0) * ids.itemsize,
            ids.itemsize,
            out.data_ptr(),
            num_rows,
            weight.n,
            weight.k,
            status.data_ptr(),
        )
        if status.tolist()[0]:
            raise ValueError(
                f"gather_rows needs ids in [0, {weight.n}), got {int(ids.min())}..{int(ids.max())}"
            )
    return out


def _supported(path: CpuPath | None) -> CpuPath:
    if path is None:
        return host_path()
    if path not in supported_paths():
        have = ", ".join(supported_paths())
        raise ValueError(f"this machine's paths are {have}, got {path!r}")
    return path


def _is_plain(tensor: Tensor, dims: int) -> bool:
    return (
        tensor.dtype == torch.float32
        and tensor.is_cpu
        and tensor.is_contiguous()
        and tensor.dim() == dims
    )


def _refusal(name: str, tensor: Tensor, shape: Sequence[int | str]) -> ValueError:
    if not tensor.is_cpu:
        return no_kernel("matmul_blocks", tensor, have=_HAVE)
    return ValueError(
        f"matmul_blocks needs {name} contiguous float32 {list(shape)}, got"
        f" {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
    )


def kernels(kind: Kind) -> tuple[Kernel, ...]:
    """What a server with weights of a kind calls on this machine, as it loads and later."""
    loading = map(requantise_kernel, get_args(Source)) if kind == "q8_64" else ()
    return (*_serving(kind), *loading)


def _serving(kind: Kind) -> tuple[Kernel, ...]:
    return (
        quantise_kernel(FORMATS[kind].block),
        normalise_kernel(FORMATS[kind].block),
        matmul_kernel(kind, host_path()),
        gather_kernel(kind),
    )


def warm(kind: Kind) -> None:
    """Compiles, or loads from the cache, the kernels for weights of a kind that are loaded."""
    for kernel in _serving(kind):
        assert kernel.address
