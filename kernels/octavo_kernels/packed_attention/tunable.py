"""What to measure of packed attention: launch choices that change no bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from octavo_kernels.packed_attention import gpu
from octavo_kernels.paged_attention import prefill
from octavo_kernels.tuning import Choice, Tunable

_KINDS = {
    f"h{head_dim}-{name}": (head_dim, dtype)
    for name, dtype in (("bf16-bf16", torch.bfloat16), ("f16-f16", torch.float16))
    for head_dim in (64, 128)
}


def _make(key: str, choice: Choice) -> Callable[[], Any]:
    head_dim, dtype = _KINDS[key]
    q, k, v = (torch.randn(16384, 16, head_dim, device="cuda", dtype=dtype) for _ in "qkv")
    starts = torch.arange(0, 16385, 512, device="cuda", dtype=torch.int32)
    return lambda: gpu.packed_attention(
        q,
        k,
        v,
        query_start_loc=starts,
        key_start_loc=starts,
        max_query_len=512,
        scale=head_dim**-0.5,
        choice=choice,
    )


TUNABLES = (
    Tunable(
        op="packed_attention",
        keys=tuple(_KINDS),
        candidates=lambda key: prefill.candidates(*_KINDS[key]),
        make=_make,
    ),
)
