"""CPU kernels of Octavo, one folder per op; knows tensors, nothing of the server around them."""

from __future__ import annotations

import torch

from octavo_kernels.parallel import Kernel, num_threads, set_num_threads

__all__ = ["kernels", "num_threads", "set_num_threads", "warm"]


def kernels(*, weight_dtype: torch.dtype, cache_dtype: torch.dtype) -> list[Kernel]:
    """Every CPU kernel that a server with these dtypes calls; compiles none."""
    # Here, so that whoever needs one op (or only a spec) does not import all of them.
    from octavo_kernels import (
        block_copy,
        matmul,
        paged_attention,
        rms_norm,
        rotary_kv_write,
        sampling,
        silu_mul,
    )

    found = [*matmul.kernels(weight_dtype), *paged_attention.kernels(cache_dtype=cache_dtype)]
    for op in (block_copy, rms_norm, rotary_kv_write, sampling, silu_mul):
        found += op.kernels()
    return found


def warm(*, weight_dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """Compiles, or loads from disk, every CPU kernel that a server with these dtypes calls.

    Seconds on a machine's first start, a fraction of one later. No later call compiles anything.
    """
    for kernel in kernels(weight_dtype=weight_dtype, cache_dtype=cache_dtype):
        assert kernel.address
