"""Kernels of Octavo, one folder per op; knows tensors, nothing of the server around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import torch

from octavo_kernels.parallel import Kernel, num_threads, set_num_threads
from octavo_kernels.shape import ModelShape

if TYPE_CHECKING:
    from octavo_kernels.launch import Launch
    from octavo_kernels.quant_matmul.blocks import Kind

__all__ = ["ModelShape", "kernels", "launches", "num_threads", "set_num_threads", "warm"]


def kernels(
    *, weight_dtype: torch.dtype, cache_dtype: torch.dtype, block_kinds: Sequence[Kind] = ()
) -> list[Kernel]:
    """Every CPU kernel that a server with these dtypes calls; compiles none.

    block_kinds: those that its matrices are made of, in place of weight_dtype.
    """
    # Here, so that whoever needs one op (or only a spec) does not import all of them.
    from octavo_kernels import (
        block_copy,
        block_move,
        likeliest,
        matmul,
        paged_attention,
        rms_norm,
        rotary_kv_write,
        row_copy,
        sampling,
        silu_mul,
        step_inputs,
    )
    from octavo_kernels.drafting import cpu as drafting_cpu
    from octavo_kernels.quant_matmul import blocks

    of_blocks = [kernel for kind in block_kinds for kernel in blocks.kernels(kind)]
    multiplying = list(dict.fromkeys(of_blocks)) if block_kinds else matmul.kernels(weight_dtype)
    found = [*multiplying, *paged_attention.kernels(cache_dtype=cache_dtype)]
    for op in (
        *(block_copy, block_move, likeliest, rms_norm, rotary_kv_write, row_copy),
        *(sampling, silu_mul, step_inputs),
    ):
        found += op.kernels()
    found.append(drafting_cpu.follow)
    return found


def launches(shape: ModelShape) -> list[Launch]:
    """Every GPU kernel that a server of this shape starts, one launch for each; compiles none."""
    # Here, since an installation for CPUs alone has no triton.
    from octavo_kernels import warming

    return warming.launches(shape)


@overload
def warm(shape: ModelShape, *, processes: int | None = None) -> list[Launch]: ...


@overload
def warm(*, weight_dtype: torch.dtype, cache_dtype: torch.dtype) -> None: ...


def warm(
    shape: ModelShape | None = None,
    *,
    weight_dtype: torch.dtype | None = None,
    cache_dtype: torch.dtype | None = None,
    processes: int | None = None,
) -> list[Launch] | None:
    """Compiles, or loads from disk, every kernel that a server calls; no later call compiles any.

    With a shape: those of its GPU, in several processes (at most one per core), and returns them.
    With dtypes alone: those of its CPU. Seconds on a machine's first start, a fraction of one
    later. Raises RuntimeError where a kernel does not compile.
    """
    if shape is not None:
        from octavo_kernels import warming

        return warming.warm(shape, processes=processes)
    assert weight_dtype is not None and cache_dtype is not None
    for kernel in kernels(weight_dtype=weight_dtype, cache_dtype=cache_dtype):
        assert kernel.address
    return None
