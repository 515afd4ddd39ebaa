"""The CPU backend: cache sizes, block copies, refusals. Models test its arithmetic."""

from __future__ import annotations

import pytest
import torch

from octavo.attention import (
    AttentionBackend,
    AttentionLayer,
    AttentionMetadata,
    CPUAttention,
    KVCacheSpec,
)


def spec(**changes: object) -> KVCacheSpec:
    fields: dict[str, object] = {
        "num_layers": 3,
        "num_kv_heads": 2,
        "head_dim": 16,
        "block_size": 32,
        "dtype": torch.bfloat16,
    }
    return KVCacheSpec(**{**fields, **changes})  # type: ignore[arg-type]


def test_block_bytes_are_what_is_allocated() -> None:
    backend: AttentionBackend = CPUAttention()
    caches = backend.allocate(spec(), num_blocks=5)
    assert len(caches) == 3
    total = sum(t.numel() * t.itemsize for kv in caches for t in kv)
    assert total == 5 * backend.block_bytes(spec())
    assert backend.block_bytes(spec()) == 2 * 3 * 2 * 16 * 32 * 2


def test_copies_blocks_in_every_layer() -> None:
    backend = CPUAttention()
    caches = backend.allocate(spec(dtype=torch.float32), num_blocks=6)
    for kv in caches:
        for tensor in kv:
            tensor.normal_()
    before = [[tensor.clone() for tensor in kv] for kv in caches]
    backend.copy_blocks(caches, src=torch.tensor([0, 4]), dst=torch.tensor([5, 1]))
    for kv, old in zip(caches, before, strict=True):
        for tensor, was in zip(kv, old, strict=True):
            assert torch.equal(tensor[[5, 1]], was[[0, 4]])
            assert torch.equal(tensor[[0, 2, 3, 4]], was[[0, 2, 3, 4]])


@pytest.mark.parametrize(
    ("changes", "message"), [({"block_size": 24}, "block_size"), ({"head_dim": 24}, "head_dim")]
)
def test_refuses_what_kernels_cannot_read(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CPUAttention().allocate(spec(**changes), num_blocks=1)


def forward(attn: AttentionMetadata, *, window: int = 0) -> None:
    backend = CPUAttention()
    sizes = spec(num_layers=2, dtype=torch.float32)
    table = torch.ones(8, 8)
    layer = AttentionLayer(
        num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25, sliding_window=window, cos=table,
        sin=table, eps=1e-6,
    )  # fmt: skip
    for kv in backend.allocate(sizes, num_blocks=2):
        backend.forward(torch.zeros(3, 8 * 16), layer=layer, attn=attn, kv=kv)


def metadata(**changes: torch.Tensor) -> AttentionMetadata:
    tensors = {
        "positions": torch.arange(3, dtype=torch.int32),
        "slots": torch.arange(3, dtype=torch.int32),
        "block_tables": torch.zeros(1, 1, dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 3], dtype=torch.int32),
        "seq_lens": torch.tensor([3], dtype=torch.int32),
    }
    return AttentionMetadata(**{**tensors, **changes})


def test_layers_share_one_plan_for_each_window() -> None:
    attn = metadata()
    forward(attn)
    [plan] = attn.plans.values()
    forward(attn)
    assert list(attn.plans.values()) == [plan]
    forward(attn, window=2)
    assert len(attn.plans) == 2
    attn.check()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("positions", [0, 1, 8], "positions must be 0 to 7, got 0 to 8"),
        ("slots", [0, 64, 1], "slots must be below 64, got 64"),
        ("block_tables", [[2]], "names block 2"),
        ("seq_lens", [33], "at most 32, got 33"),
    ],
)
def test_a_step_is_checked_once(name: str, value: list[object], message: str) -> None:
    attn = metadata(**{name: torch.tensor(value, dtype=torch.int32)})
    forward(attn)
    with pytest.raises(ValueError, match=message):
        attn.check()
