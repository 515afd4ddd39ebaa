"""Attention with a prefix computed for several requests at once: the bits of attention without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from octavo_kernels.paged_attention import numerics
from octavo_kernels.paged_attention.gpu import make_plan, paged_attention
from octavo_kernels.paged_attention.shared_prefix import attend_shared_prefix, group_prefixes
from octavo_kernels.testing import gpu_device, same_bits

DEVICE = gpu_device()
BLOCK = 16


@pytest.fixture(autouse=True)
def short_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "PARTITION", 128)


def _ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class Batch:
    """Requests (query tokens, keys); those of a group hold its first blocks in common."""

    def __init__(
        self,
        requests: list[tuple[int, int]],
        groups: list[tuple[list[int], int]],  # (members, tokens of the common prefix)
        *,
        N: int = 6,
        K: int = 2,
        H: int = 64,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        self.requests, self.groups = requests, groups
        self.per_request = max(-(-keys // BLOCK) for _, keys in requests)
        num_blocks = len(requests) * self.per_request + 1
        order = torch.randperm(num_blocks, generator=generator)[: num_blocks - 1]
        tables = order.reshape(len(requests), self.per_request).to(torch.int32)
        for members, prefix in groups:
            tables[members, : prefix // BLOCK] = tables[members[0], : prefix // BLOCK].clone()
        caches = [torch.randn(num_blocks, K, BLOCK, H, generator=generator) for _ in "kv"]
        written = torch.zeros(num_blocks, BLOCK, dtype=torch.bool)
        for row, (_, keys) in enumerate(requests):
            for slot in range(keys):
                written[tables[row, slot // BLOCK], slot % BLOCK] = True
        for cache in caches:
            cache.transpose(1, 2)[~written] = float("nan")
        self.k_cache, self.v_cache = (cache.to(DEVICE, dtype) for cache in caches)
        self.tables = tables.to(DEVICE)
        self.starts = torch.tensor([0] + [q for q, _ in requests]).cumsum(0).to(DEVICE, torch.int32)
        self.lens = _ints(*[keys for _, keys in requests])
        num_tokens = sum(q for q, _ in requests)
        self.q = torch.randn(num_tokens, N, H, generator=generator).to(DEVICE, dtype)

    def plan(self, *, shared: bool, window: int = 0, **bounds: int) -> Any:
        counts = [0] * len(self.requests)
        for members, prefix in self.groups:
            for member in members:
                counts[member] = prefix // 128
        return make_plan(
            self.starts,
            self.lens,
            num_tokens=self.q.shape[0],
            max_query_len=max(q for q, _ in self.requests),
            max_seq_len=self.per_request * BLOCK,
            num_heads=self.q.shape[1],
            num_kv_heads=self.k_cache.shape[1],
            head_dim=self.q.shape[2],
            cache_dtype=self.k_cache.dtype,
            sliding_window=window,
            shared_partitions=_ints(*counts) if shared else None,
            **bounds,
        )

    def attend(self, *, shared: bool, sliding_window: int = 0, **options: Any) -> Tensor:
        plan = self.plan(shared=shared, window=sliding_window)
        plan.partials.fill_(float("nan"))
        common: dict[str, Any] = {"block_tables": self.tables, "scale": 0.125}
        caches = (self.q, self.k_cache, self.v_cache)
        if shared:
            sizes = [len(members) for members, _ in self.groups]
            groups = group_prefixes(
                plan,
                group_start_loc=torch.tensor([0, *sizes]).cumsum(0).to(DEVICE, torch.int32),
                members=_ints(*[m for members, _ in self.groups for m in members]),
                group_partitions=_ints(*[prefix // 128 for _, prefix in self.groups]),
                max_partitions=max(prefix // 128 for _, prefix in self.groups) + 1,
            )
            shaping = {k: v for k, v in options.items() if k not in ("sinks", "v_scale")}
            attend_shared_prefix(*caches, plan=plan, groups=groups, **common, **shaping)
        return paged_attention(
            *caches,
            query_start_loc=self.starts,
            seq_lens=self.lens,
            plan=plan,
            sliding_window=sliding_window,
            **common,
            **options,
        )


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 150},
    "shaped": {
        "soft_cap": 2.0,
        "alibi_slopes": torch.linspace(0.1, 0.6, 6),
        "sinks": torch.linspace(-1, 1, 6),
    },
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_a_shared_prefix_changes_no_bit(name: str) -> None:
    batch = Batch(
        # a prompt too long for the decode kernel stands among the decoded requests
        [(1, 300), (2, 277), (30, 260), (1, 5), (1, 260), (0, 257), (1, 200), (1, 140)],
        [([0, 1, 4, 5], 256), ([6, 7], 135)],
    )
    options = {
        key: value.to(DEVICE) if isinstance(value, Tensor) else value
        for key, value in OPTIONS[name].items()
    }
    want = batch.attend(shared=False, **options)
    assert same_bits(batch.attend(shared=True, **options), want)
    assert not want.isnan().any()


def test_many_members_fill_several_tiles() -> None:
    requests = [(1, 129 + i) for i in range(35)]
    batch = Batch(requests, [(list(range(2, 35)), 128)], N=4, K=1, H=32, dtype=torch.float16)
    own = batch.plan(shared=True).requests[:, 5]
    assert own.tolist() == [0, 0, *[1] * 33]
    assert same_bits(batch.attend(shared=True), batch.attend(shared=False))


def test_members_that_are_prefilled_need_nothing() -> None:
    batch = Batch([(30, 300), (1, 290)], [([0, 1], 256)])
    assert same_bits(batch.attend(shared=True), batch.attend(shared=False))


def test_groups_of_bad_kinds_are_refused() -> None:
    plan = Batch([(1, 300), (1, 290)], []).plan(shared=False)
    good = {"group_start_loc": _ints(0, 2), "members": _ints(0, 1), "group_partitions": _ints(2)}
    with pytest.raises(ValueError, match="members must be contiguous int32"):
        group_prefixes(plan, max_partitions=2, **{**good, "members": _ints(0, 1).long()})
    with pytest.raises(ValueError, match="1 groups need 2 starts"):
        group_prefixes(plan, max_partitions=2, **{**good, "group_start_loc": _ints(0, 1, 2)})
