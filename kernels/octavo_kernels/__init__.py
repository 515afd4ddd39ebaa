"""CPU kernels of Octavo, one folder per op; knows tensors, nothing of the server around them."""

from __future__ import annotations

import torch

from octavo_kernels.parallel import num_threads, set_num_threads

__all__ = ["num_threads", "set_num_threads", "warm"]


def warm(*, weight_dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """Compiles, or loads from disk, every CPU kernel that a server with these dtypes calls.

    Seconds on a machine's first start, a fraction of one later. No later call compiles anything.
    """
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

    matmul.warm(weight_dtype)
    paged_attention.warm(cache_dtype=cache_dtype)
    for op in (block_copy, rms_norm, rotary_kv_write, sampling, silu_mul):
        op.warm()
