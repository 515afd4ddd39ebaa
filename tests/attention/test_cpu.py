"""The CPU backend's cache: sizes, block copies, refusals. Its arithmetic is tested by models."""

from __future__ import annotations

import pytest
import torch

from octavo.attention import AttentionBackend, CPUAttention, KVCacheSpec


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
