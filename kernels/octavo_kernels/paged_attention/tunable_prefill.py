"""What to measure of prefill and of shared prefixes: launch choices that change no bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from octavo_kernels.paged_attention import prefill, shared_prefix
from octavo_kernels.paged_attention.gpu_plan import AttentionPlan, make_plan
from octavo_kernels.tuning import Choice, Tunable

_NUM_HEADS, _NUM_KV_HEADS, _BLOCK = 32, 8, 16
_KINDS = {
    f"h{head_dim}-{name}": (head_dim, dtype, cache_dtype)
    for name, dtype, cache_dtype in (
        ("bf16-bf16", torch.bfloat16, torch.bfloat16),
        ("f16-f16", torch.float16, torch.float16),
        ("bf16-e4m3", torch.bfloat16, torch.float8_e4m3fn),
    )
    for head_dim in (128, 64, 256)
}


class _Step:
    """Requests of (query tokens, keys) over a cache in random order, and their plan."""

    def __init__(
        self, key: str, lengths: Sequence[tuple[int, int]], *, shared: int | None = None
    ) -> None:
        head_dim, dtype, cache_dtype = _KINDS[key]
        num_requests, keys = len(lengths), lengths[0][1]
        blocks = -(-keys // _BLOCK)
        shape = (num_requests * blocks, _NUM_KV_HEADS, _BLOCK, head_dim)
        self.caches = [torch.randn(shape, device="cuda", dtype=dtype).to(cache_dtype) for _ in "kv"]
        tables = torch.randperm(num_requests * blocks, device="cuda", dtype=torch.int32)
        self.tables = tables.view(num_requests, blocks)
        starts = [0]
        for query_len, _ in lengths:
            starts.append(starts[-1] + query_len)
        self.starts = torch.tensor(starts, device="cuda", dtype=torch.int32)
        self.lens = torch.tensor([n for _, n in lengths], device="cuda", dtype=torch.int32)
        self.q = torch.randn(starts[-1], _NUM_HEADS, head_dim, device="cuda", dtype=dtype)
        self.scale = head_dim**-0.5
        self.plan: AttentionPlan = make_plan(
            self.starts,
            self.lens,
            num_tokens=starts[-1],
            max_query_len=max(query_len for query_len, _ in lengths),
            max_seq_len=keys,
            num_heads=_NUM_HEADS,
            num_kv_heads=_NUM_KV_HEADS,
            head_dim=head_dim,
            cache_dtype=cache_dtype,
            shared_partitions=None if shared is None else torch.full_like(self.lens, shared),
        )


def _make_prefill(key: str, choice: Choice) -> Callable[[], Any]:
    step = _Step(key, [(4096, 4096)] * 4)
    out = torch.empty_like(step.q)

    def run() -> Tensor:
        prefill.attend_prefill(
            step.q,
            step.caches[0],
            step.caches[1],
            out,
            plan=step.plan,
            block_tables=step.tables,
            query_start_loc=step.starts,
            seq_lens=step.lens,
            scale=step.scale,
            choice=choice,
        )
        return out

    return run


def _make_shared(key: str, choice: Choice) -> Callable[[], Any]:
    count, partitions = 64, 4
    step = _Step(key, [(1, partitions * 1024 + 64)] * count, shared=partitions)
    groups = shared_prefix.group_prefixes(
        step.plan,
        group_start_loc=torch.tensor([0, count], device="cuda", dtype=torch.int32),
        members=torch.arange(count, device="cuda", dtype=torch.int32),
        group_partitions=torch.tensor([partitions], device="cuda", dtype=torch.int32),
        max_partitions=partitions,
    )

    def run() -> Tensor:
        shared_prefix.attend_shared_prefix(
            step.q,
            step.caches[0],
            step.caches[1],
            plan=step.plan,
            groups=groups,
            block_tables=step.tables,
            scale=step.scale,
            choice=choice,
        )
        return step.plan.partials

    step.plan.partials.zero_()
    return run


def _candidates(
    choices: Callable[[int, torch.dtype], tuple[Choice, ...]],
) -> Callable[[str], tuple[Choice, ...]]:
    return lambda key: choices(*_KINDS[key][:2])


TUNABLES = (
    Tunable(
        op="paged_prefill",
        keys=tuple(_KINDS),
        candidates=_candidates(prefill.candidates),
        make=_make_prefill,
    ),
    Tunable(
        op="shared_prefix",
        keys=tuple(_KINDS),
        candidates=_candidates(shared_prefix.candidates),
        make=_make_shared,
    ),
)
