"""The GPU backend beside the CPU's, on the GPU or in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.attention import (
    AttentionBackend,
    AttentionLayer,
    AttentionMetadata,
    CPUAttention,
    KVCacheSpec,
    KVLayer,
    SharedPrefixes,
)
from octavo.attention.triton import TritonAttention
from octavo_kernels.paged_attention import numerics
from octavo_kernels.paged_attention.shared_prefix import PrefixGroups, attend_shared_prefix
from octavo_kernels.testing import gpu_device, same_bits

DEVICE = gpu_device()
N, K, H, BLOCK = 4, 2, 32, 16


def spec(**changes: object) -> KVCacheSpec:
    fields: dict[str, object] = {
        "num_layers": 2,
        "num_kv_heads": K,
        "head_dim": H,
        "block_size": BLOCK,
        "dtype": torch.float32,
    }
    return KVCacheSpec(**{**fields, **changes})  # type: ignore[arg-type]


def layer(*, sliding_window: int, device: str) -> AttentionLayer:
    generator = torch.Generator().manual_seed(1)
    angle = torch.rand(64, H // 2, generator=generator) * 6
    return AttentionLayer(
        num_heads=N,
        num_kv_heads=K,
        head_dim=H,
        scale=H**-0.5,
        sliding_window=sliding_window,
        cos=angle.cos().to(device),
        sin=angle.sin().to(device),
        eps=1e-6,
        q_norm=torch.rand(H, generator=generator).to(device),
        k_norm=torch.rand(H, generator=generator).to(device),
    )


def batch(query_lens: list[int], seq_lens: list[int], *, device: str) -> AttentionMetadata:
    """Requests of up to 2 blocks: request r holds blocks 2r + 1 and 2r."""
    positions, slots = [], []
    for r, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        for position in range(seq_len - query_len, seq_len):
            positions.append(position)
            slots.append((2 * r + 1 - position // BLOCK) * BLOCK + position % BLOCK)
    tables = [[2 * r + 1, 2 * r] for r in range(len(seq_lens))]
    starts = [sum(query_lens[:r]) for r in range(len(query_lens) + 1)]

    def ints(values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return AttentionMetadata(
        positions=ints(positions),
        slots=ints(slots),
        block_tables=ints(tables),
        query_start_loc=ints(starts),
        seq_lens=ints(seq_lens),
    )


def run(backend: AttentionBackend, *, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Two layers, one with a window, over a step of prompts and a step of one token each."""
    caches = backend.allocate(spec(dtype=dtype), num_blocks=6)
    layers = [layer(sliding_window=window, device=device) for window in (0, 7)]
    outs = []
    for step, (query_lens, seq_lens) in enumerate(
        [([5, 19, 1], [5, 19, 1]), ([1] * 3, [6, 20, 2])]
    ):
        attn = batch(query_lens, seq_lens, device=device)
        for index, (one, kv) in enumerate(zip(layers, caches, strict=True)):
            generator = torch.Generator().manual_seed(10 * step + index)
            qkv = torch.randn(sum(query_lens), (N + 2 * K) * H, generator=generator)
            outs.append(backend.forward(qkv.to(device, dtype), layer=one, attn=attn, kv=kv))
    return outs


def test_attends_as_the_cpu_does() -> None:
    want = run(CPUAttention(), device="cpu", dtype=torch.float32)
    got = run(TritonAttention(DEVICE), device=DEVICE, dtype=torch.float32)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, atol=2e-5, rtol=2e-5)


def test_a_pass_shares_its_plan_and_the_next_makes_its_own() -> None:
    backend = TritonAttention(DEVICE)
    caches = backend.allocate(spec(), num_blocks=2)
    one = layer(sliding_window=0, device=DEVICE)
    attn = batch([3], [3], device=DEVICE)
    other = replace(attn)
    plans = [
        backend._plan(one, metadata, kv)
        for metadata, kv in [
            (attn, caches[0]),
            (attn, caches[1]),
            (attn, caches[0]),
            (other, caches[1]),
        ]
    ]
    assert plans[0] is plans[1]
    assert len({id(plan) for plan in plans}) == 3


def test_block_bytes_copies_and_refusals() -> None:
    backend: AttentionBackend = TritonAttention(DEVICE)
    caches = backend.allocate(spec(dtype=torch.bfloat16), num_blocks=5)
    total = sum(t.numel() * t.itemsize for kv in caches for t in kv)
    assert total == 5 * backend.block_bytes(spec(dtype=torch.bfloat16))
    caches = [KVLayer(*(torch.randn_like(t) for t in kv)) for kv in caches]
    before = [t.clone() for kv in caches for t in kv]
    source, target = torch.tensor([0, 4], device=DEVICE), torch.tensor([3, 1], device=DEVICE)
    backend.copy_blocks(caches, src=source, dst=target)
    for now, was in zip([t for kv in caches for t in kv], before, strict=True):
        assert same_bits(now, was[[0, 4, 2, 0, 4]])
    for changes, message in (({"block_size": 24}, "block_size"), ({"head_dim": 24}, "head_dim")):
        with pytest.raises(ValueError, match=message):
            backend.allocate(spec(**changes), num_blocks=1)


def test_a_common_prefix_read_once_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests 0, 2 and 3 hold a partition of 8 blocks in common; not every place is used."""
    monkeypatch.setattr(numerics, "PARTITION", 8 * BLOCK)
    calls: list[PrefixGroups] = []

    def counted(*args: Tensor, groups: PrefixGroups, **options: Any) -> None:
        calls.append(groups)
        attend_shared_prefix(*args, groups=groups, **options)

    monkeypatch.setattr("octavo.attention.triton.attend_shared_prefix", counted)

    def ints(values: object) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    common, seq_lens = list(range(8)), [130, 150, 133, 144]
    tables = [[*common, 8], [*range(20, 30)], [*common, 9], [*common, 10]]
    attn = AttentionMetadata(
        positions=ints([3, 60, 40, 63]),
        slots=ints(
            [
                t[(n - 1) // BLOCK] * BLOCK + (n - 1) % BLOCK
                for t, n in zip(tables, seq_lens, strict=True)
            ]
        ),
        block_tables=ints([[*table, 0, 0][:10] for table in tables]),
        query_start_loc=ints([0, 1, 2, 3, 4]),
        seq_lens=ints(seq_lens),
        max_query_len=1,
    )
    prefixes = SharedPrefixes(
        request_partitions=ints([1, 0, 1, 1]),
        group_start_loc=ints([0, 3, 3]),
        members=ints([0, 2, 3, 0]),
        group_partitions=ints([1, 0]),
        max_partitions=2,
    )
    generator = torch.Generator().manual_seed(2)
    shape = (30, K, BLOCK, H)
    start = [torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16) for _ in "kv"]
    qkv = torch.randn(4, (N + 2 * K) * H, generator=generator).to(DEVICE, torch.bfloat16)
    for window in (0, 40):
        one = layer(sliding_window=window, device=DEVICE)
        outs = []
        for batch_ in (attn, replace(attn, prefixes=prefixes)):
            backend, kv = TritonAttention(DEVICE), KVLayer(*(t.clone() for t in start))
            outs.append(backend.forward(qkv.clone(), layer=one, attn=batch_, kv=kv))
        assert same_bits(*outs)
    assert len(calls) == 2
