"""What to measure of paged attention: how decode is launched over long caches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from octavo_kernels.paged_attention.decode_hopper import (
    HEAD_DIMS,
    TUNED_AS,
    attend_decode_hopper,
    decode_hopper_candidates,
)
from octavo_kernels.paged_attention.gpu import attend_decode, kv_cache_shape
from octavo_kernels.paged_attention.gpu_plan import decode_candidates, decode_key, make_plan
from octavo_kernels.paged_attention.tunable_prefill import TUNABLES as PREFILL_TUNABLES
from octavo_kernels.tuning import Choice, Tunable

_NUM_HEADS, _NUM_KV_HEADS = 32, 8
_REQUESTS, _LENGTH, _BLOCK = 64, 4096, 16
_CACHES = {2: torch.bfloat16, 1: torch.float8_e4m3fn}
_SIZES = {decode_key(h, size): (h, size) for size in _CACHES for h in (128, 64, 256, 96)}


def _make_decode(
    key: str, choice: Choice, *, attend: Callable[..., None] = attend_decode
) -> Callable[[], Any]:
    """One token a request: the time is that of reading all keys and values once."""
    head_dim, itemsize = _SIZES[key]
    num_blocks = _REQUESTS * _LENGTH // _BLOCK
    shape = kv_cache_shape(
        num_blocks, block_size=_BLOCK, num_kv_heads=_NUM_KV_HEADS, head_dim=head_dim
    )
    k_cache, v_cache = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(_CACHES[itemsize])
        for _ in range(2)
    )
    tables = torch.randperm(num_blocks, device="cuda").to(torch.int32).view(_REQUESTS, -1)
    q = torch.randn(_REQUESTS, _NUM_HEADS, head_dim, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(q)
    plan = make_plan(
        torch.arange(_REQUESTS + 1, device="cuda", dtype=torch.int32),
        torch.full((_REQUESTS,), _LENGTH, device="cuda", dtype=torch.int32),
        num_tokens=_REQUESTS,
        max_query_len=1,
        max_seq_len=_LENGTH,
        num_heads=_NUM_HEADS,
        num_kv_heads=_NUM_KV_HEADS,
        head_dim=head_dim,
        cache_dtype=_CACHES[itemsize],
        per_sm=choice.get("per_sm"),
    )
    scale = head_dim**-0.5

    def run() -> torch.Tensor:
        attend(q, k_cache, v_cache, out, plan=plan, block_tables=tables, scale=scale, choice=choice)
        return out

    return run


TUNABLES = (
    Tunable(
        op="paged_attention_decode",
        keys=tuple(_SIZES),
        candidates=lambda key: decode_candidates(*_SIZES[key]),
        make=_make_decode,
        rotate=1,  # a set is far larger than L2
    ),
    Tunable(
        op=TUNED_AS,
        keys=tuple(key for key, (head_dim, _) in _SIZES.items() if head_dim in HEAD_DIMS),
        candidates=lambda key: decode_hopper_candidates(*_SIZES[key]),
        make=functools.partial(_make_decode, attend=attend_decode_hopper),
        rotate=1,
    ),
    *PREFILL_TUNABLES,
)
